"""What a backup costs, beside a daemon that commits all the time: time, how long the snapshot is held, the writer's
waiting, memory, bytes written, the write-ahead log, and what the next night's copy changes.

Against a raw online copy of the same store through Python's sqlite3 with nobody writing, and on PostgreSQL against bare
`pg_dump -Fc`; and, for what the disk alone does to the writer, beside a plain file copy or the bare dump. `--megabytes`
is the size of the store, `--rate` what the daemon commits in a second, `--events` what it does between two nights.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import peewee

import kagedb
from kagedb import AuditEvent, Project, Run, Session, Transcript

SESSION_MEGABYTES = 16
"""Of output in each session."""

BLOCK_BYTES = 4096
"""What rsync and a file system compare by."""

SCHEMA = "kaged_backup_benchmark"
"""Made and dropped."""

HELD, WHOLE, P99, MEMORY, WRITTEN = (
    "held, x raw",
    "whole, x raw",
    "writer's p99, x alone",
    "MB of memory",
    "bytes written, x the store",
)
"""What is promised of a backup, each with a goal."""

HEAD = [
    "what",
    "raw s",
    "held s",
    "took s",
    "alone: /s",
    "p99 ms",
    "beside: /s",
    "p99 ms",
    "RSS MB",
    "written MB",
    "WAL MB",
]

PLAIN = "beside a plain copy"
"""What the disk alone does to a writer, without anything of kaged."""

WRITER = """
import json, sys, time
import kagedb
from kagedb import AuditEvent
pause = 1 / float(sys.argv[1])
with kagedb.connect():
    print("ready", flush=True)
    took, began = [], time.monotonic()
    import select
    while len(took) < 2 or not select.select([sys.stdin], [], [], 0)[0]:
        start = time.perf_counter()
        AuditEvent.record("policy.decision", actor="agent:busy", body={"filler": "x" * 300})
        took.append(time.perf_counter() - start)
        time.sleep(max(0, began + len(took) * pause - time.monotonic()))
    print(json.dumps([took, time.monotonic() - began]), flush=True)
"""

BACKUP = """
import re, sys
from kagedb.cli import kaged
kaged(sys.argv[1:], standalone_mode=False)
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
written = re.search(r"\\nwrite_bytes: (\\d+)", open("/proc/self/io").read())[1]
print(peak, written, file=sys.stderr)
"""
"""Not ru_maxrss, which a child takes over from whoever started it. The bytes are those of its ended children too."""


class Writer:
    """Another process that commits so many times a second, as far as the disk lets it."""

    def __init__(self, per_second: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(per_second)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stdout.readline().strip() == "ready"

    def stop(self) -> tuple[float, float]:
        """Commits a second, and the 99th percentile of one in milliseconds."""
        said, _ = self._process.communicate("\n")
        took, seconds = json.loads(said)
        return len(took) / seconds, statistics.quantiles(took, n=100)[98] * 1000


def fill(megabytes: int) -> None:
    """A store of about that size: two thirds terminal output that does not compress, one third audit events."""
    with kagedb.connect() as storage:
        project = Project.add("house", actor="operator:ana")
        output = megabytes * 2 // 3
        for first in range(0, output, SESSION_MEGABYTES):
            session = Session.start(project, title="long", actor="operator:ana")
            run = Run.dispatch(session, agent="planner", input={}, parent=None)
            recorder = Transcript.open(session, columns=80, rows=24)
            for _ in range(min(SESSION_MEGABYTES, output - first)):
                recorder.write(secrets.token_bytes(1024 * 1024))
            recorder.close()
        for _ in range(megabytes // 3):
            with storage.transaction(durability="relaxed"):
                for _ in range(1200):
                    AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"filler": "x" * 300})


def kaged_backup(place: Path, *options: str) -> tuple[dict[str, Any], float, float, int]:
    """What the command says of itself, its wall time in seconds, its peak memory in MB, and the bytes that it and
    pg_dump have written."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BACKUP, "-q", "backup", "--json", "--output", f"{place}/", *options],
        capture_output=True,
        text=True,
    )
    took = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak_kib, written = done.stderr.split()[-2:]
    return json.loads(done.stdout), took, int(peak_kib) / 1024, int(written)


def raw_copy(path: Path, place: Path) -> float:
    """Seconds of `sqlite3`'s own online copy, durable, with nobody writing."""
    began = time.monotonic()
    source, target = peewee.sqlite3.connect(path), peewee.sqlite3.connect(place / "raw.sqlite3")
    source.backup(target)
    target.close()
    source.close()
    with open(place / "raw.sqlite3", "rb") as file:
        os.fsync(file.fileno())
    took = time.monotonic() - began
    (place / "raw.sqlite3").unlink()
    return took


def raw_dump(url: str, place: Path) -> float:
    """Seconds of a bare `pg_dump -Fc`; the password, if there is one, in its environment."""
    from psycopg2 import extensions

    given = extensions.parse_dsn(url)
    environment = {**os.environ, "PGPASSWORD": given.pop("password", "")}
    command = ["pg_dump", "-Fc", "-n", SCHEMA, "-f", str(place / "raw.pgdump"), extensions.make_dsn(**given)]
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    took = time.monotonic() - began
    (place / "raw.pgdump").unlink()
    return took


def changed_blocks(old: Path, new: Path) -> tuple[int, int]:
    """Blocks that differ at the same place, and blocks in all."""
    changed = whole = 0
    with open(old, "rb") as before, open(new, "rb") as after:
        while block := after.read(BLOCK_BYTES):
            whole += 1
            changed += before.read(BLOCK_BYTES) != block
    return changed, whole


