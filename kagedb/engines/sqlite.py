"""SQLite: the default engine. One file, WAL, STRICT tables, one writer at a time among all threads and processes.

Strategy: SQLite up to 3.51.2 can lose committed pages when a checkpoint overlaps a commit that restarts the WAL
(sqlite.org/wal.html, "WAL-reset bug"). Here neither can overlap: the turn to write (locks.py) is held from BEGIN to the
end of COMMIT with the automatic checkpoint inside it, around every statement that writes without a transaction, and
around closing. Nothing but SQLite ever opens the database file: closing any other descriptor would drop its locks.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import peewee

from ..errors import (
    ImmutableError,
    MigrationFailed,
    ReadOnlyStorage,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageInUse,
    StorageNotFound,
    TransactionError,
)
from ..fields import Limits
from ..settings import Settings, require_parent
from . import forks, sqlite_catalogue, sqlite_forks
from .ddl import REFUSAL, SqliteDDL
from .engine import HISTORY_TABLE, STARTER_WAIT_SECONDS, USE_GRACE_SECONDS, Engine, Figures, Holder
from .locks import MIGRATION, OWNER, USE, LockFile, WriterTurn
from .places import (
    make_private_file,
    refuse_foreign,
    refuse_network_file_system,
    sync_directory,
    sync_file,
    writable,
)
from .transactions import FULL, StoreDatabase

sqlite3 = peewee.sqlite3

APPLICATION_ID = 0x4B616765
"""Marks the file as a kaged store ("Kage"), for file(1) and for us."""

OLDEST_VERSION = (3, 38, 0)
"""The first SQLite with STRICT tables (3.37) and `->>` (3.38)."""

FIXED_VERSIONS = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
"""SQLite without the WAL-reset bug: these in their series, and everything from the first on."""

BACKUP_STEP_PAGES = 256
"""Pages copied at a time: half a megabyte, so that a copy can be interrupted within milliseconds."""

SPARE_BYTES = 16 * 1024 * 1024
"""Free space wanted beyond what a rewrite needs: the journal of the file system and the next hours' work."""

