"""The tables of a damaged SQLite file: what its schema says of them, or what this version's scripts would make.

The texts of tables are run in an empty database in memory, so that SQLite itself says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .archive import BLOB, INTEGER, REAL, TEXT
from .engine import PLUGIN_TABLE
from .salvage import Shape, Survey
from .sqlite_contents import _KINDS as KINDS
from .sqlite_contents import quoted, sqlite3

SCHEMA = Shape(
    "sqlite_schema",
    ("type", "name", "tbl_name", "rootpage", "sql"),
    ("text", "text", "text", "integer", "text"),
    (True, True, True, True, False),
    (None,) * 5,
    ("type", "name"),
    (),
    (),
    strict=True,
)
"""The table that names the others; its first page is the first of the file (section 2.6 of the file format)."""


@dataclass(slots=True)
class Tree:
    """A table and where its rows begin; `root` is 0 where that is not known."""

    shape: Shape
    root: int
    number: int = 0
    alias: int | None = None
    """The place of the column that stands for the rowid, which the record itself does not have."""
    indexes: list[tuple[int, bool]] = field(default_factory=list)
    """The roots of the indexes that have every row, and whether that is the primary key's."""
    strays: int = 0
    """Pages of it that no page above leads to."""

    def fits(self, kinds: list[int]) -> bool:
        """Whether a record with these serial types can be a row of the table; an older one may be shorter."""
        shape = self.shape
        if len(kinds) > len(shape.columns) or not kinds:
            return False
        if len(kinds) < len(shape.columns) and any(
            required and default is None
            for required, default in zip(shape.required[len(kinds) :], shape.defaults[len(kinds) :], strict=True)
        ):
            return False
        for place, kind in enumerate(kinds):
            if place == self.alias:
                if kind != 0:
                    return False
            elif kind == 0:
                if shape.required[place]:
                    return False
            elif shape.strict and not _MAY_BE.get(shape.kinds[place], _anything)(kind):
                return False
        return True


def _anything(kind: int) -> bool:
    return True


# By the serial types of section 2.1.
_MAY_BE: dict[str, Callable[[int], bool]] = {
    INTEGER: lambda kind: kind in (1, 2, 3, 4, 5, 6, 8, 9),
    REAL: lambda kind: kind in (1, 2, 3, 4, 5, 6, 7, 8, 9),
    TEXT: lambda kind: kind >= 13 and kind % 2 == 1,
    BLOB: lambda kind: kind >= 12 and kind % 2 == 0,
}


@dataclass(frozen=True, slots=True)
class Object:
    """A row of sqlite_schema."""

    type: str
    name: str
    table: str
    root: int
    sql: str | None


def objects(rows: Iterable[tuple[Any, ...]]) -> list[Object]:
    return [Object(*row) for row in rows]


def known_objects(pattern: Path) -> list[Object]:
    """What a fresh store of this version's scripts has."""
    connection = sqlite3.connect(pattern)
    try:
        return objects(
            connection.execute("SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master ORDER BY rowid")
        )
    finally:
        connection.close()


def trees(found: list[Object], known: list[Object], survey: Survey, engine: str) -> list[Tree]:
    """The tables whose rows are to be looked for: those of the scripts, and those of plugins that the file names.

    A table of the scripts of which the file says nothing has the root 0. `survey.notes` is told what is left behind.
    """
    wanted = _described(known)
    told = _described(found)
    made = []
    for name, tree in wanted.items():
        mine = told.pop(name, None)
        if mine is None:
            tree.root, tree.indexes = 0, []
        elif mine.shape.columns != tree.shape.columns and (
            set(mine.shape.columns) == set(tree.shape.columns) or len(mine.shape.columns) != len(tree.shape.columns)
        ):
            # Of an older schema. Where only a name differs, it is the text that is damaged.
            tree = mine
        else:
            tree.root, tree.indexes = mine.root, mine.indexes
        made.append(tree)
    for name, tree in told.items():
        if name.startswith("sqlite_"):
            continue
        if not PLUGIN_TABLE.match(name):
            survey.notes.append(f"the table {name} is not one of kaged's and is left behind")
        elif not tree.root:
            survey.notes.append(f"the table {name} has no rowids, so that it is left behind")
        else:
            tree.shape.engine = engine
            made.append(tree)
    lost = [one.name for one in found if one.type == "table" and one.name not in {*wanted, *told}]
    survey.notes += [f"what the table {name} is cannot be told any more" for name in lost if name not in wanted]
    return made


def known_roots(known: list[Object]) -> dict[str, int]:
    """Where the tables of a fresh store begin; also where those of this one do, if it was never changed."""
    return {one.name: one.root for one in known if one.type == "table"}


def _described(found: list[Object]) -> dict[str, Tree]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for kind in ("table", "index"):
            for one in found:
                if one.type == kind and one.sql and one.sql[:7].upper() == "CREATE ":
                    try:
                        connection.execute(one.sql)
                    except (sqlite3.Error, sqlite3.Warning):
                        # A damaged text; who asks for the table is told that it is not here.
                        continue
        roots = {one.name: one.root for one in found}
        # The table's own comes first.
        texts: dict[str, list[str]] = {one.table: [one.sql] for one in found if one.sql and one.type == "table"}
        for one in found:
            if one.sql and one.type == "index" and one.table in texts:
                texts[one.table].append(one.sql)
        described = {}
        for _, name, kind, _, without_rowid, strict in connection.execute("PRAGMA table_list").fetchall():
            if kind == "table" and name != "sqlite_schema" and name in roots:
                tree = _tree(connection, name, bool(strict), roots)
                tree.root = 0 if without_rowid else roots[name]
                tree.shape.statements = tuple(texts[name])
                described[name] = tree
        return described
    finally:
        connection.close()


def _tree(connection: Any, name: str, strict: bool, roots: dict[str, int]) -> Tree:
    def ask(what: str, of: str) -> list[tuple[Any, ...]]:
        return list(connection.execute(f"PRAGMA {what}({quoted(of)})"))

    # Generated columns that are not stored are in no record.
    columns = [row for row in ask("table_xinfo", name) if row[6] in (0, 3)]
    key = [row[1] for row in sorted(columns, key=lambda row: int(row[5])) if row[5]]
    unique, indexes, keyed = [], [], False
    for _, index, is_unique, origin, partial in ask("index_list", name):
        parts = [row[2] for row in ask("index_xinfo", index) if row[5]]
        keyed = keyed or origin == "pk"
        if is_unique and not partial and origin != "pk" and None not in parts:
            unique.append(tuple(parts))
        if roots.get(index) and not partial:
            indexes.append((roots[index], origin == "pk"))
    names = [row[1] for row in columns]
    groups: dict[int, list[tuple[str, str, str]]] = {}
    for number, _, target, column, target_column, *_ in ask("foreign_key_list", name):
        groups.setdefault(number, []).append((column, target, target_column or ""))
    shape = Shape(
        name,
        tuple(names),
        tuple(KINDS.get(row[2].upper(), "") for row in columns),
        tuple(bool(row[3]) for row in columns),
        tuple(_default(connection, row[4]) for row in columns),
        tuple(key),
        tuple(unique),
        tuple(parts[0] for parts in groups.values() if len(parts) == 1),
        strict,
    )
    return Tree(shape, 0, alias=names.index(key[0]) if len(key) == 1 and not keyed else None, indexes=indexes)


def _default(connection: Any, text: str | None) -> Any:
    """What an older record has that is shorter than its table: the column came later."""
    if text is None:
        return None
    try:
        return connection.execute(f"SELECT {text}").fetchone()[0]
    except sqlite3.Error:
        return None
