"""The schema of a PostgreSQL store as sorted lines, for the fingerprint and the comparison with the models.

The name of the schema itself is left out of the lines: it is a setting. Owners and grants are not part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .engine import PLUGIN_TABLE

if TYPE_CHECKING:
    from .database import StoreDatabase

# A child table, even in another schema, adds its rows to what a query of its parent gives.
_RELATIONS = (
    "SELECT c.relname, c.relkind, c.relpersistence, c.relrowsecurity,"
    " EXISTS (SELECT 1 FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)),"
    " CASE WHEN c.relkind IN ('v', 'm') THEN concat_ws(' ', c.reloptions::text, pg_get_viewdef(c.oid)) END"
    " FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ? AND c.relkind NOT IN ('i', 'I', 't', 'c')"
)
_COLUMNS = (
    "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), l.collname, a.attnotnull,"
    " pg_get_expr(d.adbin, d.adrelid), a.attgenerated, a.attidentity"
    " FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " LEFT JOIN pg_collation l ON l.oid = a.attcollation AND l.collname <> 'default'"
    " LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum"
    " WHERE n.nspname = ? AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped"
)
_VIEWS = (
    "SELECT c.relname, array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a"
    " JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND c.relkind = 'v' AND a.attnum > 0 AND NOT a.attisdropped"
    ' GROUP BY c.relname ORDER BY c.relname COLLATE "C"'
)
# 'n' and 't': NOT NULL is in the columns (PostgreSQL 18 also lists it here), triggers have their own query.
_CONSTRAINTS = (
    "SELECT c.relname, k.conname, pg_get_constraintdef(k.oid) FROM pg_constraint k"
    " JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND (k.contype NOT IN ('n', 't') OR NOT k.convalidated)"
)
_INDEXES = (
    "SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid FROM pg_index i"
    " JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND c.relkind = 'r'"
)
# Internal triggers are what enforces foreign keys; they are not worth a line while they do.
_TRIGGERS = (
    "SELECT c.relname, CASE WHEN t.tgisinternal THEN 'of a foreign key' ELSE t.tgname END, t.tgenabled,"
    " CASE WHEN t.tgisinternal THEN '' ELSE pg_get_triggerdef(t.oid) END, p.prosrc, p.proconfig FROM pg_trigger t"
    " JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " JOIN pg_proc p ON p.oid = t.tgfoid WHERE n.nspname = ? AND NOT (t.tgisinternal AND t.tgenabled = 'O')"
)
_RULES = (
    "SELECT c.relname, pg_get_ruledef(r.oid) FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ? AND r.rulename <> '_RETURN'"
)
# A function of ours can stand in for a built-in one. Those of triggers are told with their trigger.
_FUNCTIONS = (
    "SELECT p.proname, pg_get_function_identity_arguments(p.oid) FROM pg_proc p"
    " JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = ?"
    " AND NOT EXISTS (SELECT 1 FROM pg_trigger t WHERE t.tgfoid = p.oid)"
)
_ENABLED = {"O": "except on replicas", "D": "disabled", "R": "on replicas only", "A": "always"}
_KINDS = {
    "r": "table",
    "v": "view",
    "m": "materialized view",
    "S": "sequence",
    "p": "partitioned table",
    "f": "foreign table",
}


def tables(database: StoreDatabase, schema: str) -> list[str]:
    return sorted(row[0] for row in _rows(database, _RELATIONS, schema) if row[1] == "r")


def views(database: StoreDatabase, schema: str) -> dict[str, tuple[str, ...]]:
    return {view: tuple(columns) for view, columns in _rows(database, _VIEWS, schema)}


def catalogue(database: StoreDatabase, schema: str) -> list[str]:
    def plain(text: str) -> str:
        return " ".join(re.sub(rf'(?<![\w"])"?{re.escape(schema)}"?\.', "", text).split())

    lines = []
    for name, kind, persistence, row_security, inherits, definition in _rows(database, _RELATIONS, schema):
        line = f"{_KINDS.get(kind, kind)} {name}"
        line += " UNLOGGED" if persistence == "u" else ""
        line += " ROW SECURITY" if row_security else ""
        line += " INHERITANCE" if inherits else ""
        lines.append(line + (f": {plain(definition)}" if definition else ""))
    for table, name, kind, collation, required, default, generated, identity in _rows(database, _COLUMNS, schema):
        line = f"column {table}.{name} {kind}"
        line += f' COLLATE "{collation}"' if collation else ""
        line += " NOT NULL" if required else ""
        line += f" DEFAULT {plain(default)}" if default else ""
        lines.append(line + (f" {generated}{identity}" if generated or identity else ""))
    for table, name, text in _rows(database, _CONSTRAINTS, schema):
        lines.append(f"constraint {table} {name} {plain(text)}")
    for table, text, valid in _rows(database, _INDEXES, schema):
        lines.append(f"index on {table} {plain(text)}{'' if valid else ' INVALID'}")
    for table, name, enabled, text, body, config in _rows(database, _TRIGGERS, schema):
        settings = ", ".join(config or ()).replace(f'"{schema}"', "<schema>").replace(f"={schema}", "=<schema>")
        lines.append(
            f"trigger {name} on {table} enabled {_ENABLED.get(enabled, enabled)}:"
            f" {plain(text)} | {settings} | {' '.join(body.split())}"
        )
    lines += [f"rule on {table} {plain(text)}" for table, text in _rows(database, _RULES, schema)]
    lines += [f"function {name}({plain(arguments)})" for name, arguments in _rows(database, _FUNCTIONS, schema)]
    return sorted(lines)


def _rows(database: StoreDatabase, query: str, schema: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a query whose first column is the table that they are about, without those of plugins."""
    return (row for row in database.raw(query, (schema,)).fetchall() if not PLUGIN_TABLE.match(row[0]))
