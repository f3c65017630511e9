"""The half of a Peewee database that is alike on both engines: transactions, snapshots, who may join them.

Every write passes `StoreTransaction`: `storage.transaction()`, Peewee's `database.atomic()`, and single statements
outside both, which get one of their own. The engines add how a write begins, commits, becomes durable and rolls back.
A transaction belongs to the thread, and in asyncio to the task, that opened it. An error inside one breaks it on both
engines (PostgreSQL does so by itself, SQLite would go on, or worse, go on without a transaction after a full disk).
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peewee

from ..errors import ReadOnlyStorage, StorageClosed, TransactionError
from ..fields import Limits
from .statements import Kind, classify

if TYPE_CHECKING:
    from .ddl import DDL

logger = logging.getLogger("kagedb")

FULL = "full"
RELAXED = "relaxed"

SLOW_SNAPSHOT_FACTOR = 20
"""A snapshot is warned of after this many times `storage.slow_transaction_ms`: reading may take longer than writing,
but while it lasts a SQLite WAL cannot be reused and PostgreSQL cannot vacuum."""


class _State(peewee._ConnectionLocal):  # type: ignore[misc]
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


def _current_task() -> Any:
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


class StoreDatabase(peewee.Database):  # type: ignore[misc]
    """Mixed in before Peewee's SqliteDatabase or PostgresqlDatabase; see the engines for the hooks it calls."""

    ddl: DDL
    strict_tables = False
    limits = Limits()
    slow_transaction_ms = 0
    read_only = False
    closed_for_good = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = _State()
        self.rendered: dict[Any, Any] = {}
        self._by_thread: dict[int, tuple[weakref.ref[threading.Thread], Any]] = {}

    # Hooks of an engine. Each is called with this thread's connection open.

    def begin_write(self, durability: str) -> None:
        """Wait for the turn to write and begin. Raises StorageBusy; after any error nothing is begun or held."""
        raise NotImplementedError

    def commit_write(self, durability: str) -> None:
        """Commit; durable as asked when it returns. After an error the transaction is still to be rolled back."""
        raise NotImplementedError

    def rollback_write(self) -> None:
        """Roll back what is still open and give the turn away."""
        raise NotImplementedError

    def strengthen(self) -> None:
        """A relaxed transaction has been asked to be full."""
        raise NotImplementedError

    def can_roll_back_to_savepoint(self) -> bool:
        """Whether the transaction is still there: a full disk ends SQLite's, a lost server PostgreSQL's."""
        raise NotImplementedError

    def begin_snapshot(self) -> None:
        raise NotImplementedError

    def end_snapshot(self) -> None:
        raise NotImplementedError

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the turn to write without a transaction, for statements that cannot run inside one."""
        raise NotImplementedError
        yield

    def translate(self, error: Exception) -> Exception:
        """The error of errors.py that a driver's error stands for, or the error itself."""
        raise NotImplementedError

    def statement_done(self) -> None:
        """A read outside any transaction has run; PostgreSQL gives its connection back here."""

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a long read, in constant memory; inside a snapshot or transaction."""
        raise NotImplementedError
        yield

    def dialect(self, sql: str) -> str:
        """Our SQL texts use `?`; this engine's form of it."""
        raise NotImplementedError

    def json_text(self, field: Any, keys: tuple[str | int, ...]) -> Any:
        raise NotImplementedError

    # Connections.

    def connect(self, reuse_if_open: bool = False) -> bool:
        if self.closed_for_good:
            raise StorageClosed("the store is closed", "open it again with kagedb.connect()")
        self.reclaim_dead_threads()
        return bool(super().connect(reuse_if_open))

    def track(self, connection: Any) -> None:
        """Remember which thread a connection belongs to: a thread that dies does not close it."""
        self._by_thread[id(connection)] = (weakref.ref(threading.current_thread()), connection)

    def untrack(self, connection: Any) -> None:
        self._by_thread.pop(id(connection), None)

    def reclaim_dead_threads(self) -> None:
        for key, (thread, connection) in list(self._by_thread.items()):
            alive = thread()
            if (alive is None or not alive.is_alive()) and self._by_thread.pop(key, None) is not None:
                self._close(connection)

    # Statements.

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        """Run SQL as it is: no classification, no turn to write. For the engines' own pragmas, BEGIN and the like."""
        try:
            with peewee.__exception_wrapper__:
                cursor = self.connection().cursor()
                if params:
                    cursor.execute(sql, params)
                else:
                    cursor.execute(sql)
                return cursor
        except peewee.PeeweeException as error:
            raise self.translated(error) from error

    def translated(self, error: Exception) -> Exception:
        state = self._state
        if state.transactions and state.failed is None:
            state.failed = error
        return self.translate(error)

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        kind = classify(sql)
        state = self._state
        if state.transactions:
            self.check_usable()
            if kind is not Kind.READ:
                self._check_write_allowed(kind)
            return self._execute(sql, params, options)
        if kind is Kind.READ:
            cursor = self._execute(sql, params, options)
            if not options:
                self.statement_done()
            return cursor
        self._check_write_allowed(kind)
        if kind is Kind.ALONE:
            with self.alone():
                return _Fetched(self._execute(sql, params, options))
        with self.atomic():
            return _Fetched(self._execute(sql, params, options))

    def _execute(self, sql: str, params: Any, options: dict[str, Any]) -> Any:
        try:
            return super()._execute_cursor(sql, params, **options)
        except peewee.PeeweeException as error:
            translated = self.translated(error)
            if translated is error:
                raise
            raise translated from error

    def _check_write_allowed(self, kind: Kind) -> None:
        if kind is Kind.CONTROL:
            raise TransactionError(
                "BEGIN, COMMIT, ROLLBACK and SAVEPOINT are not statements here",
                "use storage.transaction() or database.atomic()",
            )
        if self._state.snapshot:
            raise TransactionError(
                "a write inside a snapshot", "write outside it, in a storage.transaction() of its own"
            )
        if kind is Kind.ALONE and self._state.transactions:
            raise TransactionError("this statement cannot run inside a transaction", "run it outside")
        if self.read_only:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True to write")

    def check_usable(self) -> None:
        """Refuse to join somebody else's transaction, or to go on in a broken one."""
        state = self._state
        if state.task is not _current_task():
            raise TransactionError(
                "a transaction of this thread belongs to another asyncio task",
                "do not await inside a transaction; run it in a thread with asyncio.to_thread",
            )
        if state.failed is not None:
            raise TransactionError(
                "a statement failed earlier in this transaction, so nothing more can be done in it",
                "leave the block; wrap what may fail in a nested transaction()",
            ) from state.failed

    # Transactions.

    def atomic(self, durability: str | None = None) -> StoreTransaction:
        """One write transaction, or a savepoint inside one.

        `durability` is "full" (on disk when the block is left) or "relaxed"; the strongest wish wins; the outermost
        default is full.
        """
        return StoreTransaction(self, durability)

    transaction = atomic

    def savepoint(self) -> StoreTransaction:
        if not self._state.transactions:
            raise TransactionError("a savepoint outside a transaction", "use storage.transaction()")
        return StoreTransaction(self, None)

    def snapshot(self) -> StoreSnapshot:
        """One consistent read across several queries."""
        return StoreSnapshot(self)

    def manual_commit(self) -> Any:
        raise TransactionError("manual commits are not for this store", "use storage.transaction()")

    def _refuse_manual(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TransactionError("transactions are not begun or ended by hand", "use storage.transaction()")

    begin = commit = rollback = _refuse_manual
    session_start = session_commit = session_rollback = _refuse_manual

    def after_commit(self, callback: Callable[[], Any]) -> Callable[[], Any]:
        """Run `callback` once, after the outermost commit; never when it or a savepoint around it rolls back."""
        if self._state.transactions:
            self._state.after_commit.append(callback)
        else:
            _run_after_commit([callback])
        return callback


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

    def _begin_outermost(self, database: StoreDatabase, state: _State) -> None:
        if database.read_only:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True to write")
        if state.closed:
            database.connect()
        durability = self.durability or FULL
        database.begin_write(durability)
        state.forget_transaction()
        state.task = _current_task()
        state.durability = durability
        state.began = time.monotonic()

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

    def _end_savepoint(self, database: StoreDatabase, state: _State, error: BaseException | None) -> None:
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

    def _end_outermost(self, database: StoreDatabase, state: _State, error: BaseException | None) -> None:
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
                _warn_if_slow(database, began, database.slow_transaction_ms, "a write transaction held the store for")
                database.statement_done()
        _run_after_commit(callbacks)

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
            if state.closed:
                database.connect()
            database.begin_snapshot()
            state.forget_transaction()
            state.task = _current_task()
            state.snapshot = True
            state.began = time.monotonic()
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
            limit = database.slow_transaction_ms * SLOW_SNAPSHOT_FACTOR
            _warn_if_slow(database, began, limit, "a snapshot held back cleaning for")
            database.statement_done()


class _Fetched:
    """The result of a write outside a transaction, read before its commit so that it outlives it."""

    def __init__(self, cursor: Any) -> None:
        self.description = cursor.description
        self.rowcount = cursor.rowcount
        self.lastrowid = getattr(cursor, "lastrowid", None)
        self._rows: Any = iter(cursor.fetchall() if cursor.description else ())
        cursor.close()

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)

    def fetchmany(self, size: int = 1) -> list[Any]:
        return list(itertools.islice(self._rows, size))

    def __iter__(self) -> Any:
        return self._rows

    def close(self) -> None:
        self._rows = iter(())


def _warn_if_slow(database: StoreDatabase, began: float, limit_ms: int, what: str) -> None:
    if database.slow_transaction_ms:
        took_ms = (time.monotonic() - began) * 1000
        if took_ms > limit_ms:
            logger.warning("%s %d ms (warned of above %d ms): %s", what, took_ms, limit_ms, _caller())


def _run_after_commit(callbacks: list[Callable[[], Any]]) -> None:
    # The rows are committed: whatever a callback does, the caller must not be told that they are not.
    for callback in callbacks:
        try:
            callback()
        except Exception:
            logger.exception("a callback after a commit failed; the commit stands")
