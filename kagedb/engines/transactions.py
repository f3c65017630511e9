"""Transactions and snapshots, alike on both engines: how they begin, nest, end, and who may join them.

A transaction belongs to the thread, and in asyncio to the task, that opened it. An error inside one breaks it on both
engines (PostgreSQL does so by itself, SQLite would go on, or worse, go on without a transaction after a full disk).
What an engine does to begin, commit and roll back is in its database class; what both share of that in database.py.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import peewee

from ..errors import ReadOnlyStorage, TransactionError

if TYPE_CHECKING:
    from .database import StoreDatabase

logger = logging.getLogger("kagedb")

FULL = "full"
RELAXED = "relaxed"

SLOW_SNAPSHOT_FACTOR = 20
"""A snapshot is warned of after this many times `storage.slow_transaction_ms`: reading may take longer than writing,
but while it lasts a SQLite WAL cannot be reused and PostgreSQL cannot vacuum."""


class State(peewee._ConnectionLocal):  # type: ignore[misc]
    """What Peewee keeps by thread, and what a transaction of ours adds to it."""

    def reset(self) -> None:
        super().reset()
        self.forget_transaction()

    def forget_transaction(self) -> None:
        self.task: Any = None
        self.snapshot = False
        self.durability: str | None = None
        self.failed: BaseException | None = None
        self.after_commit: list[Callable[[], Any]] = []
        self.savepoints = 0
        self.began = 0.0


def current_task() -> Any:
    """The running asyncio task, or None. Does not import asyncio."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


def _caller() -> str:
    """File and line of the nearest frame that is neither ours nor Peewee's."""
    package = __name__.partition(".")[0]
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        package,
        "peewee",
        "playhouse",
        "contextlib",
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown place"


class StoreTransaction(peewee._callable_context_manager):  # type: ignore[misc]
    """A write transaction (outermost) or a savepoint (nested); also a decorator."""

    def __init__(self, database: StoreDatabase, durability: str | None) -> None:
        if durability not in (None, FULL, RELAXED):
            raise TransactionError(f"unknown durability {durability!r}", 'write "full" or "relaxed"')
        self.database = database
        self.durability = durability
        self._savepoint = ""
        self._callbacks_before = 0

    def _build_ctx(self) -> StoreTransaction:
        return StoreTransaction(self.database, self.durability)

    def __enter__(self) -> StoreTransaction:
        database = self.database
        state = database._state
        if not state.transactions:
            self._begin_outermost(database, state)
        else:
            database.check_usable()
            if state.snapshot:
                raise TransactionError("a write transaction inside a snapshot", "end the snapshot first")
            if self.durability == FULL and state.durability == RELAXED:
                database.strengthen()
                state.durability = FULL
            state.savepoints += 1
            self._savepoint = f"kaged_{state.savepoints}"
            self._callbacks_before = len(state.after_commit)
            database.raw(f"SAVEPOINT {self._savepoint}")
        state.transactions.append(self)
        return self

    def _begin_outermost(self, database: StoreDatabase, state: State) -> None:
        if database.read_only:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True to write")
        durability = self.durability or FULL
        _begin(database, partial(database.begin_write, durability))
        state.durability = durability

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        database = self.database
        state = database._state
        if not state.transactions or state.transactions[-1] is not self:
            raise TransactionError("transactions were left in another order than they were entered")
        state.transactions.pop()
        if self._savepoint:
            self._end_savepoint(database, state, error)
        else:
            self._end_outermost(database, state, error)

    def _end_savepoint(self, database: StoreDatabase, state: State, error: BaseException | None) -> None:
        failed = state.failed
        if error is None and failed is None:
            database.raw(f"RELEASE SAVEPOINT {self._savepoint}")
            return
        del state.after_commit[self._callbacks_before :]
        if database.can_roll_back_to_savepoint():
            database.raw(f"ROLLBACK TO SAVEPOINT {self._savepoint}")
            database.raw(f"RELEASE SAVEPOINT {self._savepoint}")
            state.failed = None
        if error is None:
            raise TransactionError(
                "a statement failed in a nested transaction and the error was dropped; the nested part was rolled back",
                "let the error leave the block",
            ) from failed

    def _end_outermost(self, database: StoreDatabase, state: State, error: BaseException | None) -> None:
        failed, callbacks = state.failed, state.after_commit
        committed = False
        try:
            if error is None and failed is None:
                database.commit_write(state.durability or FULL)
                committed = True
            elif error is None:
                raise TransactionError(
                    "a statement failed in this transaction and the error was dropped; nothing was saved",
                    "let the error leave the block, or wrap what may fail in a nested transaction()",
                ) from failed
        finally:
            began = state.began
            try:
                if not committed:
                    database.rollback_write()
            finally:
                state.forget_transaction()
                database.busy_threads.discard(threading.get_ident())
                _warn_if_slow(database, began, database.slow_transaction_ms, "a write transaction held the store for")
                database.statement_done()
        if committed:
            run_after_commit(callbacks)

    def commit(self, begin: bool = True) -> None:
        raise TransactionError("a transaction is committed by leaving its block", "split it into two blocks")

    def rollback(self, begin: bool = True) -> None:
        raise TransactionError("a transaction is rolled back by an error that leaves its block", "raise one")


class StoreSnapshot(peewee._callable_context_manager):  # type: ignore[misc]
    """A read-only transaction that sees one state of the store; joins a snapshot around it."""

    def __init__(self, database: StoreDatabase) -> None:
        self.database = database

    def _build_ctx(self) -> StoreSnapshot:
        return StoreSnapshot(self.database)

    def __enter__(self) -> StoreSnapshot:
        database = self.database
        state = database._state
        if state.transactions:
            database.check_usable()
            if not state.snapshot:
                raise TransactionError("a snapshot inside a write transaction", "read in the transaction itself")
        else:
            _begin(database, database.begin_snapshot)
            state.snapshot = True
        state.transactions.append(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        database = self.database
        state = database._state
        if not state.transactions or state.transactions[-1] is not self:
            raise TransactionError("snapshots were left in another order than they were entered")
        state.transactions.pop()
        if state.transactions:
            return
        began = state.began
        state.forget_transaction()
        try:
            database.end_snapshot()
        finally:
            database.busy_threads.discard(threading.get_ident())
            limit = database.slow_transaction_ms * SLOW_SNAPSHOT_FACTOR
            _warn_if_slow(database, began, limit, "a snapshot held back cleaning for")
            database.statement_done()


def _begin(database: StoreDatabase, begin: Callable[[], None]) -> None:
    """Begin what this thread is in until it is left; after an error nothing is begun."""
    me, state = threading.get_ident(), database._state
    # Before the question whether the store is open: whoever closes it says so first, and then looks here.
    database.busy_threads.add(me)
    try:
        database.require_open()
        if state.closed:
            database.connect()
        begin()
    except BaseException:
        database.busy_threads.discard(me)
        database.statement_done()
        raise
    state.forget_transaction()
    state.task = current_task()
    state.began = time.monotonic()


def _warn_if_slow(database: StoreDatabase, began: float, limit_ms: int, what: str) -> None:
    if database.slow_transaction_ms:
        took_ms = (time.monotonic() - began) * 1000
        if took_ms > limit_ms:
            logger.warning("%s %d ms (warned of above %d ms): %s", what, took_ms, limit_ms, _caller())


def run_after_commit(callbacks: list[Callable[[], Any]]) -> None:
    # The rows are committed: whatever a callback does, the caller must not be told that they are not.
    for callback in callbacks:
        try:
            callback()
        except Exception:
            logger.exception("a callback after a commit failed; the commit stands")
