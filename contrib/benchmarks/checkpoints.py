"""A hundred checkpoints: what they take on the disk, what is written for them, how long a restore takes.

KAGED_BENCHMARK_LANGGRAPH_PYTHON names a Python that has langgraph-checkpoint-sqlite, to compare with; without it the
same states are stored whole, as JSON, in one table.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from harness import Disk, arguments, connect_sqlite, describe, open_disk, open_store, print_table, sqlite_url
from states import KINDS

from kagedb import Checkpoint, Project, Run, Session

ACTOR = "operator:benchmark"

DATABASE_SHARE, WRITTEN_SHARE, RESTORE_MS = 1 / 50, 1 / 20, 10.0
LONG_LIST_BYTES = 3_000_000
"""The goals: of LangGraph's figures for growing states, and for 100 steps of the long list."""


@dataclass(frozen=True)
class Figures:
    """Of one way to keep the states: bytes of the database, bytes written for the steps, and the time of a restore."""

    name: str
    database: int
    written: int
    restore_ms: float


class Kagedb:
    name = "kagedb"

    def make(self, directory: Path) -> None:
        with open_store(sqlite_url(directory / "kaged.db"), directory):
            session = Session.start(Project.add("house", actor=ACTOR), title="steps", actor=ACTOR)
            Run.dispatch(session, agent="planner", input={})

    def keep(self, directory: Path, kind: str, steps: int) -> float:
        with open_store(sqlite_url(directory / "kaged.db"), directory):
            run, state = Run.get(), None
            for state in KINDS[kind](steps):
                Checkpoint.pause(run, state)
        with open_store(sqlite_url(directory / "kaged.db"), directory):
            head = Checkpoint.head(Session.get())
            assert head
            times = []
            for _ in range(5):
                began = time.perf_counter()
                found = head.restore()
                times.append((time.perf_counter() - began) * 1000)
            assert found == state
        return statistics.median(times)


class Whole:
    name = "whole states as JSON"

    def make(self, directory: Path) -> None:
        with closing(connect_sqlite(directory / "whole.db")) as connection:
            connection.execute("CREATE TABLE state (step INTEGER PRIMARY KEY, value TEXT)")

    def keep(self, directory: Path, kind: str, steps: int) -> float:
        with closing(connect_sqlite(directory / "whole.db", durability="relaxed")) as connection:
            for step, state in enumerate(KINDS[kind](steps)):
                connection.execute("INSERT INTO state VALUES (?, ?)", (step, json.dumps(state)))
            began = time.perf_counter()
            json.loads(connection.execute("SELECT value FROM state ORDER BY step DESC LIMIT 1").fetchone()[0])
            return (time.perf_counter() - began) * 1000


class LangGraph:
    name = "langgraph-checkpoint-sqlite"

    def make(self, directory: Path) -> None:
        self._run(directory, "growing", 0)

    def keep(self, directory: Path, kind: str, steps: int) -> float:
        return float(self._run(directory, kind, steps))

    def _run(self, directory: Path, kind: str, steps: int) -> str:
        program = "import langgraph_saver; langgraph_saver.main()"
        return subprocess.run(
            [os.environ["KAGED_BENCHMARK_LANGGRAPH_PYTHON"], "-c", program, directory / "saver.db", kind, str(steps)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout


Way = Kagedb | Whole | LangGraph


def measure(disk: Disk, way: Way, kind: str, steps: int) -> Figures:
    directory = disk.directory / f"{kind}-{way.name.split()[0]}"
    directory.mkdir()
    way.make(directory)
    before = disk.written()
    restore_ms = way.keep(directory, kind, steps)
    written = disk.written() - before
    files = [path for path in directory.iterdir() if ".db" in path.name and path.suffix != ".lock"]
    return Figures(way.name, sum(path.stat().st_size for path in files), written, restore_ms)


def main() -> None:
    given = arguments(__doc__ or "", steps=(100, 3))
    ways: list[Way] = [Kagedb(), Whole()]
    if os.environ.get("KAGED_BENCHMARK_LANGGRAPH_PYTHON"):
        ways.append(LangGraph())
    with open_disk(given.quick) as disk:
        describe(disk)
        print("Written: from the first step until the file is closed; making the store before is not counted.")
        for kind in KINDS:
            report(kind, given.steps, [measure(disk, way, kind, given.steps) for way in ways])


def report(kind: str, steps: int, ways: list[Figures]) -> None:
    last = json.dumps(list(KINDS[kind](steps))[-1], separators=(",", ":"))
    print(f"\n### {steps} steps of {kind} states, {len(last) / 1000:,.0f} KB at the end\n")
    mine = ways[0]
    print_table(
        ["way", "database KB", "x kagedb", "written KB", "x kagedb", "restore ms"],
        [
            [
                way.name,
                f"{way.database / 1000:,.0f}",
                f"{way.database / mine.database:.1f}",
                f"{way.written / 1000:,.0f}",
                f"{way.written / mine.written:.1f}" if mine.written else "-",
                f"{way.restore_ms:.1f}",
            ]
            for way in ways
        ],
    )
    if kind == "growing":
        goal("ms of a restore", mine.restore_ms, RESTORE_MS)
        if len(ways) == 3:
            goal("share of LangGraph's database", mine.database / ways[2].database, DATABASE_SHARE)
            goal("share of LangGraph's writes", mine.written / ways[2].written, WRITTEN_SHARE)
    else:
        goal("bytes of the database", mine.database, LONG_LIST_BYTES)


def goal(what: str, found: float, limit: float) -> None:
    print(f"- {what}: {found:,.3f}, goal {limit:,.3f}: **{'met' if found <= limit else 'MISSED'}**")


if __name__ == "__main__":
    main()
