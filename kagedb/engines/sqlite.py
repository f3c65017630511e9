"""SQLite: the default engine. One file, WAL, STRICT tables, one writer at a time among all threads and processes.

Strategy: SQLite up to 3.51.2 can lose committed pages when a checkpoint overlaps a commit that restarts the WAL
(sqlite.org/wal.html, "WAL-reset bug"). Here neither can overlap: the turn to write (locks.py) is held from BEGIN to the
end of COMMIT with the automatic checkpoint inside it, around every statement that writes without a transaction, and
around closing. Nothing but SQLite ever opens the database file: closing any other descriptor would drop its locks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import (
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageInUse,
    StorageNotFound,
)
from ..fields import Limits
from ..settings import Settings, require_parent
from . import forks, sqlite_catalogue, sqlite_forks
from .ddl import SqliteDDL
from .locks import LockFile, WriterTurn
from .places import refuse_foreign, refuse_network_file_system, writable
from .sqlite_calls import CallGate
from .sqlite_database import SqliteStoreDatabase, sqlite3
from .sqlite_locks import RESTORE_DRAFT, RESTORE_NOTE, SqliteLocks

if TYPE_CHECKING:
    from .archive import Archiver, Contents
    from .compacting import Compaction
    from .engine import Engine, Figures
    from .query import Answer
    from .salvage import Wreck
    from .transfer import Receiver

OLDEST_VERSION = (3, 38, 0)
"""The first SQLite with STRICT tables (3.37) and `->>` (3.38)."""

SPARE_BYTES = 16 * 1024 * 1024
"""Free space wanted beyond what a rewrite needs: the journal of the file system and the next hours' work."""


