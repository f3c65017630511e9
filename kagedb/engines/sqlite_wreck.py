"""A damaged SQLite store, read past SQLite: which page belongs to which table, and the rows that are on them.

Strategy: a page belongs to the table from whose root it is reached. What a damaged page above no longer leads to is
given to its table by the pointer map, which every store of ours has, and where that is damaged too, to the one table
whose columns its rows fit. Pages that are free by the pointer map, or else by the list of them, are not looked at: what
is on them was deleted.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StorageCorrupt, StorageForbidden, StorageInUse, StorageNotFound
from ..url import StorageURL
from .archive import REAL, TEXT
from .engine import Holder
from .locks import LockFile, holder_of
from .places import refuse_foreign
from .salvage import Hole, Read, Shape, Survey, Wreck
from .sqlite_pages import (
    BTREE_PAGE,
    FREE_PAGE,
    INDEX_INTERIOR,
    INDEX_LEAF,
    ROOT_PAGE,
    TABLE_INTERIOR,
    TABLE_LEAF,
    PageFile,
)
from .sqlite_records import Node, Records, Value, misplaced, serial_types, sort_key, values
from .sqlite_shapes import SCHEMA, Tree, known_objects, known_roots, objects, trees

if TYPE_CHECKING:
    from .engine import Engine
    from .sqlite import SqliteEngine

SHARED_BYTE = 0x40000002
"""The first byte of the database file that a connection locks, shared, for as long as it reads, and in WAL mode for as
long as it is open (sqlite.org/src, os.h: SHARED_FIRST)."""

DEEPEST = 40
"""Pages from a leaf up to a root: twenty would be more than the largest file has."""

LATE_ROWS = 10_000
"""Rows that do not fit where they are, kept for the end: those of some hundred pages."""

_STRAY = 0x8000
"""Marks the owner of a page that nothing leads to."""


@contextmanager
def wreck(engine: SqliteEngine, make: Callable[[Engine], None]) -> Iterator[Wreck]:
    """The store as it lies there, kept from everybody else; `make` makes a fresh one of this version's scripts."""
    path = engine.path
    if path.is_dir() or not path.exists():
        raise StorageNotFound(f"there is no file {path}", "name the damaged file with --url")
    refuse_foreign(path)
    # Not made where it is missing: nothing is written beside what may be the only evidence.
    engine._locks = LockFile.open(engine.beside(".lock"), create=False)
    try:
        if engine._locks is not None:
            engine.exclude()
        with tempfile.TemporaryDirectory(prefix="kaged-salvage-") as scratch:
            pattern = _pattern(engine, Path(scratch) / "kaged.db", make)
            try:
                file = PageFile(path)
            except PermissionError as error:
                raise StorageForbidden(
                    f"{path} cannot be read: {error.strerror}", "check its owner and mode"
                ) from error
            except OSError as error:
                raise StorageCorrupt(
                    f"{path} has nothing in it that could be a kaged store: {error.strerror or error}",
                    "restore a backup: kaged restore --latest",
                ) from error
            try:
                yield SqliteWreck(engine, file, pattern)
            finally:
                file.close()
    finally:
        engine.release()


def _pattern(engine: SqliteEngine, path: Path, make: Callable[[Engine], None]) -> Path:
    fresh = type(engine)(engine.settings.at(StorageURL.from_path(str(path))), read_only=False)
    try:
        fresh.archiver().hold()
        fresh.change_schema(lambda: make(fresh))
    finally:
        fresh.close()
    return path


