"""The moves of docs/engines.md are run as they are written, from each engine to the other (machine.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kagedb
from kagedb import Run
from machine import Machine, Page

if TYPE_CHECKING:
    from conftest import Places

PAGE = Page("engines.md")


def count_runs(url: str) -> int:
    with kagedb.connect(url=url, read_only=True):
        return Run.select().count()


def test_every_block_of_the_page_is_run_by_a_test_here() -> None:
    PAGE.require_all_run(Path(__file__))


def test_moving_to_postgresql(tmp_path: Path, places: Places) -> None:
    machine = Machine(tmp_path / "first")
    machine.fill()
    new = places.empty("postgres")
    dry, stop, copy, look, start = PAGE.blocks("Moving from SQLite to PostgreSQL")
    with_new = {"NEW": new, "PATH": machine.path_with_postgres}
    machine.run(dry, **with_new)
    machine.run(stop, **with_new)
    assert "[storage]" in machine.run(copy, **with_new)
    assert "run 1" in machine.run(look, **with_new)
    said = machine.run(start, **with_new)
    assert "verified" in said and "backups: good" in said
    assert count_runs(new) == count_runs(machine.url) == 1


def test_moving_to_sqlite(tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path / "first")
    old, new = places.migrated("postgres"), f"sqlite://{machine.system}/kaged.db"
    machine.fill(old)
    config = machine.home / ".config" / "kaged" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'[storage]\nurl = "{old}"\n')
    (machine.home / ".local/share/kaged").mkdir(parents=True, mode=0o700)
    (block,) = PAGE.blocks("Moving from PostgreSQL to SQLite")
    said = machine.run(block, NEW=new, PATH=machine.path_with_postgres)
    assert "verified" in said and "backups: good" in said
    assert count_runs(new) == count_runs(old) == 1
