"""Copies of an SQLite store: out of a read transaction that is held, and back under the store's name.

Strategy: a copy through SQLite's backup API from a connection that already holds a read transaction ("pinned") cannot
be made to start over by writers; without, it never ends beside a busy daemon. While it is held the write-ahead log
grows, which is what the guard is for. Bringing a store back exchanges files by renames that a note makes repeatable.
"""

from __future__ import annotations

import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StorageCorrupt, StorageError, StorageFull
from ..settings import require_parent, sync_directory
from .archive import COPY, FIRST_OF_HISTORY, Archiver, Contents, Pace, Present, Reader, Table
from .locks import LockFile, WriterTurn
from .places import (
    make_private_file,
    refuse_foreign,
    refuse_network_file_system,
    room_is_out,
    sync_file,
)
from .sqlite_contents import CACHE_KIB, LogLimit, SqliteContents, quoted, sqlite3, translated
from .sqlite_locks import RESTORE_DRAFT, RESTORE_NOTE
from .syncing import Sending

if TYPE_CHECKING:
    from .sqlite import SqliteEngine

logger = logging.getLogger("kagedb")

STEP_PAGES = 256
"""Pages copied at a time: half a megabyte, so that a copy is throttled evenly and interrupted within milliseconds."""

NAP_SECONDS = 0.1
"""Longest sleep of the throttle: the log is looked at again after it."""

LOAD_CHARACTERS = 1 << 20

PREPARING, EXCHANGING = "preparing", "exchanging"
"""What the note of a restore says first: nothing is changed yet, or files are being renamed."""

_LOGS = ("-wal", "-journal")


class SqliteReader(Reader):
    @contextmanager
    def reading(self, data: Path, form: str, tables: list[Table], scratch: Path) -> Iterator[Contents]:
        if form != COPY:
            loaded = scratch / "loaded.sqlite3"
            make_private_file(loaded)
            connection = sqlite3.connect(loaded, isolation_level=None)
            try:
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute("PRAGMA journal_mode = OFF")
                _run_statements(connection, data, loaded)
            finally:
                connection.close()
            data = loaded
        contents = SqliteContents.open(data)
        try:
            yield contents
        finally:
            contents.close()


