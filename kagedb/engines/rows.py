"""The cursor of a query: its rows are fetched some at a time, and what a driver says then is one of our errors too.

A statement is over before its rows are read, and outside a transaction its connection is given back: closing the store
in another thread may come in between. What a call into SQLite has to pass is in sqlite_calls.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import peewee

if TYPE_CHECKING:
    from .database import StoreDatabase

ROWS_AHEAD = 64
"""Rows fetched at a time after the first: passing SQLite's gate costs as much as a short row."""


class Rows:
    """Each call into the driver is made inside `gate`. Made inside it, with the first row: most queries have no other.

    Raises StorageClosed where the store was closed meanwhile.
    """

    def __init__(self, cursor: Any, database: StoreDatabase, gate: AbstractContextManager[Any]) -> None:
        self._cursor = cursor
        self._database = database
        self._gate = gate
        self.description = cursor.description
        first = self._call(cursor.fetchone)
        self._ended = first is None
        self._ahead: deque[Any] = deque() if first is None else deque((first,))

    @property
    def rowcount(self) -> int:
        return int(self._cursor.rowcount)

    @property
    def lastrowid(self) -> int | None:
        row: int | None = self._cursor.lastrowid
        return row

    def fetchone(self) -> Any:
        if not self._ahead and not self._ended:
            with self._gate:
                rows = self._call(lambda: self._cursor.fetchmany(ROWS_AHEAD))
            self._ended = len(rows) < ROWS_AHEAD
            self._ahead.extend(rows)
        return self._ahead.popleft() if self._ahead else None

    def fetchmany(self, size: int = 1) -> list[Any]:
        rows: list[Any] = []
        while len(rows) < size and (row := self.fetchone()) is not None:
            rows.append(row)
        return rows

    def fetchall(self) -> list[Any]:
        rows = list(self._ahead)
        self._ahead.clear()
        if not self._ended:
            self._ended = True
            with self._gate:
                rows += self._call(self._cursor.fetchall)
        return rows

    def __iter__(self) -> Iterator[Any]:
        ahead = self._ahead
        while (row := self.fetchone()) is not None:
            yield row
            while ahead:
                yield ahead.popleft()

    def close(self) -> None:
        self._ended = True
        self._ahead.clear()
        with self._gate:
            self._call(self._cursor.close)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            with peewee.__exception_wrapper__:
                return call()
        except peewee.PeeweeException as error:
            self._database.raise_translated(error)
