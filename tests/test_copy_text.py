"""Rows as text: what PostgreSQL's own COPY writes, whatever stands beside what in a column."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import psycopg2
import pytest

from kagedb.engines.archive import BLOB, INTEGER, REAL, TEXT, Table
from kagedb.engines.copy_text import BATCH_ROWS, LONG, batches, hashes_of, lines_of, text_of
from postgres_server import DatabaseServer

VALUES: dict[str, list[Any]] = {
    "text": ["", "a", "\\", "\\N", "\\.", "\t\n\r\b\f\v", "\x01\x7f", "Küche 日本語 😀", "\\x00", None],
    "bytea": [b"", b"\x00\xff", b"text", bytes(range(256)), None],
    "int8": [0, -1, 2**63 - 1, -(2**63), None],
}


@pytest.mark.parametrize("kind", VALUES)
def test_it_is_what_the_server_itself_writes(kind: str, postgres_server: DatabaseServer) -> None:
    values = VALUES[kind]
    connection = psycopg2.connect(postgres_server.url(postgres_server.maintenance_database))
    try:
        cursor = connection.cursor()
        cursor.execute(f"CREATE TEMPORARY TABLE written (number int, value {kind})")
        for number, value in enumerate(values):
            cursor.execute("INSERT INTO written VALUES (%s, %s)", (number, value))
        written: list[bytes] = []

        class File:
            def write(self, line: bytes) -> None:
                written.append(line)

        cursor.copy_expert("COPY (SELECT value FROM written ORDER BY number) TO STDOUT", File())
    finally:
        connection.close()
    assert text_of([(value,) for value in values]) == b"".join(written)


@pytest.mark.parametrize(
    "values", [*VALUES.values(), [True, False, None], [5.0, 0.1, 1e300, None], [1, "1", b"1", 1.0]]
)
def test_a_value_is_written_alike_whatever_it_stands_beside(values: list[Any]) -> None:
    alone = b"".join(text_of([(value,)]) for value in values)
    assert text_of([(value,) for value in values]) == alone
    assert text_of([(value,) for value in reversed(values)]) == b"".join(
        text_of([(value,)]) for value in reversed(values)
    )


def test_a_text_with_nul_is_one_value_still() -> None:
    assert text_of([("a\0b", 1), ("c\t", 2)]) == b"a\0b\t1\nc\\t\t2\n"


def test_rows_go_by_batches_that_are_bounded_in_rows_and_bytes() -> None:
    table = Table("t", ("a", "b", "c"), (TEXT, BLOB, INTEGER), ("c",))
    rows = [("x" * 1_000_000 if number % 100 == 7 else "x", b"y", number) for number in range(1000)]
    found = list(batches(iter(rows), table))
    assert [row for batch in found for row in batch] == rows
    assert max(map(len, found)) <= BATCH_ROWS
    assert max(sum(len(row[0]) for row in batch) for batch in found) < 1_200_000
    assert b"".join(lines_of(iter(rows), table)).count(b"\n") == len(rows)


def test_a_number_in_a_column_of_texts_is_no_error() -> None:
    table = Table("t", ("a", "b"), (TEXT, REAL), ())
    assert b"".join(lines_of([("a", 1.5), (3, None)], table)) == b"a\t1.5\n3\t\\N\n"


@pytest.mark.parametrize("value", [None, 7, 1.5, True, b"", b"\x00\xff", "", "\\\t😀\n", "a\0b\t"])
@pytest.mark.parametrize("length", [LONG - 1, LONG + 1, 2 * LONG, 2 * LONG + 1])
def test_long_values_are_hashed_in_parts_as_whole(value: Any, length: int) -> None:
    long = (value or "x") * length if isinstance(value, (str, bytes)) else b"\\\x00" * length
    rows = [(value, long, value), ("short", 1, None), (long, value, long)]
    assert hashes_of(rows) == [sha256(text_of([row])[:-1]).digest() for row in rows]