class WalPeak(threading.Thread):
    """The largest size of a file while it runs."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.peak, self._ended = path, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.01):
            if self.path.exists():
                self.peak = max(self.peak, self.path.stat().st_size)

    def end(self) -> float:
        self._ended.set()
        self.join()
        return self.peak / 2**20


def plain_copy(path: Path, place: Path) -> None:
    """What any program does that copies a file and makes the copy durable."""
    with open(path, "rb") as source, open(place / "plain", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 19)
        target.flush()
        os.fsync(target.fileno())
    (place / "plain").unlink()


def measure(place: Path, baseline: Callable[[], float], beside: Callable[[], object], given: Any, path: Path) -> None:
    """`baseline` gives the seconds of a raw copy; `beside` is what the writer has beside it for comparison. `path` is
    the database file, where there is one."""
    seconds = 5.0 if not given.quick else 0.5
    wal = path.with_name(path.name + "-wal")
    with kagedb.connect(read_only=True) as storage:
        server_bytes = storage.engine.size_bytes()
    rows: list[list[str]] = []
    ratios: dict[str, dict[str, list[float]]] = {}
    kaged_backup(place / "warm")
    for _ in range(given.rounds):
        raw = baseline()
        for name, options in (("backup", ()), ("backup --quick", ("--quick",)), (PLAIN, None)):
            if not (given.quick and rows):
                writer = Writer(given.rate)
                time.sleep(seconds)
                alone = writer.stop()
            peak = WalPeak(wal)
            writer = Writer(given.rate)
            began = time.monotonic()
            mine = ratios.setdefault(name, {what: [] for what in (HELD, WHOLE, P99, MEMORY, WRITTEN)})
            shown = []
            if options is None:
                beside()
                took = time.monotonic() - began
            else:
                made, took, memory, written = kaged_backup(place / "made", *options)
                size = path.stat().st_size if path.exists() else server_bytes
                shutil.rmtree(made["directory"])
                figures = [made["held_ms"] / 1000 / raw, took / raw, memory, written / size]
                for what, figure in zip((HELD, WHOLE, MEMORY, WRITTEN), figures, strict=True):
                    mine[what].append(figure)
                shown = [made["held_ms"] / 1000, memory, written / 2**20]
            rate, p99 = writer.stop()
            mine[P99].append(p99 / alone[1])
            held, memory_shown, written_shown = [f"{figure:.2f}" for figure in shown] or ["-", "-", "-"]
            times = [f"{figure:.2f}" for figure in (*alone, rate, p99)]
            wal_shown = f"{peak.end():.0f}" if path.exists() else "-"
            rows.append([name, f"{raw:.2f}", held, f"{took:.2f}", *times, memory_shown, written_shown, wal_shown])
    harness.print_table(HEAD, rows)
    for name, whole in (("backup", 8.0), ("backup --quick", 3.0)):
        for what, goal in ((HELD, 1.5), (WHOLE, whole), (P99, 2.0), (MEMORY, 40.0), (WRITTEN, 1.05)):
            harness.print_goal(f"{name}: {what}", statistics.median(ratios[name][what]), goal)
    print(f"- {PLAIN}: {P99}: {statistics.median(ratios[PLAIN][P99]):.2f}")


def main() -> None:
    given = harness.arguments(__doc__ or "", megabytes=(500, 3), rate=(1000, 1000), rounds=(3, 1), events=(1000, 50))
    # No file system of its own: sizes are seen by themselves, and the store and its copies need gigabytes.
    with harness.open_disk(quick=True) as disk:
        harness.describe(disk)
        place = disk.directory
        config, path = place / "config.toml", place / "kaged.db"
        config.write_text(f'[storage]\nschema = "{SCHEMA}"\n')
        os.environ.update(KAGED_CONFIG=str(config), KAGED_DATABASE_URL=harness.sqlite_url(path))
        measure_file(place, path, given)
        for file in place.glob("kaged.db*"):
            file.unlink()
        if given.postgres:
            os.environ["KAGED_DATABASE_URL"] = given.postgres
            measure_server(place, path, given)


def measure_file(place: Path, path: Path, given: Any) -> None:
    fill(given.megabytes)
    print(f"\n### SQLite, a store of {path.stat().st_size / 2**20:,.0f} MiB\n")
    first, *_ = kaged_backup(place / "nights", "--quick")
    with kagedb.connect():
        for _ in range(given.events):
            AuditEvent.record("policy.decision", actor="agent:night", body={"filler": "x" * 300})
    second, *_ = kaged_backup(place / "nights", "--quick")
    changed, whole = changed_blocks(*(Path(made["directory"]) / "kaged.sqlite3" for made in (first, second)))
    print(f"The next night after {given.events:,} events: {changed:,} of {whole:,} blocks of 4 KiB changed.\n")
    copied = Path(first["directory"]) / "kaged.sqlite3"
    measure(place, lambda: raw_copy(path, place), lambda: plain_copy(copied, place), given, path)
    shutil.rmtree(place / "nights")


def measure_server(place: Path, no_path: Path, given: Any) -> None:
    import psycopg2

    try:
        fill(given.megabytes)
        print(f"\n### PostgreSQL, a store of about {given.megabytes} MB\n")

        def dump() -> float:
            return raw_dump(given.postgres, place)

        measure(place, dump, dump, given, no_path)
    finally:
        connection = psycopg2.connect(given.postgres)
        connection.autocommit = True
        connection.cursor().execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
        connection.close()


if __name__ == "__main__":
    main()
