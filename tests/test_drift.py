"""Whatever is changed in the schema of a store by hand is seen by `schema.drift`, and a change of no meaning is not."""

from __future__ import annotations

import re
import sqlite3

import pytest

import kagedb
from extra_scripts import sqlite_path
from kagedb import Storage, schema
from postgres_server import DatabaseServer

ON_BOTH = {
    "a dropped index": ("DROP INDEX session_project_id", "missing: index on session "),
    "a lost UNIQUE": (
        "DROP INDEX project_name;; CREATE INDEX project_name ON project (name)",
        "missing: index on project project_name UNIQUE|missing: index on project CREATE UNIQUE INDEX",
    ),
    "an index over more rows": (
        "DROP INDEX run_parent_id;; CREATE INDEX run_parent_id ON run (parent_id)",
        "missing: index on run .*WHERE",
    ),
    "an extra index": ("CREATE INDEX run_agent ON run (agent)", "unknown: index on run "),
    "an index over an expression": ("CREATE INDEX run_agent ON run (lower(agent))", "unknown: index on run .*lower"),
    "an extra column": ("ALTER TABLE run ADD COLUMN mood TEXT", "unknown: column run.mood"),
    "a lost column": ("ALTER TABLE blob DROP COLUMN size", "missing: column blob.size"),
    "an extra table": ("CREATE TABLE extra (id BIGINT)", "unknown: table extra"),
    "a lost view": ("DROP VIEW v_audit", "missing: view v_audit"),
    "a view that says something else": (
        "DROP VIEW v_audit;; CREATE VIEW v_audit AS SELECT a.seq FROM audit_event a JOIN project p ON p.id = a.project",
        "unknown: view v_audit",
    ),
    "an extra view": ("CREATE VIEW runs AS SELECT id FROM run", "unknown: view runs"),
    "a renamed table": ("ALTER TABLE counter RENAME TO counters", "unknown: table counters"),
}


@pytest.mark.parametrize("change", ON_BOTH)
def test_a_change_is_seen(storage: Storage, change: str) -> None:
    statements, told = ON_BOTH[change]
    change_by_hand(storage, statements)
    assert_drift(storage, told)


IN_SQLITE_TEXT = {
    "a lost STRICT": ("session", ") STRICT", ")", "missing: table session STRICT"),
    "a lost foreign key": (
        "session",
        ",\n        FOREIGN KEY (project_id) REFERENCES project (id)",
        "",
        r"missing: foreign key session\.project_id",
    ),
    "a foreign key that cascades": (
        "session",
        "REFERENCES project (id)",
        "REFERENCES project (id) ON DELETE CASCADE",
        "on delete CASCADE",
    ),
    "a deferred foreign key": (
        "session",
        "REFERENCES project (id)",
        "REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED",
        "unknown: table session also says: FOREIGN KEY .* DEFERRED",
    ),
    "another type": ("session", "ended_at INTEGER", "ended_at TEXT", r"unknown: column session\.ended_at TEXT"),
    "another collation": (
        "session",
        "title TEXT NOT NULL",
        "title TEXT NOT NULL COLLATE NOCASE",
        "unknown: table session also says: title TEXT NOT NULL COLLATE NOCASE",
    ),
    "another collation under an index": (
        "project",
        "name TEXT NOT NULL",
        "name TEXT NOT NULL COLLATE NOCASE",
        r"unknown: index on project project_name UNIQUE \(name COLLATE NOCASE\)",
    ),
    "a lost NOT NULL": (
        "session",
        "title TEXT NOT NULL",
        "title TEXT",
        r"missing: column session\.title TEXT NOT NULL",
    ),
    "a default": (
        "session",
        "title TEXT NOT NULL",
        "title TEXT NOT NULL DEFAULT 'x'",
        r"unknown: column session\.title TEXT NOT NULL DEFAULT 'x'",
    ),
    "a CHECK": (
        "session",
        "title TEXT NOT NULL",
        "title TEXT NOT NULL CHECK (title <> 'Ana, or (so)')",
        r"also says: title TEXT NOT NULL CHECK \( title < > 'Ana, or \(so\)' \)",
    ),
    "a unique constraint": (
        "session",
        "title TEXT NOT NULL",
        "title TEXT NOT NULL UNIQUE",
        "unknown: index on session of a unique constraint UNIQUE",
    ),
    "a key that replaces": (
        "session",
        "id TEXT NOT NULL PRIMARY KEY",
        "id TEXT NOT NULL PRIMARY KEY ON CONFLICT REPLACE",
        "also says: id TEXT NOT NULL PRIMARY KEY ON CONFLICT REPLACE",
    ),
    "a lost primary key": (
        "session",
        "id TEXT NOT NULL PRIMARY KEY",
        "id TEXT NOT NULL",
        "missing: index on session of the primary key",
    ),
    "a table without rowid": (
        "session",
        ") STRICT",
        ") STRICT, WITHOUT ROWID",
        "unknown: table session .*WITHOUT ROWID",
    ),
    "a generated column": (
        "session",
        "title TEXT NOT NULL",
        "title TEXT NOT NULL AS (id) STORED",
        r"unknown: column session\.title TEXT NOT NULL HIDDEN 3",
    ),
}


