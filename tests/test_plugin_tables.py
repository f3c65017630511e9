"""Tables of a plugin's own: the ledger of their scripts, and what a handle cannot touch, whatever it tries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from contents import contents
from kagedb import (
    AuditEvent,
    InvalidValue,
    MigrationFailed,
    Plugin,
    Project,
    SchemaDrift,
    SchemaTooNew,
    Session,
    StateError,
    StorageForbidden,
)
from kagedb.models.plugin_tables import PluginDatabase
from programs import start_python, tell, wait_for_line

if TYPE_CHECKING:
    from kagedb.storage import Storage
    from postgres_server import DatabaseServer

ANA = "operator:ana"

READINGS = {
    "0001_readings": """
        -- what was measured; nothing else
        CREATE TABLE p_weather__place (
            name {text} NOT NULL PRIMARY KEY
        ) {strict};
        CREATE TABLE p_weather__reading (
            id {ulid} NOT NULL PRIMARY KEY,
            place {text} NOT NULL REFERENCES p_weather__place (name) ON DELETE CASCADE,
            at {integer} NOT NULL,
            note {text} NOT NULL DEFAULT 'a ; in quotes',
            raw {blob}
        ) {strict};
        CREATE INDEX p_weather__reading_at ON p_weather__reading (at);
    """,
    "0002_humid": "ALTER TABLE p_weather__reading ADD COLUMN humid {boolean}; -- the end",
}


def install(name: str = "weather", project: str = "house") -> Plugin:
    place = Project.get_or_none(Project.name == project) or Project.add(project, actor=ANA)
    return Plugin.install(place, {"name": name, "version": "1.0", "permissions": ["tables"]}, actor=ANA)


def allow(server: DatabaseServer, database: str, *names: str) -> None:
    """Do on PostgreSQL what the operator has to do, taken from the error that says so."""
    for name in names:
        with pytest.raises(StorageForbidden, match="has no role and schema of its own") as caught:
            install(name).database().execute("SELECT 1")
        start, _, sql = caught.value.hint.partition(": ")
        assert start == "let somebody who may run"
        server.execute(sql, url=server.admin_url(database))


@pytest.fixture
def plugin(storage: Storage, request: pytest.FixtureRequest) -> Iterator[Plugin]:
    """A plugin that may have tables, beside another one, "other"."""
    if storage.engine.name == "sqlite":
        yield install()
        return
    server = request.getfixturevalue("postgres_server")
    database = storage.database.execute_sql("SELECT current_database()").fetchone()[0]
    storage.database.statement_done()
    names = ("weather", "other")
    allow(server, database, *names)
    yield install()
    for name in names:
        server.execute(f"DROP OWNED BY kaged_p_{name} CASCADE", url=server.admin_url(database))
        server.execute(f"DROP ROLE kaged_p_{name}", url=server.admin_url(database))


@pytest.fixture
def tables(plugin: Plugin) -> PluginDatabase:
    plugin.migrate(READINGS)
    database = plugin.database()
    database.execute("INSERT INTO p_weather__place VALUES (?)", ("roof",))
    return database


def test_scripts_make_tables_and_are_run_once(plugin: Plugin) -> None:
    assert plugin.migrate({"0001_readings": READINGS["0001_readings"]}) == ["0001_readings"]
    assert plugin.migrate(READINGS) == ["0002_humid"]
    assert plugin.migrate(READINGS) == []
    assert plugin.database().tables() == ["p_weather__migration", "p_weather__place", "p_weather__reading"]


def test_rows_are_written_and_read(tables: PluginDatabase) -> None:
    add = "INSERT INTO p_weather__reading (id, place, at, raw, humid) VALUES (?, ?, ?, ?, ?)"
    assert tables.execute(add, ("01", "roof", 5, b"\0\xff", True)).rowcount == 1
    tables.execute(add, ("02", "roof", 6, None, None))
    found = tables.execute("SELECT id, note, raw, humid FROM p_weather__reading ORDER BY id")
    assert found.columns == ["id", "note", "raw", "humid"]
    assert list(found) == [("01", "a ; in quotes", b"\0\xff", True), ("02", "a ; in quotes", None, None)]
    assert list(tables.execute("SELECT '%', '?' || ? /* ? */ FROM p_weather__place -- ?", ("x",))) == [("%", "?x")]
    assert tables.execute("UPDATE p_weather__reading SET at = at + 1 WHERE at > ?", (5,)).rowcount == 1
    assert tables.execute("DELETE FROM p_weather__place").rowcount == 1
    assert len(tables.execute("SELECT 1 FROM p_weather__reading")) == 0, "its own foreign keys cascade"


def test_queries_of_every_shape_work_within_the_tables(tables: PluginDatabase) -> None:
    for sql in (
        "WITH x AS (SELECT name FROM p_weather__place) SELECT COUNT(*) FROM x",
        "SELECT COUNT(*) FROM (SELECT 1 FROM p_weather__place) AS places",
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1) SELECT COUNT(*) FROM n",
        "SELECT COUNT(*) FROM p_weather__place a JOIN p_weather__place b ON a.name = b.name",
        " -- a comment\n SELECT COUNT(*) FROM p_weather__place;",
        "INSERT INTO p_weather__place VALUES ('garden') ON CONFLICT (name) DO NOTHING RETURNING 1",
    ):
        assert list(tables.execute(sql)) == [(1,)], sql
    tables.execute("CREATE VIEW p_weather__names AS SELECT name FROM p_weather__place")
    assert len(tables.execute("SELECT * FROM p_weather__names")) == 2
    tables.execute("CREATE UNIQUE INDEX p_weather__one ON p_weather__reading (place, at)")
    tables.execute("ALTER TABLE p_weather__reading RENAME COLUMN note TO remark")
    tables.execute("ALTER TABLE p_weather__reading RENAME TO p_weather__measured")
    tables.execute("ALTER TABLE p_weather__measured DROP COLUMN humid")
    tables.execute("DROP INDEX p_weather__one")
    tables.execute("DROP VIEW p_weather__names")
    tables.execute("DROP TABLE p_weather__measured")
    assert tables.tables() == ["p_weather__migration", "p_weather__place"]


FORBIDDEN = [
    "SELECT * FROM audit_event",
    "SELECT COUNT(*) FROM audit_event",
    "SELECT COUNT(*) FROM AUDIT_EVENT",
    "SELECT 1 FROM audit_event LIMIT 1",
    "SELECT * FROM v_audit",
    "SELECT COUNT(*) FROM v_run",
    "SELECT name FROM p_weather__place WHERE EXISTS (SELECT 1 FROM project)",
    "WITH x AS (SELECT * FROM project) SELECT COUNT(*) FROM x",
    "SELECT * FROM schema_migration",
    "INSERT INTO project (id, created_at, name) VALUES ('01JAB3C4D5E6F7G8H9JKMNPQRS', 1, 'mine')",
    "INSERT INTO p_weather__place SELECT name FROM project",
    "UPDATE project SET name = 'mine'",
    "UPDATE p_weather__place SET name = (SELECT name FROM project)",
    "DELETE FROM session",
    "DROP TABLE session",
    "DROP TABLE p_other__thing",
    "SELECT * FROM p_other__thing",
    "DROP INDEX run_session_id",
    "ALTER TABLE session ADD COLUMN mine INTEGER",
    "ALTER TABLE session RENAME TO p_weather__session",
    "ALTER TABLE p_weather__place RENAME TO place",
    "ALTER TABLE p_weather__place RENAME TO p_other__place",
    "CREATE TABLE mine (x INTEGER)",
    "CREATE TABLE p_other__mine (x INTEGER)",
    "CREATE TABLE p_weather_mine (x INTEGER)",
    "CREATE TABLE p_weather__copy AS SELECT * FROM project",
    "CREATE TABLE p_weather__child (x TEXT REFERENCES session (id))",
    "CREATE TABLE p_weather__child (x TEXT REFERENCES p_other__thing (name))",
    "ALTER TABLE p_weather__place ADD COLUMN session TEXT REFERENCES session (id)",
    "CREATE INDEX p_weather__x ON session (title)",
    "CREATE INDEX mine ON p_weather__place (name)",
]

OTHER_STATEMENTS = [
    "CREATE TRIGGER p_weather__x BEFORE INSERT ON audit_event BEGIN SELECT 1; END",
    "CREATE TRIGGER p_weather__x BEFORE INSERT ON p_weather__place BEGIN DELETE FROM session; END",
    "CREATE TEMP TABLE p_weather__x (x INTEGER)",
    "CREATE TEMPORARY VIEW p_weather__x AS SELECT 1",
    "CREATE VIRTUAL TABLE p_weather__x USING fts5 (x)",
    "CREATE FUNCTION p_weather__x () RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "DO $$ BEGIN RESET ROLE; END $$",
    "RESET ROLE",
    "/* */ ; SET ROLE NONE",
    "SELECT set_config('role', 'none', true)",
    "SELECT SET_CONFIG('search_path', 'kaged', false)",
    "PRAGMA writable_schema = ON",
    "PRAGMA table_info(session)",
    "ATTACH DATABASE '/tmp/x.db' AS x",
    "VACUUM",
    "VACUUM INTO '/tmp/x.db'",
    "ANALYZE",
    "REINDEX",
    "BEGIN",
    "COMMIT",
    "SAVEPOINT x",
    "COPY p_weather__place TO PROGRAM 'cat'",
    "GRANT ALL ON p_weather__place TO PUBLIC",
    "",
]


def test_nothing_but_its_own_can_be_touched(storage: Storage, tables: PluginDatabase) -> None:
    install("other").migrate({"1": "CREATE TABLE p_other__thing (name {text} PRIMARY KEY) {strict}"})
    Session.start(Project.named("house"), title="night watch", actor=ANA)
    before, catalogue = contents(storage), storage.engine.catalogue()
    for sql in FORBIDDEN:
        with pytest.raises((StorageForbidden, Exception)) as caught:
            tables.execute(sql)
        if not isinstance(caught.value, StorageForbidden):
            # In the role's own schema PostgreSQL does not see the tables of others at all.
            assert storage.engine.name == "postgres", sql
            assert "does not exist" in str(caught.value), sql
    for sql in OTHER_STATEMENTS:
        with pytest.raises(InvalidValue, match="a plugin cannot run the statement"):
            tables.execute(sql)
    assert contents(storage) == before
    assert storage.engine.catalogue() == catalogue
    assert tables.tables() == ["p_weather__migration", "p_weather__place", "p_weather__reading"]
    assert install("other").database().tables() == ["p_other__migration", "p_other__thing"]


@pytest.mark.postgres_only
def test_names_with_the_schema_before_them_are_refused_by_the_role(storage: Storage, tables: PluginDatabase) -> None:
    install("other").migrate({"1": "CREATE TABLE p_other__thing (name {text} PRIMARY KEY) {strict}"})
    for sql in (
        "SELECT * FROM kaged.audit_event",
        "SELECT * FROM kaged.v_audit",
        "DELETE FROM kaged.session",
        "DROP TABLE kaged.session",
        "SELECT * FROM kaged_p_other.p_other__thing",
        "CREATE TABLE kaged.p_weather__x (x integer)",
        "CREATE TABLE p_weather__child (x text REFERENCES kaged.session (id))",
        "CREATE INDEX p_weather__x ON kaged.session (title)",
        "ALTER TABLE p_weather__place SET SCHEMA kaged",
    ):
        with pytest.raises(StorageForbidden, match="the plugin 'weather' can touch only its own tables"):
            tables.execute(sql)


@pytest.mark.postgres_only
def test_a_session_is_the_stores_again_after_each_statement(storage: Storage, tables: PluginDatabase) -> None:
    def session() -> Any:
        return storage.database.execute_sql(
            "SELECT current_user, session_user, current_setting('search_path'), current_setting('role')"
        ).fetchone()

    usual = session()
    with storage.transaction():
        tables.execute("SELECT 1")
        assert session() == usual
        with pytest.raises(StorageForbidden):
            tables.execute("SELECT * FROM kaged.session")
        assert session() == usual
        tables.execute("INSERT INTO p_weather__place VALUES ('x')")
    assert session() == usual


@pytest.mark.postgres_only
def test_a_role_that_may_do_more_is_refused(storage: Storage, plugin: Plugin, postgres_server: DatabaseServer) -> None:
    storage.database.plugins._granted.clear()
    admin = postgres_server.admin_url("postgres")
    postgres_server.execute("ALTER ROLE kaged_p_weather SUPERUSER", url=admin)
    with pytest.raises(StorageForbidden, match="may do more than touch the tables"):
        plugin.database().execute("SELECT 1")
    postgres_server.execute("ALTER ROLE kaged_p_weather NOSUPERUSER", url=admin)
    plugin.database().execute("SELECT 1")


@pytest.mark.postgres_only
def test_without_the_grant_the_operator_is_told_what_to_run(storage: Storage) -> None:
    plugin = install()
    for verb in (lambda: plugin.migrate(READINGS), lambda: plugin.database().execute("SELECT 1")):
        with pytest.raises(StorageForbidden) as caught:
            verb()
        assert caught.value.hint == (
            'let somebody who may run: CREATE ROLE "kaged_p_weather" NOLOGIN; GRANT "kaged_p_weather" TO "kaged";'
            ' CREATE SCHEMA "kaged_p_weather" AUTHORIZATION "kaged_p_weather";'
        )
    plugin.state.set("works", True)
    plugin.uninstall(actor=ANA)


def test_one_statement_at_a_time(tables: PluginDatabase) -> None:
    for sql in ("SELECT 1; SELECT 2", "DELETE FROM p_weather__place; DELETE FROM session"):
        with pytest.raises(Exception, match=r"several statements|one statement"):
            tables.execute(sql)
    assert len(tables.execute("SELECT * FROM p_weather__place")) == 1


def test_what_the_store_ran_before_is_not_let_through(storage: Storage, tables: PluginDatabase) -> None:
    sql = "SELECT COUNT(*) FROM project"
    for _ in range(3):
        assert storage.database.execute_sql(sql).fetchone() == (1,)
        with pytest.raises((StorageForbidden, Exception), match=r"only its own|does not exist"):
            tables.execute(sql)
    assert storage.database.execute_sql(sql).fetchone() == (1,)


def test_a_statement_that_fails_undoes_itself_and_not_what_is_around_it(
    storage: Storage, tables: PluginDatabase
) -> None:
    with storage.transaction():
        tables.execute("INSERT INTO p_weather__place VALUES ('garden')")
        with pytest.raises(Exception):
            tables.execute("INSERT INTO p_weather__place VALUES ('garden')")
        with pytest.raises(Exception):
            tables.execute("SELECT * FROM session")
        with pytest.raises(Exception):
            tables.execute("ALTER TABLE p_weather__place RENAME TO place")
        Project.add("second", actor=ANA)
    assert [name for (name,) in tables.execute("SELECT name FROM p_weather__place ORDER BY 1")] == ["garden", "roof"]
    Project.named("second")


def test_tables_and_state_change_together_or_not_at_all(plugin: Plugin, tables: PluginDatabase) -> None:
    with pytest.raises(ZeroDivisionError), tables.transaction():
        tables.execute("INSERT INTO p_weather__place VALUES ('garden')")
        plugin.state.set("places", 2)
        raise ZeroDivisionError
    assert (len(tables.execute("SELECT * FROM p_weather__place")), plugin.state.get("places")) == (1, (None, 0))
    with tables.transaction() as same:
        same.execute("INSERT INTO p_weather__place VALUES ('garden')")
        plugin.state.set("places", 2)
    assert (len(tables.execute("SELECT * FROM p_weather__place")), plugin.state.get("places")) == (2, (2, 1))


def test_a_snapshot_sees_one_state_of_the_tables_and_writes_nothing(storage: Storage, tables: PluginDatabase) -> None:
    with storage.snapshot():
        assert len(tables.execute("SELECT * FROM p_weather__place")) == 1
        with pytest.raises(kagedb.TransactionError, match="snapshot"):
            tables.execute("DELETE FROM p_weather__place")
    assert len(tables.execute("SELECT * FROM p_weather__place")) == 1


FAILING = {
    "not SQL": "CREATE TABLE p_weather__x (a {text}) {strict}; NOT SQL;",
    "names a table that is not its own": "CREATE TABLE p_weather__x (a {text}) {strict}; DROP TABLE session;",
    "makes a table without the prefix": "CREATE TABLE p_weather__x (a {text}) {strict}; CREATE TABLE x (a {text});",
    "has a brace of its own": "CREATE TABLE p_weather__x (a {text}) {strict}; INSERT INTO p_weather__x VALUES ('{}');",
    "fails on a row": "CREATE TABLE p_weather__x (a {text} NOT NULL) {strict};"
    " INSERT INTO p_weather__x VALUES ('1'); INSERT INTO p_weather__x VALUES (NULL)",
}


@pytest.mark.parametrize("script", FAILING.values(), ids=FAILING)
def test_a_failing_script_leaves_the_previous_version(plugin: Plugin, script: str) -> None:
    first = {"0001_readings": READINGS["0001_readings"]}
    plugin.migrate(first)
    before = plugin.database().tables()
    with pytest.raises(MigrationFailed, match=r"the script 0003_bad of the plugin 'weather' failed, .* as they were"):
        plugin.migrate({**READINGS, "0003_bad": script})
    assert plugin.database().tables() == before
    assert plugin.migrate(READINGS) == ["0002_humid"], "the good script before it was undone with it"


def test_the_first_script_that_fails_leaves_no_ledger(plugin: Plugin) -> None:
    with pytest.raises(MigrationFailed):
        plugin.migrate({"1": "NOT SQL"})
    assert plugin.database().tables() == []


def test_a_script_with_braces_doubled_is_run_as_it_is_meant(plugin: Plugin) -> None:
    plugin.migrate(
        {"1": "CREATE TABLE p_weather__x (a {json}) {strict}; INSERT INTO p_weather__x VALUES ('{{\"a\":1}}')"}
    )
    assert list(plugin.database().execute("SELECT a FROM p_weather__x")) == [('{"a":1}',)]


def test_edited_forgotten_and_inserted_scripts_are_noticed(plugin: Plugin) -> None:
    plugin.migrate(READINGS)
    edited = {**READINGS, "0002_humid": READINGS["0002_humid"] + " "}
    with pytest.raises(SchemaDrift, match="the script 0002_humid of the plugin 'weather' is not what was run"):
        plugin.migrate(edited)
    with pytest.raises(SchemaTooNew, match="made by a newer version: 0002_humid"):
        plugin.migrate({"0001_readings": READINGS["0001_readings"]})
    with pytest.raises(SchemaDrift, match="comes before 0002_humid"):
        plugin.migrate({"0000": "SELECT 1", **READINGS})
    with pytest.raises(InvalidValue, match="the script name"):
        plugin.migrate({"a b": "SELECT 1"})
    assert plugin.migrate(READINGS) == []


def test_plugin_tables_are_no_drift_of_the_store(storage: Storage, tables: PluginDatabase, migrated_url: str) -> None:
    catalogue = storage.engine.catalogue()
    assert not [line for line in catalogue if "p_weather" in line]
    storage.close()
    with kagedb.connect(url=migrated_url):
        assert len(install().database().execute("SELECT * FROM p_weather__place")) == 1


def test_uninstalling_drops_the_tables_with_the_last_project_that_has_them(storage: Storage, plugin: Plugin) -> None:
    plugin.migrate(READINGS)
    plugin.database().execute("INSERT INTO p_weather__place VALUES ('roof')")
    plugin.database().execute("INSERT INTO p_weather__reading (id, place, at) VALUES ('01', 'roof', 1)")
    plugin.database().execute("CREATE VIEW p_weather__names AS SELECT name FROM p_weather__place")
    elsewhere = install(project="garden")
    plugin.uninstall(actor=ANA)
    assert len(elsewhere.database().execute("SELECT * FROM p_weather__place")) == 1
    with pytest.raises(StateError, match="is uninstalled"):
        plugin.database().execute("SELECT * FROM p_weather__place")
    elsewhere.uninstall(actor=ANA)
    assert (
        '"tables":["p_weather__migration","p_weather__place","p_weather__reading"]' in AuditEvent.of(elsewhere)[0].body
    )
    assert storage.database.plugins.tables("weather") == []
    again = install()
    assert again.migrate(READINGS) == list(READINGS)
    assert len(again.database().execute("SELECT * FROM p_weather__place")) == 0


STARTER = """
import sys, kagedb
sys.path.insert(0, sys.argv[2])
from test_plugin_tables import READINGS
with kagedb.connect(url=sys.argv[1]):
    plugin = kagedb.Plugin.named(kagedb.Project.named("house"), "weather")
    input(print("ready", flush=True) or "")
    print("ran", plugin.migrate(READINGS), flush=True)
