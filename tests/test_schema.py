"""How a store's history fits this program: current, behind, ahead, edited, reloaded from a dump."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kagedb
from extra_scripts import MORE, ExtraScripts, copies, fill, sqlite_path
from kagedb import AuditEvent, Project, Session, schema
from kagedb.engines import open_engine
from kagedb.errors import (
    SchemaDrift,
    SchemaTooNew,
    SchemaTooOld,
)
from kagedb.settings import load

if TYPE_CHECKING:
    from places import Places

ACTOR = "operator:ana"


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    """A store of this version with a project and two sessions in it."""
    fill(migrated_url)
    return migrated_url


def test_a_new_store_needs_no_copy(scripts: ExtraScripts, url: str) -> None:
    with kagedb.connect(url=url) as storage:
        assert copies(storage.settings) == []
        assert [event.kind for event in AuditEvent.select()] == ["store.created"]


def test_two_new_stores_never_have_the_same_chain(places: Places, engine: str) -> None:
    heads = []
    for _ in range(2):
        with kagedb.connect(url=places.empty(engine)):
            heads.append(json.loads(AuditEvent.get().body)["store"])
    assert heads[0] != heads[1]


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
    with pytest.raises(SchemaTooOld, match="pending: 9001_more") as caught:
        kagedb.connect(url=filled_url, migrate=False)
    assert "kaged migrate" in caught.value.hint
    assert copies(load(url=filled_url)) == []


def test_a_reader_of_an_old_store_sees_it_as_it_is_and_the_verbs_say_what_to_do(
    scripts: ExtraScripts, filled_url: str
) -> None:
    scripts.add("9001_more", MORE)
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        assert "more" not in storage.engine.tables()
        assert schema.drift(storage.engine, scripts.last) == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM session").fetchone() == (2,)
        for ask in (lambda: Project.by_id("house"), lambda: list(Project.select()), Project.select().count):
            with pytest.raises(SchemaTooOld, match="pending: 9001_more"):
                ask()


def no_backup(engine: object, name: str) -> AbstractContextManager[Path]:
    raise AssertionError(f"a backup before {name} of a current store")


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
        standing, copy = schema.ensure(engine, migrate=True, actor=ACTOR, backup=no_backup)
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
