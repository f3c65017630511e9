"""`kaged query`: the answer to an operator's SQL, or the tables and views there are, spooled before it is shown.

A reader that stops reading, or a pager, must not hold a read of the store open.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from math import isfinite
from typing import Any, Self

from ..engines.engine import Engine

SPOOL_BYTES = 1 << 20
"""Of an answer that are kept in memory; more goes into a temporary file."""


class Spool:
    """An answer that is all here: its columns, and its rows in plain JSON values as often as they are asked for.

    `more` says that the limit cut it off. Also a context manager, which removes it.
    """

    def __init__(self, columns: Sequence[str], rows: Iterator[Sequence[Any]], limit: int) -> None:
        self.columns = tuple(columns)
        self._file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, "w+", encoding="ascii", newline="\n")  # noqa: SIM115
        try:
            for row in islice(rows, limit or None):
                self._file.write(json.dumps([plain(value) for value in row]) + "\n")
            self.more = bool(limit) and next(rows, None) is not None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[list[Any]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)


def ask(engine: Engine, sql: str, named: Mapping[str, str], positional: Sequence[str], limit: int) -> Spool:
    """Run one statement that reads; at most `limit` rows (0: all).

    Raises ReadOnlyStorage where it would do anything else, InvalidValue where it is wrong.
    """
    with engine.query(sql, named, positional) as answer:
        return Spool(answer.columns, iter(answer.rows), limit)


def columns(engine: Engine) -> Spool:
    """Every table with its columns, their kinds, and their places in the primary key; then every view with its own.

    `is` says which it is. The columns of views have no kind: SQLite does not say it of what is computed.
    """
    with engine.reading() as contents:
        found = [
            (table.name, "table", column, kind, table.key.index(column) + 1 if column in table.key else None)
            for table in contents.tables()
            for column, kind in sorted(
                zip(table.columns, table.kinds, strict=True),
                key=lambda pair: (table.key.index(pair[0]) if pair[0] in table.key else len(table.key), pair[0]),
            )
        ]
    shown = [(view, "view", column, None, None) for view, names in engine.views().items() for column in names]
    return Spool(("table", "is", "column", "kind", "key"), iter([*found, *shown]), 0)


def plain(value: Any) -> Any:
    """A driver's value as JSON has it: bytes as hex digits, what JSON has no form for as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, bytes | memoryview | bytearray):
        return bytes(value).hex()
    if isinstance(value, Decimal):
        # What PostgreSQL makes of sums and averages of integers.
        value = int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
        return plain(value)
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
