"""`kaged copy` of a large store to PostgreSQL and back: that nothing is lost, how fast it is, what memory it takes.

Against bare COPY into the same tables, with the same indexes, keys and guards made after it, and nothing compared:
once as a program of thirty lines moves the rows, read from SQLite and written as COPY's text value by value; once of
text that lies ready in files, which leaves the server's part alone. Needs KAGED_BENCHMARK_POSTGRES_URL; schemas of
their own are made there and dropped. Ends with status 1 where a digest, the audit log or a transcript is not what it
was.

Usage: python contrib/benchmarks/copying.py [--quick] [--events N] [--megabytes N] [--rounds N]
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import harness
import peewee
from stores import large_store

import kagedb
from kagedb import Transcript
from kagedb.engines import open_engine
from kagedb.operations import audit_verify
from kagedb.operations.digests import digests
from kagedb.settings import Settings, load

SCHEMA, BARE_SCHEMA = "kaged_copy_benchmark", "kaged_copy_bare"

LOADING_GOAL, WHOLE_GOAL, MEMORY_GOAL_MB = 0.8, 0.4, 60.0

COPY = """
import json, re, sys, time
import kagedb
from kagedb.operations import transfer
from kagedb.settings import load
told, moments = json.load(sys.stdin), {}
with kagedb.connect(url=told["source"], config=told["config"]) as storage:
    began = time.monotonic()
    done = transfer.copy(
        storage, load(url=told["target"], config=told["config"]), actor="operator:benchmark",
        progress=lambda what, *_: moments.setdefault(what, time.monotonic()),
    )
    ended = time.monotonic()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps([sum(done.rows.values()), moments["verifying"] - began, ended - began, peak / 1024]))
"""
"""In a process of its own, for its peak of memory. The URLs come by the standard input: they may hold a secret."""


def kaged_copy(source: str, target: str, config: Path) -> tuple[int, float, float, float]:
    """Rows, seconds until all of them were loaded with their indexes, seconds in all, and peak memory in MB."""
    told = json.dumps({"source": source, "target": target, "config": str(config)})
    done = subprocess.run([sys.executable, "-c", COPY], input=told, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows, loading, whole, peak = json.loads(done.stdout)
    return rows, loading, whole, peak


@contextmanager
def reading(settings: Settings) -> Iterator[Any]:
    """The contents of a store, through an engine of its own."""
    engine = open_engine(settings, read_only=True)
    engine.open(create=False)
    try:
        with engine.reading() as contents:
            yield contents
    finally:
        engine.close()


def facts(settings: Settings) -> dict[str, tuple[int, str]]:
    with reading(settings) as contents:
        return {name: (one.rows, one.digest) for name, one in digests(contents).facts.items()}


def transcripts(url: str, config: Path) -> tuple[int, str]:
    """Bytes of every transcript as it is exported raw, and their SHA-256."""
    size, digest = 0, hashlib.sha256()
    with kagedb.connect(url=url, config=config, read_only=True) as storage, storage.snapshot():
        for transcript in Transcript.select().order_by(Transcript.id):
            for part in transcript.raw():
                size += len(part)
                digest.update(part)
    return size, digest.hexdigest()


def by_hand(source: Path) -> Callable[[Any], None]:
    """A move as one writes it down: rows of SQLite as COPY's text, value by value."""

    def value(value: Any) -> str:
        if value is None:
            return "\\N"
        if isinstance(value, str):
            for special, written in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
                value = value.replace(special, written)
            return str(value)
        return "\\\\x" + value.hex() if isinstance(value, bytes) else str(value)

    def move(cursor: Any) -> None:
        connection = peewee.sqlite3.connect(f"file:{source}?mode=ro", uri=True)
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            rows = connection.execute(f'SELECT * FROM "{table}"')
            columns = ", ".join(f'"{column[0]}"' for column in rows.description)
            lines = ("\t".join(map(value, row)) + "\n" for row in rows)
            cursor.copy_expert(f'COPY "{table}" ({columns}) FROM STDIN', Lines(lines), 1 << 16)
        connection.close()

    return move


