"""A state of a PostgreSQL store, read on a connection that is in one transaction for as long as that lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .archive import BLOB, BOOLEAN, INTEGER, REAL, TEXT, Contents, Table
from .copy_text import piece_hashes
from .plugins import prefix
from .postgres_copy import copied_out
from .resting import Rests
from .sqlite_contents import quoted

DAMAGE_SHOWN = 5

FETCH_ROWS = 500
"""Rows fetched at a time where they are small."""

FETCH_ROWS_AT_FIRST, FETCH_BYTES = 16, 1 << 18
"""Of a table's rows as many as are so large; of those of unknown size so many. Bytes come as text of twice their
length: 16 chunks of terminal output take a megabyte."""

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
    "SELECT n.nspname, c.relname, a.attname, t.typname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
    " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_type t ON t.oid = a.atttypid"
    " WHERE n.nspname = ANY (?) AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''"
    ' ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C", a.attname COLLATE "C"'
)
_KEYS = (
    "SELECT n.nspname, c.relname, a.attname FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid"
    " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN LATERAL unnest(i.indkey) WITH ORDINALITY k(attnum, place)"
    " ON TRUE JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum"
    " WHERE n.nspname = ANY (?) AND i.indisprimary ORDER BY n.nspname, c.relname, k.place"
)
# A schema of that beginning may be another store's: a plugin's belongs to the role of its name (postgres_plugins.py).
_PLUGIN_SCHEMAS = (
    "SELECT n.nspname::text FROM pg_namespace n WHERE starts_with(n.nspname, ? || '_p_')"
    " AND pg_get_userbyid(n.nspowner) = n.nspname ORDER BY 1"
)
_INVALID_INDEXES = (
    "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY (?) AND NOT (i.indisvalid AND i.indisready)"
    " ORDER BY 1"
)
_TREES = (
    "SELECT c.oid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " JOIN pg_am m ON m.oid = c.relam WHERE n.nspname = ANY (?) AND m.amname = 'btree' AND i.indisvalid ORDER BY c.oid"
)
# An extension that few databases have; it is not asked for.
_AMCHECK = (
    "SELECT n.nspname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.proname = 'bt_index_check'"
    " AND pg_get_function_identity_arguments(p.oid) IN ('index regclass', 'regclass')"
    " AND has_function_privilege(p.oid, 'EXECUTE')"
)
_COLUMNS_OF = (
    "ARRAY(SELECT quote_ident(a.attname) FROM unnest(k.{key}) WITH ORDINALITY u(number, place)"
    " JOIN pg_attribute a ON a.attrelid = k.{table} AND a.attnum = u.number ORDER BY u.place)"
)
_REFERENCES = (
    "SELECT k.conrelid::regclass::text, k.conname::text, k.confrelid::regclass::text,"  # noqa: S608
    f" {_COLUMNS_OF.format(key='conkey', table='conrelid')}, {_COLUMNS_OF.format(key='confkey', table='confrelid')},"
    " k.convalidated FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace"
    " WHERE n.nspname = ANY (?) AND k.contype = 'f' ORDER BY 1, 2"
)
_HAS_RELATIONS = "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relnamespace = to_regnamespace(?))"


Ask = Callable[..., Any]
"""Runs a query, written with `?`, with a tuple of its parameters; gives a cursor."""


def plugin_schemas(ask: Ask, schema: str) -> dict[str, bool]:
    """The schemas of the plugins of the store in `schema`, and whether there is anything in each."""
    names = [name for (name,) in ask(_PLUGIN_SCHEMAS, (schema,)).fetchall()]
    return {name: ask(_HAS_RELATIONS, (quoted(name),)).fetchone()[0] for name in names}


def table_names(schema: str, table: str) -> tuple[str, str]:
    """What a plugin's table may be called in a manifest: with its schema, where it is not named as plugins do it, so
    that no name stands for two; else as it is, which is what SQLite has."""
    return f"{schema}.{table}", table


class PostgresContents(Contents):
    """`plugins` are the schemas of plugins whose tables are a part of it."""

    def __init__(self, connection: Any, schema: str, plugins: Iterable[str] = ()) -> None:
        self.connection = connection
        self.schema = schema
        self.schemas = [schema, *plugins]
        self.rests: Rests | None = None
        """Where there is no hurry."""
        self._places: dict[str, str] = {}
        """The schema and name of each table, as SQL writes them."""
        self._padded: set[tuple[str, str]] = set()
        self._cursors = 0

    def tables(self) -> list[Table]:
        columns: dict[str, list[tuple[str, str]]] = {}
        keys: dict[str, list[str]] = {}
        for schema, table, column, kind in self.raw(_COLUMNS, (self.schemas,)).fetchall():
            name = self._name(schema, table)
            self._places[name] = f"{quoted(schema)}.{quoted(table)}"
            columns.setdefault(name, []).append((column, _KINDS.get(kind, TEXT)))
            if kind == "bpchar":
                self._padded.add((name, column))
        for schema, table, column in self.raw(_KEYS, (self.schemas,)).fetchall():
            keys.setdefault(self._name(schema, table), []).append(column)
        return [
            Table(name, tuple(c for c, _ in found), tuple(kind for _, kind in found), tuple(keys.get(name, ())))
            for name, found in columns.items()
        ]

    def _name(self, schema: str, table: str) -> str:
        long, short = table_names(schema, table)
        plugin = schema.removeprefix(f"{self.schema}_p_")
        return short if schema == self.schema or table.startswith(prefix(plugin)) else long

    def places(self) -> list[str]:
        """Every table, by schema and name as SQL writes them."""
        self.tables()
        return list(self._places.values())

    def place(self, table: Table) -> str:
        """The table's schema and name, as SQL writes them."""
        if table.name not in self._places:
            self.tables()
        return self._places[table.name]

    def count(self, table: Table) -> int:
        (rows,) = self.raw(f"SELECT COUNT(*) FROM {self.place(table)}").fetchone()  # noqa: S608
        return int(rows)

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        blobs = [place for place, kind in enumerate(table.kinds) if kind == BLOB]
        for batch in self._batches(self._select(table), (), FETCH_ROWS_AT_FIRST):
            if not blobs:
                yield from batch
                continue
            columns: list[Any] = list(zip(*batch, strict=True))
            for place in blobs:
                columns[place] = [None if value is None else bytes(value) for value in columns[place]]
            yield from zip(*columns, strict=True)

    def lines(self, table: Table) -> Iterator[bytes]:
        if REAL in table.kinds:
            # Of a float the server writes other digits than Python.
            return super().lines(table)
        return self._resting(copied_out(self.connection, self._select(table, boolean="::int")))

    def hashes(self, table: Table) -> Iterator[list[bytes]]:
        return map(piece_hashes, self.lines(table))

    def _resting(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            if self.rests is not None:
                self.rests.rest()

    def _select(self, table: Table, boolean: str = "") -> str:
        """The query for all rows, by key; `boolean` comes after the columns of that kind."""
        kinds = dict(zip(table.columns, table.kinds, strict=True))

        def value(column: str, collated: bool = False) -> str:
            name = f"t.{quoted(column)}"
            if kinds[column] == BOOLEAN:
                return name + boolean
            if kinds[column] != TEXT:
                return name
            # A cast to text would cut off the blanks at the end of a char(n), which a dump has.
            text = f"textin(bpcharout({name}))" if (table.name, column) in self._padded else f"{name}::text"
            return f'{text} COLLATE "C"' if collated else text

        place = self.place(table)
        columns = ", ".join(map(value, table.columns))
        order = ", ".join(value(column, True) for column in table.key)
        in_order = f" ORDER BY {order}" if order else ""
        return f"SELECT {columns} FROM {place} AS t{in_order}"  # noqa: S608

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        cursor = self.connection.cursor()
        cursor.execute(sql.replace("?", "%s") if params else sql, params or None)
        return cursor

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for batch in self._batches(sql, params, FETCH_ROWS):
            yield from batch

    def _batches(self, sql: str, params: tuple[Any, ...], at_first: int) -> Iterator[list[tuple[Any, ...]]]:
        # A cursor of the server: psycopg2 would fetch everything first.
        self._cursors += 1
        with self.connection.cursor() as cursor:
            name = f"kaged_contents_{self._cursors}"
            declare = f"DECLARE {name} NO SCROLL CURSOR FOR {sql.replace('?', '%s') if params else sql}"
            cursor.execute(declare, params or None)
            number = at_first
            while True:
                cursor.execute(f"FETCH {number} FROM {name}")
                rows = cursor.fetchall()
                if not rows:
                    break
                yield rows
                if self.rests is not None:
                    self.rests.rest()
                if at_first < FETCH_ROWS:
                    number = _next_number(number, rows)
            cursor.execute(f"CLOSE {name}")

    def give_up_beyond(self, log_bytes: int) -> None:
        """No log grows: the server keeps dead rows a while longer."""

    def damage(self) -> list[str]:
        """What does not fit together. Reading every row, as a digest does, finds a damaged page."""
        return damage_told(self.raw, self.schemas)


def damage_told(ask: Ask, schemas: list[str]) -> list[str]:
    """What the server was made to overlook: it enforces references as long as nobody has it look away."""
    found = [f"the index {name} is not valid" for (name,) in ask(_INVALID_INDEXES, (schemas,)).fetchall()]
    for table, name, target, columns, referred, trusted in ask(_REFERENCES, (schemas,)).fetchall():
        pairs = list(zip(columns, referred, strict=True))
        given = " AND ".join(f"c.{column} IS NOT NULL" for column, _ in pairs)
        same = " AND ".join(f"p.{other} = c.{column}" for column, other in pairs)
        dangling = (
            f"SELECT 1 FROM {table} c WHERE {given} AND NOT EXISTS (SELECT 1 FROM {target} p WHERE {same}) LIMIT 1"  # noqa: S608
        )
        if ask(dangling).fetchone() is not None:
            found.append(f"{table} refers to a {target} that is not there ({name})")
        elif not trusted:
            found.append(f"the reference {name} of {table} is not validated")
    return found[:DAMAGE_SHOWN]


def damage_of(ask: Ask, schema: str) -> list[str]:
    """What is wrong with the whole store in `schema`, each row of it read, and its indexes too where amcheck is there.

    Raises StorageCorrupt where the server cannot read something.
    """
    schemas = [schema, *plugin_schemas(ask, schema)]
    found = damage_told(ask, schemas)
    for name in dict.fromkeys(f"{quoted(s)}.{quoted(t)}" for s, t, _, _ in ask(_COLUMNS, (schemas,)).fetchall()):
        # As text: the server must fetch what is kept outside of the row.
        ask(f"SELECT SUM(octet_length(t::text)) FROM {name} t").fetchone()  # noqa: S608
    check = ask(_AMCHECK).fetchone()
    for (index,) in ask(_TREES, (schemas,)).fetchall() if check else ():
        ask(f"SELECT {quoted(check[0])}.bt_index_check(?)", (index,))
    return found


def _next_number(number: int, rows: list[tuple[Any, ...]]) -> int:
    """Twice as many rows where these were small, fewer where not; by every eighth of them."""
    size = 8 * sum(len(value) for row in rows[::8] for value in row if isinstance(value, str | memoryview))
    fitting = number * FETCH_BYTES // max(size, 1)
    return max(FETCH_ROWS_AT_FIRST, min(2 * number, fitting, FETCH_ROWS))
