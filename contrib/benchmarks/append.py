"""What a commit costs beside the same rows by hand and by plain Peewee: an audit event, a run dispatched and finished,
and a small row in a relaxed transaction. The verbs are always durable, so the relaxed one is a row put by itself.
With KAGED_BENCHMARK_POSTGRES_URL PostgreSQL is measured too, in a schema made and dropped.

Usage: python contrib/benchmarks/append.py [--quick] [--operations N] [--rounds N]
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peewee
import plain
from harness import (
    Case,
    Disk,
    Goal,
    arguments,
    compare,
    connect_sqlite,
    describe,
    open_disk,
    open_store,
    postgres_schema,
    postgres_written,
    sqlite_pragmas,
    sqlite_url,
)

import kagedb
from kagedb.models.base import Counter
from kagedb.storage import Storage

RECORD = "AuditEvent.record"
CHAINED = "by hand"
"""The same rows in the same table, chain, triggers and all."""
PLAIN = "no chain"
"""The same table without chain and triggers."""
TEXT = "TEXT key"
"""The same with a ULID as the key, two indexes, and SQLite's usual pages of 4 KiB."""
CREATE = "Model.create"
"""By plain Peewee, in the table without chain and triggers."""

VERBS = "kagedb"
EVENT = "One audit event a commit"
RUN = "A run dispatched and finished, two commits"
ROW = "One small row a commit"

EVENT_GOALS = [Goal(RECORD, PLAIN, "cpu", 1.6), Goal(RECORD, PLAIN, "bytes", 1.2)]
PAGE_GOAL = Goal(RECORD, TEXT, "bytes", 0.6)
"""About pages and b-trees: PostgreSQL's log takes rows."""


@dataclass
class Rows:
    """What new events and runs refer to."""

    project: str
    session: Any


def rows_of(name: str) -> Rows:
    project = kagedb.Project.add(name, actor="operator:benchmark")
    return Rows(project.id, kagedb.Session.start(project, title="night", actor="operator:benchmark"))


def record(project: str, count: int) -> None:
    subjects = plain.SUBJECTS
    for number in range(count):
        subject = subjects[number % len(subjects)]
        kagedb.AuditEvent.record(plain.KIND, actor=plain.ACTOR, subject=subject, project=project, body=plain.BODY)


def dispatch_and_finish(session: Any, count: int) -> None:
    for _ in range(count):
        run = kagedb.Run.dispatch(session, agent="planner", input=plain.INPUT)
        run.finish(output=plain.OUTPUT)


def put_relaxed(storage: Storage, count: int) -> None:
    for _ in range(count):
        with storage.transaction("relaxed"):
            Counter.put(name=plain.new_ulid(), value=1)


class Peewee:
    """The same by plain Peewee models, bound to `database`."""

    def __init__(self, database: Any, project: str, session: str) -> None:
        self.database = database
        self.project = project
        self.session = session
        self.seq = 0

    def create(self, count: int) -> None:
        for number in range(count):
            self.seq += 1
            with self.database.atomic():
                plain.PlainEvent.create(
                    seq=self.seq,
                    at=plain.now(),
                    kind=plain.KIND,
                    actor=plain.ACTOR,
                    subject=plain.SUBJECTS[number % len(plain.SUBJECTS)],
                    project=self.project,
                    body=plain.dump(plain.BODY),
                )

    def put(self, count: int) -> None:
        for _ in range(count):
            with self.database.atomic():
                plain.PlainCounter.create(name=plain.new_ulid(), value=1)

    def dispatch_and_finish(self, count: int) -> None:
        Run = plain.PlainRun
        for _ in range(count):
            at = plain.now()
            with self.database.atomic():
                run = Run.create(
                    id=plain.new_ulid(),
                    created_at=at,
                    session=self.session,
                    agent="planner",
                    input=plain.dump(plain.INPUT),
                    state="running",
                    started_at=at,
                )
            with self.database.atomic():
                changes = {"state": "finished", "exit_status": 0, "output": plain.dump(plain.OUTPUT), "error": None}
                Run.update(**changes, finished_at=plain.now()).where(
                    (Run.id == run.id) & Run.finished_at.is_null()
                ).execute()


def cases(
    storage: Storage, rows: Rows, drivers: dict[str, plain.Driver], by_peewee: Peewee, other: Rows
) -> dict[str, list[Case]]:
    """The cases by durability and work. `other` is what rows by hand refer to."""
    appender = {name: plain.Appender(driver, other.project) for name, driver in drivers.items()}
    return {
        EVENT: [
            Case(RECORD, partial(record, rows.project)),
            Case(CHAINED, appender[CHAINED].chained),
            Case(PLAIN, appender[PLAIN].plain),
            Case(TEXT, appender[TEXT].text),
            Case(CREATE, by_peewee.create),
        ],
        RUN: [
            Case(VERBS, partial(dispatch_and_finish, rows.session)),
            Case(CHAINED, partial(plain.dispatch_and_finish, drivers[CHAINED], other.session.id)),
            Case("create + update", by_peewee.dispatch_and_finish),
        ],
        ROW: [
            Case("transaction + put", partial(put_relaxed, storage)),
            Case(CHAINED, partial(plain.put, drivers[CHAINED])),
            Case(CREATE, by_peewee.put),
        ],
    }


