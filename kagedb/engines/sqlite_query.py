"""An operator's query on SQLite: a read-only connection of its own, and an authorizer that lets nothing but reading by.

The authorizer is asked while a statement is prepared (sqlite.org/c3ref/set_authorizer.html), by SQLite's own parser.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import KagedError
from .query import Answer, fill_in, refused, wrong
from .sqlite_contents import INTERRUPTIBLE_STEPS, SqliteContents, sqlite3

if TYPE_CHECKING:
    from .sqlite import SqliteEngine

_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# fmt: off
_PRAGMAS = frozenset({
    "table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list",
    "foreign_key_check", "integrity_check", "quick_check", "compile_options", "database_list", "collation_list",
    "function_list",
})
"""Pragmas that only look, whatever they are given."""
_ASKING = frozenset({
    "application_id", "auto_vacuum", "data_version", "encoding", "freelist_count", "journal_mode", "page_count",
    "page_size", "schema_version", "user_version",
})
"""Pragmas that only look where they are given nothing."""
# fmt: on
_HARMFUL_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer"})

_EXACT_DIGITS = 15
"""What SQLite writes of a number with a fraction, at most."""
_NUMBER = re.compile(rf"-?[0-9]{{1,{len(str(2**63))}}}(?P<fraction>\.[0-9]{{1,{_EXACT_DIGITS}}})?")


@contextmanager
def open_reading(engine: SqliteEngine) -> Iterator[Any]:
    """A read-only connection of its own to the store; Ctrl-C is seen between two steps of a query."""
    database = engine.database
    mode = "mode=ro&immutable=1" if database.immutable else "mode=ro"
    uri = f"file:{urllib.parse.quote(os.fsencode(database.database))}?{mode}"
    connection = sqlite3.connect(
        uri,
        uri=True,
        isolation_level=None,
        timeout=engine.settings.busy_timeout_ms / 1000,
        check_same_thread=False,  # a copy goes on in a thread of its own, one at a time
    )
    try:
        # A signal is seen between two steps only.
        connection.set_progress_handler(lambda: 0, INTERRUPTIBLE_STEPS)
        connection.execute("PRAGMA query_only = ON")
        yield connection
    finally:
        connection.close()


@contextmanager
def reading(engine: SqliteEngine) -> Iterator[SqliteContents]:
    """The store as it is at one moment."""
    with open_reading(engine) as connection:
        try:
            connection.execute("BEGIN")
            # BEGIN alone sees nothing yet: the first read fixes the state.
            connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        except sqlite3.Error as error:
            raise engine.database.translate(error) from error
        yield SqliteContents(connection, engine.path)


@contextmanager
def answer(engine: SqliteEngine, sql: str, named: Mapping[str, str], positional: Sequence[str]) -> Iterator[Answer]:
    text = fill_in(sql, named, positional, _literal)
    with open_reading(engine) as connection:
        connection.set_authorizer(_authorize)
        try:
            cursor = connection.execute(text)
            columns = tuple(column[0] for column in cursor.description or ())
            with closing(_rows(engine, cursor)) as rows:
                yield Answer(columns, rows)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise _translated(engine, error) from error


def _rows(engine: SqliteEngine, cursor: Any) -> Generator[Sequence[Any], None, None]:
    try:
        yield from cursor
    except sqlite3.Error as error:
        raise _translated(engine, error) from error


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
    allowed = action in _READING
    if action == sqlite3.SQLITE_FUNCTION:
        allowed = (second or "").lower() not in _HARMFUL_FUNCTIONS
    elif action == sqlite3.SQLITE_PRAGMA:
        name = (first or "").lower()
        allowed = name in _PRAGMAS or (name in _ASKING and second is None)
    return int(sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY)


def _literal(value: str) -> str:
    """A number where SQLite would write that number just so, else a text: either becomes the other in a column of it.

    It is what PostgreSQL makes of a quoted literal, but for one thing: text that the query computes does not turn a
    number back, since it is no column (sqlite.org/datatype3.html, section 4.2).
    """
    return f"({value})" if _is_number(value) else "'" + value.replace("'", "''") + "'"


def _is_number(value: str) -> bool:
    found = _NUMBER.fullmatch(value)
    if found is None:
        return False
    if found["fraction"]:
        digits = len(value) - value.count("-") - 1
        return digits <= _EXACT_DIGITS and repr(float(value)) == value != "-0.0"
    # A larger one would become a number with a fraction.
    return str(int(value)) == value and -(2**63) <= int(value) < 2**63


def _translated(engine: SqliteEngine, error: Exception) -> BaseException:
    name = getattr(error, "sqlite_errorname", None) or ""
    if name == "SQLITE_INTERRUPT":
        return KeyboardInterrupt()
    if name == "SQLITE_AUTH" or name.startswith("SQLITE_READONLY") or "prohibited" in str(error):
        return refused(str(error))
    if name in ("", "SQLITE_ERROR", "SQLITE_MISMATCH", "SQLITE_TOOBIG", "SQLITE_RANGE"):
        return wrong(str(error))
    translated = engine.database.translate(error)
    return translated if isinstance(translated, KagedError) else wrong(str(error))
