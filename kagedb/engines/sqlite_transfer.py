"""A SQLite file as the target of a copy: built aside without a journal, synced and renamed.

That is half the writes of one large transaction in WAL mode, and whoever is killed leaves what was at the place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KagedError, StorageError, StorageForbidden, StorageFull, StorageInUse
from ..settings import require_parent
from . import sqlite_making
from .archive import Contents, Table
from .places import refuse_foreign, refuse_network_file_system, writable
from .sqlite_contents import SqliteContents, quoted, sqlite3
from .transfer import Receiver

if TYPE_CHECKING:
    from .sqlite import SqliteEngine

IN_MEMORY = "TEMP_STORE=3"
"""How SQLite says that it was compiled never to use temporary files (sqlite.org/compile.html)."""


class SqliteReceiver(Receiver):
    def __init__(self, engine: SqliteEngine) -> None:
        self.engine: SqliteEngine = engine

    def replace(self, work: Callable[[], None]) -> None:
        engine, database = self.engine, self.engine.database
        if engine.path.exists():
            # The rename will take the place of this file alone: nothing of the old store may be in a log beside it.
            mode = database.raw("PRAGMA journal_mode = DELETE").fetchone()[0]
            database.close()
            if mode != "delete":
                raise StorageInUse(f"another program has {engine.path} open", "close it first")
        sqlite_making.make(engine, work)

    def require_place(self) -> None:
        settings, path = self.engine.settings, self.engine.path
        refuse_foreign(path)
        if path.parent.is_dir():
            refuse_network_file_system(path)
            if not writable(path.parent):
                raise StorageForbidden(f"nothing can be made in {path.parent}", f"look at it: ls -ld {path.parent}")
        elif path.parent != Path(settings.home):
            # That of the default home would be made.
            require_parent(settings)

    def require_room(self, wanted_bytes: int) -> None:
        directory = next(parent for parent in self.engine.path.parents if parent.is_dir())
        free = shutil.disk_usage(directory).free
        if free < wanted_bytes:
            raise StorageFull(
                f"{directory} has {free:,} bytes free; the copy may need {wanted_bytes:,}",
                "free some space, or name another place",
            )

    def lay_aside(self) -> list[str]:
        raw = self.engine.database.raw
        raw("PRAGMA temp_store = FILE")
        # Making an index of rows that are there sorts them, which would take memory that grows with the table.
        sorts_in_memory = (IN_MEMORY,) in raw("PRAGMA compile_options").fetchall()
        kinds = "('trigger')" if sorts_in_memory else "('index', 'trigger')"
        found = raw(
            f"SELECT type, name, sql FROM sqlite_master WHERE type IN {kinds} AND sql IS NOT NULL"  # noqa: S608
            " ORDER BY type, rowid"
        ).fetchall()
        for kind, name, _ in found:
            raw(f"DROP {kind} {quoted(name)}")
        return [sql for _, _, sql in found]

    def empty(self) -> None:
        raw = self.engine.database.raw
        for (table,) in raw("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if not table.startswith("sqlite_"):
                raw(f"DELETE FROM {quoted(table)}")  # noqa: S608

    def load(self, table: Table, rows: Iterable[tuple[Any, ...]]) -> None:
        columns, places = ", ".join(map(quoted, table.columns)), ", ".join("?" * len(table.columns))
        self.engine.database.connection().executemany(
            f"INSERT INTO {quoted(table.name)} ({columns}) VALUES ({places})",  # noqa: S608
            rows,
        )

    def contents(self) -> Contents:
        return SqliteContents(self.engine.database.connection(), self.engine.path)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            translated = self.engine.database.translate(error)
            if isinstance(translated, KagedError):
                raise translated from error
            raise StorageError(
                f"{self.engine.path} cannot be filled: {error}", "check the source: kaged check"
            ) from error
