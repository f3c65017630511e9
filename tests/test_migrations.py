"""Stores that are behind are migrated whole or not at all, after a copy, and never by a program that does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote

import pytest

import kagedb
from extra_scripts import ExtraScripts
from kagedb import AuditEvent, Project, Session, __version__, schema
from kagedb.engines import open_engine
from kagedb.errors import (
    MigrationFailed,
    SchemaDrift,
    SchemaTooNew,
    SchemaTooOld,
    StorageFull,
    StorageInUse,
    StorageUnavailable,
)
from kagedb.settings import load
from kagedb.storage import open_storage

MORE = 'db.ddl.run("CREATE TABLE more (id {ulid} NOT NULL PRIMARY KEY, note {text}) {strict}")'
ACTOR = "operator:ana"


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtraScripts:
    return ExtraScripts(tmp_path / "scripts", monkeypatch)


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    """A store of this version with a project and two sessions in it."""
    with kagedb.connect(url=migrated_url):
        project = Project.add("house", actor=ACTOR)
        for title in ("one", "two"):
            Session.start(project, title=title, actor=ACTOR)
    return migrated_url


def history(storage: kagedb.Storage) -> list[str]:
    return [row.name for row in schema.look(storage.engine).applied]


def copies(storage_or_url: kagedb.Storage | str) -> list[Path]:
    settings = load(url=storage_or_url) if isinstance(storage_or_url, str) else storage_or_url.settings
    backups = Path(settings.backup_directory)
    return sorted(backups.iterdir()) if backups.exists() else []


def sqlite_path(url: str) -> Path:
    return Path(unquote(url.removeprefix("sqlite://")))


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


@pytest.mark.sqlite_only
def test_peewees_rebuild_of_sqlite_tables_is_refused(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_rebuild", 'migrator.migrate(migrator.drop_not_null("session", "title"))')
    with pytest.raises(MigrationFailed, match=r"session\.title cannot be changed like that on every engine"):
        kagedb.connect(url=filled_url)


def test_a_verified_copy_is_made_before(scripts: ExtraScripts, filled_url: str, url: str) -> None:
    scripts.add("9001_more", MORE)
    scripts.learn(url)
    with kagedb.connect(url=filled_url) as storage:
        (copy,) = copies(storage)
        assert copy.parent == Path(storage.settings.backup_directory)
        assert copy.name.startswith("before-9001_more-") and not copy.name.endswith(".part")
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
            assert len((copy / "kaged.copy" / "session.txt").read_text().splitlines()) == 2
            assert not (copy / "kaged.copy" / "more.txt").exists()


@pytest.mark.sqlite_only
def test_the_copy_of_a_sqlite_store_is_a_store_of_the_old_schema(
    scripts: ExtraScripts, filled_url: str, url: str, tmp_path: Path
) -> None:
    scripts.add("9001_more", MORE)
    scripts.learn(url)
    with kagedb.connect(url=filled_url) as storage:
        (copy,) = copies(storage)
    again = tmp_path / "again.db"
    shutil.copy(copy / "kaged.sqlite3", again)
    with kagedb.connect(url=f"sqlite://{again}") as storage:
        assert storage.standing is not None and [s.name for s in storage.standing.pending] == ["9001_more"]
        assert Session.select().count() == 2


def test_a_new_store_needs_no_copy(scripts: ExtraScripts, url: str) -> None:
    with kagedb.connect(url=url) as storage:
        assert copies(storage) == []
        assert [event.kind for event in AuditEvent.select()] == ["store.created"]


def test_two_new_stores_never_have_the_same_chain(places: object, engine: str) -> None:
    heads = []
    for _ in range(2):
        with kagedb.connect(url=places.empty(engine)):  # type: ignore[attr-defined]
            heads.append(json.loads(AuditEvent.get().body)["store"])
    assert heads[0] != heads[1]


@pytest.mark.sqlite_only
def test_a_disk_without_room_for_the_copy_is_refused_before_anything_is_done(
    scripts: ExtraScripts, filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite alone: a server's disk is not to be seen from here."""
    scripts.add("9001_more", MORE)
    size = sqlite_path(filled_url).stat().st_size
    real = shutil.disk_usage(filled_url and sqlite_path(filled_url).parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=size))
    with pytest.raises(StorageFull, match="bytes free; a migration of this store may need"):
        kagedb.connect(url=filled_url)
    monkeypatch.undo()
    assert copies(filled_url) == []
    with kagedb.connect(url=filled_url) as storage:
        assert "9001_more" not in history(storage)