class SqliteEngine(SqliteLocks):
    """A store in one SQLite file."""

    name = "sqlite"
    database: SqliteStoreDatabase

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        super().__init__(settings, read_only=read_only)
        assert settings.url.path is not None
        self.path = Path(os.path.realpath(settings.url.path))
        self.database = SqliteStoreDatabase(str(self.path), settings, read_only=read_only)
        self.database.limits = Limits.of(settings)
        self.database.slow_transaction_ms = settings.slow_transaction_ms
        self.database.ddl = SqliteDDL(self.database)
        self._scratch: Path | None = None
        self._paused = True
        self._read_marks: list[int] = []
        self._unusable_after_fork = ""

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def audit_key_path(self) -> Path:
        # By the store, not by who asks: root and the daemon must find the same key.
        default = self.path.name == "kaged.db"
        return self.path.with_name("audit.key" if default else f"{self.path.name}.audit.key")

    # Opening and closing.

    def open(self, *, create: bool) -> None:
        version = sqlite3.sqlite_version_info
        if version < OLDEST_VERSION:
            raise StorageError(
                f"SQLite {sqlite3.sqlite_version} is too old; 3.38 or newer is needed",
                "install a newer one with the extra: pip install 'kagedb[sqlite]'",
            )
        refuse_foreign(self.path)
        if self.beside(RESTORE_NOTE).exists():
            self._settle_restore()
        self._check_file(create)
        refuse_network_file_system(self.path)
        if self.read_only and not writable(self.path.parent):
            self._open_in_read_only_place()
        lock = self.beside(".lock")
        try:
            self._locks = LockFile.open(lock, create=not self.read_only or self._may_leave_a_lock_file())
        except OSError as error:
            raise StorageForbidden(
                f"the store {self.path} cannot be written: {lock.name} beside it: {error.strerror}",
                "check who may write to that directory, or open the store read-only",
            ) from error
        if self._locks is not None and not self.read_only:
            self.database.turn = WriterTurn(self._locks, self.settings.busy_timeout_ms / 1000)
        forks.watch(self)
        if self.path.exists():
            # First, so that no restore puts another file in place of the one that is opened.
            self.share()
            if not self.read_only:
                self.beside(RESTORE_DRAFT).unlink(missing_ok=True)
            if self.read_only and self.beside("-journal").exists() and writable(self.path.parent):
                from .sqlite_compact import roll_back_journal

                roll_back_journal(self.path)
            self.database.raw("SELECT 1")  # connects, which refuses what is no store

    def exists(self) -> bool:
        return self.path.exists()

    def _settle_restore(self) -> None:
        """Wait for the restore that is at work, or finish one that was cut off and say so."""
        from .sqlite_archive import finish_exchange

        try:
            self._locks = LockFile.open(self.beside(".lock"), create=True)
        except OSError as error:
            raise StorageInUse(
                f"a restore of the store {self.path} is at work or was cut off", "open it as its owner first"
            ) from error
        try:
            self.share()
            if self.beside(RESTORE_NOTE).exists():
                self.unshare()
                with self.starters_line():
                    self.exclude()
                    finish_exchange(self)
        finally:
            self.release()

    def _may_leave_a_lock_file(self) -> bool:
        """Whether a reader may make the lock file, so that nobody migrates or replaces the store under it.

        Not as another user, whose file would be in the owner's way.
        """
        return writable(self.path.parent) and self.path.stat().st_uid == os.geteuid()

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
        import shutil
        import tempfile

        self._scratch = Path(tempfile.mkdtemp(prefix="kaged-read-"))
        copy = self._scratch / self.path.name
        shutil.copyfile(self.path, copy)
        shutil.copyfile(wal, copy.with_name(copy.name + "-wal"))
        self.database.database = str(copy)

    def close(self) -> None:
        database = self.database
        patience = self.settings.busy_timeout_ms / 1000
        database.close_for_good(patience)
        database._state.reset()
        # Nobody else may be inside: a connection that is closed under a running statement takes its memory along.
        alone = database.calls.pause(patience)
        try:
            # Not before: somebody inside may have been connecting.
            connections = [connection for _, connection in database._by_thread.values()]
            if not alone:
                for connection in connections:
                    connection.interrupt()
                database.calls.wait_until_alone(patience)
            for connection in connections:
                database._close(connection)
        finally:
            database.calls.resume()
        self.release()
        if self._scratch is not None:
            import shutil

            shutil.rmtree(self._scratch)

    # Forks.

    def before_fork(self) -> None:
        database = self.database
        turn = database.turn
        patience = self.settings.busy_timeout_ms / 1000
        self._paused = turn is not None and turn.pause(patience)
        nobody_inside = database.calls.pause(patience)
        self._unusable_after_fork = ""
        if database._state.transactions:
            self._unusable_after_fork = "inside a transaction"
        elif turn is not None and not self._paused:
            self._unusable_after_fork = "while another thread was writing"
        elif not nobody_inside:
            self._unusable_after_fork = "while another thread was reading"

    def after_fork_in_parent(self) -> None:
        self._unusable_after_fork = ""
        self.database.calls.resume()
        if self._paused and self.database.turn is not None:
            self.database.turn.resume()

    def after_fork_in_child(self) -> None:
        database = self.database
        inherited = [connection for _, connection in database._by_thread.values()]
        forks.keep_for_ever(inherited)
        database._by_thread.clear()
        database._lock = threading.Lock()
        database._state.reset()
        database.calls = CallGate()
        database.busy_threads.clear()
        if database.turn is not None:
            database.turn.start_anew()
        LockFile.start_anew()
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

    # The catalogue.

    def tables(self) -> list[str]:
        return sqlite_catalogue.tables(self.database)

    def views(self) -> dict[str, tuple[str, ...]]:
        return sqlite_catalogue.views(self.database)

    def catalogue(self) -> list[str]:
        return sqlite_catalogue.catalogue(self.database)

    def change_schema(self, work: Callable[[], None]) -> None:
        from . import sqlite_making

        if self.path.exists():
            sqlite_making.in_one_transaction(self.database, work)
        else:
            sqlite_making.make(self, work)

    # Whole-store words.

    def sizes(self) -> dict[str, int]:
        """Bytes by part of the store, as `Figures` has them."""
        parts = {"database": "", "wal": "-wal", "shared memory": "-shm"}
        return {
            part: self.beside(suffix).stat().st_size for part, suffix in parts.items() if self.beside(suffix).exists()
        }

    def figures(self) -> Figures:
        from . import sqlite_condition

        return sqlite_condition.figures(self)

    def size_bytes(self) -> int:
        return sum(self.sizes().values())

    def archiver(self) -> Archiver:
        from .sqlite_archive import SqliteArchiver

        return SqliteArchiver(self)

    def receiver(self) -> Receiver:
        from .sqlite_transfer import SqliteReceiver

        return SqliteReceiver(self)

    def wreck(self, make: Callable[[Engine], None]) -> AbstractContextManager[Wreck]:
        from . import sqlite_wreck

        return sqlite_wreck.wreck(self, make)

    def reading(self) -> AbstractContextManager[Contents]:
        from . import sqlite_query

        return sqlite_query.reading(self)

    def query(self, sql: str, named: Mapping[str, str], positional: Sequence[str]) -> AbstractContextManager[Answer]:
        from . import sqlite_query

        return sqlite_query.answer(self, sql, named, positional)

    def require_space(self) -> None:
        import shutil

        wanted = 2 * self.size_bytes() + SPARE_BYTES
        free = shutil.disk_usage(self.path.parent).free
        if free < wanted:
            raise StorageFull(
                f"{self.path.parent} has {free:,} bytes free; rewriting this store may need {wanted:,}",
                "free some space first",
            )

    def erase_traces(self, table: str) -> None:
        from . import sqlite_compact

        if not sqlite_compact.erase(self):
            raise StorageBusy(
                f"a reader of {self.path} keeps removed bytes in its WAL", "do it again when that reader is done"
            )

    def compact(self, run: Compaction) -> None:
        from . import sqlite_compact

        sqlite_compact.compact(self, run)

    @contextmanager
    def gently(self) -> Iterator[Callable[[int], float]]:
        from . import sqlite_compact

        with sqlite_compact.gently(self) as move:
            yield move

    @contextmanager
    def until(self, moment: float) -> Iterator[None]:
        from .compacting import TimeIsUp
        from .sqlite_contents import INTERRUPTIBLE_STEPS

        connection = self.database.connection()
        connection.set_progress_handler(lambda: time.monotonic() >= moment, INTERRUPTIBLE_STEPS)
        try:
            yield
        except Exception as error:
            if getattr(getattr(error, "orig", error), "sqlite_errorname", "") != "SQLITE_INTERRUPT":
                raise
            # Else a signal was seen in the handler, out of which SQLite lets no exception.
            raise (TimeIsUp() if time.monotonic() >= moment else KeyboardInterrupt()) from error
        finally:
            connection.set_progress_handler(None, 0)

    def damage(self) -> list[str]:
        from .sqlite_contents import damage_told

        try:
            return damage_told(lambda sql: list(self.database.raw(sql)))
        except (sqlite3.DatabaseError, StorageCorrupt) as error:
            return [str(error)]

    def exposed(self) -> list[str]:
        from . import sqlite_condition

        return sqlite_condition.exposed(self)

    def missing_marks(self) -> list[str]:
        from . import sqlite_condition

        return sqlite_condition.missing_marks(self)
