"""What the values of `kaged query` are compared with, as docs/operators.md says it: alike, and where not, how not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from commands import answer_json, in_process
from kagedb import Project, Session
from kagedb.models.base import Counter
from stored import ACTOR

if TYPE_CHECKING:
    from places import Places

# Names and values of counters: text that looks like numbers, each beside a number of its own.
ROWS = {
    "5": 50,
    "12": 12,
    "007": 7,
    "1.10": 110,
    "1.1": 11,
    "2026": 2026,
    "-3": -3,
    "abc": 1,
    "1e3": 1000,
    "9007199254740993": 2**53 + 1,
}

ODD = [
    "12",
    "-0",
    "-0.0",
    "007",
    "1.10",
    "0.00001",
    "1e3",
    "٣",
    "1.٣",
    "99999999999999999999",
    "9" * 200,
    "0.30000000000000004",
    "999999999999999.9",
]

BY_NAME = "SELECT name FROM counter WHERE name = :x"
BY_VALUE = "SELECT name FROM counter WHERE value > :x ORDER BY value"

ALIKE: tuple[tuple[str, dict[str, str], list[Any]], ...] = (
    # Columns: text is text, whatever its digits are.
    *((BY_NAME, {"x": name}, [name]) for name in ROWS),
    (BY_NAME, {"x": "7"}, []),
    (BY_NAME, {"x": "1.100"}, []),
    (BY_NAME, {"x": "1000"}, []),
    (BY_NAME, {"x": "9007199254740992"}, []),
    ("SELECT name FROM counter WHERE name > :x ORDER BY name", {"x": "2"}, ["2026", "5", "9007199254740993", "abc"]),
    ("SELECT name FROM counter WHERE :x = name", {"x": "12"}, ["12"]),
    ("SELECT name FROM counter WHERE name IN (:x, :y) ORDER BY name", {"x": "1.10", "y": "12"}, ["1.10", "12"]),
    ("SELECT name FROM counter WHERE name LIKE :x", {"x": "12"}, ["12"]),
    ("SELECT n FROM (SELECT name AS n FROM counter) AS c WHERE n = :x", {"x": "12"}, ["12"]),
    ("SELECT title FROM v_session WHERE title = :x", {"x": "1.10"}, ["1.10"]),
    ("SELECT title FROM v_session WHERE created_at >= :x AND created_at < :y", {"x": "2020", "y": "2200"}, ["1.10"]),
    ("SELECT title FROM v_session WHERE created_at >= :x", {"x": "2200"}, []),
    # Columns: numbers are numbers.
    (BY_VALUE, {"x": "110"}, ["1e3", "2026", "9007199254740993"]),
    (BY_VALUE, {"x": "9007199254740992"}, ["9007199254740993"]),
    (BY_VALUE, {"x": "0110"}, ["1e3", "2026", "9007199254740993"]),
    (BY_VALUE, {"x": "9223372036854775807"}, []),
    ("SELECT name FROM counter WHERE value < :x", {"x": "-2"}, ["-3"]),
    ("SELECT name FROM counter WHERE value > :x", {"x": "-9223372036854775808"}, list(ROWS)),
    ("SELECT name FROM counter WHERE value BETWEEN :x AND :y", {"x": "12", "y": "49"}, ["12"]),
    ("SELECT name FROM counter WHERE value IN (:x, :y) ORDER BY value", {"x": "7", "y": "12"}, ["007", "12"]),
    ("SELECT title FROM session WHERE created_at > :x", {"x": "1500000000000"}, ["1.10"]),
    ("SELECT title FROM session WHERE pinned = :x", {"x": "0"}, ["1.10"]),
    ("SELECT title FROM session WHERE pinned = :x", {"x": "1"}, []),
    # Numbers that the query computes.
    ("SELECT title FROM session WHERE COALESCE(ended_at, created_at) > :x", {"x": "1500000000000"}, ["1.10"]),
    ("SELECT title FROM session WHERE COALESCE(ended_at, created_at) < :x", {"x": "5"}, []),
    ("SELECT name FROM counter WHERE value * 2 = :x", {"x": "24"}, ["12"]),
    ("SELECT LENGTH(name) FROM counter GROUP BY 1 HAVING COUNT(*) > :x ORDER BY 1", {"x": "2"}, [3]),
    ("SELECT 'yes' FROM (SELECT AVG(value) AS a FROM counter) AS one WHERE a > :x", {"x": "2.5"}, ["yes"]),
    ("SELECT 'yes' WHERE 0.25 = :x", {"x": "0.25"}, ["yes"]),
    ("SELECT 'yes' WHERE -1.5 < :x", {"x": "-0.5"}, ["yes"]),
    ("SELECT name FROM v_project WHERE sessions = :x", {"x": "1"}, ["house"]),
    # Counts of rows, and texts that a value is made part of.
    ("SELECT value FROM counter WHERE value > 0 ORDER BY value LIMIT :x OFFSET :y", {"x": "2", "y": "1"}, [7, 11]),
    ("SELECT value FROM counter WHERE value > 0 ORDER BY value LIMIT :x", {"x": "007"}, [1, 7, 11, 12, 50, 110, 1000]),
    ("SELECT 'v' || :x", {"x": "1.10"}, ["v1.10"]),
    # A cast says what it is.
    ("SELECT name FROM counter WHERE SUBSTR(name, 1, 2) = CAST(:x AS TEXT)", {"x": "20"}, ["2026"]),
    ("SELECT CAST(:x AS TEXT)", {"x": "1.10"}, ["1.10"]),
    ("SELECT CAST(:x AS INTEGER)", {"x": "12"}, [12]),
    ("SELECT CAST(:x AS INTEGER) + CAST(:y AS INTEGER)", {"x": "12", "y": "-2"}, [10]),
    ("SELECT name FROM counter WHERE value > CAST(:x AS NUMERIC) AND value < 12", {"x": "7.50"}, ["1.1"]),
)  # fmt: skip


def fill(url: str) -> None:
    with kagedb.connect(url=url):
        Session.start(Project.add("house", actor=ACTOR), title="1.10", actor=ACTOR)
        Counter.delete().execute()
        Counter.insert_many([{"name": name, "value": value} for name, value in ROWS.items()]).execute()


def first_column(url: str, sql: str, values: dict[str, str]) -> list[Any]:
    words = [word for name, value in values.items() for word in ("--param", f"{name}={value}")]
    return [next(iter(row.values())) for row in answer_json(url, "query", sql, *words)]


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    fill(migrated_url)
    return migrated_url


def test_a_value_is_a_number_beside_numbers_and_a_text_beside_texts(filled_url: str) -> None:
    unordered = {sql for sql, _, _ in ALIKE if "ORDER BY" not in sql}
    for sql, values, expected in ALIKE:
        found = first_column(filled_url, sql, values)
        if sql in unordered:
            found, expected = sorted(found), sorted(expected)
        assert found == expected, (sql, values)


@pytest.mark.parametrize("value", ODD)
def test_a_text_column_and_a_cast_give_back_each_character(filled_url: str, value: str) -> None:
    with kagedb.connect(url=filled_url):
        Counter.delete().where(Counter.name == value).execute()
        Counter.insert(name=value, value=77).execute()
    assert first_column(filled_url, BY_NAME, {"x": value}) == [value]
    assert first_column(filled_url, "SELECT CAST(:x AS TEXT)", {"x": value}) == [value]


# Where they differ: the statement, the value, and what each engine answers; None where it refuses.
DIFFERENT = (
    ("SELECT value FROM counter WHERE SUBSTR(name, 1, 2) = :x", "12", [], [12]),
    ("SELECT COUNT(*) FROM counter WHERE SUBSTR(name, 1, 2) > :x", "12", [10], [5]),
    ("SELECT :x", "12", [12], ["12"]),
    ("SELECT COALESCE(title, :x) FROM (SELECT CAST(NULL AS TEXT) AS title) AS one", "12", [12], ["12"]),
    ("SELECT COALESCE(ended_at, :x) FROM session", "12", [12], [12]),
    ("SELECT :x + :x", "12", [24], None),
    ("SELECT COUNT(*) FROM counter WHERE value > :x", "2.5", [8], None),
    ("SELECT COUNT(*) FROM counter WHERE value > :x", "abc", [0], None),
    ("SELECT COUNT(*) FROM counter WHERE value < :x", "abc", [10], None),
    ("SELECT name FROM v_project WHERE sessions > :x", "00", [], ["house"]),
    ("SELECT 'yes' FROM (SELECT COUNT(*) AS n FROM counter) AS one WHERE n > :x", "007", [], ["yes"]),
    ("SELECT 'yes' FROM (SELECT COUNT(*) AS n FROM counter) AS one WHERE n > :x", "2.50", [], None),
    ("SELECT 'yes' FROM (SELECT AVG(value) AS a FROM counter) AS one WHERE a > :x", "2.50", [], ["yes"]),
)


def test_the_engines_differ_where_the_page_says_so(places: Places) -> None:
    urls = places.migrated("sqlite"), places.migrated("postgres")
    for url in urls:
        fill(url)
    for sql, value, *answers in DIFFERENT:
        for url, expected in zip(urls, answers, strict=True):
            if expected is not None:
                assert first_column(url, sql, {"x": value}) == expected, (sql, url)
                continue
            result = in_process("--url", url, "query", sql, "--param", f"x={value}")
            assert (result.exit_code, result.stdout) == (2, ""), sql
            assert result.stderr.startswith("kaged: the query cannot be answered: "), sql
