"""What a commit costs beside the same rows by hand and by plain Peewee: a run dispatched and finished, and a small row
in a relaxed transaction. (What an audit event costs is in audit.py.) The verbs are always durable, so the relaxed one
is a row put by itself. With KAGED_BENCHMARK_POSTGRES_URL PostgreSQL is measured too, in a schema made and dropped.

Usage: python contrib/benchmarks/append.py [--quick] [--operations N] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import plain
from harness import Case, Goal, arguments, compare, describe, open_disk, postgres_schema, postgres_written
from stores import CHAINED, CREATE, Ready, on_postgres, on_sqlite

import kagedb
from kagedb.models.base import Counter
from kagedb.storage import Storage

VERBS = "kagedb"


def dispatch_and_finish(session: Any, count: int) -> None:
    for _ in range(count):
        run = kagedb.Run.dispatch(session, agent="planner", input=plain.INPUT)
        run.finish(output=plain.OUTPUT)


def dispatch_and_finish_by_peewee(database: Any, session: str, count: int) -> None:
    Run = plain.PlainRun
    for _ in range(count):
        at = plain.now()
        with database.atomic():
            run = Run.create(
                id=plain.new_ulid(),
                created_at=at,
                session=session,
                agent="planner",
                input=plain.dump(plain.INPUT),
                state="running",
                started_at=at,
            )
        with database.atomic():
            changes = {"state": "finished", "exit_status": 0, "output": plain.dump(plain.OUTPUT), "error": None}
            Run.update(**changes, finished_at=plain.now()).where(
                (Run.id == run.id) & Run.finished_at.is_null()
            ).execute()


def put_relaxed(storage: Storage, count: int) -> None:
    for _ in range(count):
        with storage.transaction("relaxed"):
            Counter.put(name=plain.new_ulid(), value=1)


def put_by_peewee(database: Any, count: int) -> None:
    for _ in range(count):
        with database.atomic():
            plain.PlainCounter.create(name=plain.new_ulid(), value=1)


def runs(ready: Ready) -> list[Case]:
    session = ready.other.session.id
    return [
        Case(VERBS, partial(dispatch_and_finish, ready.rows.session)),
        Case(CHAINED, partial(plain.dispatch_and_finish, ready.drivers[CHAINED], session)),
        Case("create + update", partial(dispatch_and_finish_by_peewee, ready.peewee, session)),
    ]


def small_rows(ready: Ready) -> list[Case]:
    return [
        Case("transaction + put", partial(put_relaxed, ready.storage)),
        Case(CHAINED, partial(plain.put, ready.drivers[CHAINED])),
        Case(CREATE, partial(put_by_peewee, ready.peewee)),
    ]


def measure(
    where: str,
    given: argparse.Namespace,
    written: Callable[[], int],
    setup: Callable[[str], AbstractContextManager[Ready]],
) -> None:
    for work, durability, cases, goals in (
        ("A run dispatched and finished, two commits", "full", runs, [Goal(VERBS, CHAINED, "cpu", 2.0)]),
        ("One small row a commit", "relaxed", small_rows, []),
    ):
        with setup(durability) as ready:
            found = compare(
                f"{work}, {where}, {durability}",
                cases(ready),
                operations=given.operations,
                rounds=given.rounds,
                written=written,
            )
        found.print([CHAINED], goals)


def main() -> None:
    given = arguments(__doc__ or "", operations=(2000, 4), rounds=(5, 1))
    with open_disk(given.quick) as disk:
        describe(disk)
        measure("SQLite", given, disk.written, partial(on_sqlite, disk))
        if given.postgres:
            with postgres_schema(given.postgres) as (connection, schema):
                written = postgres_written(connection)
                measure("PostgreSQL", given, written, partial(on_postgres, given.postgres, schema, disk))


if __name__ == "__main__":
    main()