@pytest.mark.sqlite_only
@pytest.mark.parametrize("change", IN_SQLITE_TEXT)
def test_a_table_made_anew_otherwise_is_seen_on_sqlite(migrated_url: str, change: str) -> None:
    """SQLite alone: PostgreSQL has ALTER TABLE for these."""
    table, before, after, told = IN_SQLITE_TEXT[change]
    connection = sqlite3.connect(sqlite_path(migrated_url), isolation_level=None)
    (text,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    indexes = connection.execute(
        "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name = ?", (table,)
    ).fetchall()
    assert text.count(before) == 1
    connection.execute(f"DROP TABLE {table}")
    for (sql,) in [(text.replace(before, after),), *indexes]:
        connection.execute(sql)
    connection.close()
    with kagedb.connect(url=migrated_url) as storage:
        assert_drift(storage, told)


@pytest.mark.sqlite_only
def test_a_comment_or_other_white_space_in_a_table_is_no_drift_on_sqlite(migrated_url: str) -> None:
    connection = sqlite3.connect(sqlite_path(migrated_url), isolation_level=None)
    (text,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'counter'").fetchone()
    connection.execute("DROP TABLE counter")
    connection.execute(text.replace("name TEXT", '"name" -- not a CHECK, nor a COLLATE\n /* (AS */ TEXT'))
    connection.close()
    with kagedb.connect(url=migrated_url) as storage:
        assert schema.drift(storage.engine) == []


SQLITE_TRIGGERS = {
    "a dropped trigger": ("DROP TRIGGER audit_event_guard_delete", "missing: trigger audit_event_guard_delete"),
    "a weakened trigger": (
        "DROP TRIGGER audit_event_guard_delete;; CREATE TRIGGER audit_event_guard_delete BEFORE DELETE ON audit_event"
        " BEGIN SELECT 1; END",
        "unknown: trigger audit_event_guard_delete on audit_event: .* SELECT 1",
    ),
    "an extra trigger": (
        "CREATE TRIGGER spy AFTER INSERT ON run BEGIN DELETE FROM counter; END",
        "unknown: trigger spy on run",
    ),
    "a trigger on a view": (
        "CREATE VIEW runs AS SELECT id FROM run;; CREATE TRIGGER spy INSTEAD OF DELETE ON runs BEGIN SELECT 1; END",
        "unknown: trigger spy on runs",
    ),
}


@pytest.mark.sqlite_only
@pytest.mark.parametrize("change", SQLITE_TRIGGERS)
def test_a_changed_trigger_is_seen_on_sqlite(storage: Storage, change: str) -> None:
    statements, told = SQLITE_TRIGGERS[change]
    change_by_hand(storage, statements)
    assert_drift(storage, told)


GUARD = "audit_event_guard_delete"
POSTGRES_CHANGES = {
    "a dropped trigger": (f"DROP TRIGGER {GUARD} ON audit_event", f"missing: trigger {GUARD}"),
    "a disabled trigger": (f"ALTER TABLE audit_event DISABLE TRIGGER {GUARD}", f"unknown: trigger {GUARD} .*disabled"),
    "a trigger that replicas skip": (
        f"ALTER TABLE audit_event ENABLE TRIGGER {GUARD}",
        f"unknown: trigger {GUARD} .*except on replicas",
    ),
    "a trigger for replicas": (f"ALTER TABLE audit_event ENABLE REPLICA TRIGGER {GUARD}", "on replicas only"),
    "another function body": (
        f"CREATE OR REPLACE FUNCTION {GUARD}() RETURNS trigger LANGUAGE plpgsql SET search_path = kaged"
        " AS $$ BEGIN RETURN OLD; END $$",
        f"unknown: trigger {GUARD} .*BEGIN RETURN OLD; END",
    ),
    "another search_path": (
        f"ALTER FUNCTION {GUARD}() SET search_path = elsewhere, kaged",
        f"unknown: trigger {GUARD} .*search_path=elsewhere",
    ),
    "a lost search_path": (f"ALTER FUNCTION {GUARD}() RESET search_path", rf"unknown: trigger {GUARD} .* \|  \| BEGIN"),
    "a condition on the trigger": (
        f"DROP TRIGGER {GUARD} ON audit_event;; CREATE TRIGGER {GUARD} BEFORE DELETE ON audit_event FOR EACH ROW"
        f" WHEN (OLD.seq > 5) EXECUTE FUNCTION {GUARD}();; ALTER TABLE audit_event ENABLE ALWAYS TRIGGER {GUARD}",
        f"unknown: trigger {GUARD} .*WHEN",
    ),
    "another function": (
        "CREATE FUNCTION lax() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN OLD; END $$;;"
        f" DROP TRIGGER {GUARD} ON audit_event;; CREATE TRIGGER {GUARD} BEFORE DELETE ON audit_event FOR EACH ROW"
        f" EXECUTE FUNCTION lax();; ALTER TABLE audit_event ENABLE ALWAYS TRIGGER {GUARD}",
        f"unknown: trigger {GUARD} .*EXECUTE FUNCTION lax",
    ),
    "an extra trigger": (
        f"CREATE TRIGGER spy AFTER DELETE ON run FOR EACH ROW EXECUTE FUNCTION {GUARD}()",
        "unknown: trigger spy on run",
    ),
    "a rule": ("CREATE RULE deaf AS ON INSERT TO audit_event DO INSTEAD NOTHING", "unknown: rule on audit_event"),
    "a function beside ours": (
        "CREATE FUNCTION max(text) RETURNS text LANGUAGE sql AS 'SELECT $1'",
        r"unknown: function max\(text\)",
    ),
    "a lost foreign key": (
        "ALTER TABLE session DROP CONSTRAINT session_project_id_fkey",
        "missing: constraint session session_project_id_fkey",
    ),
    "a foreign key that cascades": (
        "ALTER TABLE session DROP CONSTRAINT session_project_id_fkey;; ALTER TABLE session ADD CONSTRAINT"
        " session_project_id_fkey FOREIGN KEY (project_id) REFERENCES project (id) ON DELETE CASCADE",
        "unknown: constraint session .*CASCADE",
    ),
    "a foreign key that was not checked": (
        "ALTER TABLE session DROP CONSTRAINT session_project_id_fkey;; ALTER TABLE session ADD CONSTRAINT"
        " session_project_id_fkey FOREIGN KEY (project_id) REFERENCES project (id) NOT VALID",
        "unknown: constraint session .*NOT VALID",
    ),
    "a deferred foreign key": (
        "ALTER TABLE session ALTER CONSTRAINT session_project_id_fkey DEFERRABLE INITIALLY DEFERRED",
        "unknown: constraint session .*DEFERRABLE",
    ),
    "another type": ("ALTER TABLE blob ALTER size TYPE integer", r"unknown: column blob\.size integer"),
    "another collation": (
        'ALTER TABLE blob ALTER codec TYPE text COLLATE "default"',
        r"unknown: column blob\.codec text NOT NULL",
    ),
    "a lost NOT NULL": (
        "ALTER TABLE session ALTER title DROP NOT NULL",
        r'unknown: column session\.title text COLLATE "C"$',
    ),
    "a default": ("ALTER TABLE session ALTER title SET DEFAULT 'x'", r"unknown: column session\.title .*DEFAULT 'x'"),
    "a CHECK": ("ALTER TABLE session ADD CHECK (title <> '')", "unknown: constraint session .*CHECK"),
    "a unique constraint": (
        "ALTER TABLE session ADD UNIQUE (title)",
        r"unknown: constraint session .*UNIQUE \(title\)",
    ),
    "a lost primary key": (
        "ALTER TABLE transcript_chunk DROP CONSTRAINT transcript_chunk_pkey",
        "missing: constraint transcript_chunk",
    ),
    "an unlogged table": ("ALTER TABLE audit_event SET UNLOGGED", "unknown: table audit_event UNLOGGED"),
    "row security": ("ALTER TABLE run ENABLE ROW LEVEL SECURITY", "unknown: table run ROW SECURITY"),
    "rows from a child table": (
        "CREATE SCHEMA elsewhere;; CREATE TABLE elsewhere.more () INHERITS (audit_event)",
        "unknown: table audit_event INHERITANCE",
    ),
    "a view with the rights of whoever asks": (
        "ALTER VIEW v_audit SET (security_invoker = true)",
        "unknown: view v_audit: .*security_invoker",
    ),
    "a sequence": ("CREATE SEQUENCE numbers", "unknown: sequence numbers"),
    "a materialized view": ("CREATE MATERIALIZED VIEW runs AS SELECT id FROM run", "unknown: materialized view runs"),
}


@pytest.mark.postgres_only
@pytest.mark.parametrize("change", POSTGRES_CHANGES)
def test_a_change_is_seen_on_postgres(storage: Storage, change: str) -> None:
    statements, told = POSTGRES_CHANGES[change]
    change_by_hand(storage, statements)
    assert_drift(storage, told)


@pytest.mark.postgres_only
def test_foreign_keys_switched_off_by_a_superuser_are_seen(
    postgres_server: DatabaseServer, postgres_database: str
) -> None:
    kagedb.connect(url=postgres_server.url(postgres_database)).close()
    postgres_server.execute(
        "ALTER TABLE kaged.session DISABLE TRIGGER ALL", url=postgres_server.admin_url(postgres_database)
    )
    with kagedb.connect(url=postgres_server.url(postgres_database)) as storage:
        assert_drift(storage, "unknown: trigger of a foreign key on session enabled disabled")


def change_by_hand(storage: Storage, statements: str) -> None:
    """Run statements that are separated by `;;`, since the bodies of triggers have `;` in them."""
    with storage.transaction():
        for statement in statements.split(";; "):
            storage.database.execute_sql(statement)


def assert_drift(storage: Storage, told: str) -> None:
    found = schema.drift(storage.engine)
    assert any(re.search(told, line) for line in found), found
