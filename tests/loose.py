"""A store with room in it that holds nothing, for tests of what gives that back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import kagedb
from contents import contents
from kagedb import Project, Run, Session
from kagedb.operations import checking

RUNS, RUN_BYTES = 200, 10_000

COMPACT = """
import sys
import kagedb
from kagedb.engines import sqlite_compact
from kagedb.operations import compacting
sqlite_compact.MOST_PAGES = 16
with kagedb.connect(url=sys.argv[1]) as storage:
    print("ready", flush=True)
    input()
    done = compacting.compact(storage)
    print("done", done.finished, done.longest_hold_ms, flush=True)
"""


def fill(url: str, runs: int = RUNS) -> None:
    """A store of two megabytes, of which half is then removed, so that what stays must be moved.

    On PostgreSQL the newer half: a plain VACUUM only gives back what is at the end of a table.
    """
    with kagedb.connect(url=url) as storage:
        session = Session.start(Project.add("house", actor="operator:ana"), title="", actor="operator:ana")
        with storage.transaction("relaxed"):
            ids = [
                Run.dispatch(
                    session, agent="planner", input={"filler": os.urandom(RUN_BYTES // 2).hex()}, parent=None
                ).id
                for _ in range(runs)
            ]
        with storage.transaction("relaxed"):
            half = slice(runs // 2) if storage.engine.name == "sqlite" else slice(runs // 2, None)
            Run.delete().where(Run.id.in_(ids[half])).execute()


def all_rows(url: str) -> dict[str, Any]:
    with kagedb.connect(url=url, read_only=True) as storage:
        return contents(storage)


def wholeness(url: str) -> list[str]:
    """What is wrong with the store, damage above all."""
    with kagedb.connect(url=url, read_only=True) as storage:
        return [finding.wrong for finding in checking.check(storage).findings]


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite://"))
