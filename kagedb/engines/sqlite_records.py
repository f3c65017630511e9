"""What is in the pages of a SQLite file: the cells of a b-tree page, and the values of a record.

Everything may be damaged: whatever cannot be is told as None, never as an error. Sections are those of
sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from .sqlite_pages import INDEX_INTERIOR, INDEX_LEAF, TABLE_INTERIOR, TABLE_LEAF, PageFile, varint

Value = int | float | str | bytes | None

_REAL, _ZERO, _ONE = 7, 8, 9
_FIRST_BLOB = 12

CHAIN_BYTES = 1 << 30
"""A longer record is none: SQLite's own limit is a little less (SQLITE_MAX_LENGTH)."""


@dataclass(frozen=True, slots=True)
class Node:
    """A page of a b-tree: its kind, and where its cells are. `last` is the rightmost child of an interior page."""

    number: int
    kind: int
    page: bytes
    cells: tuple[int, ...]
    wrong_cells: int
    last: int = 0


class Cell(NamedTuple):
    """A cell of a table's leaf: the rowid, and the payload; None where that is damaged."""

    rowid: int
    payload: bytes | None


class Records:
    """The b-tree pages and records of one file."""

    def __init__(self, file: PageFile) -> None:
        self.file = file
        usable = file.usable_bytes
        self._usable = usable
        self._most_of_table = usable - 35
        self._most_of_index = (usable - 12) * 64 // 255 - 23
        self._least = (usable - 12) * 32 // 255 - 23

    def node(self, number: int) -> Node | None:
        """The b-tree page of that number (section 1.6)."""
        page = self.file.page(number)
        if page is None:
            return None
        start = 100 if number == 1 else 0
        kind = page[start]
        if kind not in (TABLE_LEAF, TABLE_INTERIOR, INDEX_LEAF, INDEX_INTERIOR):
            return None
        interior = kind in (TABLE_INTERIOR, INDEX_INTERIOR)
        (count,) = struct.unpack_from(">H", page, start + 3)
        first = start + (12 if interior else 8)
        begin = first + 2 * count
        if begin > self._usable:
            return None
        places = struct.unpack_from(f">{count}H", page, first)
        good = tuple(place for place in places if begin <= place <= self._usable - 4)
        last = struct.unpack_from(">I", page, start + 8)[0] if interior else 0
        return Node(number, kind, page, good, count - len(good), last)

    def children(self, node: Node) -> list[tuple[int, int | None]]:
        """The children of an interior page of a table, each with its largest rowid; None for the last."""
        found: list[tuple[int, int | None]] = []
        for place in node.cells:
            key = varint(node.page, place + 4)
            (child,) = struct.unpack_from(">I", node.page, place)
            found.append((child, None if key is None else _signed(key[0])))
        found.append((node.last, None))
        return found

    def index_child(self, node: Node, place: int) -> int:
        child: int = struct.unpack_from(">I", node.page, place)[0]
        return child

    def cell(self, node: Node, place: int) -> Cell | None:
        """A cell of a leaf of a table; None where not even the rowid can be told."""
        size = varint(node.page, place)
        if size is None:
            return None
        rowid = varint(node.page, size[1])
        if rowid is None:
            return None
        payload = self._payload(node.page, rowid[1], size[0], self._most_of_table)
        return Cell(_signed(rowid[0]), payload)

    def index_payload(self, node: Node, place: int) -> bytes | None:
        size = varint(node.page, place + (4 if node.kind == INDEX_INTERIOR else 0))
        return None if size is None else self._payload(node.page, size[1], size[0], self._most_of_index)

    def _payload(self, page: bytes, at: int, size: int, most: int) -> bytes | None:
        """The payload of a cell, with what of it is on overflow pages (section 1.6, "Cell Payload Overflow Pages")."""
        if size <= most:
            return page[at : at + size] if at + size <= self._usable else None
        if size > CHAIN_BYTES:
            return None
        local = self._least + (size - self._least) % (self._usable - 4)
        if local > most:
            local = self._least
        if at + local + 4 > self._usable:
            return None
        parts = [page[at : at + local]]
        left = size - local
        (following,) = struct.unpack_from(">I", page, at + local)
        seen = set()
        while left > 0:
            # A chain that bites its own tail would never be too short.
            data = None if following in seen else self.file.page(following)
            if data is None:
                return None
            seen.add(following)
            parts.append(data[4 : 4 + min(left, self._usable - 4)])
            left -= self._usable - 4
            (following,) = struct.unpack_from(">I", data)
        # The last page of a chain says that it is.
        return b"".join(parts) if following == 0 else None

    def kinds(self, node: Node, place: int) -> list[int] | None:
        """The serial types of a leaf cell's record, from the page alone; None where they are not there whole."""
        size = varint(node.page, place)
        rowid = None if size is None else varint(node.page, size[1])
        if size is None or rowid is None:
            return None
        return serial_types(node.page[rowid[1] : self._usable], size[0])