class SqliteWreck(Wreck):
    def __init__(self, engine: SqliteEngine, file: PageFile, pattern: Path) -> None:
        self.place = engine.place
        self._engine = engine
        self._file = file
        self._records = Records(file)
        self._before = self._stamp()
        self._refuse_open()
        self._owner = array("H", bytes(2 * (file.pages + 1)))
        self._disputed: list[tuple[Tree, int]] = []
        self.survey = Survey(notes=file.notes)
        if (journal := engine.beside("-journal")).exists() and journal.stat().st_size:
            file.notes.append(f"{journal.name} lies beside: what was being written then may be there by halves")
        self._trees = [Tree(SCHEMA, 1, number=1)]
        known = known_objects(pattern)
        found = self._schema()
        self._trees += trees(found, known, self.survey, engine.name)
        for number, tree in enumerate(self._trees, 1):
            tree.number = number
        self._by_name = {tree.shape.name: tree for tree in self._trees}
        self._find_roots(known_roots(known))
        self._assign()
        self.survey.shapes = [tree.shape for tree in self._trees[1:]]

    def _stamp(self) -> list[tuple[int, int, int]]:
        stamps = []
        for suffix in ("", "-wal"):
            path = self._engine.beside(suffix)
            if path.exists():
                stat = path.stat()
                stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return stamps

    def _refuse_open(self) -> None:
        holder = holder_of(self._file.descriptor, SHARED_BYTE)
        if holder is not None:
            raise StorageInUse(
                f"the store {self.place} is open in {Holder(holder)}", "stop the daemon, or whatever has it open"
            )

    def require_unchanged(self) -> None:
        if self._stamp() != self._before:
            raise StorageInUse(f"somebody has written to {self.place} meanwhile", "stop the daemon, and try again")

    # Which page belongs to which table.

    def _schema(self) -> list[Any]:
        schema = self._trees[0]
        self._claim(schema, 1, 0)
        for number in self._unclaimed():
            if self._root_of(number) == 1:
                self._claim_stray(schema, number)
        found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for row in self.rows(SCHEMA):
            if isinstance(row, Read):
                found.setdefault(row.values[:2], row.values)
        return objects(found.values())

    def _find_roots(self, known: dict[str, int]) -> None:
        taken = {tree.root for tree in self._trees}
        for tree in self._trees:
            root = known.get(tree.shape.name, 0)
            if not tree.root and root and root not in taken and self._may_begin(tree, root):
                tree.root = root

    def _may_begin(self, tree: Tree, root: int) -> bool:
        if self._file.pointer(root) not in (None, (ROOT_PAGE, 0)):
            return False
        number = root
        for _ in range(DEEPEST):
            node = self._records.node(number)
            if node is None:
                return True
            if node.kind == TABLE_LEAF:
                return self._fits(tree, node)
            if node.kind != TABLE_INTERIOR:
                return False
            number = self._records.children(node)[0][0]
        return False

    def _assign(self) -> None:
        for tree in self._trees[1:]:
            if tree.root:
                self._claim(tree, tree.root, 0)
        # The page above and the pointer map contradict each other; what is left now is the page above's.
        disputed, self._disputed = self._disputed, []
        for tree, number in disputed:
            if not self._owner[number] and not self._file.is_free(number):
                self._claim(tree, number, None)
        unknown = 0
        roots = {tree.root: tree for tree in self._trees if tree.root}
        for number in self._unclaimed():
            root = self._root_of(number)
            if root in roots and self._claim_stray(roots[root], number):
                continue
            # Under the root of a table of which the schema does not tell, or of any.
            lost = root and root not in roots
            among = [tree for tree in self._trees[1:] if not (lost and tree.root)]
            if not self._claim_by_shape(number, among):
                unknown += 1
        if unknown:
            self.survey.notes.append(f"{unknown} pages with rows belong to no table that is known any more")

    def _unclaimed(self) -> Iterator[int]:
        """Pages that may be leaves of tables, and that nothing leads to."""
        for number in range(2, self._file.pages + 1):
            if self._owner[number] or self._file.is_map_page(number):
                continue
            pointer = self._file.pointer(number)
            if (pointer is None or pointer[0] in (ROOT_PAGE, BTREE_PAGE)) and not self._file.is_free(number):
                page = self._file.page(number)
                if page is not None and page[0] == TABLE_LEAF:
                    yield number

    def _root_of(self, number: int) -> int:
        """The root to which the pointer map leads; 0 where it does not."""
        for _ in range(DEEPEST):
            pointer = self._file.pointer(number)
            if number == 1 or pointer == (ROOT_PAGE, 0):
                return number
            if pointer is None or pointer[0] != BTREE_PAGE:
                return 0
            number = pointer[1]
        return 0

    def _claim(self, tree: Tree, number: int, parent: int | None) -> None:
        """Give the pages from `number` down to the table; `parent` is None where that was disputed."""
        waiting: list[tuple[int, int | None]] = [(number, parent)]
        while waiting:
            number, parent = waiting.pop()
            if not 1 <= number <= self._file.pages or self._owner[number] or self._file.is_map_page(number):
                continue
            if parent is not None:
                pointer = self._file.pointer(number)
                if pointer not in (None, (BTREE_PAGE, parent) if parent else (ROOT_PAGE, 0)):
                    if pointer != (FREE_PAGE, 0):
                        self._disputed.append((tree, number))
                    continue
            node = self._records.node(number)
            if node is None:
                continue
            if node.kind == TABLE_LEAF and self._fits(tree, node):
                self._owner[number] = tree.number
            elif node.kind == TABLE_INTERIOR:
                self._owner[number] = tree.number
                waiting += [(child, number) for child, _ in self._records.children(node)]

    def _claim_stray(self, tree: Tree, number: int) -> bool:
        node = self._records.node(number)
        if node is None or not node.cells or not self._fits(tree, node):
            return False
        self._owner[number] = tree.number | _STRAY
        tree.strays += 1
        return True

    def _claim_by_shape(self, number: int, among: list[Tree]) -> bool:
        node = self._records.node(number)
        if node is None or not node.cells:
            return False
        kinds = [self._records.kinds(node, place) for place in node.cells]
        fitting = [
            tree for tree in among if tree.shape.strict and any(kinds) and all(k is None or tree.fits(k) for k in kinds)
        ]
        return len(fitting) == 1 and self._claim_stray(fitting[0], number)

    def _fits(self, tree: Tree, node: Node) -> bool:
        """Whether a leaf has a row that could be the table's; an empty one could be anybody's."""
        if not node.cells:
            return node.wrong_cells == 0
        return any(
            kinds is not None and tree.fits(kinds)
            for kinds in (self._records.kinds(node, place) for place in node.cells)
        )

    # Rows.

    def rows(self, shape: Shape) -> Iterator[Read | Hole]:
        tree = self._trees[0] if shape is SCHEMA else self._by_name[shape.name]
        late: list[tuple[int, int]] = []
        for item in self._leaves(tree):
            if isinstance(item, Hole):
                yield item
            else:
                yield from self._on_leaf(tree, *item, late)
        number = 0
        for _ in range(tree.strays):
            number = self._owner.index(tree.number | _STRAY, number + 1)
            node = self._records.node(number)
            if node is not None:
                yield from self._on_leaf(tree, node, Hole(None, None), late)
        for number, place in late:
            node = self._records.node(number)
            row = None if node is None else self._row(tree, node, place)
            if isinstance(row, Read):
                yield row._replace(doubtful=True)

    def _leaves(self, tree: Tree) -> Iterator[Hole | tuple[Node, Hole]]:
        """The leaves that the root leads to, in order, each with what numbers its rows may have."""
        seen = bytearray((self._file.pages >> 3) + 1)
        waiting = [(tree.root, Hole(None, None))]
        while waiting:
            number, bounds = waiting.pop()
            mine = 1 <= number <= self._file.pages and self._owner[number] == tree.number
            node = self._records.node(number) if mine and not seen[number >> 3] & 1 << (number & 7) else None
            if node is None:
                yield bounds
                continue
            seen[number >> 3] |= 1 << (number & 7)
            if node.kind == TABLE_LEAF:
                # Only a root can be empty; this one has lost the number of its cells.
                yield (node, bounds) if node.cells or number == tree.root else bounds
                continue
            children = self._records.children(node)
            keys = [key for _, key in children[:-1]]
            within = [bounds.after, *keys, bounds.upto]
            told = [key for key in within if key is not None]
            sound = None not in keys and all(one < other for one, other in pairwise(told))
            parts = [
                (child, Hole(within[place], within[place + 1]) if sound else bounds)
                for place, (child, _) in enumerate(children)
            ]
            if node.wrong_cells:
                yield bounds
            waiting += reversed(parts)

    def _on_leaf(self, tree: Tree, node: Node, bounds: Hole, late: list[tuple[int, int]]) -> Iterator[Read | Hole]:
        if node.wrong_cells:
            yield bounds
        rows = [(place, self._row(tree, node, place)) for place in node.cells]
        numbers = [row.rowid for _, row in rows if isinstance(row, Read)]
        odd = set() if tree.alias is None else misplaced(numbers, *bounds)
        for place, row in rows:
            if row is None:
                yield bounds
            elif isinstance(row, Read) and row.rowid in odd:
                if len(late) < LATE_ROWS:
                    late.append((node.number, place))
                yield Hole(row.rowid - 1, row.rowid)
            else:
                yield row

    def _row(self, tree: Tree, node: Node, place: int) -> Read | Hole | None:
        """The row of a cell; where it is damaged its place, and None where not even that can be told."""
        cell = self._records.cell(node, place)
        if cell is None:
            return None
        damaged = Hole(cell.rowid - 1, cell.rowid)
        kinds = None if cell.payload is None else serial_types(cell.payload, len(cell.payload))
        if cell.payload is None or kinds is None or not tree.fits(kinds):
            return damaged
        found: list[Value] | None = values(cell.payload, kinds)
        if found is None:
            return damaged
        shape = tree.shape
        found += shape.defaults[len(found) :]
        if tree.alias is not None:
            found[tree.alias] = cell.rowid
        for at, kind in enumerate(shape.kinds):
            value = found[at]
            if kind == REAL and type(value) is int:
                found[at] = float(value)
            elif kind == TEXT and shape.strict and type(value) is str and "\0" in value:
                return damaged
        return Read(cell.rowid, tuple(found))

    # Keys.

    def keys(self, shape: Shape) -> Iterator[tuple[Any, ...] | None]:
        tree = self._by_name[shape.name]
        for root, primary in tree.indexes:
            if primary or tree.alias is not None:
                width = len(shape.key)
                for entry in self._entries(root):
                    # What an index ends with is the rowid.
                    yield None if entry is None else tuple(entry[:width] if primary else entry[-1:])
                return
        yield None

    def _entries(self, root: int) -> Iterator[list[Value] | None]:
        """The entries of an index in their order; None, and nothing more, where it is damaged."""
        seen = bytearray((self._file.pages >> 3) + 1)
        last: tuple[Any, ...] = ()
        waiting: list[tuple[int, Node | None]] = [(root, None)]
        while waiting:
            number, above = waiting.pop()
            if above is not None:
                payload = self._records.index_payload(above, number)
                entry = None if payload is None else values(payload)
                order = sort_key(entry or [])
                if entry is None or order <= last:
                    yield None
                    return
                last = order
                yield entry
                continue
            fresh = 1 <= number <= self._file.pages and not seen[number >> 3] & 1 << (number & 7)
            node = self._records.node(number) if fresh else None
            if node is None or node.wrong_cells or node.kind not in (INDEX_LEAF, INDEX_INTERIOR):
                yield None
                return
            seen[number >> 3] |= 1 << (number & 7)
            steps: list[tuple[int, Node | None]] = []
            for place in node.cells:
                if node.kind == INDEX_INTERIOR:
                    steps.append((self._records.index_child(node, place), None))
                steps.append((place, node))
            if node.kind == INDEX_INTERIOR:
                steps.append((node.last, None))
            waiting += reversed(steps)
