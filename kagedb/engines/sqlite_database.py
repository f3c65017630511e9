"""The Peewee database of the SQLite engine: connections, the turn to write, durability by transaction, our errors.

How each connection is set up and why a checkpoint never overlaps a commit is here; whole-store work is in sqlite.py.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peewee

from ..errors import (
    ImmutableError,
    ReadOnlyStorage,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageForbidden,
    StorageFull,
    TransactionError,
)
from ..settings import Settings
from .database import StoreDatabase
from .ddl import REFUSAL
from .engine import HISTORY_TABLE
from .locks import WriterTurn
from .places import room_is_out, sync_file
from .rows import Rows
from .sqlite_calls import CallGate
from .transactions import FULL

if TYPE_CHECKING:
    from .plugins import PluginTables

sqlite3 = peewee.sqlite3

APPLICATION_ID = 0x4B616765
"""Marks the file as a kaged store ("Kage"), for file(1) and for us."""

CLOSING_WAIT_SECONDS = 1.0
"""How long the last connection of a process waits for the turn to close: whoever holds it longer has the file open too,
so that closing does not checkpoint."""

_NORMAL, _FULL = 1, 2  # sqlite.org/pragma.html#pragma_synchronous


class SqliteStoreDatabase(StoreDatabase, peewee.SqliteDatabase):  # type: ignore[misc]
    """Peewee's SQLite database with the turn to write, durability by transaction, and our errors."""

    strict_tables = True
    field_types = {  # noqa: RUF012
        **peewee.SqliteDatabase.field_types,
        "ULID": "TEXT",
        "INTEGER64": "INTEGER",
        "PLAIN_TEXT": "TEXT",
        "JSON_TEXT": "TEXT",
    }

    def __init__(self, path: str, settings: Settings, *, read_only: bool) -> None:
        super().__init__(path)
        self.settings = settings
        self.read_only = read_only
        self.immutable = False
        self.creating = False
        self.turn: WriterTurn | None = None
        self.before_connecting: Callable[[], None] | None = None
        self.calls = CallGate()

    # Connections.

    def connect(self, reuse_if_open: bool = False) -> bool:
        # The gate before Peewee's lock, here as in every statement that connects by itself.
        with self.calls:
            return super().connect(reuse_if_open)

    def close(self) -> bool:
        with self.calls:
            return bool(super().close())

    def _connect(self) -> Any:
        if self.before_connecting is not None:
            self.before_connecting()
        mode = "mode=ro&immutable=1" if self.immutable else f"mode={'ro' if self.read_only else 'rw'}"
        uri = f"file:{urllib.parse.quote(os.fsencode(self.database))}?{mode}"
        connection = sqlite3.connect(
            uri,
            uri=True,
            timeout=self.settings.busy_timeout_ms / 1000,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        self.track(connection)
        try:
            self._prepare(connection)
        except BaseException:
            self._close(connection)
            raise
        self._add_conn_hooks(connection)
        return connection

    def _prepare(self, connection: Any) -> None:
        settings = self.settings
        execute = connection.execute
        if self.creating:
            # Both take only before WAL and the first table. The rest makes a file that is thrown away if anything
            # goes wrong, so it needs no journal on the disk.
            execute(f"PRAGMA page_size = {settings.page_size}")
            execute("PRAGMA auto_vacuum = INCREMENTAL")
            execute("PRAGMA journal_mode = MEMORY")
            execute("PRAGMA synchronous = OFF")
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
        else:
            self._refuse_other_databases(execute)
            if not self.read_only:
                self._prepare_to_write(connection)
        execute("PRAGMA foreign_keys = ON")
        if execute("PRAGMA foreign_keys").fetchone()[0] != 1:
            raise StorageError("this SQLite cannot enforce foreign keys", "install the extra: kagedb[sqlite]")
        # What is removed is overwritten where that costs no write more; what stays on free pages goes with them.
        execute("PRAGMA secure_delete = FAST")
        execute(f"PRAGMA cache_size = -{settings.cache_kib}")
        execute("PRAGMA mmap_size = 0")
        self._state.synchronous = _FULL

    def _prepare_to_write(self, connection: Any) -> None:
        settings = self.settings
        execute = connection.execute
        if execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            with self.alone():
                mode = execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise StorageError(
                    f"{self.database} cannot be put into WAL mode (it stays in {mode} mode)",
                    "keep the store on a local file system that supports shared memory",
                )
        execute("PRAGMA synchronous = FULL")
        execute(f"PRAGMA journal_size_limit = {settings.journal_size_limit_kib * 1024}")
        pages = max(1, settings.wal_autocheckpoint_kib * 1024 // self._page_size(connection))
        execute(f"PRAGMA wal_autocheckpoint = {pages}")

    def _refuse_other_databases(self, execute: Callable[..., Any]) -> None:
        # First of all: going into WAL mode would change somebody else's file.
        if execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
            return
        # A store reloaded from a dump has lost its mark, but not its history.
        history = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        if execute(history, (HISTORY_TABLE,)).fetchone() is None:
            raise StorageCorrupt(
                f"{self.database} is a SQLite database, but not a kaged store", "check the path in the storage URL"
            )

    def _page_size(self, connection: Any) -> int:
        return int(connection.execute("PRAGMA page_size").fetchone()[0])

    def _close(self, connection: Any) -> None:
        self.untrack(connection)
        # Closing the last connection checkpoints. While others of this process are open this cannot be the last one;
        # and whoever makes us wait for the turn has one open too.
        if self._by_thread or self.turn is None or self.read_only or self.turn.held_by_this_thread():
            connection.close()
            return
        try:
            self.turn.acquire(CLOSING_WAIT_SECONDS)
        except StorageBusy:
            connection.close()
            return
        try:
            connection.close()
        finally:
            self.turn.release()

    # Statements.

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        with self.calls:
            cursor = super().raw(sql, params)
            return Rows(cursor, self, self.calls) if cursor.description else cursor

    def _execute(self, sql: str, params: Any, options: dict[str, Any]) -> Any:
        with self.calls:
            cursor = super()._execute(sql, params, options)
            return Rows(cursor, self, self.calls) if cursor.description else cursor

    # Transactions.

    def _turn(self) -> WriterTurn:
        if self.turn is None:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True to write")
        return self.turn

    def begin_write(self, durability: str) -> None:
        turn = self._turn()
        turn.acquire()
        try:
            state = self._state
            wanted = _FULL if durability == FULL else _NORMAL
            if state.synchronous != wanted:
                # Takes effect only outside a transaction.
                self.raw(f"PRAGMA synchronous = {wanted}")
                state.synchronous = wanted
            self.raw("BEGIN IMMEDIATE")
        except BaseException:
            turn.release()
            raise

    def commit_write(self, durability: str) -> None:
        self.raw("COMMIT")
        self._turn().release()
        if durability == FULL and self._state.synchronous == _NORMAL and not self.creating:
            # Asked to be full after it began. Whatever a checkpoint moved meanwhile, it has synced itself; and where
            # the last of others' connections has closed, nothing is left to sync.
            try:
                sync_file(Path(self.database + "-wal"))
            except FileNotFoundError:
                pass
            except OSError as error:
                raise StorageError(
                    f"{self.database} was committed, but the disk did not confirm it: {error.strerror}",
                    "check the disk: dmesg, fsck",
                ) from error

    def rollback_write(self) -> None:
        turn = self._turn()
        try:
            # A full disk or an I/O error has ended the transaction already.
            if self._state.conn.in_transaction:
                self.raw("ROLLBACK")
        finally:
            if turn.held_by_this_thread():
                turn.release()

    def can_roll_back_to_savepoint(self) -> bool:
        return bool(self._state.conn.in_transaction)

    def strengthen(self) -> None:
        """Nothing to do before the commit: `commit_write` sees that it began relaxed."""

    def begin_snapshot(self) -> None:
        self.raw("PRAGMA query_only = ON")
        try:
            self.raw("BEGIN")
            # BEGIN alone sees nothing yet: the first read fixes the snapshot.
            self.raw("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        except BaseException:
            self.end_snapshot()
            raise

    def end_snapshot(self) -> None:
        if self._state.conn.in_transaction:
            self.raw("ROLLBACK")
        self.raw("PRAGMA query_only = OFF")

    @contextmanager
    def alone(self) -> Iterator[None]:
        turn = self._turn()
        turn.acquire()
        try:
            yield
        finally:
            turn.release()

    # Words.

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield from self.raw(sql, params)

    @cached_property
    def plugins(self) -> PluginTables:
        from .sqlite_plugins import SqlitePluginTables

        return SqlitePluginTables(self)

    def dialect(self, sql: str) -> str:
        return sql

    def text_bytes(self, column: str) -> str:
        # Reads no more than the row's header; before it came (3.43), the whole text has to be read.
        known = sqlite3.sqlite_version_info >= (3, 43)
        return f"octet_length({column})" if known else f"length(CAST({column} AS BLOB))"

    def json_text(self, field: Any, keys: tuple[str | int, ...]) -> Any:
        path = "$" + "".join(f"[{key}]" if isinstance(key, int) else f'."{key}"' for key in keys)
        where = peewee.Value(path, converter=False)
        return peewee.NodeList(
            (
                peewee.SQL("CASE json_type("),
                field,
                peewee.SQL(","),
                where,
                peewee.SQL(") WHEN 'text' THEN"),
                field,
                peewee.SQL("->>"),
                where,
                # The number as it was written: ->> would turn 1e2 into 100.0.
                peewee.SQL("WHEN 'integer' THEN"),
                field,
                peewee.SQL("->"),
                where,
                peewee.SQL("WHEN 'real' THEN"),
                field,
                peewee.SQL("->"),
                where,
                peewee.SQL("WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' END"),
            )
        )

    def translate(self, error: Exception) -> Exception:
        driver = getattr(error, "orig", error)
        name = getattr(driver, "sqlite_errorname", None) or ""
        text = str(driver)
        if self.closed_for_good:
            return StorageClosed("the store is closed", "open it again with kagedb.connect()")
        if text.startswith(REFUSAL):
            return ImmutableError(text.removeprefix(REFUSAL))
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return StorageBusy(
                f"another program held {self.database} for longer than {self.settings.busy_timeout_ms} ms",
                "close the program that writes to the file beside kaged",
            )
        # SQLite says "full" for ENOSPC alone: a quota and a limit on file sizes are an input or output error to it.
        if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and room_is_out(self.database)):
            return StorageFull(
                f"the disk of {self.database} is full; the transaction was undone",
                "free some space, or give back some of the store's own: kaged status",
            )
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return StorageCorrupt(
                f"{self.database} is damaged or not a SQLite database: {text}",
                "keep the file, and restore a backup: kaged restore --latest; without one: kaged salvage --to URL",
            )
        if name.startswith("SQLITE_READONLY"):
            if self._state.snapshot:
                return TransactionError("a write inside a snapshot", "write in a storage.transaction() of its own")
            return ReadOnlyStorage(f"{self.database} cannot be written: {text}", "check the owner and mode of the file")
        if name.startswith("SQLITE_CANTOPEN"):
            return StorageForbidden(f"{self.database} cannot be opened: {text}", "check the owner and mode of the file")
        if name.startswith("SQLITE_IOERR"):
            return StorageError(f"input or output error on {self.database}: {name}", "check the disk: dmesg, fsck")
        return error
