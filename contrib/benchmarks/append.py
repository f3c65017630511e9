"""What a durable audit event, and a run dispatched and finished, cost beside the same rows by hand and by Peewee.

Usage: python contrib/benchmarks/append.py [--quick] [--postgres URL] [--operations N] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from kagedb.storage import Storage

RECORD = "AuditEvent.record"
PLAIN = "same table, no chain, no triggers"
TEXT = "TEXT key, two indexes"
CHAINED = "same table, by hand"
CREATE = "Model.create"

RUN, RAW_RUN = "dispatch + finish", "two statements by hand"

EVENT_GOALS = [Goal(RECORD, PLAIN, "cpu", 1.6), Goal(RECORD, PLAIN, "bytes", 1.2)]
PAGE_GOAL = Goal(RECORD, TEXT, "bytes", 0.6)
"""About pages and b-trees: PostgreSQL's log takes rows."""
RUN_GOALS = [Goal(RUN, RAW_RUN, "cpu", 2.0)]


@dataclass
class Rows:
    """What new events and runs refer to."""

    project: str
    session: Any


def rows_of(name: str) -> Rows:
    project = kagedb.Project.add(name, actor="operator:benchmark")
    return Rows(project.id, kagedb.Session.start(project, title="night", actor="operator:benchmark"))


def record(storage: Storage, durability: str, project: str, count: int) -> None:
    subjects = plain.SUBJECTS
    for number in range(count):
        subject = subjects[number % len(subjects)]
        if durability == "full":
            kagedb.AuditEvent.record(plain.KIND, actor=plain.ACTOR, subject=subject, project=project, body=plain.BODY)
        else:
            with storage.transaction(durability):
                kagedb.AuditEvent.record(
                    plain.KIND, actor=plain.ACTOR, subject=subject, project=project, body=plain.BODY
                )


def dispatch_and_finish(storage: Storage, durability: str, session: Any, count: int) -> None:
    for _ in range(count):
        if durability == "full":
            run = kagedb.Run.dispatch(session, agent="planner", input=plain.INPUT)
            run.finish(output=plain.OUTPUT)
        else:
            with storage.transaction(durability):
                run = kagedb.Run.dispatch(session, agent="planner", input=plain.INPUT)
            with storage.transaction(durability):
                run.finish(output=plain.OUTPUT)


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
    storage: Storage, durability: str, rows: Rows, drivers: dict[str, plain.Driver], database: Any, other: Rows
) -> tuple[list[Case], list[Case]]:
    """The cases for events and for runs. `other` is what the drivers' and Peewee's own rows refer to."""
    appender = {name: plain.Appender(driver, other.project) for name, driver in drivers.items()}
    by_peewee = Peewee(database, other.project, other.session.id)
    events = [
        Case(RECORD, partial(record, storage, durability, rows.project)),
        Case(CHAINED, appender[CHAINED].chained),
        Case(PLAIN, appender[PLAIN].plain),
        Case(TEXT, appender[TEXT].text),
        Case(CREATE, by_peewee.create),
    ]
    runs = [
        Case(RUN, partial(dispatch_and_finish, storage, durability, rows.session)),
        Case(RAW_RUN, partial(plain.dispatch_and_finish, drivers[CHAINED], other.session.id)),
        Case("create + update", by_peewee.dispatch_and_finish),
    ]
    return events, runs


def measure(
    where: str,
    given: argparse.Namespace,
    written: Callable[[], int],
    setup: Callable[[str], Any],
    *more_goals: Goal,
) -> None:
    for durability in ("full", "relaxed"):
        with setup(durability) as (events, runs):
            found = compare(
                f"One audit event a commit, {where}, {durability}",
                events,
                operations=given.operations,
                rounds=given.rounds,
                written=written,
            )
            found.print([PLAIN, CHAINED, TEXT], [*EVENT_GOALS, *more_goals])
            found = compare(
                f"A run dispatched and finished, {where}, {durability}",
                runs,
                operations=given.operations // 2,
                rounds=given.rounds,
                written=written,
            )
            found.print([RAW_RUN], RUN_GOALS)


@contextmanager
def on_sqlite(disk: Disk, durability: str) -> Iterator[Any]:
    """Each case has a file of its own on `disk`, with the same pragmas, and the TEXT key its usual 4 KiB pages."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(_directory(disk.directory)))
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
            yield cases(storage, durability, rows_of("kaged"), drivers, database, other)


@contextmanager
def on_postgres(url: str, schema: str, directory: Path, durability: str) -> Iterator[Any]:
    """All in one schema: the audit events of kagedb and those by hand make one chain there, which changes nothing."""
    import psycopg2

    with ExitStack() as stack:
        place = Path(stack.enter_context(_directory(directory)))
        storage = stack.enter_context(open_store(url, place, storage__schema=schema))
        rows = rows_of(durability)
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
            events, runs = cases(storage, durability, rows, drivers, database, rows)
            peewees = Peewee(database, rows.project, rows.session.id)
            peewees.seq = 1 << 40  # beside the rows by hand, in the same table
            events[-1] = Case(CREATE, peewees.create)
            yield events, runs


@contextmanager
def _directory(parent: Path) -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield directory


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
