"""`--keep` and `--keep-days` never remove the last good sets, or those of another store."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

import kagedb
from backup_sets import back_up, directory, sets
from commands import answer_json
from kagedb.engines import open_engine
from kagedb.operations import backup_set
from kagedb.operations.backup import Plan, make
from kagedb.settings import load

if TYPE_CHECKING:
    from conftest import Places

# Retention.


def test_keep_leaves_the_newest(stored_url: str) -> None:
    names = [back_up(stored_url).name for _ in range(3)]
    made = answer_json(stored_url, "backup", "--keep", "2")
    assert made["removed"] == names[:2]
    assert [one.name for one in sets()] == [names[2], made["name"]]


def test_a_quick_set_removes_nothing_and_suspect_sets_stay(stored_url: str) -> None:
    first, second = back_up(stored_url), back_up(stored_url)
    backup_set.mark_suspect(first.directory, ["odd"])
    made = answer_json(stored_url, "backup", "--quick", "--keep", "1")
    assert made["removed"] == [] and made["notes"]
    made = answer_json(stored_url, "backup", "--keep", "1")
    assert made["removed"][0] == second.name and len(made["removed"]) == 2
    assert [one.name for one in sets()] == [first.name, made["name"]]


def test_the_last_good_sets_stay_however_old(stored_url: str) -> None:
    old = [back_up(stored_url) for _ in range(4)]
    for one in old:
        manifest = one.directory / "manifest.json"
        document = json.loads(manifest.read_text())
        document["created_at"] -= 90 * 86_400_000
        manifest.write_text(json.dumps(document))
    made = answer_json(stored_url, "backup", "--keep-days", "30")
    assert made["removed"] == [one.name for one in old[:2]]


def test_nothing_is_removed_by_age_while_the_clock_is_before_the_store(
    stored_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        back_up(stored_url)
    real = time.time_ns
    monkeypatch.setattr("kagedb.operations.backup.time.time_ns", lambda: real() - 365 * 86_400 * 10**9)
    made = answer_json(stored_url, "backup", "--keep-days", "1")
    assert made["removed"] == []
    assert "the clock of this host is before" in made["notes"][0]
    assert len(sets()) == 6


def test_sets_of_another_store_are_not_counted_or_removed(stored_url: str, places: Places, engine: str) -> None:
    other = places.empty(engine)
    kagedb.connect(url=other).close()
    theirs = back_up(other)
    mine = back_up(stored_url)
    made = answer_json(stored_url, "backup", "--keep", "1")
    assert made["removed"] == [mine.name]
    assert theirs.directory.exists()


def test_the_directory_itself_is_locked_for_the_time_of_a_backup_only(stored_url: str) -> None:
    back_up(stored_url)
    with backup_set.lock(directory()):
        pass


def test_an_engine_opened_to_be_read_is_enough(stored_url: str) -> None:
    engine = open_engine(load(url=stored_url), read_only=True)
    engine.open(create=False)
    made = make(engine, directory(), Plan())
    engine.close()
    assert made.verified
