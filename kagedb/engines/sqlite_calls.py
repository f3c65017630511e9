"""Who is inside SQLite at this moment, so that a fork, and closing, can wait until nobody is.

SQLite runs without Python's lock. A thread that a fork catches inside it does not exist in the child, but the mutexes
that it holds do: the child would wait for them for ever. So every call goes through the gate, the steps of a query too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import peewee

if TYPE_CHECKING:
    from .sqlite_database import SqliteStoreDatabase

ROWS_AHEAD = 64
"""Rows fetched at a time after the first: passing the gate costs as much as a short row."""

PAUSE_POLL_SECONDS = 0.0005
"""Between looks at whether the other threads' calls have ended; most take 10 microseconds."""


class CallGate:
    """Open, but while a fork or closing is under way; as a context manager it is around each call into SQLite."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self._paused_by: int | None = None
        self._pause = threading.Lock()

    def __enter__(self) -> None:
        me = threading.get_ident()
        depth = self._inside.get(me, 0)
        # First said, then asked: whoever closes the gate says so first, and then looks who is inside.
        self._inside[me] = depth + 1
        while not depth and self._paused_by not in (None, me):
            del self._inside[me]
            with self._pause:
                self._inside[me] = 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        depth = self._inside[me] - 1
        if depth:
            self._inside[me] = depth
        else:
            del self._inside[me]

    def pause(self, seconds: float) -> bool:
        """Close the gate, and wait until the other threads are out; False where one stays. `resume` opens it."""
        self._pause.acquire()
        self._paused_by = threading.get_ident()
        return self.wait_until_alone(seconds)

    def wait_until_alone(self, seconds: float) -> bool:
        """While it is closed, wait again; False where somebody stays."""
        me = threading.get_ident()
        deadline = time.monotonic() + seconds
        while set(self._inside) - {me}:
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_POLL_SECONDS)
        return True

    def resume(self) -> None:
        self._paused_by = None
        self._pause.release()


class Rows:
    """The cursor of a query, read through the gate. Made inside it, with the first row: most queries have no other."""

    def __init__(self, cursor: Any, database: SqliteStoreDatabase) -> None:
        self._cursor = cursor
        self._database = database
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
            with self._database.calls:
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
            with self._database.calls:
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
        with self._database.calls:
            self._call(self._cursor.close)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            with peewee.__exception_wrapper__:
                return call()
        except peewee.PeeweeException as error:
            self._database.raise_translated(error)
