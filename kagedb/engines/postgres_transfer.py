"""A PostgreSQL schema as the target of a copy: one transaction, rows by COPY, keys, indexes and guards afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .archive import Table
from .copy_text import lines_of
from .postgres_archive import PostgresArchiver
from .postgres_contents import PostgresContents, plugin_schemas
from .postgres_copy import copy_in
from .sqlite_contents import quoted
from .transfer import Receiver

if TYPE_CHECKING:
    from .postgres import PostgresEngine

_CONSTRAINTS = (
    "SELECT n.nspname, c.relname, k.conname, pg_get_constraintdef(k.oid), k.contype::text FROM pg_constraint k"
    " JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY (?) AND k.contype IN ('f', 'p', 'u') ORDER BY k.contype = 'f' DESC, k.conname"
)
_INDEXES = (
    "SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) FROM pg_index i"
    " JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY (?) AND NOT EXISTS"
    " (SELECT 1 FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))"
)
_TRIGGERS = (
    "SELECT n.nspname, c.relname, t.tgname, pg_get_triggerdef(t.oid), t.tgenabled::text FROM pg_trigger t"
    " JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY (?) AND NOT t.tgisinternal ORDER BY t.tgname"
)
_ENABLING = {"D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}


class PostgresReceiver(Receiver):
    takes_lines = True

    def __init__(self, engine: PostgresEngine) -> None:
        self.engine: PostgresEngine = engine

    def replace(self, work: Callable[[], None]) -> None:
        self.engine.change_schema(work)

    def require_place(self) -> None:
        self.engine.require_schema()
        self.engine.database.statement_done()

    def require_room(self, wanted_bytes: int) -> None:
        """The server's disk is not to be seen from here; a full one undoes the copy."""

    def lay_aside(self) -> list[str]:
        raw, schemas = self.engine.database.raw, (self._schemas(),)
        keys: list[str] = []
        references: list[str] = []
        indexes, guards = [], []
        for schema, relation, name, definition, enabled in raw(_TRIGGERS, schemas).fetchall():
            table = f"{quoted(schema)}.{quoted(relation)}"
            raw(f"DROP TRIGGER {quoted(name)} ON {table}")
            guards.append(definition)
            if enabled in _ENABLING:
                guards.append(f"ALTER TABLE {table} {_ENABLING[enabled]} TRIGGER {quoted(name)}")
        for schema, relation, name, definition, kind in raw(_CONSTRAINTS, schemas).fetchall():
            table = f"{quoted(schema)}.{quoted(relation)}"
            raw(f"ALTER TABLE {table} DROP CONSTRAINT {quoted(name)}")
            again = f"ALTER TABLE {table} ADD CONSTRAINT {quoted(name)} {definition}"
            (references if kind == "f" else keys).append(again)
        for name, definition in raw(_INDEXES, schemas).fetchall():
            raw(f"DROP INDEX {name}")
            indexes.append(definition)
        # References rest on keys.
        made_again = [*keys, *indexes, *references, *guards]
        # Else it would be read in the order of its keys by sorting it, since nothing is known of it yet.
        return made_again + [f"ANALYZE {place}" for place in self.contents().places()]

    def empty(self) -> None:
        self.engine.database.raw(f"TRUNCATE {', '.join(self.contents().places())}")

    def load(self, table: Table, rows: Iterable[tuple[Any, ...]]) -> None:
        self.load_lines(table, lines_of(rows, table))

    def load_lines(self, table: Table, pieces: Iterable[bytes]) -> None:
        columns = ", ".join(map(quoted, table.columns))
        copy_in(self.engine.database.connection(), self.contents().place(table), columns, pieces)

    def contents(self) -> PostgresContents:
        return PostgresContents(self.engine.database.connection(), self.engine.schema, self._schemas()[1:])

    def _schemas(self) -> list[str]:
        """The store's own and those of its plugins."""
        found = plugin_schemas(self.engine.database.raw, self.engine.schema)
        return [self.engine.schema, *(name for name, used in found.items() if used)]

    def errors(self) -> AbstractContextManager[None]:
        return PostgresArchiver(self.engine)._errors()
