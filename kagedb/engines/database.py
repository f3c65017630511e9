"""The half of a Peewee database that is alike on both engines: connections, statements, and who may write when.

Every write passes `StoreTransaction` (transactions.py): `storage.transaction()`, Peewee's `database.atomic()`, and
single statements outside both, which get one of their own. The engines add how a write begins, commits, becomes durable
and rolls back, and what their driver's errors mean.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import peewee

from ..errors import ReadOnlyStorage, StorageClosed, TransactionError
from ..fields import Limits
from .statements import Kind, classify, split
from .transactions import State, StoreSnapshot, StoreTransaction, current_task, run_after_commit

if TYPE_CHECKING:
    from .ddl import DDL
    from .plugins import PluginTables

CLOSING_POLL_SECONDS = 0.002
"""Between looks at whether the other threads' transactions have ended: a commit takes 0.1 to 10 ms."""


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
        self._state = State()
        self.rendered: dict[Any, Any] = {}
        self.busy_threads: set[int] = set()
        """Threads that are in a transaction or snapshot, or about to begin one."""
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
        """A read outside any transaction has run or failed; PostgreSQL gives its connection back here."""

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a long read, in constant memory; inside a snapshot or transaction."""
        raise NotImplementedError
        yield

    @property
    def plugins(self) -> PluginTables:
        """What plugins' own tables ask of this engine."""
        raise NotImplementedError

    def dialect(self, sql: str) -> str:
        """Our SQL texts use `?`; this engine's form of it."""
        raise NotImplementedError

    def split(self, script: str) -> Iterator[str]:
        """The statements of a script."""
        return split(script)

    def json_text(self, field: Any, keys: tuple[str | int, ...]) -> Any:
        raise NotImplementedError

    def text_bytes(self, column: str) -> str:
        """SQL for the bytes that a column of text or JSON takes, in UTF-8; NULL where it is."""
        raise NotImplementedError

    # Connections.

    def connect(self, reuse_if_open: bool = False) -> bool:
        self.require_open()
        self.reclaim_dead_threads()
        try:
            return bool(super().connect(reuse_if_open))
        except peewee.PeeweeException as error:
            self.raise_translated(error)

    def require_open(self) -> None:
        """Raises StorageClosed."""
        if self.closed_for_good:
            raise StorageClosed("the store is closed", "open it again with kagedb.connect()")

    def close_for_good(self, patience_seconds: float) -> None:
        """Let nothing begin any more, and give what other threads have begun that long to end."""
        self.closed_for_good = True
        deadline = time.monotonic() + patience_seconds
        while self.busy_threads - {threading.get_ident()} and time.monotonic() < deadline:
            time.sleep(CLOSING_POLL_SECONDS)

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
            self.raise_translated(error)

    def raise_translated(self, error: Exception) -> NoReturn:
        """Raise what a driver's error stands for; a transaction that it happened in is broken."""
        state = self._state
        if state.transactions and state.failed is None:
            state.failed = error
        translated = self.translate(error)
        try:
            if translated is error:
                raise error
            raise translated from error
        finally:
            # The error holds this frame by its traceback. Held by it in turn, it would stay until the garbage collector
            # runs, and with it the cursor that failed, which keeps the files of a closed SQLite store open.
            del error, translated

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        kind = classify(sql)
        state = self._state
        if state.transactions:
            self.check_usable()
            if kind is not Kind.READ:
                self._check_write_allowed(kind)
            return self._execute(sql, params, options)
        if kind is Kind.READ:
            self.require_open()
            try:
                return self._execute(sql, params, options)
            finally:
                if not options:
                    self.statement_done()
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
            self.raise_translated(error)

    def _check_write_allowed(self, kind: Kind) -> None:
        if kind is Kind.CONTROL:
            raise TransactionError(
                "BEGIN, COMMIT, ROLLBACK and SAVEPOINT are not statements here",
                "use storage.transaction() or database.atomic()",
            )
        if kind is Kind.SEVERAL:
            raise TransactionError("several statements in one text", "run them one by one, in a storage.transaction()")
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
        if state.task is not current_task():
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
            run_after_commit([callback])
        return callback


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