CLOSING_WAIT_SECONDS = 1.0

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

    # Connections.

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
        elif not self.read_only:
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
        execute("PRAGMA foreign_keys = ON")
        if execute("PRAGMA foreign_keys").fetchone()[0] != 1:
            raise StorageError("this SQLite cannot enforce foreign keys", "install the extra: kagedb[sqlite]")
        execute(f"PRAGMA cache_size = -{settings.cache_kib}")
        execute("PRAGMA mmap_size = 0")
        self._state.synchronous = _FULL

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
            # Asked to be full after it began. Whatever a checkpoint moved meanwhile, it has synced itself.
            with suppress(FileNotFoundError):
                sync_file(Path(self.database + "-wal"))

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
        self.raw("BEGIN")
        # BEGIN alone sees nothing yet: the first read fixes the snapshot.
        self.raw("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()

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

    def dialect(self, sql: str) -> str:
        return sql

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
        driver = error.args[0] if error.args else error
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
        if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and self._disk_is_full()):
            return StorageFull(
                f"the disk of {self.database} is full; the transaction was undone",
                "free some space, or give back some of the store's own: kaged status",
            )
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return StorageCorrupt(
                f"{self.database} is damaged or not a SQLite database: {text}",
                "keep the file as it is, and restore a backup beside it",
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

    def _disk_is_full(self) -> bool:
        try:
            return shutil.disk_usage(os.path.dirname(self.database)).free < self.settings.page_size * 64
        except OSError:
            return False


class SqliteEngine(Engine):
    """A store in one SQLite file."""

    name = "sqlite"

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        super().__init__(settings, read_only=read_only)
        assert settings.url.path is not None
        self.path = Path(os.path.realpath(settings.url.path))
        self.database = SqliteStoreDatabase(str(self.path), settings, read_only=read_only)
        self.database.limits = Limits(settings.json_bytes, settings.json_depth, settings.text_bytes)
        self.database.slow_transaction_ms = settings.slow_transaction_ms
        self.database.ddl = SqliteDDL(self.database)
        self._locks: LockFile | None = None
        self._scratch: Path | None = None
        self._shares = False
        self._owns = False
        self._paused = True
        self._read_marks: list[int] = []
        self._unusable_after_fork = ""

    @property
    def place(self) -> str:
        return str(self.path)

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    # Opening and closing.

    def open(self, *, create: bool) -> None:
        version = sqlite3.sqlite_version_info
        if version < OLDEST_VERSION:
            raise StorageError(
                f"SQLite {sqlite3.sqlite_version} is too old; 3.38 or newer is needed",
                "install a newer one with the extra: pip install 'kagedb[sqlite]'",
            )
        refuse_foreign(self.path)
        self._check_file(create)
        refuse_network_file_system(self.path)
        if self.read_only and not writable(self.path.parent):
            self._open_in_read_only_place()
        self._locks = LockFile.open(self.beside(".lock"), create=not self.read_only)
        if self._locks is not None and not self.read_only:
            self.database.turn = WriterTurn(self._locks, self.settings.busy_timeout_ms / 1000)
        forks.watch(self)
        if self.path.exists():
            self._check_marks()

    def exists(self) -> bool:
        return self.path.exists()

    def _check_file(self, create: bool) -> None:
        if self.path.is_dir():
            raise StorageNotFound(f"{self.path} is a directory", "name the database file in it")
        if self.path.exists():
            if self.path.stat().st_size == 0:
                raise StorageCorrupt(
                    f"{self.path} is an empty file, not a kaged store",
                    "restore a backup; or, if there never was anything in it, remove it and run: kaged init",
                )
            return
        for leftover in ("-wal", "-journal"):
            if self.beside(leftover).exists():
                raise StorageCorrupt(
                    f"{self.path} is missing, but {self.beside(leftover).name} lies beside its place",
                    "put the database file back, or move the leftover away",
                )
        if not create:
            raise StorageNotFound(f"there is no store at {self.path}", "make one with: kaged init")
        require_parent(self.settings)

    def _open_in_read_only_place(self) -> None:
        wal = self.beside("-wal")
        if not wal.exists() or wal.stat().st_size == 0:
            self.database.immutable = True
            return
        # immutable=1 would miss what is in the WAL.
        import tempfile

        self._scratch = Path(tempfile.mkdtemp(prefix="kaged-read-"))
        copy = self._scratch / self.path.name
        shutil.copyfile(self.path, copy)
        shutil.copyfile(wal, copy.with_name(copy.name + "-wal"))
        self.database.database = str(copy)

    def _check_marks(self) -> None:
        database = self.database
        if database.raw("PRAGMA application_id").fetchone()[0] == APPLICATION_ID or self._has_history():
            return
        raise StorageCorrupt(
            f"{self.path} is a SQLite database, but not a kaged store", "check the path in the storage URL"
        )

    def _has_history(self) -> bool:
        found = self.database.raw("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (HISTORY_TABLE,))
        return found.fetchone() is not None

    def close(self) -> None:
        database = self.database
        database.closed_for_good = True
        database._state.reset()
        connections = [connection for _, connection in database._by_thread.values()]
        for connection in connections:
            database._close(connection)
        if self._owns:
            with suppress(FileNotFoundError):
                self.beside(".owner").unlink()
        if self._locks is not None:
            self._locks.close()
            self._locks = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch)

    # Forks.

    def before_fork(self) -> None:
        state = self.database._state
        turn = self.database.turn
        self._paused = turn is not None and turn.pause(self.settings.busy_timeout_ms / 1000)
        if state.transactions:
            self._unusable_after_fork = "inside a transaction"
        elif turn is not None and not self._paused:
            self._unusable_after_fork = "while another thread was writing"

    def after_fork_in_parent(self) -> None:
        self._unusable_after_fork = ""
        if self._paused and self.database.turn is not None:
            self.database.turn.resume()

    def after_fork_in_child(self) -> None:
        database = self.database
        inherited = [connection for _, connection in database._by_thread.values()]
        forks.keep_for_ever(inherited)
        database._by_thread.clear()
        database._lock = threading.Lock()
        database._state.reset()
        if database.turn is not None:
            database.turn.start_anew()
        self._shares = self._owns = False
        if inherited:
            self._read_marks = sqlite_forks.read_marks_of_parent(database.database)
            database.before_connecting = self._connect_in_child

    def _connect_in_child(self) -> None:
        if self._unusable_after_fork:
            raise StorageError(
                f"this process was forked {self._unusable_after_fork}, so the store {self.path} cannot be used in it",
                "fork outside transactions, or start a fresh interpreter (subprocess, multiprocessing's spawn)",
            )
        if not self.database.immutable:
            sqlite_forks.take_believed_locks(self.database.database, self._read_marks)
        self.share()
        self.database.before_connecting = None

    # Locks.

    def share(self) -> None:
        if self._locks is None or self._shares:
            return
        patience = self.settings.busy_timeout_ms / 1000
        began = time.monotonic()
        while not self._locks.lock(USE, 0.05, shared=True):
            if self._locks.holder(MIGRATION) is not None:
                if time.monotonic() - began > STARTER_WAIT_SECONDS:
                    raise StorageInUse(f"the store {self.path} is still being migrated", "try again later")
            elif time.monotonic() - began > patience:
                who = Holder(self._locks.holder(USE) or 0)
                raise StorageInUse(f"{who} is replacing or changing the store {self.path}", "try again later")
        self._shares = True

    def unshare(self) -> None:
        if self._locks is not None and self._shares:
            self._locks.unlock(USE)
            self._shares = False

    def exclude(self) -> None:
        if self._locks is None:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True")
        if not self._locks.lock(USE, USE_GRACE_SECONDS):
            owner = self.owner()
            who = owner if owner is not None else Holder(self._locks.holder(USE) or 0)
            raise StorageInUse(f"the store {self.path} is open in {who}", "stop the daemon, or whatever has it open")
        self._shares = True

    def readmit(self) -> None:
        if self._locks is not None:
            self._locks.try_lock(USE, shared=True)

    @contextmanager
    def starters_line(self) -> Iterator[None]:
        if self._locks is None:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True")
        if not self._locks.lock(MIGRATION, STARTER_WAIT_SECONDS):
            raise StorageInUse(f"the store {self.path} is still being migrated", "try again later")
        try:
            yield
        finally:
            self._locks.unlock(MIGRATION)

    def own(self, description: str) -> None:
        if self._locks is None:
            raise ReadOnlyStorage("a store opened to be read has no owner", "open it without read_only=True")
        if not self._locks.try_lock(OWNER):
            holder = self.owner() or Holder(0)
            raise StorageInUse(f"the store {self.path} belongs to another daemon: {holder}", "stop that one first")
        self._owns = True
        make_private_file(self.beside(".owner"))
        self.beside(".owner").write_text(json.dumps({"pid": os.getpid(), "description": description}))

    def owner(self) -> Holder | None:
        if self._locks is None:
            return None
        pid = self._locks.holder(OWNER)
        if pid is None:
            return None
        try:
            said = json.loads(self.beside(".owner").read_text())
        except (OSError, ValueError):
            return Holder(pid)
        # The note of a daemon before this one may still be there.
        return Holder(pid, str(said.get("description", "")) if pid in (0, said.get("pid")) else "")

    # The catalogue.

    def tables(self) -> list[str]:
        return sqlite_catalogue.tables(self.database)

    def catalogue(self) -> list[str]:
        return sqlite_catalogue.catalogue(self.database)

    def change_schema(self, work: Callable[[], None]) -> None:
        if self.path.exists():
            self._in_one_transaction(work)
        else:
            self._make(work)

    def _in_one_transaction(self, work: Callable[[], None]) -> None:
        database = self.database
        # Does nothing inside a transaction; with it on, rebuilding a table deletes the rows that refer to it.
        database.raw("PRAGMA foreign_keys = OFF")
        try:
            with database.atomic():
                work()
                dangling = database.raw("PRAGMA foreign_key_check").fetchmany(5)
                if dangling:
                    places = ", ".join(f"{table} row {row} -> {target}" for table, row, target, _ in dangling)
                    raise MigrationFailed(f"the migration would leave dangling references: {places}")
        finally:
            database.raw("PRAGMA foreign_keys = ON")

    def _make(self, work: Callable[[], None]) -> None:
        """Make the store aside and rename it into place, so that it is whole or not there."""
        database = self.database
        for leftover in self.path.parent.glob(f".{self.path.name}.new*"):
            leftover.unlink()
        aside = self.path.with_name(f".{self.path.name}.new")
        database.close()
        make_private_file(aside)
        database.database = str(aside)
        database.creating = True
        try:
            try:
                self._in_one_transaction(work)
                if database.raw("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                    raise StorageError(
                        f"{self.path} cannot be put into WAL mode",
                        "keep the store on a local file system that supports shared memory",
                    )
            finally:
                database.close()
            sync_file(aside)
            os.rename(aside, self.path)
            sync_directory(self.path.parent)
        except BaseException:
            for leftover in self.path.parent.glob(f"{aside.name}*"):
                leftover.unlink()
            raise
        finally:
            database.creating = False
            database.database = str(self.path)

    # Whole-store words.

    def figures(self) -> Figures:
        parts = {"database": "", "wal": "-wal", "shared memory": "-shm"}
        sizes = {
            part: self.beside(suffix).stat().st_size for part, suffix in parts.items() if self.beside(suffix).exists()
        }
        version = sqlite3.sqlite_version_info
        warnings = []
        fixed = version >= FIXED_VERSIONS[0] or any(version[:2] == f[:2] and version >= f for f in FIXED_VERSIONS)
        if not fixed:
            warnings.append(
                f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug; kaged avoids it among its own programs. Let no"
                " other program write to the file, or install a newer SQLite with the extra: kagedb[sqlite]"
            )
        source = "pysqlite3" if sqlite3.__name__.startswith("pysqlite3") else f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        return Figures(f"SQLite {sqlite3.sqlite_version} ({source})", sizes, warnings)

    def size_bytes(self) -> int:
        return sum(self.figures().bytes_by_part.values()) if self.path.exists() else 0

    def copy_aside(self, directory: Path) -> Path:
        target = directory / "kaged.sqlite3"
        part = directory / "kaged.sqlite3.part"
        make_private_file(part)
        uri = f"file:{urllib.parse.quote(os.fsencode(self.database.database))}?mode=ro"
        source = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            copy = sqlite3.connect(part, isolation_level=None)
            try:
                # A source that holds a read transaction cannot be made to start over by writers.
                source.execute("BEGIN")
                source.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
                source.backup(copy, pages=BACKUP_STEP_PAGES)
                source.execute("ROLLBACK")
                # In WAL mode it could not be read from read-only media.
                copy.execute("PRAGMA journal_mode = DELETE")
                found = [row[0] for row in copy.execute("PRAGMA integrity_check(5)").fetchall()]
            finally:
                copy.close()
        except sqlite3.Error as error:
            wrapped = peewee.OperationalError(error, *error.args)
            raise self.database.translate(wrapped) from error
        finally:
            source.close()
        if found != ["ok"]:
            raise StorageCorrupt(
                f"the copy of {self.path} made before the migration is damaged: {'; '.join(found)}",
                f"the store is as it was; look at the copy {part}",
            )
        sync_file(part)
        os.rename(part, target)
        sync_directory(directory)
        return target

    def require_space(self) -> None:
        wanted = 2 * self.size_bytes() + SPARE_BYTES
        free = shutil.disk_usage(self.path.parent).free
        if free < wanted:
            raise StorageFull(
                f"{self.path.parent} has {free:,} bytes free; a migration of this store may need {wanted:,}",
                "free some space first",
            )

    def missing_marks(self) -> list[str]:
        raw = self.database.raw
        missing = []
        if raw("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            missing.append("application_id")
        if raw("PRAGMA auto_vacuum").fetchone()[0] != 2:
            missing.append("auto_vacuum")
        if raw("PRAGMA page_size").fetchone()[0] != self.settings.page_size:
            missing.append("page_size")
        return missing