def serial_types(payload: bytes, size: int) -> list[int] | None:
    """The serial types in the header of a record of `size` bytes (section 2.1)."""
    head = varint(payload, 0)
    if head is None or not head[1] <= head[0] <= min(len(payload), size):
        return None
    kinds = []
    at, whole = head[1], head[0]
    while at < head[0]:
        kind = payload[at]
        if kind < 0x80:
            # Nearly all are of one byte, and reading rows is mostly this.
            at += 1
        else:
            told = varint(payload, at)
            if told is None:
                return None
            kind, at = told
        if kind in (10, 11):
            return None
        kinds.append(kind)
        whole += _SIZES[kind] if kind < 0x80 else (kind - _FIRST_BLOB) // 2
    return kinds if at == head[0] and whole == size else None


def values(payload: bytes, kinds: list[int] | None = None) -> list[Value] | None:
    """The values of a record; None where it is damaged. Text that is not UTF-8 is damage.

    `kinds` are its serial types, where they are known already.
    """
    kinds = serial_types(payload, len(payload)) if kinds is None else kinds
    if kinds is None:
        return None
    at = varint(payload, 0)[0]  # type: ignore[index]  # it was there a moment ago
    found: list[Value] = []
    for kind in kinds:
        size = _SIZES[kind] if kind < 0x80 else (kind - _FIRST_BLOB) // 2
        data = payload[at : at + size]
        at += size
        if kind >= _FIRST_BLOB:
            if kind & 1:
                try:
                    found.append(data.decode())
                except UnicodeDecodeError:
                    return None
            else:
                found.append(data)
        elif kind == 0:
            found.append(None)
        elif kind == _REAL:
            found.append(struct.unpack(">d", data)[0])
        elif kind in (_ZERO, _ONE):
            found.append(kind - _ZERO)
        else:
            found.append(int.from_bytes(data, "big", signed=True))
    return found


_SIZES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0, *((kind - _FIRST_BLOB) // 2 for kind in range(_FIRST_BLOB, 0x80)))
"""Bytes of a value by its serial type, of those of one byte."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# Orders.


def sort_key(entry: list[Value]) -> tuple[Any, ...]:
    """What compares as SQLite sorts the values of an index (sqlite.org/datatype3.html, section 4.1)."""
    return tuple(_RANKS[type(value)](value) for value in entry)


_RANKS: dict[type, Callable[[Any], tuple[int, Any]]] = {
    type(None): lambda value: (0, 0),
    int: lambda value: (1, value),
    float: lambda value: (1, value),
    str: lambda value: (2, value.encode()),
    bytes: lambda value: (3, value),
}


def misplaced(numbers: list[int], after: int | None, upto: int | None) -> set[int]:
    """Of the rowids of a leaf those that break its order, or lie outside what the page above says of it."""

    def is_within(number: int) -> bool:
        return (after is None or number > after) and (upto is None or number <= upto)

    if all(map(is_within, numbers)) and all(one < other for one, other in pairwise(numbers)):
        return set()
    # All but a longest rising sequence of them: `ends` has where one of each length ends, `before` what leads there.
    ends: list[int] = []
    last: list[int] = []
    before = [-1] * len(numbers)
    for at, number in enumerate(numbers):
        if is_within(number):
            length = bisect_left(ends, number)
            before[at] = last[length - 1] if length else -1
            ends[length : length + 1] = [number]
            last[length : length + 1] = [at]
    kept = set()
    at = last[-1] if last else -1
    while at >= 0:
        kept.add(at)
        at = before[at]
    return {number for at, number in enumerate(numbers) if at not in kept}
