"""What recording terminals writes to the disk and keeps, beside a row for each read and asciinema's lines of JSON: a
busy hour of a full-screen program, and a log of 20 MB. Then how long reading takes, and what `Recorder.write` costs.

The hour is made up but not slept through: each read has its time, and every two seconds of that time are flushed.
With KAGED_BENCHMARK_POSTGRES_URL a sixth of the hour is measured on PostgreSQL too, in a schema made and dropped.

Usage: python contrib/benchmarks/transcripts.py [--quick] [--seconds N] [--log-bytes N] [--read-bytes N]
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    Disk,
    arguments,
    connect_sqlite,
    describe,
    open_disk,
    open_store,
    postgres_schema,
    postgres_written,
    print_table,
    sqlite_url,
)

from kagedb import Project, Session, Transcript
from kagedb.models.recorder import FLUSH_SECONDS
from kagedb.models.segment import TICK_MS

ACTOR = "operator:benchmark"
READS_PER_SECOND = 137
"""Of a busy full-screen agent program, 16 bytes each on average; a log comes in reads of a line or a few."""

WRITTEN_TIMES, STORED_SHARE, TAIL_MS = 200, 0.25, 5.0
"""The goals: device bytes of a row a read over ours, stored over raw, and the last 1,000 lines."""

Reads = Callable[[], Iterator[tuple[float, bytes]]]
"""The reads of a terminal: seconds since the beginning, and bytes. The same each time it is called."""


def words() -> list[bytes]:
    """What a program that writes about software writes: this project's own text."""
    root = Path(__file__).parent.parent.parent
    files = sorted([*root.glob("docs/*.md"), *root.glob("kagedb/**/*.py")])
    return [word for file in files for word in re.findall(rb"\s*\S+", file.read_bytes())]


