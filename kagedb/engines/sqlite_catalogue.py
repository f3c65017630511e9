"""The schema of a SQLite store as sorted lines, for the fingerprint and the comparison with the models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .transactions import StoreDatabase

PLUGIN_TABLE = re.compile(r"p_.+__")
"""Tables of plugins have a ledger of their own and are not part of the schema."""

_EXTRAS = re.compile(
    r"\bCOLLATE\s+\w+|\bCHECK\b|\bGENERATED\b|\bON\s+CONFLICT\s+\w+|\bDEFERRABLE\b[\w\s]*|\bAUTOINCREMENT\b",
    re.IGNORECASE,
)
"""What a table's text can hold that no pragma tells."""


def tables(database: StoreDatabase) -> list[str]:
    rows = database.raw("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'")
    return sorted(name for (name,) in rows.fetchall() if not PLUGIN_TABLE.match(name))


def catalogue(database: StoreDatabase) -> list[str]:
    lines: list[str] = []
    names = tables(database)
    strict = {row[1]: row[5] for row in database.raw("PRAGMA table_list").fetchall() if row[0] == "main"}
    texts = {
        (kind, name): text
        for kind, name, text in database.raw("SELECT type, name, sql FROM sqlite_master").fetchall()
    }
    for table in names:
        lines.append(f"table {table}{' STRICT' if strict.get(table) else ''}")
        lines += _columns(database, table)
        lines += _foreign_keys(database, table)
        lines += _indexes(database, table, texts)
        lines += sorted(
            f"table {table} also says {' '.join(extra.upper().split())}"
            for extra in _EXTRAS.findall(texts["table", table] or "")
        )
    rows = database.raw("SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    lines += [f"trigger {name} on {table}: {_one_line(text)}" for name, table, text in rows if table in names]
    return sorted(lines)


def _columns(database: StoreDatabase, table: str) -> list[str]:
    lines = []
    for _, name, kind, required, default, key, hidden in database.raw(f'PRAGMA table_xinfo("{table}")').fetchall():
        line = f"column {table}.{name} {kind}"
        line += " NOT NULL" if required else ""
        line += f" DEFAULT {default}" if default is not None else ""
        line += f" KEY {key}" if key else ""
        lines.append(line + (f" HIDDEN {hidden}" if hidden else ""))
    return lines


def _foreign_keys(database: StoreDatabase, table: str) -> list[str]:
    lines = []
    for row in database.raw(f'PRAGMA foreign_key_list("{table}")').fetchall():
        _, part, target, column, target_column, on_update, on_delete, match = row
        lines.append(
            f"foreign key {table}.{column} to {target}.{target_column} part {part}"
            f" on update {on_update} on delete {on_delete} match {match}"
        )
    return lines


def _indexes(database: StoreDatabase, table: str, texts: dict[tuple[str, str], str]) -> list[str]:
    lines = []
    for _, name, unique, origin, partial in database.raw(f'PRAGMA index_list("{table}")').fetchall():
        columns = [
            f"{column}{' DESC' if descending else ''} COLLATE {collation}"
            for _, _, column, descending, collation, is_key in database.raw(f'PRAGMA index_xinfo("{name}")').fetchall()
            if is_key
        ]
        where = _one_line(texts["index", name]).partition(" WHERE ")[2] if partial else ""
        # An index that a constraint makes has a name that SQLite numbers.
        shown = name if origin == "c" else {"pk": "of the primary key", "u": "of a unique constraint"}[origin]
        lines.append(
            f"index on {table} {shown}{' UNIQUE' if unique else ''} ({', '.join(columns)})"
            f"{f' WHERE {where}' if where else ''}"
        )
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.replace('"', "").split())
