"""An operator's query on PostgreSQL: a cursor that plpgsql opens over the text, in a transaction that only reads.

A read-only session alone is not enough: `commit; begin read write; delete ...` walks out of it. OPEN ... FOR EXECUTE
takes one statement that gives rows, and nothing that ends or changes a transaction; and `transaction_read_only` cannot
be turned off once the transaction has a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import KagedError
from .postgres_contents import FETCH_ROWS, PostgresContents
from .postgres_server import driver
from .query import Answer, fill_in, refused, wrong

if TYPE_CHECKING:
    from .postgres import PostgresEngine

CANCEL_SECONDS = 0.2
"""Between requests to cancel: one that comes between two statements does nothing."""

_BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1"  # the first query fixes the snapshot


@contextmanager
def reading(engine: PostgresEngine) -> Iterator[PostgresContents]:
    """The store as it is at one moment."""
    from .postgres_archive import PLAIN_TEXT, PostgresArchiver

    connection = engine.server.connect()
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"{_BEGIN}; {PLAIN_TEXT}")
        yield PostgresContents(connection, engine.schema, PostgresArchiver(engine).plugin_schemas(connection))
    except driver.Error as error:
        raise _translated(engine, error) from error
    finally:
        connection.close()


@contextmanager
def answer(engine: PostgresEngine, sql: str, named: Mapping[str, str], positional: Sequence[str]) -> Iterator[Answer]:
    from psycopg2 import extras

    connection = engine.server.connect(application_name="kaged query")
    try:
        extras.register_default_jsonb(connection, loads=str)
        with connection.cursor() as cursor, Beside(connection) as beside:

            def literal(text: str) -> str:
                quoted: bytes = cursor.mogrify("%s", (text,))
                return quoted.decode()

            text = literal(fill_in(sql, named, positional, literal))
            body = f"DECLARE answer refcursor := 'kaged_query'; BEGIN OPEN answer FOR EXECUTE {text}; END"
            cursor.execute(_BEGIN)
            beside.run(lambda: cursor.execute(f"DO {literal(body)}"))
            beside.run(lambda: cursor.execute("FETCH 0 FROM kaged_query"))
            yield Answer(tuple(column.name for column in cursor.description or ()), _rows(cursor, beside))
    except driver.Error as error:
        raise _translated(engine, error) from error
    finally:
        connection.close()


def _rows(cursor: Any, beside: Beside) -> Iterator[Sequence[Any]]:
    while True:
        beside.run(lambda: cursor.execute(f"FETCH {FETCH_ROWS} FROM kaged_query"))
        rows = cursor.fetchall()
        if not rows:
            return
        yield from rows


class Beside:
    """Runs calls in a thread of its own: libpq waits without looking for signals, so Ctrl-C cancels from here."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._pool = ThreadPoolExecutor(1, "kaged query")

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, work: Callable[[], None]) -> None:
        future = self._pool.submit(work)
        try:
            future.result()
        except KeyboardInterrupt:
            while not future.done():
                self._connection.cancel()
                try:
                    future.exception(CANCEL_SECONDS)
                except TimeoutError:
                    continue
            raise


def _translated(engine: PostgresEngine, error: Exception) -> Exception:
    code = getattr(error, "pgcode", None) or ""
    said = getattr(getattr(error, "diag", None), "message_primary", None) or str(error).strip()
    text = engine.settings.url.scrub(" ".join(said.split()))
    # 25006: a write in a transaction that reads. 42P11: what a cursor cannot be opened over. 0A000, 2D000: a statement
    # that ends the transaction, or is none that can run inside one.
    if code in ("25006", "42P11", "0A000", "2D000"):
        return refused(text)
    translated = engine.database.translate(error)
    return translated if isinstance(translated, KagedError) else wrong(text)