def full_screen(seconds: int) -> Iterator[tuple[float, bytes]]:
    """An agent at work: thirty words a second, each placed, coloured, written and closed by reads of its own, as
    curses programs do it; a status line ten times a second; the whole screen every twenty seconds."""
    vocabulary, at = words(), 0
    row, column, pending = 1, 1, list[bytes]()
    for number in range(seconds * READS_PER_SECOND):
        now = number / READS_PER_SECOND
        if number % (READS_PER_SECOND * 20) == 0:
            screen = [vocabulary[(at - back) % len(vocabulary)] for back in range(200, 0, -1)]
            yield now, b"\x1b[2J\x1b[H" + b" ".join(screen).replace(b"\n", b"\r\n")
        elif number % 13 == 0:
            spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[number // 13 % 10]
            said = f"\x1b[35m{spinner}\x1b[0m Thinking… \x1b[2m({now:.0f} s, {at} words, Esc stops)\x1b[0m"
            yield now, f"\x1b7\x1b[24;1H{said}\x1b8".encode()
        else:
            if not pending:
                word = vocabulary[at % len(vocabulary)].strip()
                at += 1
                if column + len(word) > 78:
                    row, column = row % 22 + 1, 1
                # Coloured always alike, by what it is, as a highlighter does it.
                colour = zlib.crc32(word) % 20
                pending = [b"\x1b[0m\x1b[K", word + b" ", b"\x1b[3%dm" % (colour if 0 < colour < 7 else 9)]
                pending.append(b"\x1b[%d;%dH" % (row, column))
                column += len(word) + 1
            yield now, pending.pop()


def log(size: int) -> Iterator[tuple[float, bytes]]:
    """Lines of a server's log, a hundred a second: four of its few hundred messages for each request with its id."""
    rng, vocabulary = random.Random(2), words()
    starts = [rng.randrange(len(vocabulary) - 20) for _ in range(300)]
    messages = [
        b" ".join(word.strip() for word in vocabulary[start : start + rng.randrange(5, 20)]) for start in starts
    ]
    written = number = request = 0
    while written < size:
        if number % 4 == 0:
            request = rng.getrandbits(64)
        line = b"2026-11-24T%02d:%02d:%02d.%03d %b [%016x] %b: %d\r\n" % (
            *(number // 360_000 % 24, number // 6000 % 60, number // 100 % 60, number * 10 % 1000),
            rng.choice((b"\x1b[32mINFO\x1b[0m", b"\x1b[33mWARN\x1b[0m", b"DEBUG")),
            request,
            rng.choice(messages),
            rng.randrange(1000),
        )
        yield number / 100, line
        written += len(line)
        number += 1


# Three ways to keep them.


@dataclass(frozen=True)
class Figures:
    """Of one way: bytes that reached the disk, and bytes that are kept."""

    name: str
    written: int
    stored: int


def record(session: Session, reads: Reads) -> Transcript:
    """Record reads at the times they bring, as the recorder's own clock would have it."""
    recorder = Transcript.open(session, 80, 24)
    due = 0.0
    for now, data in reads():
        if now >= due:
            recorder.flush()
            due = now + FLUSH_SECONDS
        recorder._output(int(now * 1000) // TICK_MS, data)
    recorder.close()
    return Transcript.by_id(recorder.transcript.id)


def kagedb(reads: Reads, directory: Path) -> int:
    with open_store(sqlite_url(directory / "kaged.db"), directory) as storage:
        session = Session.start(Project.add("house", actor=ACTOR), title="recorded", actor=ACTOR)
        storage.database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        before = (directory / "kaged.db").stat().st_size
        record(session, reads)
    return (directory / "kaged.db").stat().st_size - before


def row_a_read(reads: Reads, directory: Path) -> int:
    with closing(connect_sqlite(directory / "rows.db", durability="relaxed")) as connection:
        connection.execute(ROW_TABLE.format(key="INTEGER PRIMARY KEY AUTOINCREMENT", blob="BLOB"))
        connection.execute(ROW_INDEX)
        for now, data in reads():
            connection.execute(
                "INSERT INTO read (session, at, data) VALUES (?, ?, ?)", (SESSION, int(now * 1000), data)
            )
    return (directory / "rows.db").stat().st_size


def json_lines(reads: Reads, directory: Path) -> int:
    """asciicast version 2, each line given to the operating system, which writes when it likes."""
    path = directory / "recorded.cast"
    with path.open("w", buffering=1) as file:
        file.write('{"version": 2, "width": 80, "height": 24}\n')
        for now, data in reads():
            file.write(json.dumps([round(now, 6), "o", data.decode(errors="replace")], ensure_ascii=False) + "\n")
    return path.stat().st_size


ROW_TABLE = "CREATE TABLE read (id {key}, session TEXT NOT NULL, at BIGINT NOT NULL, data {blob} NOT NULL)"
ROW_INDEX = "CREATE INDEX read_session ON read (session, at)"
SESSION = "01M86CWBMA40ZS9EHC2065KCDM"
WAYS = {"kagedb": kagedb, "a row a read": row_a_read, "JSON lines": json_lines}


def on_disk(title: str, reads: Reads, disk: Disk, *, goal: bool) -> None:
    figures = []
    for name, way in WAYS.items():
        directory = disk.directory / re.sub(r"\W+", "-", f"{title} {name}")[:60]
        directory.mkdir(mode=0o700)
        before = disk.written()
        stored = way(reads, directory)
        figures.append(Figures(name, disk.written() - before, stored))
    report(title, figures, reads, goal=goal)


def report(title: str, figures: list[Figures], reads: Reads, *, goal: bool) -> None:
    sizes = [len(data) for _, data in reads()]
    raw = sum(sizes)
    print(f"\n### {title}: {raw:,} bytes in {len(sizes):,} reads\n")
    ours = figures[0]
    rows = [
        [
            *(one.name, f"{one.written:,}", f"{one.written / raw:.2f}", f"{one.written / ours.written:.1f}"),
            *(f"{one.stored:,}", f"{one.stored / raw:.3f}"),
        ]
        for one in figures
    ]
    print_table(["case", "bytes written", "x raw", "x kagedb", "bytes stored", "x raw"], rows)
    if goal:
        told("device bytes of a row a read, x kagedb", figures[1].written / ours.written, WRITTEN_TIMES, least=True)
    told("bytes stored by kagedb, x raw", ours.stored / raw, STORED_SHARE)


def told(what: str, found: float, limit: float, *, least: bool = False) -> None:
    met = found >= limit if least else found <= limit
    print(f"- {what}: {found:.3g}, goal at {'least' if least else 'most'} {limit:g}: **{'met' if met else 'MISSED'}**")


# Reading, and what write costs.


def reading(size: int, disk: Disk) -> None:
    with open_store(sqlite_url(disk.directory / "read.db"), disk.directory):
        session = Session.start(Project.add("house", actor=ACTOR), title="read", actor=ACTOR)
        transcript = record(session, lambda: log(size))
        usage = transcript.usage()
        print(f"\n### Reading a transcript of {usage.output_bytes:,} bytes in {usage.chunks:,} chunks\n")
        middle = usage.duration_ms // 2
        cases: dict[str, Callable[[], Any]] = {
            "the last 1,000 lines": lambda: transcript.tail(1000),
            "the last 10,000 lines": lambda: transcript.tail(10_000),
            "the first event of the second half": lambda: next(transcript.events(middle)),
            "all of it, raw": lambda: sum(map(len, transcript.raw())),
        }
        rows = []
        for name, case in cases.items():
            times = []
            for _ in range(15 if "all" not in name else 3):
                began = time.perf_counter()
                case()
                times.append((time.perf_counter() - began) * 1000)
            rows.append([name, f"{statistics.median(times):.2f}", f"{max(times):.2f}"])
        print_table(["case", "median ms", "most ms"], rows)
        told("the last 1,000 lines, ms", float(rows[0][1]), TAIL_MS)


def writing(reads: Reads, disk: Disk) -> None:
    data = [data for _, data in reads()]
    megabytes = sum(map(len, data)) / 1e6
    with open_store(sqlite_url(disk.directory / "write.db"), disk.directory):
        session = Session.start(Project.add("house", actor=ACTOR), title="write", actor=ACTOR)
        with Transcript.open(session, 80, 24) as recorder:
            write, caller, process = recorder.write, 0.0, time.process_time()
            for start in range(0, len(data), 1000):
                thread = time.thread_time()
                for piece in data[start : start + 1000]:
                    write(piece)
                caller += time.thread_time() - thread
                recorder.flush()
            process = time.process_time() - process
    print(f"\n### Recorder.write: CPU of {len(data):,} reads, {megabytes:.1f} MB\n")
    rows = [
        ["in the caller's thread", f"{caller / megabytes * 1000:.1f}", f"{caller / len(data) * 1e6:.2f}"],
        ["with packing and storing", f"{process / megabytes * 1000:.1f}", f"{process / len(data) * 1e6:.2f}"],
    ]
    print_table(["where", "ms a MB", "us a read"], rows)


def on_postgres(url: str, reads: Reads, disk: Disk) -> None:
    with postgres_schema(url) as (connection, schema):
        written = postgres_written(connection)
        with connection.cursor() as cursor:
            with open_store(url, disk.directory, storage__schema=schema):
                session = Session.start(Project.add("house", actor=ACTOR), title="recorded", actor=ACTOR)
                before = written()
                record(session, reads)
                ours = written() - before
                stored = Transcript.stored_bytes(session.id)
            cursor.execute(f"SET search_path = {schema}; SET synchronous_commit = off")
            cursor.execute(ROW_TABLE.format(key="BIGSERIAL PRIMARY KEY", blob="BYTEA"))
            cursor.execute(ROW_INDEX)
            before = written()
            for now, data in reads():
                cursor.execute(
                    "INSERT INTO read (session, at, data) VALUES (%s, %s, %s)", (SESSION, int(now * 1000), data)
                )
            theirs = written() - before
            cursor.execute("SELECT pg_total_relation_size('read')")
            rows_stored = cursor.fetchone()[0]
        figures = [Figures("kagedb", ours, stored), Figures("a row a read", theirs, rows_stored)]
        report("A part of the hour on PostgreSQL", figures, reads, goal=False)


def main() -> None:
    given = arguments(
        __doc__ or "", seconds=(3600, 20), log_bytes=(20_000_000, 200_000), read_bytes=(100_000_000, 500_000)
    )
    with open_disk(given.quick) as disk:
        describe(disk)
        on_disk("A busy hour", lambda: full_screen(given.seconds), disk, goal=True)
        on_disk("A log", lambda: log(given.log_bytes), disk, goal=False)
        reading(given.read_bytes, disk)
        writing(lambda: full_screen(given.seconds), disk)
        if given.postgres:
            on_postgres(given.postgres, lambda: full_screen(max(20, given.seconds // 6)), disk)


if __name__ == "__main__":
    main()
