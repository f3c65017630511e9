"""Every procedure of docs/damage.md is run as it is written, on a store that is damaged (machine.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import damages
import kagedb
from kagedb import AuditEvent, Project, Run
from machine import Machine, Page
from stored import fill

PAGE = Page("damage.md")
blocks = PAGE.blocks


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "machine")
    machine.fill()
    fill(machine.url, "annex", events=60)
    return machine


@pytest.fixture
def path(machine: Machine) -> Path:
    return machine.home / ".local/share/kaged/kaged.db"


def test_every_block_of_the_page_is_run_by_a_test_here() -> None:
    PAGE.require_all_run(Path(__file__))


def test_with_a_good_backup(machine: Machine, path: Path) -> None:
    machine.run("kaged backup")
    damages.zero_page(path)
    (first,) = blocks("First")
    assert "StorageCorrupt" not in machine.run(first)
    (restoring,) = blocks("There is a good backup")
    machine.run(restoring)
    with kagedb.connect(url=machine.url, read_only=True):
        assert {project.name for project in Project.select()} == {"house", "annex"}


def test_without_one_and_the_log_begun_anew(machine: Machine, path: Path) -> None:
    damages.leaf_zeroed(path)
    (first,) = blocks("First")
    machine.run(first)
    (saving,) = blocks("There is none")
    said = machine.run(saving)
    assert "lost of audit_event: " in said and "audit log: broken at event" in said, said
    with kagedb.connect(url=machine.url, read_only=True):
        assert Run.select().count() == 2
        assert AuditEvent.select().order_by(AuditEvent.seq.desc()).get().kind == "store.salvaged"
    (anew,) = blocks("The audit log afterwards")
    said = machine.run(anew)
    assert "holds" in said and "verified" in said
    exported = [json.loads(line) for line in (machine.home / "damaged/audit.jsonl").read_text().splitlines()]
    assert "store.salvaged" in {row.get("kind") for row in exported}
