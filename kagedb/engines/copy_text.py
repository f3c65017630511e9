"""Rows as lines of text: the form in which PostgreSQL's COPY takes and gives them, made here for rows of any engine.

What is loaded and what hashes are taken of is this text, so that rows cross between engines and digests with as few
steps as can be. Which rows, and where they go, is in the engines' files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any

from .archive import BLOB, TEXT, Table

Row = tuple[Any, ...]

BATCH_ROWS = 250
"""Rows made into text at a time: enough that what is done once for a column costs little, and few enough that a server
has not yet worked off the last ones (a socket holds some 200 KB)."""

BATCH_BYTES = 1 << 17
"""Of text and bytes in them, about: a row of terminal output has 16 KB, a blob may have a megabyte."""

LONG = 1 << 15
"""Characters or bytes of a value that is hashed in parts of so many."""

FEW_ROWS = 16
"""Of more, the text takes little more memory than the rows: as many do not fit into a batch otherwise."""

NULL = "\\N"

# What means something else in COPY's text form, and how COPY itself writes it (sql-copy.html, "Text Format").
_ESCAPED = {"\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\v": "\\v", "\f": "\\f", "\r": "\\r"}
_SPECIAL = re.compile("[\\\\\b\t\n\v\f\r]")


def lines_of(rows: Iterable[Row], table: Table) -> Iterator[bytes]:
    """The rows as pieces of whole lines, in UTF-8."""
    return map(text_of, batches(rows, table))


def batches(rows: Iterable[Row], table: Table) -> Iterator[list[Row]]:
    """The rows, some at a time: as many as are a quarter of a megabyte of memory, about."""
    large = [place for place, kind in enumerate(table.kinds) if kind in (TEXT, BLOB)]
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        try:
            for place in large:
                size += len(row[place] or ())
        except TypeError:
            pass  # a number, in a table of a plugin that is not strict
        if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def text_of(rows: Sequence[Row]) -> bytes:
    """A line for each row: values with a tab between them, a line feed at its end.

    Integers in decimal digits, booleans as 1 and 0, floats as the shortest digits that mean them, bytes in lower-case
    hex after `\\\\x`, text as it is but for backslashes and control characters, which are escaped; `\\N` for NULL.
    """
    # By columns: what is done once for a column of many rows costs half of what it does value by value.
    # A row may have megabytes: what it was made of is let go before the next form of it is made.
    lines = [*map("\t".join, zip(*map(_column, zip(*rows, strict=True)), strict=True)), ""]
    whole = "\n".join(lines)
    del lines
    return whole.encode()


def row_hashes(lines: Iterable[bytes | memoryview]) -> list[bytes]:
    """What stands for each row where all of them cannot be kept: SHA-256 of its line, without the line feed."""
    return [sha256(line).digest() for line in lines]


def piece_hashes(piece: bytes) -> list[bytes]:
    """The same of the lines of a piece."""
    # In a value there is no line feed.
    if piece.find(b"\n") == len(piece) - 1:
        return row_hashes([memoryview(piece)[:-1]])
    lines = piece.split(b"\n")
    lines.pop()
    return row_hashes(lines)


def hashes_of(rows: Sequence[Row]) -> list[bytes]:
    """The same of rows, in less memory than their text takes where one has long values."""
    # A long value ends a batch after a few rows.
    if len(rows) <= FEW_ROWS and any(
        type(value) in (str, bytes) and len(value) > LONG for row in rows for value in row
    ):
        return [_hash_in_parts(row) for row in rows]
    return piece_hashes(text_of(rows))


def _hash_in_parts(row: Row) -> bytes:
    whole = sha256()
    for place, value in enumerate(row):
        if place:
            whole.update(b"\t")
        for part in _parts(value):
            whole.update(part)
    return whole.digest()


def _parts(value: Any) -> Iterator[bytes]:
    if type(value) is bytes:
        yield b"\\\\x"
        for start in range(0, len(value), LONG):
            yield value[start : start + LONG].hex().encode()
    elif type(value) is str:
        for start in range(0, len(value), LONG):
            yield _text((value[start : start + LONG],))[0].encode()
    else:
        yield _MAKERS[type(value)]((value,))[0].encode()


def _column(column: Sequence[Any]) -> Sequence[str]:
    maker = _MAKERS[type(column[0])]
    try:
        return maker(column)
    except TypeError:
        # One with NULLs, or a plugin's that is not strict.
        return [_MAKERS[type(value)]((value,))[0] for value in column]


# Each raises TypeError for a column that has values of another type too.


def _text(column: Sequence[str]) -> Sequence[str]:
    whole = "\0".join(column)
    if not _SPECIAL.search(whole):
        return column
    escaped = _SPECIAL.sub(lambda found: _ESCAPED[found[0]], whole).split("\0")
    if len(escaped) == len(column):
        return escaped
    # A NUL, which no verb writes and PostgreSQL cannot hold.
    return [_SPECIAL.sub(lambda found: _ESCAPED[found[0]], value) for value in column]


def _blob(column: Sequence[bytes]) -> Sequence[str]:
    return [f"\\\\x{digits}" for digits in map(bytes.hex, column)]


def _view(column: Sequence[memoryview]) -> Sequence[str]:
    return [f"\\\\x{digits}" for digits in map(memoryview.hex, column)]


def _integer(column: Sequence[int]) -> Sequence[str]:
    # Of booleans too, which are 1 and 0 then.
    return list(map(int.__repr__, column))


def _real(column: Sequence[float]) -> Sequence[str]:
    return list(map(float.__repr__, column))


def _null(column: Sequence[None]) -> Sequence[str]:
    if column.count(None) != len(column):
        raise TypeError
    return [NULL] * len(column)


_MAKERS: dict[type, Callable[[Sequence[Any]], Sequence[str]]] = {
    str: _text,
    int: _integer,
    bool: _integer,
    float: _real,
    bytes: _blob,
    memoryview: _view,
    type(None): _null,
}
