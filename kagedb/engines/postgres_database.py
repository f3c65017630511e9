"""The Peewee database of the PostgreSQL engine: a small pool, turns to write, durability by transaction, our errors.

How a session is opened is in postgres_server.py, the locks that outlive a transaction are in postgres_locks.py.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.pool import PooledPostgresqlDatabase

from ..errors import (
    ImmutableError,
    ReadOnlyStorage,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageForbidden,
    StorageFull,
    StorageUnavailable,
    TransactionError,
)
from .database import StoreDatabase
from .ddl import REFUSAL
from .postgres_server import alive, driver, lost
from .rows import Rows
from .statements import QUOTED
from .transactions import RELAXED
from .turns import FairSemaphore

if TYPE_CHECKING:
    from .plugins import PluginTables
    from .postgres_locks import PostgresLocks

# A question mark in quotes or comments is no parameter.
_QUOTED_OR_PLACE = re.compile(rf"{QUOTED.pattern}|\?", QUOTED.flags)

STREAM_ROWS = 1_000
"""Rows fetched at a time by `stream`."""

_NO_GATE = nullcontext()


class _Adapter(peewee.Psycopg2Adapter):  # type: ignore[misc]
    """How Peewee asks psycopg2 for a connection: through the engine, which knows the secret."""

    def connect(self, db: Any, **params: Any) -> Any:
        return db.engine.server.connect()


class PostgresStoreDatabase(StoreDatabase, PooledPostgresqlDatabase):  # type: ignore[misc]
    """Peewee's pooled PostgreSQL database with turns to write, durability by transaction, and our errors.

    A thread has a connection only while it is in a transaction or statement.
    """

    psycopg2_adapter = _Adapter
    field_types = {  # noqa: RUF012
        **PooledPostgresqlDatabase.field_types,
        "ULID": 'TEXT COLLATE "C"',
        "INTEGER64": "BIGINT",
        "PLAIN_TEXT": 'TEXT COLLATE "C"',
        "JSON_TEXT": "JSON",
    }

    def __init__(self, engine: PostgresLocks) -> None:
        settings = engine.settings
        self.engine = engine
        self.settings = settings
        super().__init__(settings.url.redacted, max_connections=None)
        self._places = FairSemaphore(settings.pool_size)
        self.read_only = engine.read_only

    # Connections.

    def connect(self, reuse_if_open: bool = False) -> bool:
        if not self._state.closed:
            return super().connect(reuse_if_open)
        # Peewee's pool would wait too, but without a queue.
        if not self._places.enter(self.settings.busy_timeout_ms / 1000):
            raise StorageBusy(
                f"all {self.settings.pool_size} connections to PostgreSQL stayed in use"
                f" for {self.settings.busy_timeout_ms} ms",
                "shorten the transactions that hold them, or raise postgres.pool_size",
            )
        try:
            return super().connect(reuse_if_open)
        except BaseException:
            self._places.leave()
            raise

    def close(self) -> bool:
        was_open = not self._state.closed
        try:
            return bool(super().close())
        finally:
            if was_open and self._state.closed:
                self._places.leave()

    def all_connections(self) -> list[Any]:
        """Every connection of the pool, idle or in use."""
        return [entry[2] for entry in self._connections] + [used.connection for used in self._in_use.values()]

    def forget_connections(self) -> None:
        """In a forked child: start with an empty pool, without closing what was inherited."""
        self._pool_lock = threading.RLock()
        self._pool_available = threading.Condition(self._pool_lock)
        self._lock = threading.Lock()
        self._connections: list[Any] = []
        self._in_use: dict[int, Any] = {}
        self._places = FairSemaphore(self.settings.pool_size)
        self.busy_threads.clear()
        self._state.reset()

    def _is_closed(self, conn: Any) -> bool:
        return not alive(conn)

    def _can_reuse(self, conn: Any) -> bool:
        # One that was opened, or given back, while the store was being closed: nobody would close it later.
        return not self.closed_for_good and bool(super()._can_reuse(conn))

    def statement_done(self) -> None:
        state = self._state
        if not state.closed and not state.transactions and not state.ctx:
            self.close()

    # Transactions.

    def begin_write(self, durability: str) -> None:
        engine = self.engine
        engine.keep_locks()
        try:
            self._begin(durability)
        except StorageUnavailable:
            # Nothing was begun: a connection that had died unseen is worth a second try.
            self.close()
            self.connect()
            self._begin(durability)

    def _begin(self, durability: str) -> None:
        engine = self.engine
        commit_setting = "off" if durability == RELAXED else engine.server.full_commit
        try:
            cursor = self.raw(
                "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
                f"SET LOCAL synchronous_commit = {commit_setting};"
                f"SELECT pg_advisory_xact_lock({engine.key('writer')})" + engine.epoch_query()
            )
            engine.check_epoch(cursor)
        except StorageBusy:
            holder = engine.holder("writer") or "another writer"
            self.rollback_write()
            raise StorageBusy(
                f"waited {self.settings.busy_timeout_ms} ms for {holder} to finish writing",
                "try again, shorten that transaction, or raise storage.busy_timeout_ms",
            ) from None
        except BaseException:
            self.rollback_write()
            raise

    def commit_write(self, durability: str) -> None:
        try:
            self.raw("COMMIT")
        except StorageUnavailable as error:
            raise StorageUnavailable(
                "the server went away during a commit; whether the transaction was saved is not known",
                "read it back before doing it again",
            ) from error

    def rollback_write(self) -> None:
        connection = self._state.conn
        if connection is None:
            return
        if not lost(connection):
            try:
                self.raw("ROLLBACK")
                return
            except StorageUnavailable:
                pass  # The server rolls back what its lost client left.
        self.close()

    def can_roll_back_to_savepoint(self) -> bool:
        return not lost(self._state.conn)

    def strengthen(self) -> None:
        self.raw(f"SET LOCAL synchronous_commit = {self.engine.server.full_commit}")

    def begin_snapshot(self) -> None:
        # The first query fixes the snapshot, not BEGIN.
        self.raw("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1")

    def end_snapshot(self) -> None:
        self.rollback_write()

    @contextmanager
    def alone(self) -> Iterator[None]:
        # Statements like VACUUM take their own locks; they cannot run while a transaction-scoped lock is held.
        yield

    # Words.

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        # A cursor on the server: psycopg2 would fetch everything first (50 MB for 100,000 rows).
        self._state.savepoints += 1
        name = f"kaged_cursor_{self._state.savepoints}"
        self.raw(f"DECLARE {name} NO SCROLL CURSOR FOR {self.dialect(sql)}", params)
        while rows := self.raw(f"FETCH {STREAM_ROWS} FROM {name}").fetchall():
            yield from rows
        self.raw(f"CLOSE {name}")

    @cached_property
    def plugins(self) -> PluginTables:
        from .postgres_plugins import PostgresPluginTables

        return PostgresPluginTables(self, self.engine.server.schema)

    def dialect(self, sql: str) -> str:
        sql = sql.replace("%", "%%")
        if "?" in sql and ("'" in sql or '"' in sql or "--" in sql):
            return _QUOTED_OR_PLACE.sub(lambda found: "%s" if found[0] == "?" else found[0], sql)
        return sql.replace("?", "%s")

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        try:
            cursor = super().raw(self.dialect(sql) if params and "%s" not in sql else sql, params)
            return Rows(cursor, self, _NO_GATE) if cursor.description else cursor
        except BaseException:
            # A broken connection must not be the one that the next statement finds.
            self.statement_done()
            raise

    def _execute(self, sql: str, params: Any, options: dict[str, Any]) -> Any:
        cursor = super()._execute(sql, params, options)
        return Rows(cursor, self, _NO_GATE) if cursor.description else cursor

    def text_bytes(self, column: str) -> str:
        return f"octet_length({column}::text)"

    def json_text(self, field: Any, keys: tuple[str | int, ...]) -> Any:
        parts: list[Any] = [field]
        for key in keys[:-1]:
            parts += [peewee.SQL("->"), _json_key(key)]
        document = peewee.NodeList((*parts, peewee.SQL("->"), _json_key(keys[-1])))
        text = peewee.NodeList((*parts, peewee.SQL("->>"), _json_key(keys[-1])))
        return peewee.NodeList(
            (
                peewee.SQL("CASE WHEN json_typeof("),
                document,
                peewee.SQL(") IN ('string', 'number', 'boolean') THEN"),
                text,
                # Whatever the database's own collation is, text sorts as it does everywhere else in the store.
                peewee.SQL('END COLLATE "C"'),
            )
        )

    def translate(self, error: Exception) -> Exception:
        original = getattr(error, "orig", error)
        code = getattr(original, "pgcode", None) or ""
        diagnostics = getattr(original, "diag", None)
        text = (getattr(diagnostics, "message_primary", None) or str(original)).strip()
        text = self.settings.url.scrub(text.splitlines()[0] if text else "no reason given")
        if self.closed_for_good:
            return StorageClosed("the store is closed", "open it again with kagedb.connect()")
        connection = self._state.conn
        is_lost = connection is not None and lost(connection)
        # Not always seen by psycopg2 at once; but what has no SQLSTATE did not come from the server.
        is_lost = is_lost or (not code and type(original) in (driver.DatabaseError, driver.OperationalError))
        if is_lost or code[:2] == "08" or code in ("57P01", "57P02", "57P03"):
            return StorageUnavailable(
                f"the connection to the PostgreSQL server was lost: {text}",
                "nothing of the transaction was saved; try again",
            )
        if text.startswith(REFUSAL):
            return ImmutableError(text.removeprefix(REFUSAL))
        if code in ("55P03", "40P01"):
            return StorageBusy(
                f"waited {self.settings.busy_timeout_ms} ms for another writer",
                "try again, shorten that transaction, or raise storage.busy_timeout_ms",
            )
        if code == "53100":
            return StorageFull("the disk of the PostgreSQL server is full", "free some space on the server")
        if code == "25006":
            if self._state.snapshot:
                return TransactionError("a write inside a snapshot", "write in a storage.transaction() of its own")
            return ReadOnlyStorage(
                f"the PostgreSQL server does not take writes: {text}", "name the primary server in the URL"
            )
        if code == "42501":
            return StorageForbidden(f"PostgreSQL refused: {text}", "grant it to the role in the storage URL")
        if code in ("XX001", "XX002"):
            return StorageCorrupt(f"PostgreSQL reports damage: {text}", "restore a backup")
        return error


def _json_key(key: str | int) -> Any:
    # Typed, so that "0" asks an object and 0 an array.
    return peewee.NodeList(
        (peewee.Value(key, converter=False), peewee.SQL("::int" if isinstance(key, int) else "::text"))
    )
