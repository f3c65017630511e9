"""What the read verbs cost beside the same queries by hand and by plain Peewee models.

By hand, rows are tuples as the driver gives them, JSON as text on SQLite (psycopg2 decodes it); the verbs give models
with their JSON decoded, which is also done by hand where there is any. With KAGED_BENCHMARK_POSTGRES_URL PostgreSQL is
measured too, in a schema made and dropped.

Usage: python contrib/benchmarks/reads.py [--quick] [--operations N] [--rounds N] [--rows N]
"""

from __future__ import annotations

import argparse
import json
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

BY_HAND, DECODED, VERB, MODELS = "by hand", "by hand, JSON decoded", "kagedb", "plain Peewee"

RUNS = 20
"""In each session."""

EVENTS = 500
"""For each session; with the usual number of rows that is a busy month of one person."""


def measure(where: str, given: argparse.Namespace, driver: plain.Driver) -> None:
    """Fill the open store, then read it in turns; plain Peewee is bound to the same place."""
    project = kagedb.Project.add("house", actor="operator:benchmark")
    sessions, runs = [], []
    for _ in range(max(given.rows // EVENTS, 1)):
        sessions.append(kagedb.Session.start(project, title="night", actor="operator:benchmark"))
        if driver.begin:
            driver.run(driver.begin)
        for _ in range(RUNS):
            runs.append(plain.new_ulid())
            at = plain.now()
            driver.run(plain.INSERT_RUN, (runs[-1], at, sessions[-1].id, "planner", plain.dump(plain.INPUT), at))
            driver.run(plain.FINISH_RUN, (0, plain.dump(plain.OUTPUT), at, runs[-1]))
        driver.end()
    plain.Appender(driver, project.id).fill(given.rows)

    keys = [session.id for session in sessions]
    for title, values, operations, limit, ways in (
        (
            "A run by its key",
            runs,
            given.operations,
            1.5,
            {BY_HAND: by_key_by_hand, DECODED: by_key_decoded, VERB: by_key, MODELS: by_key_by_peewee},
        ),
        (
            f"A session with its {RUNS} runs",
            keys,
            given.operations // 10,
            1.5,
            {BY_HAND: session_by_hand, DECODED: session_decoded, VERB: session_of, MODELS: session_by_peewee},
        ),
        (
            "The last 100 events of a subject",
            plain.SUBJECTS,
            given.operations // 10,
            1.3,
            {BY_HAND: last_by_hand, VERB: last, MODELS: last_by_peewee},
        ),
        (
            f"{given.rows:,} events, one after the other; for each",
            [],
            given.rows,
            2.2,
            {BY_HAND: iterate_by_hand, VERB: iterate, MODELS: iterate_by_peewee},
        ),
    ):
        cases = [Case(name, partial(read, driver, values)) for name, read in ways.items()]
        found = compare(f"{title}, {where}", cases, operations=operations, rounds=given.rounds)
        found.print([name for name in (BY_HAND, DECODED) if name in ways], [Goal(VERB, BY_HAND, "cpu", limit)])


def by_key_by_hand(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        driver.run(plain.SELECT_RUN, (keys[number * 7919 % len(keys)],)).fetchone()
    driver.end_read()


def by_key_decoded(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        decoded_run(driver.run(plain.SELECT_RUN, (keys[number * 7919 % len(keys)],)).fetchone())
    driver.end_read()


def decoded_run(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*row[:-2], decoded(row[-2]), decoded(row[-1]))


def decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


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


def session_decoded(driver: plain.Driver, keys: list[str], count: int) -> None:
    for number in range(count):
        key = keys[number % len(keys)]
        row = driver.run(plain.SELECT_SESSION, (key,)).fetchone()
        decoded(row[8])
        len([decoded_run(row) for row in driver.run(plain.SELECT_RUNS, (key,)).fetchall()])
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