def measure(
    where: str,
    given: argparse.Namespace,
    written: Callable[[], int],
    setup: Callable[[str], AbstractContextManager[dict[str, list[Case]]]],
    *more_goals: Goal,
) -> None:
    for durability, work, baselines, goals in (
        ("full", EVENT, [PLAIN, CHAINED, TEXT], [*EVENT_GOALS, *more_goals]),
        ("full", RUN, [CHAINED], [Goal(VERBS, CHAINED, "cpu", 2.0)]),
        ("relaxed", ROW, [CHAINED], []),
    ):
        with setup(durability) as ready:
            found = compare(
                f"{work}, {where}, {durability}",
                ready[work],
                operations=given.operations,
                rounds=given.rounds,
                written=written,
            )
        found.print(baselines, goals)


@contextmanager
def on_sqlite(disk: Disk, durability: str) -> Iterator[dict[str, list[Case]]]:
    """Each case has a file of its own on `disk`, with the same pragmas, and the TEXT key its usual 4 KiB pages."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=disk.directory)))
        with open_store(sqlite_url(place / "by-hand.db"), place):
            other = rows_of("by hand")
        (place / "peewee.db").write_bytes((place / "by-hand.db").read_bytes())
        drivers: dict[str, plain.Driver] = {}
        for name, file, page_size in (
            (CHAINED, "by-hand.db", 2048),
            (PLAIN, "plain.db", 2048),
            (TEXT, "text.db", 4096),
        ):
            connection = connect_sqlite(place / file, page_size=page_size, durability=durability)
            stack.callback(connection.close)
            drivers[name] = plain.Sqlite(connection)
        drivers[PLAIN].make(*plain.PLAIN_EVENT)
        drivers[TEXT].make(*plain.TEXT_EVENT)
        pragmas = [pragma.removeprefix("PRAGMA ").split(" = ") for pragma in sqlite_pragmas(2048, durability)]
        database = peewee.SqliteDatabase(place / "peewee.db", pragmas=pragmas)
        with database.bind_ctx(plain.PLAIN_MODELS), database.connection_context():
            plain.Sqlite(database.connection()).make(*plain.PLAIN_EVENT)
            storage = stack.enter_context(open_store(sqlite_url(place / "kaged.db"), place))
            by_peewee = Peewee(database, other.project, other.session.id)
            yield cases(storage, rows_of("kaged"), drivers, by_peewee, other)


@contextmanager
def on_postgres(url: str, schema: str, directory: Path, durability: str) -> Iterator[dict[str, list[Case]]]:
    """All in one schema: the audit events of kagedb and those by hand make one chain there, which changes nothing."""
    import psycopg2

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        storage = stack.enter_context(open_store(url, place, storage__schema=schema))
        rows = rows_of(secrets.token_hex(4))
        options = f"-c search_path={schema}"
        drivers: dict[str, plain.Driver] = {}
        for name in (CHAINED, PLAIN, TEXT):
            connection = psycopg2.connect(url, options=options)
            stack.callback(connection.close)
            drivers[name] = plain.Postgres(connection, durability)
        drivers[PLAIN].make("DROP TABLE IF EXISTS plain_event", *plain.PLAIN_EVENT)
        drivers[TEXT].make("DROP TABLE IF EXISTS text_event", *plain.TEXT_EVENT)
        commit = "on" if durability == "full" else "off"
        database = peewee.PostgresqlDatabase(url, options=f"{options} -c synchronous_commit={commit}")
        with database.bind_ctx(plain.PLAIN_MODELS), database.connection_context():
            by_peewee = Peewee(database, rows.project, rows.session.id)
            by_peewee.seq = 1 << 40  # beside the rows by hand, in the same table
            yield cases(storage, rows, drivers, by_peewee, rows)


def main() -> None:
    given = arguments(__doc__ or "", operations=(2000, 4), rounds=(5, 1))
    with open_disk(given.quick) as disk:
        describe(disk)
        measure("SQLite", given, disk.written, partial(on_sqlite, disk), PAGE_GOAL)
        if given.postgres:
            with postgres_schema(given.postgres) as (connection, schema):
                written = postgres_written(connection)
                measure("PostgreSQL", given, written, partial(on_postgres, given.postgres, schema, disk.directory))


if __name__ == "__main__":
    main()
