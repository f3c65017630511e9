"""A PostgreSQL schema as the target of a copy: one transaction, rows by COPY, keys, indexes and guards afterwards."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .archive import BLOB, BOOLEAN, TEXT, Contents, Table
from .postgres_archive import PostgresArchiver
from .postgres_contents import PostgresContents
from .sqlite_contents import quoted
from .transfer import Receiver

if TYPE_CHECKING:
    from .postgres import PostgresEngine

_CONSTRAINTS = (
    "SELECT c.relname, k.conname, pg_get_constraintdef(k.oid), k.contype::text FROM pg_constraint k"
    " JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND k.contype IN ('f', 'p', 'u') ORDER BY k.contype = 'f' DESC, k.conname"
)
_INDEXES = (
    "SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) FROM pg_index i"
    " JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND NOT EXISTS"
    " (SELECT 1 FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))"
)
_TRIGGERS = (
    "SELECT c.relname, t.tgname, pg_get_triggerdef(t.oid), t.tgenabled::text FROM pg_trigger t"
    " JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND NOT t.tgisinternal ORDER BY t.tgname"
)
_ENABLING = {"D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}

# What means something else in COPY's text form (sql-copy.html, "Text Format").
_ESCAPED = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_SPECIAL = re.compile("[\\\\\t\n\r]")


class PostgresReceiver(Receiver):
    def __init__(self, engine: PostgresEngine) -> None:
        self.engine: PostgresEngine = engine

    def replace(self, work: Callable[[], None]) -> None:
        self.engine.change_schema(work)

    def require_room(self, wanted_bytes: int) -> None:
        """The server's disk is not to be seen from here; a full one undoes the copy."""

    def lay_aside(self) -> list[str]:
        raw, schema = self.engine.database.raw, (self.engine.schema,)
        keys: list[str] = []
        references: list[str] = []
        indexes, guards = [], []
        for table, name, definition, enabled in raw(_TRIGGERS, schema).fetchall():
            raw(f"DROP TRIGGER {quoted(name)} ON {quoted(table)}")
            guards.append(definition)
            if enabled in _ENABLING:
                guards.append(f"ALTER TABLE {quoted(table)} {_ENABLING[enabled]} TRIGGER {quoted(name)}")
        for table, name, definition, kind in raw(_CONSTRAINTS, schema).fetchall():
            raw(f"ALTER TABLE {quoted(table)} DROP CONSTRAINT {quoted(name)}")
            again = f"ALTER TABLE {quoted(table)} ADD CONSTRAINT {quoted(name)} {definition}"
            (references if kind == "f" else keys).append(again)
        for name, definition in raw(_INDEXES, schema).fetchall():
            raw(f"DROP INDEX {name}")
            indexes.append(definition)
        # References rest on keys.
        return [*keys, *indexes, *references, *guards]

    def empty(self) -> None:
        self.engine.database.raw(f"TRUNCATE {', '.join(map(quoted, self.engine.tables()))}")

    def load(self, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
        # By columns: what is done once for a column of many rows costs half of what it does value by value.
        texts = [
            _MAKERS.get(kind, _plain)(column) for kind, column in zip(table.kinds, zip(*rows, strict=True), strict=True)
        ]
        lines = "\n".join(map("\t".join, zip(*texts, strict=True)))
        columns = ", ".join(map(quoted, table.columns))
        text = io.BytesIO(f"{lines}\n".encode())
        cursor = self.engine.database.connection().cursor()
        cursor.copy_expert(f"COPY {quoted(table.name)} ({columns}) FROM STDIN", text, 1 << 16)

    def contents(self) -> Contents:
        return PostgresContents(self.engine.database.connection(), self.engine.schema)

    def errors(self) -> AbstractContextManager[None]:
        return PostgresArchiver(self.engine)._errors()


def _text(column: Sequence[str | None]) -> Sequence[str]:
    if None in column:
        return [_NULL if value is None else _text((value,))[0] for value in column]
    # NUL is in no text of either engine.
    whole = "\0".join(column)  # type: ignore[arg-type]
    if not _SPECIAL.search(whole):
        return column  # type: ignore[return-value]
    return _SPECIAL.sub(lambda found: _ESCAPED[found[0]], whole).split("\0")


def _blob(column: Sequence[bytes | None]) -> Sequence[str]:
    return [_NULL if value is None else "\\\\x" + value.hex() for value in column]


def _boolean(column: Sequence[Any]) -> Sequence[str]:
    return [_NULL if value is None else "t" if value else "f" for value in column]


def _plain(column: Sequence[Any]) -> Sequence[str]:
    return [_NULL if value is None else str(value) for value in column]


_NULL = "\\N"
_MAKERS: dict[str, Callable[[Sequence[Any]], Sequence[str]]] = {TEXT: _text, BLOB: _blob, BOOLEAN: _boolean}
