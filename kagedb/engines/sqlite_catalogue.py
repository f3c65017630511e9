"""The schema of a SQLite store as sorted lines, for the fingerprint and the comparison with the models.

Lines are made from pragmas, not from the texts of tables, which differ between ways to the same schema (ALTER TABLE,
Peewee, a dump). The texts are read only for what no pragma tells.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .engine import PLUGIN_TABLE

if TYPE_CHECKING:
    from .database import StoreDatabase

_TOKEN = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|\w+|\S", re.DOTALL)
_UNTOLD = frozenset(
    [
        "AUTOINCREMENT",
        "CHECK",
        "COLLATE",
        "CONFLICT",
        "DEFERRABLE",
        "DEFERRED",
        "IMMEDIATE",
        "GENERATED",
        "AS",
        "DESC",
        "INITIALLY",
    ]
)
"""Words of a column or table constraint that says something of which no pragma tells."""


def tables(database: StoreDatabase) -> list[str]:
    rows = database.raw(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    )
    return sorted(name for (name,) in rows.fetchall() if not PLUGIN_TABLE.match(name))


def views(database: StoreDatabase) -> dict[str, tuple[str, ...]]:
    rows = database.raw("SELECT name FROM sqlite_master WHERE type = 'view' ORDER BY name").fetchall()
    return {
        name: tuple(row[1] for row in database.raw(f'PRAGMA table_info("{name}")').fetchall())
        for (name,) in rows
        if not PLUGIN_TABLE.match(name)
    }


def catalogue(database: StoreDatabase) -> list[str]:
    lines: list[str] = []
    kinds = {row[1]: row[4:6] for row in database.raw("PRAGMA table_list").fetchall() if row[0] == "main"}
    objects = database.raw("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    texts = {(kind, name): text or "" for kind, name, _, text in objects}
    for table in tables(database):
        without_rowid, strict = kinds[table]
        lines.append(f"table {table}{' STRICT' if strict else ''}{' WITHOUT ROWID' if without_rowid else ''}")
        lines += _columns(database, table)
        lines += _foreign_keys(database, table)
        lines += _indexes(database, table, texts)
        lines += [f"table {table} also says: {part}" for part in _untold(texts["table", table])]
    lines += [
        f"{kind} {name} on {table}: {_one_line(text)}"
        for kind, name, table, text in objects
        if kind in ("trigger", "view") and not PLUGIN_TABLE.match(table)
    ]
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
        parts = database.raw(f'PRAGMA index_xinfo("{name}")').fetchall()
        columns = [
            f"{column}{' DESC' if descending else ''} COLLATE {collation}"
            for _, _, column, descending, collation, is_key in parts
            if is_key
        ]
        # An index that a constraint makes has a name that SQLite numbers.
        shown = name if origin == "c" else {"pk": "of the primary key", "u": "of a unique constraint"}[origin]
        line = f"index on {table} {shown}{' UNIQUE' if unique else ''} ({', '.join(columns)})"
        # The key of a table without rowid is an index that sqlite_master does not have.
        text = _one_line(texts.get(("index", name), ""))
        if any(column is None and is_key for _, _, column, _, _, is_key in parts):
            line += f" with an expression: {text}"
        elif partial:
            line += f" WHERE {text.partition(' WHERE ')[2]}"
        lines.append(line)
    return lines


def _untold(text: str) -> list[str]:
    """The columns and constraints of a CREATE TABLE text that say more than the pragmas tell."""
    parts: list[list[str]] = [[]]
    depth = 0
    for word in _TOKEN.findall(text):
        if word.startswith(("--", "/*")):
            continue
        depth += (word == "(") - (word == ")")
        if depth == 1 and word in "(,":
            parts.append([])
        elif depth:
            parts[-1].append(word)
    telling = [part for part in parts if _UNTOLD.intersection(word.upper() for word in part)]
    return [" ".join(word.strip('"`') for word in part) for part in telling]


def _one_line(text: str) -> str:
    return " ".join(text.replace('"', "").split())
