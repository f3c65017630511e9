"""Plugins' own tables cross between engines with the store: made by their scripts there, or refused before anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import kagedb
from commands import answer_json, in_process
from contents import digests_at
from kagedb import Plugin, Project, StorageForbidden
from stored import ACTOR

if TYPE_CHECKING:
    from places import Places
    from postgres_server import DatabaseServer

ENGINES = ("sqlite", "postgres")

SCRIPTS = {
    "10_readings": """
        CREATE TABLE p_carried__place (name {text} NOT NULL PRIMARY KEY) {strict};
        CREATE TABLE p_carried__reading (
            id {ulid} NOT NULL PRIMARY KEY,
            place {text} NOT NULL REFERENCES p_carried__place (name),
            at {integer} NOT NULL,
            celsius {real},
            raw {blob}
        ) {strict};
        CREATE INDEX p_carried__reading_at ON p_carried__reading (at);
        INSERT INTO p_carried__place VALUES ('nowhere');
    """,
    # Sorted by name this one comes first, and it could not run first.
    "9_humid": "ALTER TABLE p_carried__reading ADD COLUMN humid {boolean}; UPDATE p_carried__reading SET humid = NULL",
    "9_log": "CREATE TABLE p_carried__line (said {text}, times {integer}) {strict}",
}

CELSIUS = (5.0, 0.1, -1e-300, 1e300, 123456789.125, None)


def install() -> Plugin:
    project = Project.get_or_none(Project.name == "house") or Project.add("house", actor=ACTOR)
    return Plugin.install(project, {"name": "carried", "version": "1", "permissions": ["tables"]}, actor=ACTOR)


def sql_in(text: str) -> str:
    found = re.search(r"let somebody who may run: (.*;)", text)
    assert found is not None, text
    return found[1]


@pytest.fixture
def server(postgres_server: DatabaseServer) -> Iterator[DatabaseServer]:
    yield postgres_server
    admin = postgres_server.admin_url(postgres_server.maintenance_database)
    # The databases that have something of it are gone by now.
    postgres_server.execute("DROP ROLE IF EXISTS kaged_p_carried", url=admin)


@pytest.fixture
def source(server: DatabaseServer, engine: str, places: Places) -> str:
    """A store whose plugin has tables with rows, which nobody has open."""
    url = places.migrated(engine)
    with kagedb.connect(url=url):
        plugin = install()
        if engine == "postgres":
            with pytest.raises(StorageForbidden) as caught:
                plugin.database().execute("SELECT 1")
            server.execute(sql_in(caught.value.hint), url=admin_of(server, url))
        plugin.migrate({"10_readings": SCRIPTS["10_readings"]})
        plugin.migrate(SCRIPTS)
        database = plugin.database()
        database.execute("INSERT INTO p_carried__place VALUES ('roof'), ('cellar\t\\N')")
        for number, celsius in enumerate(CELSIUS):
            database.execute(
                "INSERT INTO p_carried__reading VALUES (?, 'roof', ?, ?, ?, ?)",
                (f"r{number}", number, celsius, bytes([number, 255]), None if celsius is None else number % 2 == 0),
            )
        # Without a key, and twice the same.
        database.execute("INSERT INTO p_carried__line VALUES ('b', 1), (NULL, 2), ('b', 1), ('a', NULL)")
    return url


def admin_of(server: DatabaseServer, url: str) -> str:
    return server.admin_url(url.partition("?")[0].rpartition("/")[2])


@pytest.mark.parametrize("to", ENGINES)
def test_a_plugin_finds_its_tables_and_rows_on_the_other_side(
    source: str, to: str, server: DatabaseServer, places: Places
) -> None:
    target = places.empty(to)
    if to == "postgres":
        before = digests_at(source)
        for dry in ((), ("--dry-run",)):
            refused = in_process("--url", source, "copy", "--to", target, *dry)
            assert refused.exit_code == 1, refused.output
        assert digests_at(source) == before, "what is refused is not in the log"
        server.execute(sql_in(refused.stderr), url=admin_of(server, target))
    answer_json(source, "copy", "--to", target)
    there = digests_at(target)
    assert there == digests_at(source)
    assert there["p_carried__reading"][0] == len(CELSIUS)
    assert there["p_carried__line"][0] == 4
    with kagedb.connect(url=target):
        plugin = install()
        assert plugin.migrate(SCRIPTS) == []
        rows = plugin.database().execute("SELECT celsius FROM p_carried__reading ORDER BY at").rows
        assert tuple(row[0] for row in rows) == CELSIUS
        with pytest.raises(Exception, match=r"(?i)unique|foreign"):
            plugin.database().execute("INSERT INTO p_carried__place VALUES ('roof')")
        with pytest.raises(Exception, match=r"(?i)foreign"):
            plugin.database().execute("INSERT INTO p_carried__reading (id, place, at) VALUES ('x', 'mars', 1)")


def test_there_and_back_is_the_same(source: str, engine: str, server: DatabaseServer, places: Places) -> None:
    away = places.empty("postgres" if engine == "sqlite" else "sqlite")
    if engine == "sqlite":
        refused = in_process("--url", source, "copy", "--to", away)
        server.execute(sql_in(refused.stderr), url=admin_of(server, away))
    answer_json(source, "copy", "--to", away)
    there = digests_at(away)
    back = places.empty("sqlite")
    answer_json(away, "copy", "--to", back)
    assert {name: one for name, one in digests_at(back).items() if name != "audit_event"} == {
        name: one for name, one in there.items() if name != "audit_event"
    }


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("CREATE TABLE p_carried__secret (x INTEGER)", "p_carried__secret"),
        ("UPDATE p_carried__migration SET source = source || ' '", "10_readings"),
        ("DROP TABLE p_carried__migration", "p_carried__"),
        ("ALTER TABLE p_carried__line ADD COLUMN more INTEGER", "p_carried__line"),
    ],
)
def test_what_no_kept_script_made_is_refused_by_name(source: str, damage: str, says: str, places: Places) -> None:
    with kagedb.connect(url=source):
        install().database().execute(damage)
    target, before = places.empty("sqlite"), digests_at(source)
    refused = in_process("--url", source, "copy", "--to", target)
    assert refused.exit_code in (1, 3), refused.output
    assert says in refused.stderr
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)
    if "ADD COLUMN" not in damage:
        assert digests_at(source) == before


@pytest.mark.sqlite_only
def test_a_script_for_one_engine_alone_is_refused_and_the_target_stays(
    server: DatabaseServer, migrated_url: str, places: Places
) -> None:
    with kagedb.connect(url=migrated_url):
        install().migrate({"1": "CREATE TABLE p_carried__odd (x TEXT COLLATE NOCASE)"})
    target = places.empty("postgres")
    refused = in_process("--url", migrated_url, "copy", "--to", target)
    server.execute(sql_in(refused.stderr), url=admin_of(server, target))
    refused = in_process("--url", migrated_url, "copy", "--to", target)
    assert refused.exit_code == 1
    assert "the script 1 of the plugin 'carried'" in refused.stderr
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)


@pytest.mark.postgres_only
def test_tables_that_a_store_before_has_left_are_not_written_over(
    source: str, server: DatabaseServer, places: Places
) -> None:
    target = places.empty("postgres")
    refused = in_process("--url", source, "copy", "--to", target)
    admin = admin_of(server, target)
    server.execute(sql_in(refused.stderr), url=admin)
    server.execute("CREATE TABLE kaged_p_carried.p_carried__place (name text)", url=admin)
    server.execute("ALTER TABLE kaged_p_carried.p_carried__place OWNER TO kaged_p_carried", url=admin)
    refused = in_process("--url", source, "copy", "--to", target)
    assert refused.exit_code == 1
    assert "p_carried__place" in refused.stderr
    assert server.execute("SELECT count(*) FROM kaged_p_carried.p_carried__place", url=admin) == [(0,)]
