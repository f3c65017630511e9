"""Stores that are behind are migrated whole or not at all, after a copy, and never by a program that does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kagedb
from extra_scripts import MORE, ExtraScripts, copies, fill, sqlite_path
from kagedb import AuditEvent, Session, __version__, schema
from kagedb.errors import (
    MigrationFailed,
    SchemaDrift,
    StorageFull,
    StorageUnavailable,
)
from kagedb.operations import backup_set
from kagedb.settings import load
from kagedb.storage import open_storage
from postgres_server import PostgresServer

if TYPE_CHECKING:
    pass

ACTOR = "operator:ana"


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    """A store of this version with a project and two sessions in it."""
    fill(migrated_url)
    return migrated_url


def history(storage: kagedb.Storage) -> list[str]:
    return [row.name for row in schema.look(storage.engine).applied]


def test_what_is_pending_is_applied_in_order_and_recorded(scripts: ExtraScripts, filled_url: str, url: str) -> None:
    path = scripts.add("9001_more", MORE)
    scripts.add("9002_note", """db.ddl.run("INSERT INTO more (id, note) VALUES ('x', 'after 9001')")""")
    scripts.learn(url)
    with open_storage(load(url=filled_url), actor=ACTOR) as storage:
        assert storage.standing is not None
        assert [script.name for script in storage.standing.pending] == ["9001_more", "9002_note"]
        assert history(storage)[-2:] == ["9001_more", "9002_note"]
        applied = schema.look(storage.engine).applied[-2]
        assert applied.checksum == hashlib.sha256(path.read_bytes()).hexdigest()
        assert applied.version == __version__
        assert storage.database.execute_sql("SELECT note FROM more").fetchone() == ("after 9001",)
        assert schema.drift(storage.engine) == []
        event = AuditEvent.select().order_by(AuditEvent.seq.desc()).get()
        assert (event.kind, event.actor) == ("store.migrated", ACTOR)
        assert json.loads(event.body) == {"from": scripts.last, "to": "9002_note", "kagedb": __version__}
        assert Session.select().count() == 2
    with kagedb.connect(url=filled_url) as storage:
        assert storage.standing is not None and not storage.standing.pending


def test_scripts_may_use_peewees_own_operations(scripts: ExtraScripts, filled_url: str, url: str) -> None:
    scripts.add(
        "9001_native",
        """
        migrator.migrate(
            migrator.add_column("session", "mood", fields.TextField(null=True)),
            migrator.add_column(
                "session",
                "weight",
                fields.IntegerField(constraints=[peewee.SQL("DEFAULT 7")]),
                allow_not_null=True,
            ),
            migrator.add_index("session", ("mood", "weight"), unique=False),
            migrator.add_column("session", "gone", fields.TextField(null=True)),
            migrator.drop_column("session", "gone", cascade=False),
            migrator.rename_column("session", "mood", "humour"),
            migrator.drop_index("session", "session_mood_weight"),
            migrator.rename_table("session", "sitting"),
            migrator.rename_table("sitting", "session"),
        )
        """,
    )
    scripts.learn(url)
    with kagedb.connect(url=filled_url) as storage:
        rows = storage.database.execute_sql("SELECT title, humour, weight FROM session ORDER BY title").fetchall()
        assert rows == [("one", None, 7), ("two", None, 7)]
        assert schema.drift(storage.engine) == []
        added = [line for line in storage.engine.catalogue() if ".weight " in line or ".humour " in line]
        assert [line.split()[1] for line in added] == ["session.humour", "session.weight"]
        assert "table session STRICT" in storage.engine.catalogue() or storage.engine.name == "postgres"


@pytest.mark.parametrize(
    "operation",
    [
        'drop_not_null("session", "title")',
        'add_not_null("session", "ended_at")',
        'alter_column_type("session", "title", fields.IntegerField())',
        'add_column_default("session", "title", "x")',
        'add_column("session", "mood", fields.TextField(default=""))',
        'add_unique("session", "title")',
    ],
)
def test_operations_that_not_every_engine_has_are_refused(
    scripts: ExtraScripts, filled_url: str, operation: str
) -> None:
    scripts.add("9001_rebuild", f"migrator.migrate(migrator.{operation})")
    with pytest.raises(MigrationFailed, match="on session, which not every engine has"):
        kagedb.connect(url=filled_url)


def test_a_verified_copy_is_made_before(scripts: ExtraScripts, filled_url: str, url: str) -> None:
    scripts.add("9001_more", MORE)
    scripts.learn(url)
    with kagedb.connect(url=filled_url) as storage:
        (copy,) = copies(storage.settings)
        assert copy.parent == Path(storage.settings.backup_directory)
        (one,) = backup_set.sets_in(copy.parent)
        assert (one.directory, one.state, one.manifest.before) == (copy, "verified", "9001_more")
        assert copy.stat().st_mode & 0o777 == 0o700
        assert all(path.stat().st_mode & 0o077 == 0 for path in copy.rglob("*"))
        if storage.engine.name == "sqlite":
            with sqlite3.connect(copy / "kaged.sqlite3") as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert connection.execute("SELECT COUNT(*) FROM session").fetchone() == (2,)
                tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'more'").fetchall()
            connection.close()
            assert tables == []
        else:
            assert one.manifest.facts["session"].rows == 2
            assert "more" not in one.manifest.facts


@pytest.mark.sqlite_only
def test_the_copy_of_a_sqlite_store_is_a_store_of_the_old_schema(
    scripts: ExtraScripts, filled_url: str, url: str, tmp_path: Path
) -> None:
    scripts.add("9001_more", MORE)
    scripts.learn(url)
    with kagedb.connect(url=filled_url) as storage:
        (copy,) = copies(storage.settings)
    again = tmp_path / "again.db"
    shutil.copy(copy / "kaged.sqlite3", again)
    with kagedb.connect(url=f"sqlite://{again}") as storage:
        assert storage.standing is not None and [s.name for s in storage.standing.pending] == ["9001_more"]
        assert Session.select().count() == 2


@pytest.mark.sqlite_only
def test_a_disk_without_room_for_the_copy_is_refused_before_anything_is_done(
    scripts: ExtraScripts, filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite alone: a server's disk is not to be seen from here."""
    scripts.add("9001_more", MORE)
    size = sqlite_path(filled_url).stat().st_size
    real = shutil.disk_usage(sqlite_path(filled_url).parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=size))
    with pytest.raises(StorageFull, match="bytes free; rewriting this store may need"):
        kagedb.connect(url=filled_url)
    monkeypatch.undo()
    assert copies(load(url=filled_url)) == []
    with kagedb.connect(url=filled_url) as storage:
        assert "9001_more" not in history(storage)


