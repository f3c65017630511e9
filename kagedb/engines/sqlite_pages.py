"""The pages of a SQLite file that SQLite itself may not want to read any more, as they are on the disk.

The file format is that of sqlite.org/fileformat2.html, whose sections are named below; nothing here asks SQLite, and
nothing is written. What is in the pages is for sqlite_records.py, whose tables they are for sqlite_wreck.py.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections import Counter
from pathlib import Path

MAGIC = b"SQLite format 3\0"

PAGE_SIZES = tuple(1 << power for power in range(9, 17))

SAMPLE_PAGES = 500
"""Pages looked at to tell the page size where the header does not: enough of a store of any size."""

TABLE_LEAF, TABLE_INTERIOR, INDEX_LEAF, INDEX_INTERIOR = 13, 5, 10, 2
"""The kinds of pages of a b-tree (section 1.6)."""

ROOT_PAGE, FREE_PAGE, FIRST_OVERFLOW, OVERFLOW, BTREE_PAGE = range(1, 6)
"""The kinds of entries of the pointer map (section 1.8)."""

_WAL_MAGIC = (0x377F0682, 0x377F0683)
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_MAP_ENTRY = struct.Struct(">BI")


class PageFile:
    """A database file and the committed part of its write-ahead log, read page by page; pages count from 1."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened or has no bytes that could be a page."""
        self.path = path
        self.notes: list[str] = []
        """What is wrong with the file as a whole, in words."""
        self._log: int | None = None
        self._frames: dict[int, int] = {}
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._file_bytes = os.fstat(self._file).st_size
            header = self._read(self._file, 0, 100)
            self.header_is_good = header[:16] == MAGIC and header[21:24] == b"\x40\x20\x20"
            self.page_bytes, self.usable_bytes = self._sizes(header)
            self.pages = -(-self._file_bytes // self.page_bytes)
            self._open_log()
        except BaseException:
            self.close()
            raise
        self._map_page = 0
        self._map_bytes: bytes | None = None
        self.has_map = self._finds_map()
        self._free_pages: bytearray | None = None

    def close(self) -> None:
        for descriptor in (self._file, self._log):
            if descriptor is not None:
                os.close(descriptor)

    @property
    def descriptor(self) -> int:
        """Of the database file. Closing it drops every lock of this process on that file."""
        return self._file

    def page(self, number: int) -> bytes | None:
        """The bytes of a page as of the last commit; None where there are none, or the disk does not give them."""
        if not 1 <= number <= self.pages:
            return None
        at = self._frames.get(number)
        if at is not None:
            assert self._log is not None
            data = self._read(self._log, at, self.page_bytes)
        else:
            data = self._read(self._file, (number - 1) * self.page_bytes, self.page_bytes)
        return data if len(data) == self.page_bytes else None

    # The pointer map: of each page the kind, and the page that points to it.

    def _finds_map(self) -> bool:
        """Whether there is a pointer map, by what it would say, or else by the header; a dump reloaded has none."""
        self.has_map = True
        first = range(3, min(self.pages, self.usable_bytes // 5) + 1)
        told = sum(self.pointer(number) is not None for number in first)
        if self.page(2) is None or 2 * told >= len(first):
            return True
        header = self.page(1)
        return header is None or not self.header_is_good or header[52:56] != bytes(4)

    def is_map_page(self, number: int) -> bool:
        return self.has_map and number > 1 and (number - 2) % (self.usable_bytes // 5 + 1) == 0

    def pointer(self, number: int) -> tuple[int, int] | None:
        """What the pointer map says of a page: its kind and its parent; None where that cannot be true."""
        each = self.usable_bytes // 5 + 1
        if number < 2 or not self.has_map or self.is_map_page(number):
            return None
        map_page = (number - 2) // each * each + 2
        if map_page != self._map_page:
            self._map_page, self._map_bytes = map_page, self.page(map_page)
        if self._map_bytes is None:
            return None
        kind, parent = _MAP_ENTRY.unpack_from(self._map_bytes, (number - map_page - 1) * 5)
        if kind in (ROOT_PAGE, FREE_PAGE):
            return (kind, 0) if parent == 0 else None
        if kind in (FIRST_OVERFLOW, OVERFLOW, BTREE_PAGE) and 1 <= parent <= self.pages and parent != number:
            return kind, parent
        return None

    def is_free(self, number: int) -> bool:
        """Whether a page belongs to nothing, so that what is in it was deleted."""
        pointer = self.pointer(number)
        if pointer is not None:
            return pointer[0] == FREE_PAGE
        return bool(self._free()[number >> 3] & 1 << (number & 7))

    def _free(self) -> bytearray:
        """A bit for each page on the list of free ones (section 1.5), as far as that can be followed."""
        if self._free_pages is None:
            bits = bytearray((self.pages >> 3) + 1)
            first = self.page(1)
            if first is not None and self.header_is_good:
                (trunk,) = struct.unpack_from(">I", first, 32)
                while 1 < trunk <= self.pages and not bits[trunk >> 3] & 1 << (trunk & 7):
                    bits[trunk >> 3] |= 1 << (trunk & 7)
                    data = self.page(trunk)
                    if data is None:
                        break
                    trunk, leaves = struct.unpack_from(">II", data)
                    if leaves > self.usable_bytes // 4 - 2:
                        break
                    for leaf in struct.unpack_from(f">{leaves}I", data, 8):
                        if 1 < leaf <= self.pages:
                            bits[leaf >> 3] |= 1 << (leaf & 7)
            self._free_pages = bits
        return self._free_pages

    # What the header says, or the pages where it is not to be believed.

    def _read(self, descriptor: int, at: int, count: int) -> bytes:
        try:
            return os.pread(descriptor, count, at)
        except OSError:
            # A sector that the disk does not give is a damaged page like others.
            return b""

    def _sizes(self, header: bytes) -> tuple[int, int]:
        told, reserved = 0, 0
        if self.header_is_good:
            (told,) = struct.unpack_from(">H", header, 16)
            told, reserved = 65536 if told == 1 else told, header[20]
        seen = {size: self._looks_like_pages_of(size) for size in PAGE_SIZES}
        best = max(PAGE_SIZES, key=lambda size: seen[size][0])
        if told not in PAGE_SIZES or seen[best][0] > 2 * seen[told][0]:
            if not seen[best][0]:
                raise OSError(f"nothing in {self.path} looks like a page of a database")
            self.notes.append(f"the header is damaged; the pages look like pages of {best} bytes")
            told, reserved = best, 0
        if reserved and (reserved > told - 480 or seen[told][1] > told - reserved):
            # No store of ours reserves any; where cells reach into it, the header is wrong.
            reserved = 0
        return told, told - reserved

    def _looks_like_pages_of(self, size: int) -> tuple[int, int]:
        """How many bytes, of a sample, are leaves of tables if pages have that size, and how far their cells reach."""
        count = self._file_bytes // size
        step = max(1, count // SAMPLE_PAGES)
        good = furthest = 0
        for number in range(0, count, step):
            start = self._read(self._file, number * size, size)
            end = _end_of_cells(start, size)
            if end > size // 2:
                good += size
                furthest = max(furthest, end)
        return good * step, furthest

    # The write-ahead log (section 4).

    def _open_log(self) -> None:
        log = self.path.with_name(self.path.name + "-wal")
        try:
            self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        size = os.fstat(self._log).st_size
        header = self._read(self._log, 0, _WAL_HEADER_BYTES)
        if len(header) < _WAL_HEADER_BYTES:
            if size:
                self.notes.append("the write-ahead log is cut off before its first page")
            return
        magic, _, page_bytes, _ = struct.unpack_from(">4I", header)
        order = ">" if magic & 1 else "<"
        sums = _checksum(order, header[:24], 0, 0)
        if magic not in _WAL_MAGIC or page_bytes != self.page_bytes or sums != struct.unpack_from(">II", header, 24):
            self.notes.append("the head of the write-ahead log is damaged; what it has is not used")
            return
        waiting: dict[int, int] = {}
        at = _WAL_HEADER_BYTES
        while at + _FRAME_HEADER_BYTES + page_bytes <= size:
            frame = self._read(self._log, at, _FRAME_HEADER_BYTES + page_bytes)
            if len(frame) < _FRAME_HEADER_BYTES + page_bytes or frame[8:16] != header[16:24]:
                # The rest is of an earlier round of the log.
                break
            sums = _checksum(order, frame[:8], *sums)
            sums = _checksum(order, frame[_FRAME_HEADER_BYTES:], *sums)
            if sums != struct.unpack_from(">II", frame, 16):
                self.notes.append("the write-ahead log is damaged; what was committed after that place is lost")
                break
            number, pages = struct.unpack_from(">II", frame)
            waiting[number] = at + _FRAME_HEADER_BYTES
            if pages:
                self._frames.update(waiting)
                waiting.clear()
                self.pages = pages
            at += _FRAME_HEADER_BYTES + page_bytes


def _checksum(order: str, data: bytes, first: int, second: int) -> tuple[int, int]:
    """Section 4.2, over data whose length eight divides."""
    words = array("I", data)
    if (order == "<") != (struct.pack("=H", 1) == b"\1\0"):
        words.byteswap()
    numbers = iter(words)
    for one, other in zip(numbers, numbers, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def _end_of_cells(page: bytes, size: int) -> int:
    """Where the last cell of a leaf of a table ends; 0 where it cannot be one."""
    if len(page) < size or page[0] != TABLE_LEAF:
        return 0
    cells, content = struct.unpack_from(">HH", page, 3)
    begin = 8 + 2 * cells
    if not cells or begin > size or (content or 65536) < begin:
        return 0
    places = struct.unpack_from(f">{cells}H", page, 8)
    if min(places) < begin or max(places) > size - 4 or Counter(places).most_common(1)[0][1] > 1:
        return 0
    last: int = max(places)
    told = varint(page, last)
    rowid = None if told is None else varint(page, told[1])
    whole = 0 if told is None or rowid is None else rowid[1] + told[0]
    # One with overflow pages ends somewhere behind its first bytes.
    return whole if last < whole <= size else last + 4


def varint(data: bytes, at: int) -> tuple[int, int] | None:
    """A variable-length integer, and where the next thing begins."""
    value = 0
    end = len(data)
    for _ in range(8):
        if at >= end:
            return None
        byte = data[at]
        at += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at
    if at >= end:
        return None
    return value << 8 | data[at], at + 1
