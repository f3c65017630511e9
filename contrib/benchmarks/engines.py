"""The same work of a daemon on SQLite and on PostgreSQL, in turns: what docs/engines.md says of when to change.

Needs KAGED_BENCHMARK_POSTGRES_URL; its server should be where it would be in earnest, with fsync on. The CPU is that of
this side alone, so compare the wall time. Each round opens the store anew, which is not measured.

Usage: python contrib/benchmarks/engines.py [--quick] [--operations N] [--rounds N]
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import plain
from harness import Case, arguments, compare, describe, open_disk, open_store, postgres_schema, sqlite_url
from stores import rows_of

import kagedb
from kagedb import AuditEvent, Run

SQLITE, POSTGRES = "SQLite", "PostgreSQL"

THREADS = 8
"""Of a daemon that has as many agents at work."""

READ_EVENTS = 2_000
"""Events of the subject that is read."""

BATCH_EVENTS = 200
"""Of them put in one transaction, so that none is warned of as slow."""


class Store:
    """One of the two, opened for each round, with a session whose runs and events are read."""

    def __init__(self, url: str, place: Path, **settings: Any) -> None:
        self._url, self._place, self._settings = url, place, settings
        self._stack = ExitStack()
        with open_store(url, place, **settings) as storage:
            self.session = rows_of("engines").session
            run = Run.dispatch(self.session, agent="planner", input=plain.INPUT)
            self.run = run
            for _ in range(READ_EVENTS // BATCH_EVENTS):
                with storage.transaction("relaxed"):
                    record(self, BATCH_EVENTS)

    def open(self) -> None:
        self.storage = self._stack.enter_context(open_store(self._url, self._place, **self._settings))

    def close(self) -> None:
        self._stack.close()


def record(store: Store, count: int) -> None:
    for _ in range(count):
        AuditEvent.record("policy.decision", actor="agent:planner", subject=store.run, body=plain.INPUT)


def record_relaxed(store: Store, count: int) -> None:
    for _ in range(count):
        with store.storage.transaction("relaxed"):
            kagedb.models.base.Counter.put(name=plain.new_ulid(), value=1)


def record_in_threads(store: Store, count: int) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            record(store, count // THREADS)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def dispatch_and_finish(store: Store, count: int) -> None:
    for _ in range(count):
        Run.dispatch(store.session, agent="planner", input=plain.INPUT).finish(output=plain.OUTPUT)


def read_events(store: Store, count: int) -> None:
    query = AuditEvent.select().where(AuditEvent.subject == store.run.ref).order_by(AuditEvent.seq.desc()).limit(100)
    for _ in range(count):
        assert len(list(AuditEvent.rows(query))) == 100


def count_by_kind(store: Store, count: int) -> None:
    for _ in range(count):
        store.storage.database.execute_sql("SELECT kind, COUNT(*) FROM audit_event GROUP BY kind").fetchall()


WORK: tuple[tuple[str, Callable[[Store, int], None], int], ...] = (
    ("An audit event, durable", record, 1),
    (f"An audit event, durable, {THREADS} threads", record_in_threads, 1),
    ("A run dispatched and finished, two durable commits", dispatch_and_finish, 1),
    ("A small row, relaxed", record_relaxed, 1),
    ("The last 100 events of a run", read_events, 4),
    ("All events counted by kind", count_by_kind, 20),
)
"""What is done, and how many times fewer of it."""


def main() -> None:
    given = arguments(__doc__ or "", operations=(2000, 40), rounds=(5, 1))
    if not given.postgres:
        raise SystemExit("set KAGED_BENCHMARK_POSTGRES_URL to the URL of a database")
    with open_disk(given.quick) as disk, postgres_schema(given.postgres) as (_, schema):
        describe()
        stores = {
            SQLITE: Store(sqlite_url(disk.directory / "kaged.db"), disk.directory),
            POSTGRES: Store(given.postgres, disk.directory, storage__schema=schema),
        }
        for title, work, fewer in WORK:
            compare(
                title,
                [Case(name, partial(work, store), store.open, store.close) for name, store in stores.items()],
                operations=max(1, given.operations // fewer),
                rounds=given.rounds,
            ).print([SQLITE])


if __name__ == "__main__":
    main()