def test_a_script_that_fails_undoes_those_before_it(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_more", MORE)
    scripts.add("9002_rows", "db.ddl.run(\"INSERT INTO more (id) VALUES ('x')\", \"UPDATE session SET title = 'y'\")")
    scripts.add("9003_fails", 'db.ddl.run("INSERT INTO nowhere (id) VALUES (1)")')
    with pytest.raises(MigrationFailed, match=r"failed and was undone: .*nowhere"):
        kagedb.connect(url=filled_url)
    assert copies(load(url=filled_url)) == [], "a copy of what was not changed would only fill the disk"
    for script in scripts.place.glob("900*.py"):
        script.unlink()
    with kagedb.connect(url=filled_url) as storage:
        assert history(storage)[-1] == scripts.last
        assert schema.drift(storage.engine) == []
        assert "more" not in storage.engine.tables()
        assert [session.title for session in Session.select().order_by(Session.id)] == ["one", "two"]
        assert "store.migrated" not in [event.kind for event in AuditEvent.select()]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ValueError('no such luck')", "ValueError: no such luck"),
        (
            "try:\n    db.execute_sql('SELECT nothing FROM nowhere')\nexcept Exception:\n    pass",
            "a statement failed earlier in this transaction",
        ),
        ("db.ddl.run('DELETE FROM audit_event')", "an audit event is never removed"),
        ("db.commit()", "transactions are not begun or ended by hand"),
    ],
    ids=["raises", "swallows-an-error", "does-what-a-guard-refuses", "commits"],
)
def test_a_script_that_misbehaves_is_a_failed_migration(
    scripts: ExtraScripts, filled_url: str, code: str, told: str
) -> None:
    scripts.add("9001_more", MORE)
    scripts.add("9002_wrong", code)
    with pytest.raises(MigrationFailed, match=f"failed and was undone: {told}"):
        kagedb.connect(url=filled_url)
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert "more" not in storage.engine.tables()


