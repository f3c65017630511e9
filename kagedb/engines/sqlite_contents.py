"""A state of a store in an SQLite file that nobody writes to: a finished copy, or what a set was unpacked into.

What is common to everybody who reads such files is here too: names, errors, damage, and how far a log may grow.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peewee

from ..errors import StorageBusy, StorageCorrupt, StorageError, StorageFull
from .archive import BLOB, INTEGER, REAL, TEXT, Contents, Table
from .places import room_is_out

sqlite3 = peewee.sqlite3

INTERRUPTIBLE_STEPS = 20_000
"""Steps of SQLite's machine between looks for signals: a few milliseconds."""

WATCHFUL_STEPS = 1_000
"""The same where a log may grow: some eighty rows, be they as large as a megabyte."""

CACHE_KIB = 512
"""Enough for the pages of a tree from its root to a leaf, and some to work on."""

DAMAGE_SHOWN = 5

_KINDS = {"INTEGER": INTEGER, "INT": INTEGER, "BIGINT": INTEGER, "REAL": REAL, "TEXT": TEXT, "BLOB": BLOB}


class SqliteContents(Contents):
    """Read through a connection of its own, which the caller closes."""

    finished = True

    def __init__(self, connection: Any, path: Path) -> None:
        self.connection = connection
        self.path = path
        # Everything is read once, in order: a cache would only take memory.
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._log_limit: LogLimit | None = None
        # A signal is seen between two steps only.
        connection.set_progress_handler(self._look, INTERRUPTIBLE_STEPS)

    @classmethod
    def open(cls, path: Path) -> SqliteContents:
        """The file `path`, which nobody changes meanwhile: nothing is locked and nothing left beside it."""
        uri = f"file:{urllib.parse.quote(os.fsencode(path))}?mode=ro&immutable=1"
        return cls(sqlite3.connect(uri, uri=True, isolation_level=None), path)

    def close(self) -> None:
        self.connection.close()

    def give_up_beyond(self, log_bytes: int) -> None:
        self._log_limit = LogLimit(self.path, log_bytes)
        self.connection.set_progress_handler(self._look, WATCHFUL_STEPS)

    def _look(self) -> bool:
        """Whether the statement is to be interrupted: an exception would not get out of SQLite."""
        return self._log_limit is not None and self._log_limit.passed()

    def _error(self, error: Exception) -> BaseException:
        if self._log_limit is not None and self._log_limit.passed():
            return self._log_limit.error()
        return translated(error, self.path)

    def tables(self) -> list[Table]:
        names = [
            row[1]
            for row in self.raw("PRAGMA table_list").fetchall()
            if row[0] == "main" and row[2] in ("table", "shadow") and not row[1].startswith("sqlite_")
        ]
        return [self._table(name) for name in sorted(names)]

    def _table(self, name: str) -> Table:
        found = self.raw(f"PRAGMA table_info({quoted(name)})").fetchall()
        columns = sorted((row[1], _KINDS.get(row[2].upper(), "")) for row in found)
        key = [row[1] for row in sorted(found, key=lambda row: int(row[5])) if row[5]]
        return Table(name, tuple(c for c, _ in columns), tuple(kind for _, kind in columns), tuple(key))

    def count(self, table: Table) -> int:
        (rows,) = self.raw(f"SELECT COUNT(*) FROM {quoted(table.name)}").fetchone()  # noqa: S608
        return int(rows)

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        columns = ", ".join(f"t.{quoted(column)}" for column in table.columns)
        order = ", ".join(f"t.{quoted(column)}" for column in table.key)
        in_order = f" ORDER BY {order}" if order else ""
        return self.stream(f"SELECT {columns} FROM {quoted(table.name)} AS t{in_order}")  # noqa: S608

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        try:
            return self.connection.execute(sql, params)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            # Not `yield from`, which would close the cursor of whoever goes away in the middle: after the connection.
            for row in self.connection.execute(sql, params):  # noqa: UP028
                yield row
        except sqlite3.Error as error:
            raise self._error(error) from error

    def damage(self) -> list[str]:
        try:
            return damage_told(lambda sql: list(self.stream(sql)))
        except StorageCorrupt as error:
            return [error.message]


class LogLimit:
    """How far the write-ahead log may grow while somebody holds a state of the store at `path`.

    A log that is large already is reused from its beginning: only what it grows by is the holder's doing.
    """

    def __init__(self, path: Path, log_bytes: int) -> None:
        self._log = path.with_name(path.name + "-wal")
        before = self._bytes()
        self._high = max(log_bytes, before)
        self._most = max(2 * log_bytes, before + log_bytes)

    def high(self) -> bool:
        """Whether the holder should hurry."""
        return self._bytes() > self._high

    def passed(self) -> bool:
        """Whether the holder should give up: `error` says so."""
        return self._bytes() > self._most

    def error(self) -> StorageBusy:
        return StorageBusy(
            f"the copy is too slow for what is being written: {self._log} has grown to {self._bytes():,} bytes",
            "try again when less is written, into a faster place, or raise backup.wal_limit_mib",
        )

    def _bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0


def damage_told(ask: Callable[[str], list[tuple[Any, ...]]]) -> list[str]:
    """What SQLite finds wrong with a database that is asked through `ask`."""
    found = [row[0] for row in ask(f"PRAGMA integrity_check({DAMAGE_SHOWN})")]
    if found != ["ok"]:
        return found
    dangling = ask("PRAGMA foreign_key_check")[:DAMAGE_SHOWN]
    return [f"{table} row {row} refers to a {target} that is not there" for table, row, target, _ in dangling]


def quoted(name: str) -> str:
    """A name as SQL writes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def translated(error: Exception, path: Path) -> BaseException:
    """The error that a driver's error on a copy or scratch file stands for."""
    name = getattr(error, "sqlite_errorname", None) or ""
    if name == "SQLITE_INTERRUPT":
        # A signal was seen in the progress handler, out of which SQLite lets no exception.
        return KeyboardInterrupt()
    if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and room_is_out(str(path))):
        return StorageFull(f"the disk of {path.parent} is full", "free some space, or name another place")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CANTOPEN")):
        return StorageCorrupt(f"{path} is damaged or not a SQLite database: {error}", "use another set: kaged backups")
    if name.startswith("SQLITE_IOERR"):
        return StorageError(f"input or output error on {path}: {name}", "check the disk: dmesg, fsck")
    return StorageCorrupt(f"{path} cannot be read: {error}", "use another set: kaged backups")
