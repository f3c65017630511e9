"""What `operations.health` finds out about a store, and that finding it out changes nothing."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from ulid import ULID

import kagedb
from contents import contents
from extra_scripts import ExtraScripts
from kagedb import Project, Run, Session
from kagedb.operations import health
from kagedb.storage import Storage
from programs import start_python, tell, wait_for_line

DAY_MS = 86_400_000


def test_every_table_is_counted(storage: Storage) -> None:
    project = Project.add("house", actor="operator:ana")
    for title in ("one", "two", "three"):
        Session.start(project, title=title, actor="operator:ana")
    found = health.status(storage)
    assert found.rows == {table: len(rows) for table, rows in contents(storage).items()}
    assert found.rows["session"] == 3


def test_an_empty_store_has_its_making_as_the_newest_row(storage: Storage) -> None:
    assert health.status(storage).newest_at == contents(storage)["audit_event"][0][1]


def test_looking_changes_nothing(storage: Storage) -> None:
    Project.add("house", actor="operator:ana")
    before = contents(storage)
    with storage.snapshot():
        health.status(storage)
        health.plan(storage)
    assert contents(storage) == before


def test_a_store_that_was_opened_to_be_read_has_the_same_status(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url) as storage:
        Project.add("house", actor="operator:ana")
        writing = health.status(storage)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        reading = health.status(storage)
    assert (reading.rows, reading.newest_at, reading.schema) == (writing.rows, writing.newest_at, writing.schema)


@pytest.mark.parametrize(("days", "warned"), [(-1, False), (1, True)])
def test_a_clock_before_the_newest_row_is_told(storage: Storage, days: int, warned: bool) -> None:
    at = time.time_ns() // 1_000_000 + days * DAY_MS
    Project.create(id=str(ULID.from_timestamp(at / 1000)), created_at=at, name="house")
    warnings = health.status(storage).warnings
    assert any("clock" in warning for warning in warnings) is warned


@pytest.mark.sqlite_only
def test_what_a_reload_from_a_dump_lost_is_told(storage: Storage) -> None:
    """PostgreSQL's databases have no such marks."""
    assert not any("application_id" in warning for warning in health.status(storage).warnings)
    storage.database.raw("PRAGMA application_id = 0")
    assert any("application_id" in warning for warning in health.status(storage).warnings)


@pytest.fixture
def plan_of_old(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An open store for which a script has turned up since."""
    ExtraScripts(tmp_path / "scripts", monkeypatch).add("0002_more", "pass")
    return storage


def test_a_script_without_a_docstring_is_planned_without_a_summary(plan_of_old: Storage) -> None:
    plan = health.plan(plan_of_old)
    assert plan.pending == [health.PendingScript("0002_more", "")]
    assert plan.obstacles == []
    assert plan.copy_bytes == plan_of_old.engine.size_bytes()


def test_a_disk_that_the_copy_would_fill_is_an_obstacle(plan_of_old: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    plan = health.plan(plan_of_old)
    assert plan.free_bytes == 100
    assert any("has 100 bytes free for a copy of" in obstacle for obstacle in plan.obstacles)


def test_a_current_store_has_no_obstacles(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert health.plan(storage).obstacles == []


WRITE = """
import sys, kagedb
with kagedb.connect(url=sys.argv[1]) as storage:
    with storage.transaction():
        print("writing", flush=True)
        input()
    print("written", flush=True)
    input()
"""


def test_how_busy_the_writer_is_is_what_was_seen(migrated_url: str) -> None:
    writer = start_python(WRITE, migrated_url)
    wait_for_line(writer, "writing")
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        assert health.status(storage).writer_busy_percent == 100
        tell(writer)
        wait_for_line(writer, "written")
        assert health.status(storage).writer_busy_percent == 0
        with storage.snapshot():
            assert health.status(storage).writer_busy_percent == 0
    tell(writer)


def test_what_removed_rows_have_left_is_told_as_free(storage: Storage) -> None:
    session = Session.start(Project.add("house", actor="operator:ana"), title="", actor="operator:ana")
    assert health.status(storage).free_bytes < 100_000
    with storage.transaction():
        # Not compressible, as PostgreSQL would do it.
        filler = os.urandom(50_000).hex()
        runs = [Run.dispatch(session, agent="a", input={"filler": filler}, parent=None).id for _ in range(10)]
    Run.delete().where(Run.id.in_(runs)).execute()
    deadline = time.monotonic() + 10
    while health.status(storage).free_bytes < 100_000:
        assert time.monotonic() < deadline, "PostgreSQL counts dead rows about a second late"
        time.sleep(0.1)
