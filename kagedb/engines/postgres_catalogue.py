"""The schema of a PostgreSQL store as sorted lines, for the fingerprint and the comparison with the models.

The name of the schema itself is left out of the lines: it is a setting.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .transactions import StoreDatabase

PLUGIN_TABLE = re.compile(r"p_.+__")
"""Tables of plugins have a ledger of their own and are not part of the schema."""

_RELATIONS = (
    "SELECT c.relname, c.relkind, c.relpersistence, c.relrowsecurity FROM pg_class c"
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
# 'n' and 't': NOT NULL is in the columns (PostgreSQL 18 also lists it here), triggers have their own query.
_CONSTRAINTS = (
    "SELECT c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated FROM pg_constraint k"
    " JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND k.contype NOT IN ('n', 't')"
)
_INDEXES = (
    "SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid FROM pg_index i"
    " JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ? AND c.relkind = 'r'"
)
_TRIGGERS = (
    "SELECT c.relname, t.tgname, pg_get_triggerdef(t.oid), t.tgenabled, p.prosrc, p.proconfig FROM pg_trigger t"
    " JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace"
    " JOIN pg_proc p ON p.oid = t.tgfoid WHERE n.nspname = ? AND NOT t.tgisinternal"
)
_ENABLED = {"O": "except on replicas", "D": "disabled", "R": "on replicas only", "A": "always"}
_KINDS = {"r": "table", "v": "view", "m": "materialized view", "S": "sequence", "p": "partitioned table", "f": "foreign table"}


def tables(database: StoreDatabase, schema: str) -> list[str]:
    rows = database.raw(_RELATIONS, (schema,)).fetchall()
    return sorted(name for name, kind, _, _ in rows if kind == "r" and not PLUGIN_TABLE.match(name))


def catalogue(database: StoreDatabase, schema: str) -> list[str]:
    def plain(text: str) -> str:
        return " ".join(re.sub(rf'(?<![\w"])"?{re.escape(schema)}"?\.', "", text).split())

    lines = []
    for name, kind, persistence, row_security in database.raw(_RELATIONS, (schema,)).fetchall():
        if not PLUGIN_TABLE.match(name):
            line = f"{_KINDS.get(kind, kind)} {name}"
            line += " UNLOGGED" if persistence == "u" else ""
            lines.append(line + (" ROW SECURITY" if row_security else ""))
    for table, name, kind, collation, required, default, generated, identity in database.raw(
        _COLUMNS, (schema,)
    ).fetchall():
        line = f"column {table}.{name} {kind}"
        line += f' COLLATE "{collation}"' if collation else ""
        line += " NOT NULL" if required else ""
        line += f" DEFAULT {plain(default)}" if default else ""
        lines.append(line + (f" {generated}{identity}" if generated or identity else ""))
    for table, name, text, valid in database.raw(_CONSTRAINTS, (schema,)).fetchall():
        lines.append(f"constraint {table} {name} {plain(text)}{'' if valid else ' NOT VALID'}")
    for table, text, valid in database.raw(_INDEXES, (schema,)).fetchall():
        lines.append(f"index on {table} {plain(text)}{'' if valid else ' INVALID'}")
    for table, name, text, enabled, body, config in database.raw(_TRIGGERS, (schema,)).fetchall():
        settings = ", ".join(config or ()).replace(f'"{schema}"', "<schema>").replace(f"={schema}", "=<schema>")
        lines.append(
            f"trigger {name} on {table} enabled {_ENABLED.get(enabled, enabled)}:"
            f" {plain(text)} | {settings} | {' '.join(body.split())}"
        )
    return sorted(line for line in lines if not PLUGIN_TABLE.match(line.split(" ", 2)[1].split(".")[0]))
