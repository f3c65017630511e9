"""A SQLite file as the target of a copy: built aside without a journal, synced and renamed.

That is half the writes of one large transaction in WAL mode, and whoever is killed leaves what was at the place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import KagedError, StorageError, StorageFull, StorageInUse
from .archive import Contents, Table
from .sqlite_contents import SqliteContents, quoted, sqlite3
from .transfer import Receiver

if TYPE_CHECKING:
    from .sqlite import SqliteEngine


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
        engine._make(work)

    def require_room(self, wanted_bytes: int) -> None:
        directory = self.engine.path.parent
        free = shutil.disk_usage(directory).free
        if free < wanted_bytes:
            raise StorageFull(
                f"{directory} has {free:,} bytes free; the copy may need {wanted_bytes:,}",
                "free some space, or name another place",
            )

    def lay_aside(self) -> list[str]:
        raw = self.engine.database.raw
        found = raw(
            "SELECT type, name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL"
            " ORDER BY type, rowid"
        ).fetchall()
        for kind, name, _ in found:
            raw(f"DROP {kind} {quoted(name)}")
        return [sql for _, _, sql in found]

    def empty(self) -> None:
        for table in self.engine.tables():
            self.engine.database.raw(f"DELETE FROM {quoted(table)}")  # noqa: S608

    def load(self, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
        columns, places = ", ".join(map(quoted, table.columns)), ", ".join("?" * len(table.columns))
        self.engine.database.connection().executemany(
            f"INSERT INTO {quoted(table.name)} ({columns}) VALUES ({places})",  # noqa: S608
            rows,
        )

    def contents(self) -> Contents:
        return SqliteContents(self.engine.database.connection(), self.engine.path, None)

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
