"""The `v_…` views say the same on both engines, read well, cost no scan, and are in nobody's way."""

from __future__ import annotations

import datetime
import random
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg2
import pytest

import kagedb
import one_night
from commands import answer, answer_json
from extra_scripts import ExtraScripts
from kagedb import Plugin, Project, Storage, schema
from kagedb.engines.ddl import LAST_MILLISECOND
from kagedb.operations import query
from stored import ACTOR

if TYPE_CHECKING:
    from places import Places
    from postgres_server import DatabaseServer

UTC_TEXT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z")


def shown(storage: Storage, sql: str) -> list[dict[str, Any]]:
    with query.ask(storage.engine, sql, {}, [], 0) as found:
        return [dict(zip(found.columns, row, strict=True)) for row in found]


def all_shown(url: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of every view; those of the audit log that were there before a copy."""
    with kagedb.connect(url=url, read_only=True) as storage:
        return {
            view: shown(storage, f"SELECT * FROM {view} WHERE {columns[0]} IS NOT NULL ORDER BY 1, 2, 3")
            for view, columns in storage.engine.views().items()
        }


def test_every_view_says_the_same_on_both_engines(places: Places) -> None:
    first, second = places.migrated("sqlite"), places.empty("postgres")
    one_night.fill(first)
    answer(first, "copy", "--to", second)
    before, after = all_shown(first), all_shown(second)
    assert after.keys() == before.keys()
    for view, rows in before.items():
        assert rows, f"nothing is in {view}"
        assert after[view][: len(rows)] == rows, view


def test_views_read_well(migrated_url: str) -> None:
    one_night.fill(migrated_url)
    for view, rows in all_shown(migrated_url).items():
        for name in rows[0]:
            found = {row[name] for row in rows if row[name] is not None}
            if name == "at" or name.endswith("_at"):
                assert all(UTC_TEXT.fullmatch(value) for value in found), f"{view}.{name}"
            else:
                assert not any(isinstance(value, int) and value > 10**11 for value in found), f"{view}.{name}"
    runs = {row["agent"]: row for row in all_shown(migrated_url)["v_run"] if row["session"] == "night watch"}
    assert runs["scout"]["parent_agent"] == "planner"
    assert (runs["planner"]["prompt"], runs["planner"]["prompt_version"]) == ("planner", 1)
    assert runs["reader"]["output"] == '{"read":3}'
    assert 0 <= runs["reader"]["seconds"] < 60
    (transcript,) = all_shown(migrated_url)["v_transcript"]
    assert (transcript["bytes"], transcript["agent"]) == (440, "planner")
    assert 0 < transcript["stored_bytes"] < 440
    labels = [row["labels"] for row in all_shown(migrated_url)["v_prompt"]]
    assert labels == [None, "candidate, production"]
    assert [row["current"] for row in all_shown(migrated_url)["v_checkpoint"]] == ["yes", "no"]
    assert [row["pinned"] for row in all_shown(migrated_url)["v_session"]] == ["yes", "no"]


def test_no_view_gives_bytes(migrated_url: str) -> None:
    one_night.fill(migrated_url)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        for view in storage.engine.views():
            for row in storage.database.execute_sql(f"SELECT * FROM {view}").fetchall():
                assert {type(value) for value in row} <= {str, int, float, type(None)}, view


def test_a_time_is_the_text_of_its_millisecond_wherever_it_is_one(storage: Storage) -> None:
    chance = random.Random(5)
    dates = [0, 1, 999, 1000, 59_999, 951_827_696_789, 1_795_518_690_689, LAST_MILLISECOND, LAST_MILLISECOND - 1]
    dates += [chance.randrange(LAST_MILLISECOND) for _ in range(300)]
    others = [None, -1, LAST_MILLISECOND + 1, 2**63 - 1, -(2**63)]
    plugin = Plugin.install(
        Project.add("house", actor=ACTOR), {"name": "clock", "version": "1", "permissions": []}, actor=ACTOR
    )
    with storage.transaction():
        for number, at in enumerate([*dates, *others]):
            storage.database.execute_sql(
                storage.database.dialect("INSERT INTO plugin_state VALUES (?, ?, 1, ?, 2, '{}')"),
                (str(plugin.id), f"{number:04}", at),
            )
    found = [row["expires_at"] for row in shown(storage, "SELECT expires_at FROM v_plugin_state ORDER BY key")]
    epoch = datetime.datetime(1970, 1, 1)
    texts = [str(epoch + datetime.timedelta(milliseconds=at)) for at in dates]
    assert found[: len(dates)] == [f"{text if '.' in text else text + '.000'}"[:23] + "Z" for text in texts]
    assert found[len(dates) :] == [None if at is None else str(at) for at in others]


LOOKUPS = (
    "SELECT * FROM v_project WHERE id = 'x'",
    "SELECT * FROM v_config WHERE id = 'x'",
    "SELECT * FROM v_prompt WHERE id = 'x'",
    "SELECT * FROM v_label_move WHERE id = 'x'",
    "SELECT * FROM v_plugin WHERE id = 'x'",
    "SELECT * FROM v_plugin_state WHERE plugin_id = 'x' AND key = 'y'",
    "SELECT * FROM v_session WHERE id = 'x'",
    "SELECT * FROM v_run WHERE id = 'x'",
    "SELECT * FROM v_run WHERE session_id = 'x'",
    "SELECT * FROM v_run WHERE id >= 'x' AND id < 'y'",
    "SELECT * FROM v_attachment WHERE run_id = 'x'",
    "SELECT * FROM v_checkpoint WHERE id = 'x'",
    "SELECT * FROM v_checkpoint WHERE session_id = 'x'",
    "SELECT * FROM v_transcript WHERE session_id = 'x'",
    "SELECT * FROM v_transcript WHERE number = 5",
    "SELECT * FROM v_audit WHERE seq = 5",
    "SELECT * FROM v_audit WHERE subject = 'run:x'",
    "SELECT seq, kind FROM v_audit ORDER BY seq DESC LIMIT 5",
)


@pytest.mark.sqlite_only
def test_what_is_looked_up_in_a_view_goes_through_the_indexes_of_its_tables_on_sqlite(storage: Storage) -> None:
    """PostgreSQL says otherwise what it does; its form of this is below."""
    views = "\n".join(line for line in storage.engine.catalogue() if line.startswith("view "))
    tables = "|".join(storage.engine.tables())
    names = {name for found in re.findall(rf"(?:FROM|JOIN) ({tables}) (\w+)", views) for name in found}
    assert {"run", "r", "transcript_chunk", "x"} <= names
    for sql in LOOKUPS:
        steps = [row[3] for row in storage.database.execute_sql(f"EXPLAIN QUERY PLAN {sql}").fetchall()]
        scans = [step for step in steps if step.startswith("SCAN") and step.split()[1] in names]
        assert not scans or "LIMIT" in sql, (sql, steps)
        assert any(step.startswith("SEARCH") for step in steps) or "LIMIT" in sql, (sql, steps)
        assert "v_prompt " in sql or not any("TEMP B-TREE" in step for step in steps), (sql, steps)


@pytest.mark.postgres_only
def test_what_is_looked_up_in_a_view_goes_through_the_indexes_of_its_tables_on_postgres(migrated_url: str) -> None:
    """With sequential scans put off, which PostgreSQL would always choose for tables as small as these."""
    options = quote("-c enable_seqscan=off -c search_path=kaged")
    connection = psycopg2.connect(f"{migrated_url}&options={options}")
    with connection, connection.cursor() as cursor:
        for sql in LOOKUPS:
            cursor.execute(f"EXPLAIN {sql}")
            steps = [row[0] for row in cursor.fetchall()]
            assert not any("Seq Scan" in step for step in steps), (sql, steps)
            assert any("Index" in step for step in steps), (sql, steps)
            assert not sql.endswith("LIMIT 5") or not any("Sort" in step for step in steps), (sql, steps)
    connection.close()


def test_nobody_writes_through_a_view(storage: Storage) -> None:
    Project.add("house", actor=ACTOR)
    for view, columns in storage.engine.views().items():
        for sql in (
            f"DELETE FROM {view}",
            f"UPDATE {view} SET {columns[-1]} = NULL",
            f"INSERT INTO {view} ({columns[0]}) VALUES (NULL)",
        ):
            with pytest.raises(Exception, match=r"cannot (modify|delete from|update|insert into)") as caught:
                storage.database.execute_sql(sql)
            assert view in str(caught.value)
    assert Project.select().count() == 1


def test_query_lists_views_and_says_that_they_are(migrated_url: str) -> None:
    rows = answer_json(migrated_url, "query", "--schema")
    views = [row for row in rows if row["is"] == "view"]
    assert {row["table"] for row in rows if row["is"] == "table"} >= {"run", "audit_event"}
    assert {row["table"] for row in views} >= {"v_run", "v_audit"}
    assert all(row["table"].startswith("v_") for row in views)
    assert [row["column"] for row in views if row["table"] == "v_audit"][:3] == ["seq", "at", "kind"]


ANEW = """
db.ddl.drop_views("v_session")
with db.ddl.views_aside():
    db.ddl.run("ALTER TABLE session DROP COLUMN pinned", "ALTER TABLE run RENAME COLUMN error TO why")
    db.ddl.run("ALTER TABLE run RENAME COLUMN why TO error")
db.ddl.views({"v_session": "SELECT s.id, {utc[s.ended_at]} AS ended_at, p.name AS project FROM session s"
    " JOIN project p ON p.id = s.project_id"})
"""


def test_a_script_changes_what_is_under_a_view(
    scripts: ExtraScripts, migrated_url: str, places: Places, engine: str
) -> None:
    one_night.fill(migrated_url)
    before = all_shown(migrated_url)
    scripts.add("9001_anew", ANEW)
    scripts.learn(places.empty(engine))
    kagedb.connect(url=migrated_url).close()
    after = all_shown(migrated_url)
    for view in ("v_run", "v_prompt", "v_transcript"):
        assert after[view] == before[view]
    assert list(after["v_session"][0]) == ["id", "ended_at", "project"]
    assert after.keys() == before.keys()


def test_a_script_that_drops_what_a_view_shows_is_undone(scripts: ExtraScripts, migrated_url: str) -> None:
    scripts.add("9001_drops", 'with db.ddl.views_aside():\n    db.ddl.run("ALTER TABLE run DROP COLUMN error")')
    with pytest.raises(kagedb.MigrationFailed, match="error"):
        kagedb.connect(url=migrated_url)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        assert schema.drift(storage.engine, scripts.last) == []


@pytest.mark.postgres_only
def test_who_was_let_read_a_view_still_is_after_a_migration(
    scripts: ExtraScripts, postgres_server: DatabaseServer, migrated_url: str, places: Places
) -> None:
    """SQLite has no roles."""
    (database,) = postgres_server.execute("SELECT current_database()", url=migrated_url)[0]
    admin = postgres_server.admin_url(database)
    postgres_server.execute(f'CREATE ROLE "Dash {database}"', url=admin)
    try:
        postgres_server.execute(f'GRANT USAGE ON SCHEMA kaged TO "Dash {database}"', url=migrated_url)
        postgres_server.execute(f'GRANT SELECT ON kaged.v_run TO "Dash {database}" WITH GRANT OPTION', url=migrated_url)
        postgres_server.execute("GRANT SELECT ON kaged.v_audit TO PUBLIC", url=migrated_url)
        scripts.add("9001_aside", "with db.ddl.views_aside():\n    pass")
        kagedb.connect(url=migrated_url).close()
        granted = postgres_server.execute(
            "SELECT relname::text, a.grantee = 0, a.is_grantable FROM pg_class, aclexplode(relacl) a"
            " WHERE relname ^@ 'v_' AND a.grantee <> relowner ORDER BY 1",
            url=migrated_url,
        )
        assert granted == [("v_audit", True, False), ("v_run", False, True)]
        assert postgres_server.execute(
            f"SELECT has_table_privilege('Dash {database}', 'kaged.v_run', 'SELECT'),"
            f" has_table_privilege('Dash {database}', 'kaged.run', 'SELECT')",
            url=migrated_url,
        ) == [(True, False)]
    finally:
        postgres_server.execute(f'DROP OWNED BY "Dash {database}"', url=admin)
        postgres_server.execute(f'DROP ROLE "Dash {database}"', url=admin)


def test_a_view_that_was_changed_by_hand_is_told_in_a_line_that_can_be_read(storage: Storage) -> None:
    with storage.transaction():
        for statement in ("DROP VIEW v_run", "CREATE VIEW v_run AS SELECT r.id FROM run r JOIN run b ON b.id = r.id"):
            storage.database.execute_sql(statement)
    missing, unknown = schema.drift(storage.engine)
    assert missing.startswith("missing: view v_run") and missing.endswith(" ...")
    assert unknown.startswith("unknown: view v_run") and len(missing) < 600
