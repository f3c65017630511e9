"""What the benchmarks share: a disk that counts what is written to it, interleaved runs, medians, tables.

Times on a shared machine mean little, so every number that counts is a ratio of two cases that took turns. Which cases
there are is in imports.py, append.py and reads.py.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peewee

import kagedb

SECTOR_BYTES = 512
"""The unit of /sys/block/*/stat, whatever the device (kernel.org, Documentation/block/stat)."""

SECTORS_WRITTEN = 6
"""The place of "write sectors" in /sys/block/*/stat."""

DISK_BYTES = 1 << 30
"""The file system of a run; sparse, so it takes what is written to it."""

MEASURES = {"cpu": "CPU us", "wall": "wall us", "bytes": "bytes"}
"""What is measured of a case, each for one operation: CPU with the kernel's part, wall time, bytes written."""


@dataclass(frozen=True)
class Case:
    """One way to do the work: `run(n)` does it n times. `before` and `after` are not measured."""

    name: str
    run: Callable[[int], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Goal:
    """A ratio that was promised: `case` to `baseline` in `measure`, at most `limit`."""

    case: str
    baseline: str
    measure: str
    limit: float


@dataclass
class Disk:
    """A directory to measure in. `how` says, for the reader, what `written` counts."""

    directory: Path
    how: str
    _device: str = ""

    def written(self) -> int:
        """Bytes written so far; everything that waited in memory is first sent on its way."""
        subprocess.run(["sync", "-f", self.directory], check=True)
        if self._device:
            fields = Path(f"/sys/block/{self._device}/stat").read_text().split()
            return int(fields[SECTORS_WRITTEN]) * SECTOR_BYTES
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("write_bytes:"):
                return int(line.split()[1])
        raise RuntimeError("/proc/self/io has no write_bytes")


@contextmanager
def open_disk(quick: bool) -> Iterator[Disk]:
    """A directory on an ext4 file system of its own, where that can be had; else one below the temporary directory."""
    place = Path(tempfile.mkdtemp(prefix="kaged-benchmark-"))
    mounted = ""
    try:
        if not quick and os.geteuid() == 0:
            mounted = _mount(place)
        if mounted:
            yield Disk(place / "disk", "sectors written to an ext4 file system of its own", mounted)
        else:
            yield Disk(place, "write_bytes of the process: without the file system's journal")
    finally:
        if mounted:
            subprocess.run(["umount", place / "disk"], check=True)
        shutil.rmtree(place)


def _mount(place: Path) -> str:
    """The name of the loop device, "" where this machine has none to give."""
    image, disk = place / "image", place / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    for command in (["mkfs.ext4", "-q", "-F", image], ["mount", "-o", "loop", image, disk]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            print(f"(no file system of its own: {error})", file=sys.stderr)
            return ""
        if done.returncode:
            print(f"(no file system of its own: {done.stderr.strip()})", file=sys.stderr)
            return ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, where = line.split()[:2]
        if where == str(disk):
            return os.path.basename(device)
    raise RuntimeError(f"{disk} is mounted and not in /proc/self/mounts")


@dataclass
class Results:
    """What was measured: for each case and measure, the figure of each round for one operation."""

    title: str
    cases: list[str]
    rounds: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, case: str, measure: str, value: float) -> None:
        self.rounds.setdefault((case, measure), []).append(value)

    def median(self, case: str, measure: str) -> float:
        return statistics.median(self.rounds[case, measure])

    def ratio(self, case: str, baseline: str, measure: str) -> float:
        """The median of the ratios of each round, in which the two cases ran one after the other."""
        pairs = zip(self.rounds[case, measure], self.rounds[baseline, measure], strict=True)
        return statistics.median(mine / other if other else float("nan") for mine, other in pairs)

    def print(self, baselines: Sequence[str], goals: Sequence[Goal] = ()) -> None:
        """A Markdown table: each case, its figures, and their ratios to each of the baselines; then the goals."""
        measures = [measure for case, measure in self.rounds if case == self.cases[0]]
        names = {measure: MEASURES.get(measure, measure) for measure in measures}
        head = ["case"]
        for measure in measures:
            head += [names[measure], *(f"x {name}" for name in baselines)]
        rows = []
        for case in self.cases:
            row = [case]
            for measure in measures:
                row.append(f"{self.median(case, measure):,.1f}")
                row += [f"{self.ratio(case, name, measure):.2f}" for name in baselines]
            rows.append(row)
        print(f"\n### {self.title}\n")
        print_table(head, rows)
        for goal in goals:
            found = self.ratio(goal.case, goal.baseline, goal.measure)
            print_goal(f"{names[goal.measure]} of {goal.case}, x {goal.baseline}", found, goal.limit)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose source can be read too."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print()


def print_goal(what: str, found: float, limit: float) -> None:
    """Whether a goal was met: `found` is at most `limit`."""
    print(f"- {what}: {found:,.2f}, goal {limit:,g}: **{'met' if found <= limit else 'MISSED'}**")


def compare(
    title: str, cases: Sequence[Case], *, operations: int, rounds: int, written: Callable[[], int] | None = None
) -> Results:
    """Run the cases in turns, in another order each round; the first round warms up and is not counted.

    `written` gives the bytes written so far; without it none are counted.
    """
    results = Results(title, [case.name for case in cases])
    for number in range(rounds + 1):
        first = number % len(cases)
        for case in (*cases[first:], *cases[:first]):
            if case.before:
                case.before()
            bytes_before = written() if written else 0
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            case.run(operations)
            cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
            bytes_written = written() - bytes_before if written else 0
            if case.after:
                case.after()
            if number:
                results.add(case.name, "cpu", cpu / operations / 1000)
                results.add(case.name, "wall", wall / operations / 1000)
                if written:
                    results.add(case.name, "bytes", bytes_written / operations)
    return results


def arguments(description: str, **counts: tuple[int, int]) -> argparse.Namespace:
    """The command line of a benchmark: `--quick`, and a number for each of `counts` (full, quick).

    `postgres` in the answer is the URL in KAGED_BENCHMARK_POSTGRES_URL: no argument, since it may hold a secret.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few operations: shows that it works, measures nothing")
    for name, (full, _) in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"by default {full:,}")
    given = parser.parse_args()
    given.postgres = os.environ.get("KAGED_BENCHMARK_POSTGRES_URL", "")
    for name, (full, quick) in counts.items():
        if getattr(given, name) is None:
            setattr(given, name, quick if given.quick else full)
    return given


def describe(disk: Disk | None = None) -> None:
    """Say on what the figures were made."""
    library = peewee.sqlite3
    print(f"Python {sys.version.split()[0]}, Peewee {peewee.__version__}, SQLite {library.sqlite_version}", end="")
    print(f" ({library.__name__}), {os.cpu_count()} cores. Medians of interleaved runs: read the ratios.")
    if disk:
        print(f"Bytes: {disk.how}.")


def sqlite_url(path: Path) -> str:
    return f"sqlite://{path}"


@contextmanager
def open_store(url: str, directory: Path, **settings: Any) -> Iterator[Any]:
    """A kaged store at `url` with these settings (`sqlite__page_size=4096`) and no others of this machine's."""
    config = directory / f"{secrets.token_hex(4)}.toml"
    lines = []
    for name, value in settings.items():
        section, _, key = name.partition("__")
        lines.append(f"[{section}]\n{key} = {value!r}\n".replace("'", '"'))
    config.write_text("".join(lines))
    with kagedb.connect(url=url, config=config) as storage:
        yield storage


def connect_sqlite(path: Path, *, page_size: int = 2048, durability: str = "full") -> Any:
    """A connection to a new file, set up as kagedb does it; statements are a transaction each, or begun by hand."""
    connection = peewee.sqlite3.connect(path, isolation_level=None, cached_statements=256)
    for pragma in sqlite_pragmas(page_size, durability):
        connection.execute(pragma)
    return connection


def sqlite_pragmas(page_size: int = 2048, durability: str = "full") -> list[str]:
    """kagedb's own, with the same write-ahead log in bytes whatever the page size."""
    return [
        f"PRAGMA page_size = {page_size}",
        "PRAGMA auto_vacuum = INCREMENTAL",
        "PRAGMA journal_mode = WAL",
        f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}",
        f"PRAGMA wal_autocheckpoint = {4096 * 1024 // page_size}",
        "PRAGMA foreign_keys = ON",
        "PRAGMA cache_size = -2000",
    ]


@contextmanager
def postgres_schema(url: str) -> Iterator[tuple[Any, str]]:
    """An autocommit psycopg2 connection and the name of a schema that nothing else uses; dropped at the end."""
    import psycopg2

    name = f"kaged_benchmark_{secrets.token_hex(4)}"
    connection = psycopg2.connect(url, options=f"-c search_path={name}")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT version(), current_setting('fsync')")
        version, fsync = cursor.fetchone()
        print(f"\n{version.split(' on ')[0]}, fsync {fsync}; bytes: its write-ahead log. CPU: of this side alone.")
    try:
        yield connection, name
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        connection.close()


def postgres_written(connection: Any) -> Callable[[], int]:
    """Bytes of the server's write-ahead log so far."""

    def written() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
            return int(cursor.fetchone()[0])

    return written