"""


def test_two_starters_at_once_run_each_script_once(plugin: Plugin, migrated_url: str) -> None:
    starters = [start_python(STARTER, migrated_url, str(Path(__file__).parent)) for _ in range(3)]
    for starter in starters:
        wait_for_line(starter, "ready")
    for starter in starters:
        tell(starter)
    said = sorted(wait_for_line(starter, "ran") for starter in starters)
    assert said == ["ran ['0001_readings', '0002_humid']", "ran []", "ran []"]


def test_a_view_over_what_is_not_its_own_cannot_be_read(storage: Storage, tables: PluginDatabase) -> None:
    name = "audit_event" if storage.engine.name == "sqlite" else "kaged.audit_event"
    with pytest.raises(StorageForbidden, match="can touch only its own tables"):
        tables.execute(f"CREATE VIEW p_weather__peek AS SELECT * FROM {name}")
        tables.execute("SELECT COUNT(*) FROM p_weather__peek")


@pytest.mark.postgres_only
def test_a_statement_that_leaves_its_role_is_undone(tables: PluginDatabase) -> None:
    """SQL has ways to spell a function that no look at the text finds."""
    hidden = 'U&"set\\005fconfig"'
    for name, value in (("role", "none"), ("search_path", "kaged")):
        with pytest.raises(StorageForbidden, match="to change its role or search_path"):
            tables.execute(f"SELECT {hidden}('{name}', '{value}', false)")
    assert len(tables.execute("SELECT * FROM p_weather__place")) == 1
