"""What kind of statement a text of SQL is taken for: unsure means that it writes, never that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kagedb.engines.statements import Kind, classify
from kagedb.errors import TransactionError

if TYPE_CHECKING:
    from kagedb.storage import Storage


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "  \n-- a comment; with 'marks\n/* and ; another */ select 1",
        "(SELECT 1) UNION (SELECT 2);",
        "VALUES (1)",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SELECT 'INSERT INTO a', \"into\", `into` FROM t",
        "SELECT 1 -- into",
        "SELECT E'it\\'s into', $x$ into ; $x$, $$;$$",
        "SELECT replace(name, 'a', 'b') FROM t",
        "SELECT ';delete from t'",
        "PRAGMA table_info(run)",
        "PRAGMA journal_mode",
        "PRAGMA main.page_count;",
        "EXPLAIN QUERY PLAN SELECT 1",
    ],
)
def test_what_only_looks_reads(sql: str) -> None:
    assert classify(sql) is Kind.READ


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1)",
        "replace into t values (1)",
        "WITH a AS (SELECT 1) DELETE FROM t",
        "WITH a AS (SELECT 1) -- don't\nDELETE FROM t WHERE x = 'y'",
        "WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a",
        "SELECT 1 /* it's */ INTO t -- isn't",
        "SELECT E'\\'' INTO t",
        "SELECT nextval('s')",
        "EXPLAIN ANALYZE UPDATE t SET a = 1",
        "CREATE TRIGGER a BEFORE DELETE ON t BEGIN SELECT 1; SELECT 2; END",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
        "DO $$ BEGIN PERFORM 1; PERFORM 2; END $$",
        "COPY t FROM STDIN",
        "anything new",
        "",
    ],
)
def test_what_may_write_writes(sql: str) -> None:
    assert classify(sql) is Kind.WRITE


@pytest.mark.parametrize(
    "sql",
    [
        "VACUUM",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA wal_checkpoint",
        "PRAGMA incremental_vacuum(9)",
        "ATTACH 'x' AS y",
    ],
)
def test_what_cannot_run_inside_a_transaction_is_known(sql: str) -> None:
    assert classify(sql) is Kind.ALONE


@pytest.mark.parametrize(
    "sql",
    [
        "BEGIN",
        "begin immediate",
        "COMMIT;",
        "END",
        "/* x */ ROLLBACK TO a",
        "SAVEPOINT a",
        "RELEASE a",
        "START TRANSACTION",
    ],
)
def test_what_controls_a_transaction_is_refused(storage: Storage, sql: str) -> None:
    assert classify(sql) is Kind.CONTROL
    with pytest.raises(TransactionError, match="not statements here"):
        storage.database.execute_sql(sql)
    with pytest.raises(TransactionError, match="not statements here"), storage.transaction():
        storage.database.execute_sql(sql)


def test_a_second_statement_does_not_ride_along(storage: Storage) -> None:
    for sql in ("SELECT 1; DELETE FROM plugin_state", "UPDATE plugin SET enabled = TRUE; COMMIT", "SELECT 1;;;COMMIT"):
        assert classify(sql) is Kind.SEVERAL
        with pytest.raises(TransactionError, match="several statements"):
            storage.database.execute_sql(sql)
