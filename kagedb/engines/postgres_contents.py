"""A state of a PostgreSQL store, read on a connection that is in one transaction for as long as that lasts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .archive import BLOB, BOOLEAN, INTEGER, REAL, TEXT, Contents, Table
from .sqlite_contents import quoted

FETCH_ROWS, FETCH_ROWS_WITH_BYTES = 500, 40
"""Rows fetched at a time. Bytes come as text of twice their length: 40 chunks of terminal output take 2 MB."""

# Type categories would not do: json and bytea are both "user-defined" there.
_KINDS = {
    "int2": INTEGER,
    "int4": INTEGER,
    "int8": INTEGER,
    "float4": REAL,
    "float8": REAL,
    "bytea": BLOB,
    "bool": BOOLEAN,
}

_COLUMNS = (
    "SELECT c.relname, a.attname, t.typname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
    " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_type t ON t.oid = a.atttypid"
    " WHERE n.nspname = ? AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped"
    ' ORDER BY c.relname COLLATE "C", a.attname COLLATE "C"'
)
_KEYS = (
    "SELECT c.relname, a.attname FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid"
    " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN LATERAL unnest(i.indkey) WITH ORDINALITY k(attnum, place)"
    " ON TRUE JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum"
    " WHERE n.nspname = ? AND i.indisprimary ORDER BY c.relname, k.place"
)


class PostgresContents(Contents):
    def __init__(self, connection: Any, schema: str) -> None:
        self.connection = connection
        self.schema = schema
        self._cursors = 0

    def tables(self) -> list[Table]:
        columns: dict[str, list[tuple[str, str]]] = {}
        keys: dict[str, list[str]] = {}
        for table, column, kind in self.raw(_COLUMNS, (self.schema,)).fetchall():
            columns.setdefault(table, []).append((column, _KINDS.get(kind, TEXT)))
        for table, column in self.raw(_KEYS, (self.schema,)).fetchall():
            keys.setdefault(table, []).append(column)
        return [
            Table(name, tuple(c for c, _ in found), tuple(kind for _, kind in found), tuple(keys.get(name, ())))
            for name, found in columns.items()
        ]

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        kinds = dict(zip(table.columns, table.kinds, strict=True))

        def value(column: str, collated: bool = False) -> str:
            name = f"t.{quoted(column)}"
            if kinds[column] != TEXT:
                return name
            return f'{name}::text COLLATE "C"' if collated else f"{name}::text"

        columns = ", ".join(map(value, table.columns))
        order = ", ".join(value(column, True) for column in table.key or table.columns)
        name = f"{quoted(self.schema)}.{quoted(table.name)}"
        blobs = [place for place, kind in enumerate(table.kinds) if kind == BLOB]
        sql = f"SELECT {columns} FROM {name} AS t ORDER BY {order}"  # noqa: S608
        if not blobs:
            return self.stream(sql)
        rows = self._fetch(sql, (), FETCH_ROWS_WITH_BYTES)
        return (tuple(bytes(v) if isinstance(v, memoryview) else v for v in row) for row in rows)

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        cursor = self.connection.cursor()
        cursor.execute(sql.replace("?", "%s") if params else sql, params or None)
        return cursor

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        return self._fetch(sql, params, FETCH_ROWS)

    def _fetch(self, sql: str, params: tuple[Any, ...], rows_at_once: int) -> Iterator[tuple[Any, ...]]:
        # A cursor of the server: psycopg2 would fetch everything first.
        self._cursors += 1
        with self.connection.cursor() as cursor:
            name = f"kaged_contents_{self._cursors}"
            declare = f"DECLARE {name} NO SCROLL CURSOR FOR {sql.replace('?', '%s') if params else sql}"
            cursor.execute(declare, params or None)
            while True:
                cursor.execute(f"FETCH {rows_at_once} FROM {name}")
                rows = cursor.fetchall()
                if not rows:
                    break
                yield from rows
            cursor.execute(f"CLOSE {name}")

    def damage(self) -> list[str]:
        """The server enforces references itself, and reading every row finds a damaged page."""
        return []