class Lines:
    """The file that psycopg2 reads lines from."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def read(self, _: int) -> bytes:
        parts, size = [], 0
        for line in self._lines:
            parts.append(line)
            size += len(line)
            if size >= 1 << 16:
                break
        return "".join(parts).encode()


def of_texts(texts: Path) -> Callable[[Any], None]:
    """COPY of the files that `write_texts` wrote."""

    def move(cursor: Any) -> None:
        for file in sorted(texts.iterdir()):
            with open(file, "rb") as lines:
                cursor.copy_expert(f'COPY "{file.stem}" FROM STDIN', lines, 1 << 16)

    return move


def bare_copy(settings: Settings, move: Callable[[Any], None]) -> float:
    """Seconds of `move`, and of the statements that make keys, indexes and guards again."""
    engine = open_engine(settings)
    engine.open(create=True)
    try:
        receiver = engine.receiver()
        made_again = [each for each in receiver.lay_aside() if not each.startswith("ANALYZE")]
        receiver.empty()
        began = time.monotonic()

        def work() -> None:
            cursor = engine.database.connection().cursor()
            move(cursor)
            for statement in made_again:
                cursor.execute(statement)

        receiver.replace(work)
        return time.monotonic() - began
    finally:
        engine.close()


def write_texts(settings: Settings, texts: Path) -> None:
    engine = open_engine(settings)
    engine.open(create=False)
    try:
        cursor = engine.database.connection().cursor()
        for table in engine.tables():
            with open(texts / f"{table}.txt", "wb") as file:
                cursor.copy_expert(f'COPY "{table}" TO STDOUT', file)
    finally:
        engine.close()


def drop(url: str, *schemas: str) -> None:
    import psycopg2

    connection = psycopg2.connect(url)
    connection.autocommit = True
    for schema in schemas:
        connection.cursor().execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
    connection.close()


def prove(what: str, holds: bool) -> None:
    print(f"- {what}: {'yes' if holds else 'NO'}")
    if not holds:
        raise SystemExit(1)


def main() -> None:
    given = harness.arguments(__doc__ or "", events=(1_000_000, 2_000), megabytes=(200, 1), rounds=(3, 1))
    # No file system of its own: the stores and their copies need gigabytes.
    with harness.open_disk(quick=True) as disk, ExitStack() as stack:
        harness.describe(disk)
        place = disk.directory
        config, bare = place / "config.toml", place / "bare.toml"
        config.write_text(f'[storage]\nschema = "{SCHEMA}"\n')
        bare.write_text(f'[storage]\nschema = "{BARE_SCHEMA}"\n')
        os.environ["KAGED_CONFIG"] = str(config)
        source, back = (harness.sqlite_url(place / name) for name in ("source.db", "back.db"))
        with kagedb.connect(url=source) as storage:
            large_store(storage, given.events, given.megabytes)
        if not given.postgres:
            print("\nKAGED_BENCHMARK_POSTGRES_URL is not set: nothing to copy to", file=sys.stderr)
            return
        stack.callback(drop, given.postgres, SCHEMA, BARE_SCHEMA)
        drop(given.postgres, SCHEMA, BARE_SCHEMA)
        rounds = []
        size = (place / "source.db").stat().st_size / 2**20
        for number in range(given.rounds):
            drop(given.postgres, SCHEMA)
            there = kaged_copy(source, given.postgres, config)
            if number == 0:
                round_trip(source, given.postgres, back, config)
                (place / "texts").mkdir()
                write_texts(load(url=given.postgres), place / "texts")
                with kagedb.connect(url=given.postgres, config=bare):
                    pass
            target = load(url=given.postgres, config=bare)
            moved = bare_copy(target, by_hand(place / "source.db"))
            copied = bare_copy(target, of_texts(place / "texts"))
            (place / "back.db").unlink(missing_ok=True)
            rounds.append((moved, copied, there, kaged_copy(given.postgres, back, config)))
        show(size, rounds)


def round_trip(source: str, server: str, back: str, config: Path) -> None:
    """What the first copy brought to the server, and another one brings back, is what it was."""
    print("\n### There and back\n")
    there = facts(load(url=server, config=config))
    prove("every table has arrived on PostgreSQL as it was", there == facts(load(url=source, config=config)))
    said = transcripts(source, config)
    prove(f"the {said[0]:,} bytes of its transcripts too", transcripts(server, config) == said)
    kaged_copy(server, back, config)
    home = facts(load(url=back, config=config))
    prove("every table has come back as it was", home == facts(load(url=server, config=config)))
    prove("and is what it was at first", all(home[name] == there[name] for name in home if name != "audit_event"))
    prove("the transcripts too", transcripts(back, config) == said)
    for name, url in (("source", source), ("server", server), ("back", back)):
        with reading(load(url=url, config=config)) as contents:
            verdict = audit_verify.verify_in(contents)
        prove(f"the audit log of {name} holds, {verdict.last_seq:,} events", verdict.result == audit_verify.HOLDS)


Copy = tuple[int, float, float, float]


def show(size: float, rounds: list[tuple[float, float, Copy, Copy]]) -> None:
    rows = rounds[0][2][0]
    print(f"\n### A store of {size:,.0f} MiB, {rows:,} rows\n")
    lines = []
    for name, place in (("bare COPY by hand", 0), ("bare COPY of text that lies ready", 1)):
        seconds = statistics.median(found[place] for found in rounds)  # type: ignore[misc]
        lines.append([name, f"{seconds:.2f}", f"{seconds:.2f}", f"{rows / seconds:,.0f}", *["-"] * 5])
    for name, place in (("SQLite to PostgreSQL", 2), ("PostgreSQL to SQLite", 3)):
        loading, whole, peak = (
            statistics.median(found[place][part] for found in rounds)  # type: ignore[index]
            for part in (1, 2, 3)
        )
        ratios = [ratio(rounds, bare, place, part) for bare in (0, 1) for part in (1, 2)]
        line = [name, f"{loading:.2f}", f"{whole:.2f}", f"{rows / whole:,.0f}", *(f"{r:.2f}" for r in ratios)]
        lines.append([*line, f"{peak:.0f}"])
    head = ["what", "loading s", "whole s", "rows/s", "loading x", "whole x", "x ready", "whole x ready", "MB"]
    harness.print_table(head, lines)
    told: list[tuple[str, float, float, Callable[[float, float], bool]]] = [
        ("loading into PostgreSQL, x bare COPY by hand", ratio(rounds, 0, 2, 1), LOADING_GOAL, float.__ge__),
        ("the whole with digests, x bare COPY by hand", ratio(rounds, 0, 2, 2), WHOLE_GOAL, float.__ge__),
        ("MB of memory", max(max(one[2][3], one[3][3]) for one in rounds), MEMORY_GOAL_MB, float.__lt__),
    ]
    for what, found, goal, good in told:
        print(f"- {what}: {found:.2f}, goal {goal:g}: **{'met' if good(found, goal) else 'MISSED'}**")


def ratio(rounds: list[tuple[float, float, Copy, Copy]], bare: int, place: int, part: int) -> float:
    """The speed beside that of a bare COPY: the median of the ratios of each round."""
    return statistics.median(found[bare] / found[place][part] for found in rounds)  # type: ignore[index,operator]


if __name__ == "__main__":
    main()
