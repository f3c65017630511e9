"""Every procedure of docs/backup.md is run as it is written, on a store with something in it (machine.py).

Where rsync is not installed, a stand-in takes its arguments and copies; it is no proof of rsync itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

import kagedb
from kagedb import Run
from machine import Machine, Page
from stored import fill

if TYPE_CHECKING:
    from conftest import Places

PAGE = Page("backup.md")
blocks = PAGE.blocks


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "first")
    machine.fill()
    return machine


def runs(url: str) -> int:
    with kagedb.connect(url=url, read_only=True):
        return Run.select().count()


def test_every_block_of_the_page_is_run_by_a_test_here() -> None:
    PAGE.require_all_run(Path(__file__))


def test_a_first_backup(machine: Machine) -> None:
    first, units = blocks("Backup and restore")
    said = machine.run(first)
    assert "verified" in said and "is good" in said
    assert "enable --now kaged-backup.timer kaged-maintenance.timer" in machine.run(units)


def test_restoring(machine: Machine) -> None:
    (block,) = blocks("Restore")
    machine.run("kaged backup")
    with kagedb.connect(url=machine.url):
        kagedb.Project.add("garden", actor="operator:ana")
    machine.run(block)
    with kagedb.connect(url=machine.url, read_only=True):
        assert [project.name for project in kagedb.Project.select()] == ["house"]


def test_copies_elsewhere_and_a_new_machine(machine: Machine, tmp_path: Path) -> None:
    synced, direct, one_file = blocks("Backups on another disk or machine")
    (machine.nas / "kaged").mkdir()
    machine.run(synced)
    machine.run(direct)
    assert "is good" in machine.run(one_file)
    (again,) = blocks("A new machine")
    other = Machine(tmp_path / "second")
    shutil.copytree(machine.nas, other.nas, dirs_exist_ok=True)
    other.run(again)
    assert runs(other.url) == 1


def test_moving_a_system_wide_installation(machine: Machine, tmp_path: Path) -> None:
    old, new = blocks("Moving a system-wide installation")
    store = {"KAGED_HOME": str(machine.system)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGED_HOME", str(machine.system))
        fill(f"sqlite://{machine.system}/kaged.db")
    machine.run(old, **store)
    other = Machine(tmp_path / "second")
    shutil.copy(machine.home / "kaged.tar", other.home)
    other.run(new, KAGED_HOME=str(other.system))
    assert runs(f"sqlite://{other.system}/kaged.db") == 1


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the sqlite3 program is not on this machine")
def test_by_hand_on_sqlite(machine: Machine) -> None:
    dump, copy = blocks("By hand")
    machine.run(dump)
    assert runs(f"sqlite://{machine.home}/again.db") == 1
    said = machine.run(copy)
    assert "0|" in said and "run 1" in said
    assert runs(f"sqlite://{machine.home}/copy.db") == 1


def test_by_hand_on_postgresql(machine: Machine, places: Places) -> None:
    url = places.migrated("postgres")
    fill(url)
    parts = urlsplit(url)
    (block,) = blocks("By hand", "sh postgres")
    query = parse_qs(parts.query)
    machine.run(
        block,
        PATH=machine.path_with_postgres,
        PGHOST=query["host"][0] if "host" in query else parts.hostname or "",
        PGPORT=query["port"][0] if "port" in query else str(parts.port or 5432),
        PGUSER=parts.username or "",
        PGPASSWORD=parts.password or "",
        PGDATABASE=parts.path.lstrip("/"),
    )
    assert (machine.home / "kaged.pgdump").stat().st_size > 1000
