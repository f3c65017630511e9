"""What the read verbs cost beside the same queries by hand and by plain Peewee models.

By hand, rows are tuples as the driver gives them; the verbs give models, with their JSON decoded.

Usage: python contrib/benchmarks/reads.py [--quick] [--postgres URL] [--operations N] [--rounds N] [--rows N]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import peewee
import plain
from harness import (
    Case,
    Goal,
    arguments,
    compare,
    connect_sqlite,
    describe,
    open_disk,
    open_store,
    postgres_schema,
    sqlite_url,
)

import kagedb

BY_HAND, VERB, MODELS = "by hand", "kagedb", "plain Peewee"

SESSIONS, RUNS = 200, 20
"""Sessions in the store and runs in each: a busy month of one person."""


def measure(where: str, given: argparse.Namespace, driver: plain.Driver) -> None:
    """Fill the open store, then read it in turns; plain Peewee is bound to the same place."""
    project = kagedb.Project.add("house", actor="operator:benchmark")
    sessions = [kagedb.Session.start(project, title="night", actor="operator:benchmark") for _ in range(SESSIONS)]
    runs = []
    for session in sessions:
        for _ in range(RUNS):
            runs.append(plain.new_ulid())
            at = plain.now()
            if driver.begin:
                driver.run(driver.begin)
            driver.run(plain.INSERT_RUN, (runs[-1], at, session.id, "planner", plain.dump(plain.INPUT), at))
            driver.run(plain.FINISH_RUN, (0, plain.dump(plain.OUTPUT), at, runs[-1]))
            driver.end()
    plain.Appender(driver, project.id).chained(given.rows, at_once=True)

    keys = [session.id for session in sessions]
    for title, cases, limit, operations in (
        (
            "A run by its key",
            (by_key_by_hand, by_key, by_key_by_peewee),
            1.5,
            (runs, given.operations),
        ),
        (
            "The last 100 events of a subject",
            (last_by_hand, last, last_by_peewee),
            1.3,
            (plain.SUBJECTS, given.operations // 10),
        ),
        (
            f"A session with its {RUNS} runs",
            (session_by_hand, session_of, session_by_peewee),
            1.5,
            (keys, given.operations // 10),
        ),
        (
            f"{given.rows:,} events, one after the other; for each",
            (iterate_by_hand, iterate, iterate_by_peewee),
            2.2,
            ([], given.rows),
        ),
    ):
        named = zip((BY_HAND, VERB, MODELS), cases, strict=True)
        ready = [Case(name, partial(case, driver, operations[0])) for name, case in named]
        found = compare(f"{title}, {where}", ready, operations=operations[1], rounds=given.rounds)
        found.print([BY_HAND], [Goal(VERB, BY_HAND, "cpu", limit)])


def by_key_by_hand(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        driver.run(plain.SELECT_RUN, (keys[number * 7919 % len(keys)],)).fetchone()
    driver.end_read()


def by_key(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        kagedb.Run.by_id(keys[number * 7919 % len(keys)])


def by_key_by_peewee(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        plain.PlainRun.get_by_id(keys[number * 7919 % len(keys)])


def last_by_hand(driver: plain.Driver, subjects: list[str], count: int) -> None:
    for number in range(count):
        driver.run(plain.SELECT_LAST, (subjects[number % len(subjects)],)).fetchall()
    driver.end_read()


def last(driver: plain.Driver, subjects: list[str], count: int) -> None:
    for number in range(count):
        kagedb.AuditEvent.of(subjects[number % len(subjects)], 100)


def last_by_peewee(driver: plain.Driver, subjects: list[str], count: int) -> None:
    Event = plain.PlainAuditEvent
    for number in range(count):
        subject = subjects[number % len(subjects)]
        list(Event.select().where(Event.subject == subject).order_by(Event.seq.desc()).limit(100))


def session_by_hand(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        key = keys[number % len(keys)]
        driver.run(plain.SELECT_SESSION, (key,)).fetchone()
        len(driver.run(plain.SELECT_RUNS, (key,)).fetchall())
    driver.end_read()


def session_of(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        len(kagedb.Run.of(kagedb.Session.by_id(keys[number % len(keys)])))


def session_by_peewee(driver: plain.Driver, keys: list[str], count: int) -> None:
    Run = plain.PlainRun
    for number in range(count):
        session = plain.PlainSession.get_by_id(keys[number % len(keys)])
        len(Run.select().where(Run.session == session).order_by(Run.id))


def iterate_by_hand(driver: plain.Driver, _keys: list[str], _count: int) -> None:
    for _ in driver.run(plain.SELECT_EVENTS):
        pass
    driver.end_read()


def iterate(driver: plain.Driver, _keys: list[str], _count: int) -> None:
    for _ in kagedb.AuditEvent.rows(kagedb.AuditEvent.select()):
        pass


def iterate_by_peewee(driver: plain.Driver, _keys: list[str], _count: int) -> None:
    for _ in plain.PlainAuditEvent.select().iterator():
        pass


def bound(database: Any) -> Any:
    return database.bind_ctx(plain.PLAIN_MODELS)


def main() -> None:
    given = arguments(__doc__ or "", operations=(5000, 20), rounds=(7, 1), rows=(100_000, 300))
    describe()
    with open_disk(quick=True) as disk:
        path = disk.directory / "kaged.db"
        with open_store(sqlite_url(path), disk.directory):
            database = peewee.SqliteDatabase(path)
            connection = connect_sqlite(path)
            with bound(database), database.connection_context():
                measure("SQLite", given, plain.Sqlite(connection))
            connection.close()
        if given.postgres:
            import psycopg2

            with postgres_schema(given.postgres) as (_, schema):
                with open_store(given.postgres, disk.directory, storage__schema=schema):
                    options = f"-c search_path={schema}"
                    database = peewee.PostgresqlDatabase(given.postgres, options=options)
                    connection = psycopg2.connect(given.postgres, options=options)
                    with bound(database), database.connection_context():
                        measure("PostgreSQL", given, plain.Postgres(connection))
                    connection.close()


if __name__ == "__main__":
    main()
