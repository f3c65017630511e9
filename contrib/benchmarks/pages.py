"""What the page size of a new SQLite store costs: bytes and time of an append, of iterating, of a key, and file size.

This is why `sqlite.page_size` is 2048 by default.

Usage: python contrib/benchmarks/pages.py [--quick] [--operations N] [--rounds N] [--rows N]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import plain
from harness import (
    Case,
    Disk,
    arguments,
    compare,
    connect_sqlite,
    describe,
    open_disk,
    open_store,
    print_table,
    sqlite_url,
)

import kagedb

PAGE_SIZES = (1024, 2048, 4096, 8192)
USUAL = "4096"
"""SQLite's own default."""


class Stores:
    """A filled store for each page size; models can be bound to one at a time, outside what is measured."""

    def __init__(self, disk: Disk, rows: int) -> None:
        self.disk = disk
        self.keys: dict[int, list[str]] = {}
        self._open = ExitStack()
        for page_size in PAGE_SIZES:
            self.open(page_size)
            project = kagedb.Project.add("house", actor="operator:benchmark")
            session = kagedb.Session.start(project, title="night", actor="operator:benchmark")
            storage: Any = self.storage
            with storage.transaction():
                runs = [
                    kagedb.Run.dispatch(session, agent="planner", input=plain.INPUT) for _ in range(max(rows // 20, 1))
                ]
            self.keys[page_size] = [run.id for run in runs]
            connection = connect_sqlite(self.path(page_size))
            plain.Appender(plain.Sqlite(connection), project.id).fill(rows)
            connection.close()
            self.close()

    def path(self, page_size: int) -> Any:
        return self.disk.directory / f"{page_size}.db"

    def open(self, page_size: int) -> None:
        url = sqlite_url(self.path(page_size))
        self.storage = self._open.enter_context(open_store(url, self.disk.directory, sqlite__page_size=page_size))

    def close(self) -> None:
        self._open.close()

    def cases(self, work: Callable[[int, int], Any], warm_up: int = 0) -> list[Case]:
        """`warm_up` is how often the work is done between opening a store and measuring it."""

        def before(size: int) -> None:
            self.open(size)
            work(size, warm_up)

        return [
            Case(str(size), partial(work, size), before=partial(before, size), after=self.close) for size in PAGE_SIZES
        ]

    def append(self, _page_size: int, count: int) -> None:
        for number in range(count):
            subject = plain.SUBJECTS[number % len(plain.SUBJECTS)]
            kagedb.AuditEvent.record(plain.KIND, actor=plain.ACTOR, subject=subject, body=plain.BODY)

    def iterate(self, _page_size: int, count: int) -> None:
        for _ in kagedb.AuditEvent.rows(kagedb.AuditEvent.select().limit(count)):
            pass

    def get(self, page_size: int, count: int) -> None:
        keys = self.keys[page_size]
        for number in range(count):
            kagedb.Run.by_id(keys[number * 7919 % len(keys)])


def main() -> None:
    given = arguments(__doc__ or "", operations=(2000, 4), rounds=(5, 1), rows=(100_000, 40))
    with open_disk(given.quick) as disk:
        describe(disk)
        stores = Stores(disk, given.rows)
        sizes = {size: stores.path(size).stat().st_size for size in PAGE_SIZES}
        print(f"\n### File size, {given.rows:,} events and {len(stores.keys[2048]):,} runs\n")
        rows = [[str(size), f"{sizes[size] / 2**20:.1f}", f"{sizes[size] / sizes[4096]:.2f}"] for size in PAGE_SIZES]
        print_table(["page size", "MB", f"x {USUAL}"], rows)
        for title, work, operations in (
            (f"{given.rows:,} events, one after the other; for each", stores.iterate, given.rows),
            ("A run by its key", stores.get, given.operations),
        ):
            compare(title, stores.cases(work), operations=operations, rounds=given.rounds).print([USUAL])
        # A daemon overwrites a write-ahead log that has reached its size; while it grows, the file system writes too.
        compare(
            "One audit event a commit, full",
            stores.cases(stores.append, warm_up=given.operations),
            operations=given.operations,
            rounds=given.rounds,
            written=disk.written,
        ).print([USUAL])


if __name__ == "__main__":
    main()