class SqliteArchiver(Archiver):
    def __init__(self, engine: SqliteEngine) -> None:
        self.engine: SqliteEngine = engine

    def file_name(self, form: str) -> str:
        return "kaged.sqlite3" if form == COPY else "kaged.sql"

    def require_ready(self, form: str) -> None:
        """Nothing but SQLite is needed."""

    # Out.

    @contextmanager
    def copy(self, target: Path, form: str, pace: Pace, *, packed: bool) -> Iterator[Contents]:
        file = target if form == COPY else target.with_name(target.name + ".copy")
        make_private_file(file)
        self._copy_pages(file, pace)
        contents = SqliteContents.open(file)
        try:
            if form != COPY:
                contents.finished = False
                make_private_file(target)
                _write_statements(contents, target)
            yield contents
        finally:
            contents.close()
            if form != COPY:
                file.unlink()

    def _copy_pages(self, target: Path, pace: Pace) -> None:
        database = self.engine.database
        mode = "mode=ro&immutable=1" if database.immutable else "mode=ro"
        uri = f"file:{urllib.parse.quote(os.fsencode(database.database))}?{mode}"
        source = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=database.settings.busy_timeout_ms / 1000)
        try:
            copy = sqlite3.connect(target, isolation_level=None)
            try:
                source.execute("BEGIN")
                source.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
                # The file is thrown away if anything goes wrong, and made durable by whoever keeps it.
                copy.execute("PRAGMA journal_mode = OFF")
                copy.execute("PRAGMA synchronous = OFF")
                for connection in (source, copy):
                    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                page_bytes = source.execute("PRAGMA page_size").fetchone()[0]
                # Closing it drops SQLite's locks on the copy, which nobody else has.
                with Sending(target) as sending:
                    guard = _Guard(Path(database.database), page_bytes, pace, sending)
                    source.backup(copy, pages=STEP_PAGES, progress=guard.step)
                source.execute("ROLLBACK")
                # In WAL mode it could not be read from read-only media.
                copy.execute("PRAGMA journal_mode = DELETE")
            finally:
                copy.close()
        except sqlite3.Error as error:
            raise self._copy_error(error, target) from error
        finally:
            source.close()

    def _copy_error(self, error: Exception, target: Path) -> BaseException:
        name = getattr(error, "sqlite_errorname", None) or ""
        if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and room_is_out(str(target))):
            return StorageFull(f"the disk of {target.parent.parent} is full", "free some space, or name another place")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return StorageCorrupt(
                f"the store {self.engine.path} is damaged: {error}", "keep it as it is, and restore a backup"
            )
        return StorageError(f"the store {self.engine.path} cannot be copied: {error}", "check the disk: dmesg, fsck")

    # The way back.

    def hold(self) -> None:
        engine = self.engine
        refuse_foreign(engine.path)
        require_parent(engine.settings)
        refuse_network_file_system(engine.path)
        engine._locks = LockFile.open(engine.beside(".lock"), create=True)
        assert engine._locks is not None
        engine.database.turn = WriterTurn(engine._locks, engine.settings.busy_timeout_ms / 1000)
        engine.exclude()
        finish_exchange(engine)

    def present(self) -> Present:
        if not self.engine.path.exists():
            return Present()
        # To be read only: what is kept of the old store is what was there, its log not moved into it.
        connection = sqlite3.connect(f"file:{urllib.parse.quote(os.fsencode(self.engine.path))}?mode=ro", uri=True)
        try:
            first = connection.execute(FIRST_OF_HISTORY).fetchone()
            head = connection.execute("SELECT seq, hash FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
        except sqlite3.Error:
            # Perhaps it is to be replaced because it cannot be read.
            return Present()
        finally:
            connection.close()
        return Present(first, (head[0], bytes(head[1]).hex()) if head else None)

    def put(self, data: Path, form: str, check: Callable[[Contents], None], record: Callable[[str], None]) -> str:
        engine, database = self.engine, self.engine.database
        aside = _new(engine.path)
        _remove_with_parts(aside)
        there = any(_part(engine.path, suffix).exists() for suffix in ("", *_LOGS))
        kept = self._kept_path() if there else None
        _note(engine, PREPARING)
        try:
            make_private_file(aside)
            if form == COPY:
                _copy_bytes(data, aside)
            database.close()
            database.database, database.creating = str(aside), True
            try:
                if form != COPY:
                    _run_statements(database.connection(), data, aside)
                    database.close()
                contents = SqliteContents.open(aside)
                try:
                    check(contents)
                finally:
                    contents.close()
                record(kept.name if kept else "")
            finally:
                database.close()
                database.database, database.creating = str(engine.path), False
            sync_file(aside)
            sync_directory(aside.parent)
        except BaseException as error:
            _remove_with_parts(aside)
            engine.beside(RESTORE_NOTE).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _put_error(error, engine.path) from error
            raise
        _note(engine, EXCHANGING, kept.name if kept else "")
        _exchange(engine.path, aside, kept)
        engine.beside(RESTORE_NOTE).unlink()
        sync_directory(engine.path.parent)
        return str(kept) if kept else ""

    def _kept_path(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self.engine.beside(f".before-restore-{stamp}")
        number = 1
        while path.exists():
            number += 1
            path = self.engine.beside(f".before-restore-{stamp}-{number}")
        return path


class _Guard:
    """Called between the steps of a copy: keeps it from running too far ahead of the disk, throttles it, tells how far
    it is, and watches the write-ahead log."""

    def __init__(self, path: Path, page_bytes: int, pace: Pace, sending: Sending) -> None:
        self._limit = LogLimit(path, pace.wal_bytes)
        self._page_bytes = page_bytes
        self._pace = pace
        self._sending = sending
        self._began = time.monotonic()

    def step(self, status: int, remaining: int, total: int) -> None:
        done = (total - remaining) * self._page_bytes
        self._sending.written(done, hurry=self._limit.high())
        if self._pace.progress is not None:
            self._pace.progress(done, total * self._page_bytes)
        while True:
            if self._limit.passed():
                raise self._limit.error()
            rate = self._pace.bytes_per_second
            early = self._began + done / rate - time.monotonic() if rate and not self._limit.high() else 0.0
            if early <= 0 or not remaining:
                return
            time.sleep(min(early, NAP_SECONDS))


def _write_statements(contents: SqliteContents, target: Path) -> None:
    """What the `.dump` of the sqlite3 shell gives: every table with its rows, then indexes, triggers and views.

    Python's own is not in every driver.
    """
    with open(target, "r+", encoding="utf-8", newline="") as file, Sending(target) as sending:
        file.write("PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\n")
        size = 0
        objects = contents.raw(
            "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
            " ORDER BY type = 'table' DESC, type = 'index' DESC, rowid"
        ).fetchall()
        for kind, name, sql in objects:
            if sql.upper().startswith("CREATE VIRTUAL"):
                raise StorageError(f"{name} is a virtual table, which SQL text cannot hold whole", "use --format copy")
            file.write(f"{sql};\n")
            if kind == "table":
                columns = [row[1] for row in contents.raw(f"PRAGMA table_info({quoted(name)})").fetchall()]
                values = "||','||".join(f"quote(t.{quoted(column)})" for column in columns)
                insert = f"INSERT INTO {quoted(name)} VALUES("
                for (row,) in contents.stream(f"SELECT {values} FROM {quoted(name)} AS t"):  # noqa: S608
                    file.write(f"{insert}{row});\n")
                    size += len(row)
                    sending.written(size)
        file.write("COMMIT;\n")


def _run_statements(connection: Any, text: Path, path: Path) -> None:
    """Run the SQL of `text`, a statement at a time, into the database at `path`.

    Raises StorageCorrupt where it is not one whole dump.
    """
    pending: list[str] = []
    last, quotes = "", 0
    try:
        # Tables come by name, so rows may come before those that they refer to.
        connection.execute("PRAGMA foreign_keys = OFF")
        with open(text, encoding="utf-8", newline="\n") as file:
            for line in file:
                pending.append(line)
                quotes += line.count("'")
                # Not at each line of a long text in a row: asking costs the whole statement.
                if line.rstrip().endswith(";") and (quotes % 2 == 0 or not pending[0].startswith("INSERT")):
                    statement = "".join(pending)
                    if sqlite3.complete_statement(statement):
                        connection.execute(statement)
                        pending, last, quotes = [], statement.strip(), 0
    except sqlite3.Error as error:
        raise translated(error, path) from error
    except UnicodeDecodeError as error:
        raise StorageCorrupt(f"{text} is not UTF-8", "use another set: kaged backups") from error
    if "".join(pending).strip() or last.upper() != "COMMIT;":
        raise StorageCorrupt(f"{text} ends before its last statement", "use another set: kaged backups")


# Exchanging the files of a store. `path` is the database, `aside` the new one, `kept` what the old one is called after.


def finish_exchange(engine: SqliteEngine) -> None:
    """See to a restore that was cut off, and say which store is there now; the place must be held exclusively."""
    note = engine.beside(RESTORE_NOTE)
    try:
        stage, _, kept = note.read_text().strip().partition(" ")
    except FileNotFoundError:
        return
    aside = _new(engine.path)
    if stage == EXCHANGING:
        _exchange(engine.path, aside, engine.path.with_name(kept) if kept else None)
        said = f"was finished now: it has the restored store{f', the old one is {kept}' if kept else ''}"
    else:
        _remove_with_parts(aside)
        said = "had changed nothing: it has the store from before"
    note.unlink()
    sync_directory(engine.path.parent)
    logger.warning("a restore of %s was cut off and %s", engine.path, said)


def _exchange(path: Path, aside: Path, kept: Path | None) -> None:
    """Each step can be done again: as long as the new file is aside, whatever is at the place is the old store."""
    if aside.exists():
        if kept is not None:
            for suffix in (*_LOGS, ""):
                with suppress(FileNotFoundError):
                    os.rename(_part(path, suffix), _part(kept, suffix))
        _part(path, "-shm").unlink(missing_ok=True)
        sync_directory(path.parent)
        os.rename(aside, path)
    sync_directory(path.parent)


def _note(engine: SqliteEngine, stage: str, kept: str = "") -> None:
    """Say on the disk how far a restore is; the note is always a whole one."""
    note, draft = engine.beside(RESTORE_NOTE), engine.beside(RESTORE_DRAFT)
    draft.unlink(missing_ok=True)
    with open(draft, "x", opener=_private) as file:
        file.write(f"{stage} {kept}\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, note)
    sync_directory(note.parent)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.restored")


def _part(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _remove_with_parts(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        _part(path, suffix).unlink(missing_ok=True)


def _copy_bytes(source: Path, target: Path) -> None:
    """Into a file that is there already, and private; `source` is never a database that is open in this process."""
    with open(source, "rb") as read, open(target, "wb") as write:
        while data := read.read(LOAD_CHARACTERS):
            write.write(data)


def _put_error(error: OSError, path: Path) -> StorageError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"the disk of {path} is full; the store is as it was", "free some space first")
    return StorageError(
        f"the new store cannot be made beside {path}: {error.strerror}; the store is as it was",
        "check the owner and mode of the directory",
    )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