def test_a_script_that_fails_undoes_those_before_it(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_more", MORE)
    scripts.add("9002_rows", "db.ddl.run(\"INSERT INTO more (id) VALUES ('x')\", \"UPDATE session SET title = 'y'\")")
    scripts.add("9003_fails", 'db.ddl.run("INSERT INTO nowhere (id) VALUES (1)")')
    with pytest.raises(MigrationFailed, match="failed and was undone: .*nowhere"):
        kagedb.connect(url=filled_url)
    assert copies(filled_url) == [], "a copy of what was not changed would only fill the disk"
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
    with pytest.raises(MigrationFailed, match="dangling references: session|violates foreign key") as caught:
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
    assert copies(filled_url) == []
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


def test_a_script_edited_after_it_was_applied_is_noticed(scripts: ExtraScripts, filled_url: str) -> None:
    path = scripts.place / f"{scripts.last}.py"
    path.write_text(path.read_text() + "# one more line\n")
    for options in ({}, {"migrate": False}, {"read_only": True}):
        with pytest.raises(SchemaDrift, match=f"{scripts.last} was applied .* with another text"):
            kagedb.connect(url=filled_url, **options)  # type: ignore[arg-type]


def test_a_store_of_a_newer_version_says_which_one_is_needed(
    scripts: ExtraScripts, filled_url: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = scripts.add("9001_more", MORE)
    scripts.learn(url)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "__version__", "7.8.9")
        kagedb.connect(url=filled_url).close()
    path.unlink()
    for options in ({}, {"migrate": False}, {"read_only": True}, {"exclusive": True}):
        with pytest.raises(SchemaTooNew, match=r"9001_more, made by kagedb 7\.8\.9") as caught:
            kagedb.connect(url=filled_url, **options)  # type: ignore[arg-type]
        assert "7.8.9" in caught.value.hint


def test_a_store_that_lacks_a_script_before_its_newest_is_refused(
    scripts: ExtraScripts, filled_url: str, url: str
) -> None:
    scripts.add("9002_more", MORE)
    scripts.learn(url)
    kagedb.connect(url=filled_url).close()
    scripts.add("9001_between", "pass")
    with pytest.raises(SchemaDrift, match="has the migration 9002_more, but not 9001_between"):
        kagedb.connect(url=filled_url)


def test_without_migrate_an_old_store_is_too_old_and_stays_so(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_more", MORE)
    with pytest.raises(SchemaTooOld, match="1 migrations are pending") as caught:
        kagedb.connect(url=filled_url, migrate=False)
    assert "kaged migrate" in caught.value.hint
    assert copies(filled_url) == []


def test_a_reader_of_an_old_store_sees_it_as_it_is_and_the_verbs_say_what_to_do(
    scripts: ExtraScripts, filled_url: str
) -> None:
    scripts.add("9001_more", MORE)
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert "more" not in storage.engine.tables()
        assert schema.drift(storage.engine, scripts.last) == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM session").fetchone() == (2,)
        with pytest.raises(SchemaTooOld, match="1 migrations are pending"):
            Project.by_id("house")


def test_a_current_store_costs_one_query(migrated_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(load(url=migrated_url))
    seen: list[str] = []
    try:
        engine.open(create=True)
        engine.database.execute_sql("SELECT 1")  # connects, and sets the session up
        for name in ("raw", "_execute_cursor"):
            ask = getattr(engine.database, name)

            def counted(sql: str, *arguments: object, ask: object = ask, **options: object) -> object:
                seen.append(sql)
                return ask(sql, *arguments, **options)  # type: ignore[operator]

            monkeypatch.setattr(engine.database, name, counted)
        standing, copy = schema.ensure(engine, migrate=True, actor=ACTOR)
    finally:
        engine.close()
    assert not standing.pending and copy is None
    assert len(seen) == 1 and "schema_migration" in seen[0]


@pytest.mark.sqlite_only
def test_a_store_reloaded_from_a_dump_is_known_by_its_history(filled_url: str, tmp_path: Path) -> None:
    source = sqlite3.connect(sqlite_path(filled_url))
    text = "\n".join(source.iterdump())
    source.close()
    reloaded = tmp_path / "reloaded.db"
    target = sqlite3.connect(reloaded)
    target.execute("PRAGMA page_size = 1024")
    target.executescript(text)
    target.close()
    with kagedb.connect(url=f"sqlite://{reloaded}") as storage:
        assert storage.engine.missing_marks() == ["application_id", "auto_vacuum", "page_size"]
        assert schema.drift(storage.engine) == []
        assert Session.select().count() == 2
    with kagedb.connect(url=filled_url) as storage:
        assert storage.engine.missing_marks() == []


@pytest.mark.postgres_only
def test_a_store_reloaded_by_pg_restore_is_known_and_whole(filled_url: str, url: str, tmp_path: Path) -> None:
    import subprocess

    dump = tmp_path / "dump"
    subprocess.run(["pg_dump", "-Fc", "-n", "kaged", "-f", dump, filled_url], check=True)
    subprocess.run(["pg_restore", "--no-owner", "-d", url, dump], check=True)
    with kagedb.connect(url=url) as storage:
        assert schema.drift(storage.engine) == []
        assert Session.select().count() == 2


def test_the_scripts_of_this_version_are_numbered_without_gaps() -> None:
    numbers = [int(script.name.partition("_")[0]) for script in schema.scripts()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_script_has_its_known_catalogues_and_nothing_else_has() -> None:
    found = {path.name for path in (schema.directory() / "catalogue").iterdir()}
    assert found == {f"{s.name}.{engine}.txt" for s in schema.scripts() for engine in ("sqlite", "postgres")}


@pytest.mark.postgres_only
def test_a_server_that_goes_away_in_the_middle_leaves_the_old_schema(
    scripts: ExtraScripts, own_postgres_server: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_postgres_server
    server.create_database("away")  # type: ignore[attr-defined]
    try:
        url = server.url("away")  # type: ignore[attr-defined]
        kagedb.connect(url=url).close()
        scripts.add("9001_more", MORE)
        scripts.add("9002_away", 'db.execute_sql("SELECT 1"); sys.modules["test_server"].kill()')
        monkeypatch.setitem(__import__("sys").modules, "test_server", server)
        with pytest.raises((StorageUnavailable, StorageInUse)):
            kagedb.connect(url=url)
        server.start()  # type: ignore[attr-defined]
        with kagedb.connect(url=url, read_only=True) as storage:
            assert "more" not in storage.engine.tables()
    finally:
        server.drop_database("away")  # type: ignore[attr-defined]
