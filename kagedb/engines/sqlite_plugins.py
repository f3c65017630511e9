"""Plugins' own tables on SQLite: in the store's file, kept apart by an authorizer (sqlite3_set_authorizer).

The authorizer sees what a statement touches, not what it leads to: to what a table is renamed, to what a foreign key
refers. So whatever changed the schema is looked at once more before it is committed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peewee

from .plugins import PluginTables, prefix, refusal

sqlite3 = peewee.sqlite3

_FREE = frozenset(
    # SQLITE_RECURSIVE has no name in Python's module; sqlite.org/c3ref/c_alter_table.html gives its number.
    [sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, 33]
)
_ON_ROWS = frozenset([sqlite3.SQLITE_READ, sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE])
_ON_TABLES = frozenset(
    [
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_DROP_VIEW,
    ]
)
_ON_INDEXES = frozenset([sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX])
_SCHEMA_TABLES = (
    "sqlite_master",
    "sqlite_schema",
    "sqlite_temp_master",
    "sqlite_temp_schema",
    "sqlite_stat",
    "pragma_quick_check",
)
"""How the names begin of what SQLite itself reads and writes to change a schema; it lets nobody else write to them."""


class SqlitePluginTables(PluginTables):
    @contextmanager
    def confine(self, plugin: str, *, changes_schema: bool) -> Iterator[None]:
        database: Any = self.database
        objects = self._objects()
        guard = _Guard(prefix(plugin), {name.lower() for _, name, _, _ in objects}, changes_schema)
        connection = database.connection()
        # Setting it makes SQLite compile again what it had compiled before, so that nothing passes unseen.
        with database.calls:
            connection.set_authorizer(guard)
        try:
            yield
        except Exception as error:
            if guard.denied:
                raise refusal(plugin, guard.denied) from error
            raise
        finally:
            with database.calls:
                connection.set_authorizer(None)
        if guard.denied:
            # A driver may keep the error of a statement that it had compiled before to itself (pysqlite3 does).
            raise refusal(plugin, guard.denied)
        if changes_schema:
            self._check_schema(plugin, guard, objects)

    def _check_schema(self, plugin: str, guard: _Guard, before: list[tuple[Any, ...]]) -> None:
        for row in set(self._objects()).symmetric_difference(before):
            if not guard.owns(row[1]):
                raise refusal(plugin, row[1])
        for table in self._tables(guard.prefix):
            for row in self.database.raw(f'PRAGMA foreign_key_list("{table}")').fetchall():
                if not guard.owns(row[2]):
                    raise refusal(plugin, row[2])

    def _objects(self) -> list[tuple[Any, ...]]:
        return list(self.database.raw("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall())

    def _tables(self, start: str) -> list[str]:
        rows = self.database.raw(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND substr(name, 1, ?) = ? ORDER BY name",
            (len(start), start),
        )
        return [name for (name,) in rows.fetchall()]

    def require_granted(self, plugin: str) -> None:
        """Nothing has to be: the tables are in the store's file."""

    def tables(self, plugin: str) -> list[str]:
        return self._tables(prefix(plugin))

    def drop(self, plugin: str) -> None:
        raw = self.database.raw
        # Until the commit: a table may go before another that refers to it.
        raw("PRAGMA defer_foreign_keys = ON")
        for kind, name, _, _ in self._objects():
            if kind == "view" and name.startswith(prefix(plugin)):
                raw(f'DROP VIEW "{name}"')
        for table in self.tables(plugin):
            raw(f'DROP TABLE "{table}"')


class _Guard:
    """The authorizer of one statement of one plugin."""

    def __init__(self, start: str, taken: set[str], changes_schema: bool) -> None:
        self.prefix = start
        self.taken = taken
        """The names there are, in lower case."""
        self.changes_schema = changes_schema
        self.denied = ""
        """What was asked for and not given."""

    def owns(self, name: str | None) -> bool:
        return name is not None and name.removeprefix("sqlite_autoindex_").startswith(self.prefix)

    def __call__(self, action: int, first: str | None, second: str | None, schema: str | None, _: str | None) -> int:
        if action in _FREE or self._allows(action, first, second, schema):
            return int(sqlite3.SQLITE_OK)
        self.denied = self.denied or " ".join(part for part in (first, second) if part) or f"action {action}"
        return int(sqlite3.SQLITE_DENY)

    def _allows(self, action: int, first: str | None, second: str | None, schema: str | None) -> bool:
        if action in _ON_ROWS:
            if self.changes_schema and first is not None and first.startswith(_SCHEMA_TABLES):
                return True
            if action == sqlite3.SQLITE_READ and not second and first is not None:
                # A row of which no column is needed. The name may be that of a part of the query itself.
                return self.owns(first) or first.lower() not in self.taken
            return schema == "main" and self.owns(first)
        if action in _ON_TABLES:
            return schema == "main" and self.owns(first)
        if action in _ON_INDEXES:
            return schema == "main" and self.owns(first) and self.owns(second)
        if action == sqlite3.SQLITE_ALTER_TABLE:
            # Here the table is the other argument.
            return first == "main" and self.owns(second)
        if action == sqlite3.SQLITE_PRAGMA:
            return self.changes_schema and first == "quick_check"
        return action == sqlite3.SQLITE_REINDEX and self.owns(first)  # filling a new index
