"""Tables of plugins' own are in every backup set, and back with their owners after a restore, alike on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from backup_sets import back_up, verdict
from commands import answer_json, in_process
from kagedb import Plugin, Project
from stored import ACTOR

if TYPE_CHECKING:
    from conftest import Places
    from postgres_server import DatabaseServer

SCRIPTS = {
    "0001": """
        CREATE TABLE p_weather__place (name {text} NOT NULL PRIMARY KEY, wet {boolean}) {strict};
        CREATE TABLE p_weather__reading (
            id {ulid} NOT NULL PRIMARY KEY,
            place {text} NOT NULL REFERENCES p_weather__place (name),
            at {integer} NOT NULL, warm {real}, note {text}, raw {blob}
        ) {strict};
        CREATE TABLE p_weather__keyless (a {text}, b {integer}) {strict};
        CREATE INDEX p_weather__at ON p_weather__reading (at);
        CREATE VIEW p_weather__wet AS SELECT name FROM p_weather__place WHERE wet;
    """
}
TABLES = {f"p_weather__{name}" for name in ("place", "reading", "keyless", "migration")}


class Ground:
    """Where plugins may have tables; on PostgreSQL their roles are made, and removed after the test."""

    def __init__(self, url: str, request: pytest.FixtureRequest) -> None:
        self.url = url
        self._server: DatabaseServer | None = None
        if url.startswith("postgresql"):
            self._server = request.getfixturevalue("postgres_server")

    @staticmethod
    def role(plugin: str) -> str:
        return f"kaged_p_{plugin}"

    def run(self, sql: str, url: str = "") -> list[tuple[Any, ...]]:
        """As the operator, in the database of `url`; nothing on SQLite."""
        if self._server is None:
            return []
        database = (url or self.url).rpartition("?")[0].rpartition("/")[2] or (url or self.url).rpartition("/")[2]
        return self._server.execute(sql, url=self._server.admin_url(database))

    def allow(self, plugin: str) -> None:
        role = self.role(plugin)
        self.run(f"CREATE ROLE {role} NOLOGIN; GRANT {role} TO kaged; CREATE SCHEMA {role} AUTHORIZATION {role}")

    def forget(self, plugin: str, *urls: str) -> None:
        role = self.role(plugin)
        if self.run(f"SELECT 1 FROM pg_roles WHERE rolname = '{role}'"):
            for url in (self.url, *urls):
                self.run(f"DROP OWNED BY {role} CASCADE", url)
            self.run(f"DROP ROLE {role}")


@pytest.fixture
def ground(stored_url: str, request: pytest.FixtureRequest) -> Iterator[Ground]:
    """A store with the plugin "weather", which has tables with rows."""
    ground = Ground(stored_url, request)
    ground.allow("weather")
    with kagedb.connect(url=stored_url):
        add_plugin("weather").migrate(SCRIPTS)
        change(6)
    yield ground
    ground.forget("weather")


def add_plugin(name: str) -> Plugin:
    manifest = {"name": name, "version": "1", "permissions": ["tables"]}
    return Plugin.install(Project.named("house"), manifest, actor=ACTOR)


def weather() -> Any:
    return Plugin.named(Project.named("house"), "weather").database()


def change(count: int) -> None:
    """Add rows to the open store."""
    database = weather()
    for number in range(count):
        place = f"roof {number} {count}"
        wet = (True, False, None)[number % 3]
        database.execute("INSERT INTO p_weather__place (name, wet) VALUES (?, ?)", (place, wet))
        row = (f"{count:013}{number:013}", place, number, number / 3, f"tab\t\\ 日本 '{number}", bytes(range(40)))
        database.execute("INSERT INTO p_weather__reading VALUES (?, ?, ?, ?, ?, ?)", row)
        a = (None, "a", "b")[number % 3]
        database.execute("INSERT INTO p_weather__keyless VALUES (?, ?)", (a, (None, 1)[number % 2]))


def rows(url: str) -> dict[str, list[Any]]:
    with kagedb.connect(url=url):
        found = {table: weather().execute(f"SELECT * FROM {table}").rows for table in weather().tables()}
        found["view"] = weather().execute("SELECT name FROM p_weather__wet").rows
    return {name: sorted(each, key=repr) for name, each in found.items()}


@pytest.mark.parametrize("options", [[], ["--format", "sql"]], ids=["copy", "sql"])
def test_a_set_has_the_tables_of_plugins_and_brings_them_to_another_place(
    ground: Ground, places: Places, engine: str, options: list[str]
) -> None:
    one = back_up(ground.url, *options)
    assert one.manifest.facts.keys() >= TABLES
    assert {name: facts.rows for name, facts in one.manifest.facts.items() if name in TABLES} == {
        "p_weather__place": 6,
        "p_weather__reading": 6,
        "p_weather__keyless": 6,
        "p_weather__migration": 1,
    }
    assert verdict(ground.url, one) == []
    other, before = places.empty(engine), rows(ground.url)
    answer_json(ground.url, "restore", one.name, "--to", other)
    try:
        assert rows(other) == before
        with kagedb.connect(url=other):
            weather().execute("ALTER TABLE p_weather__place ADD COLUMN since BIGINT" if engine == "postgres" else _ADD)
            change(2)
        assert back_up(other, *options).state == "verified"
    finally:
        ground.run("DROP OWNED BY kaged_p_weather CASCADE", other)


_ADD = "ALTER TABLE p_weather__place ADD COLUMN since INTEGER"


def test_both_engines_give_the_same_names_and_digests(places: Places, request: pytest.FixtureRequest) -> None:
    found = {}
    for engine in ("sqlite", "postgres"):
        url = places.migrated(engine)
        ground = Ground(url, request)
        ground.allow("weather")
        try:
            with kagedb.connect(url=url):
                Project.add("house", actor=ACTOR)
                add_plugin("weather").migrate(SCRIPTS)
                change(6)
            facts = back_up(url).manifest.facts
        finally:
            ground.forget("weather")
        found[engine] = {name: facts[name].digest for name in TABLES if "migration" not in name}
    assert found["sqlite"] == found["postgres"]


def test_the_tables_of_plugins_go_back_with_the_store_and_can_be_changed(ground: Ground) -> None:
    before = rows(ground.url)
    back_up(ground.url)
    with kagedb.connect(url=ground.url):
        change(3)
    first = answer_json(ground.url, "restore", "--latest")
    assert rows(ground.url) == before
    with kagedb.connect(url=ground.url):
        # What lies aside must not keep the plugin's role from making tables.
        weather().execute("CREATE TABLE p_weather__new (x INTEGER)")
        weather().execute("DROP TABLE p_weather__new")
    second = answer_json(ground.url, "restore", "--latest")
    assert rows(ground.url) == before
    for kept, count in ((first["kept"], 9), (second["kept"], 6)):
        # On PostgreSQL, the plugin's part of the old store is a schema of its own, the storage role's from now on.
        found = ground.run(f"SELECT tableowner FROM pg_tables WHERE schemaname = '{kept}_p_weather'")
        if found:
            assert {owner for (owner,) in found} == {"kaged"}
            assert ground.run(f"SELECT COUNT(*) FROM {kept}_p_weather.p_weather__place") == [(count,)]


def test_a_set_from_before_a_plugin_leaves_it_an_empty_place(ground: Ground) -> None:
    one = back_up(ground.url)
    ground.allow("later")
    with kagedb.connect(url=ground.url):
        add_plugin("later").migrate({"1": "CREATE TABLE p_later__thing (x {integer}) {strict}"})
    try:
        done = answer_json(ground.url, "restore", one.name)
        with kagedb.connect(url=ground.url):
            again = add_plugin("later")
            assert again.database().tables() == []
            again.migrate({"1": "CREATE TABLE p_later__thing (x {integer}) {strict}"})
        assert ground.run(f"SELECT COUNT(*) FROM {done['kept']}_p_later.p_later__thing") in ([], [(0,)])
    finally:
        ground.forget("later")


@pytest.mark.postgres_only
def test_without_the_role_a_restore_changes_nothing_and_says_what_to_run(
    ground: Ground, places: Places, engine: str
) -> None:
    one, before = back_up(ground.url), rows(ground.url)
    other = places.empty(engine)
    ground.forget("weather")
    result = in_process("--url", ground.url, "restore", one.name, "--to", other)
    assert result.exit_code != 0
    assert "has tables of the plugin 'weather', whose role is not there; nothing was changed" in result.output
    sql = 'CREATE ROLE "kaged_p_weather" NOLOGIN; GRANT "kaged_p_weather" TO "kaged";'
    assert sql in " ".join(result.output.split())
    assert ground.run("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'kaged%'", other) == []
    ground.run(sql)
    answer_json(ground.url, "restore", one.name, "--to", other)
    assert rows(other) == before
    assert ground.run("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'kaged_p_weather'", other) == [
        ("kaged_p_weather",)
    ]
    ground.forget("weather", other)


@pytest.mark.postgres_only
def test_a_table_that_is_not_named_as_plugins_do_it_is_in_the_set_too(ground: Ground) -> None:
    """The operator may have put one there; even one that is called like a table of the store."""
    ground.run(
        "CREATE TABLE kaged_p_weather.project (x char(9), y timestamptz); GRANT ALL ON kaged_p_weather.project TO kaged"
    )
    ground.run("INSERT INTO kaged_p_weather.project VALUES ('padded', '2026-05-01T12:00+02:00')")
    one = back_up(ground.url)
    assert one.manifest.facts["kaged_p_weather.project"].rows == 1
    assert one.manifest.facts["project"].rows == 1
    assert verdict(ground.url, one) == []
    answer_json(ground.url, "restore", one.name)
    assert ground.run("SELECT x, y IS NULL FROM kaged_p_weather.project") == [("padded   ", False)]


@pytest.mark.postgres_only
def test_a_plugin_whose_tables_may_not_be_read_stops_the_backup(ground: Ground) -> None:
    ground.run("REVOKE kaged_p_weather FROM kaged")
    result = in_process("--url", ground.url, "backup")
    assert result.exit_code != 0
    assert 'GRANT "kaged_p_weather" TO "kaged"' in result.output
    ground.run("GRANT kaged_p_weather TO kaged")
    assert back_up(ground.url).state == "verified"
