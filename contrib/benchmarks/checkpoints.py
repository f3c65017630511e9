"""A hundred checkpoints: what they take on the disk, what is written for them, how long a restore takes.

KAGED_BENCHMARK_LANGGRAPH_PYTHON names a Python that has langgraph-checkpoint-sqlite, to compare with; without it the
same states are stored whole, as JSON, in one table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
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
    """Of one way to keep the states: bytes of the database, bytes written, and the time to restore the last."""

    name: str
    database: int
    written: int
    restore_ms: float


def kagedb_way(directory: Path, kind: str, steps: int) -> float:
    with open_store(sqlite_url(directory / "kaged.db"), directory):
        session = Session.start(Project.add("house", actor=ACTOR), title="steps", actor=ACTOR)
        run = Run.dispatch(session, agent="planner", input={})
        state = None
        for state in KINDS[kind](steps):
            Checkpoint.pause(run, state)
    with open_store(sqlite_url(directory / "kaged.db"), directory):
        head = Checkpoint.head(session)
        assert head
        times = []
        for _ in range(3):
            began = time.perf_counter()
            found = head.restore()
            times.append((time.perf_counter() - began) * 1000)
        assert found == state
    return min(times)


def whole_way(directory: Path, kind: str, steps: int) -> float:
    with closing(connect_sqlite(directory / "whole.db")) as connection:
        connection.execute("CREATE TABLE state (step INTEGER PRIMARY KEY, value TEXT)")
        for step, state in enumerate(KINDS[kind](steps)):
            connection.execute("INSERT INTO state VALUES (?, ?)", (step, json.dumps(state)))
        began = time.perf_counter()
        json.loads(connection.execute("SELECT value FROM state ORDER BY step DESC LIMIT 1").fetchone()[0])
        return (time.perf_counter() - began) * 1000


def langgraph_way(directory: Path, kind: str, steps: int) -> float:
    program = "import langgraph_saver; langgraph_saver.main()"
    done = subprocess.run(
        [os.environ["KAGED_BENCHMARK_LANGGRAPH_PYTHON"], "-c", program, directory / "saver.db", kind, str(steps)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(disk: Disk, name: str, way: Callable[[Path, str, int], float], kind: str, steps: int) -> Figures:
    directory = disk.directory / f"{kind}-{way.__name__}"
    directory.mkdir()
    before = disk.written()
    restore_ms = way(directory, kind, steps)
    written = disk.written() - before
    files = [path for path in directory.iterdir() if ".db" in path.name and path.suffix != ".lock"]
    return Figures(name, sum(path.stat().st_size for path in files), written, restore_ms)


def main() -> None:
    given = arguments(__doc__ or "", steps=(100, 3))
    rival = bool(os.environ.get("KAGED_BENCHMARK_LANGGRAPH_PYTHON"))
    with open_disk(given.quick) as disk:
        describe(disk)
        for kind in KINDS:
            ways = [measure(disk, "kagedb", kagedb_way, kind, given.steps)]
            ways.append(measure(disk, "whole states as JSON", whole_way, kind, given.steps))
            if rival:
                ways.append(measure(disk, "langgraph-checkpoint-sqlite", langgraph_way, kind, given.steps))
            report(kind, given.steps, ways)


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
    sys.exit(main())