def test_a_script_without_up_or_with_a_syntax_error_changes_nothing(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_more", MORE)
    wrong = scripts.add("9002_wrong", "pass")
    for text, told in (("x = 1\n", "does not define up"), ("def up(:\n", "invalid syntax")):
        wrong.write_text(text)
        with pytest.raises(MigrationFailed, match=told):
            kagedb.connect(url=filled_url)
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert "more" not in storage.engine.tables()


def test_a_script_that_leaves_a_dangling_reference_is_undone(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_orphans", 'db.ddl.run("DELETE FROM project")')
    with pytest.raises(MigrationFailed, match=r"dangling references: session|violates foreign key") as caught:
        kagedb.connect(url=filled_url)
    assert caught.value.hint
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert storage.database.execute_sql("SELECT COUNT(*) FROM project").fetchone() == (1,)


def test_scripts_that_give_another_schema_than_they_should_are_undone(
    scripts: ExtraScripts, filled_url: str, url: str
) -> None:
    path = scripts.add("9001_more", MORE)
    scripts.learn(url)
    path.write_text(path.read_text().replace("note {text}", "note {text} NOT NULL"))
    with pytest.raises(SchemaDrift, match=r"missing: column more\.note .*; unknown: column more\.note .* NOT NULL"):
        kagedb.connect(url=filled_url)
    assert copies(load(url=filled_url)) == []
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert "more" not in storage.engine.tables()


def test_a_store_changed_by_hand_is_not_migrated(scripts: ExtraScripts, filled_url: str, url: str) -> None:
    scripts.add("9001_more", MORE)
    scripts.learn(url)
    with kagedb.connect(url=filled_url) as storage, storage.transaction():
        storage.engine.database.ddl.run("CREATE TABLE again (id {ulid} NOT NULL PRIMARY KEY) {strict}")
    scripts.add("9002_nothing", "pass")
    with pytest.raises(SchemaDrift, match="unknown: column again") as caught:
        kagedb.connect(url=filled_url)
    assert "by hand" in caught.value.hint


@pytest.mark.sqlite_only
def test_a_disk_that_is_full_in_the_middle_undoes_it_and_is_called_that(scripts: ExtraScripts, filled_url: str) -> None:
    """SQLite alone: its limit on pages makes the same error as a full disk."""
    scripts.add("9001_more", MORE)
    scripts.add(
        "9002_grows",
        """
        db.raw(f"PRAGMA max_page_count = {db.raw('PRAGMA page_count').fetchone()[0] + 20}")
        db.ddl.run("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)"
                   " INSERT INTO more (id, note) SELECT i, hex(zeroblob(1000)) FROM n")
        """,
    )
    with pytest.raises(StorageFull, match="is full"):
        kagedb.connect(url=filled_url)
    assert copies(load(url=filled_url)) == []
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert schema.drift(storage.engine, scripts.last) == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM session").fetchone() == (2,)


@pytest.mark.postgres_only
def test_a_server_that_goes_away_in_the_middle_leaves_the_old_schema(
    scripts: ExtraScripts, own_postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_postgres_server
    server.create_database("away")
    try:
        url = server.url("away")
        kagedb.connect(url=url).close()
        scripts.add("9001_more", MORE)
        scripts.add("9002_away", 'sys.modules["server_of_the_test"].kill()')
        monkeypatch.setitem(sys.modules, "server_of_the_test", server)  # type: ignore[arg-type]
        with pytest.raises(StorageUnavailable):
            kagedb.connect(url=url)
        server.start()
        with kagedb.connect(url=url, read_only=True) as storage:
            assert "more" not in storage.engine.tables()
    finally:
        server.drop_database("away")
