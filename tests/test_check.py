"""`kaged check` finds what is wrong, names what mends it, and finds nothing in a good store."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from commands import answer_json, commands, in_process
from kagedb import Project
from kagedb.operations import backup_set, checking
from kagedb.settings import load
from stored import add_more

if TYPE_CHECKING:
    from conftest import Places

HOUR_MS = 3_600_000


def findings(url: str) -> dict[str, list[dict[str, str]]]:
    """What was found, by the check that found it."""
    result = in_process("--url", url, "check", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (1 if report["findings"] else 0)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        assert finding["mend"], finding
        found.setdefault(finding["check"], []).append(finding)
    return found


def wrong(url: str, check: str) -> str:
    found = findings(url)
    assert list(found) == [check], found
    return "; ".join(f"{finding['wrong']}: {finding['mend']}" for finding in found[check])


def make_older(one: backup_set.BackupSet, hours: int) -> None:
    manifest = one.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    document["created_at"] -= hours * HOUR_MS
    manifest.write_text(json.dumps(document))


def the_sets(url: str) -> list[backup_set.BackupSet]:
    return backup_set.sets_in(Path(load(url=url).backup_directory))


def test_a_good_store_with_a_fresh_backup_has_no_findings(stored_url: str) -> None:
    answer_json(stored_url, "backup")
    assert findings(stored_url) == {}
    result = in_process("--url", stored_url, "check")
    assert result.exit_code == 0
    assert {line.partition(":")[0] for line in result.stdout.splitlines()} == set(checking._CHECKS)


def test_it_works_beside_a_daemon(stored_url: str) -> None:
    with kagedb.connect(url=stored_url, exclusive=True) as storage:
        # In this process the store is open already, which is what a daemon of its own would see.
        with storage.snapshot():
            assert checking.check(storage).findings == []


def test_a_new_store_is_not_blamed_for_having_no_backup_yet(stored_url: str) -> None:
    assert findings(stored_url) == {}


def test_an_older_store_without_a_backup_is_told(stored_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checking._now
    monkeypatch.setattr(checking, "_now", lambda: real() + 49 * HOUR_MS)
    assert "there is no verified backup" in wrong(stored_url, "backups")
    answer_json(stored_url, "backup", "--quick")
    assert "there is no verified backup" in wrong(stored_url, "backups")


@pytest.mark.parametrize(("hours", "told"), [(47, False), (49, True)])
def test_a_newest_verified_backup_older_than_two_days_is_told(stored_url: str, hours: int, told: bool) -> None:
    answer_json(stored_url, "backup")
    (one,) = the_sets(stored_url)
    make_older(one, hours)
    if told:
        assert f"{hours} hours old; backup.max_age_hours is 48: make one: kaged backup" in wrong(stored_url, "backups")
    else:
        assert findings(stored_url) == {}


def test_how_old_a_backup_may_be_is_a_setting(stored_url: str, tmp_path: Path) -> None:
    answer_json(stored_url, "backup")
    make_older(the_sets(stored_url)[0], 24)
    config = tmp_path / "config.toml"
    for hours, status in ((12, 1), (36, 0), (0, 0)):
        config.write_text(f"[backup]\nmax_age_hours = {hours}\n")
        assert in_process("--url", stored_url, "--config", str(config), "check").exit_code == status


def test_a_fresh_backup_of_another_store_does_not_count(
    stored_url: str, places: Places, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = places.empty(engine)
    kagedb.connect(url=other).close()
    answer_json(other, "backup")
    real = checking._now
    monkeypatch.setattr(checking, "_now", lambda: real() + 49 * HOUR_MS)
    assert "there is no verified backup" in wrong(stored_url, "backups")


def test_a_suspect_set_is_told(stored_url: str) -> None:
    answer_json(stored_url, "backup")
    (one,) = the_sets(stored_url)
    answer_json(stored_url, "backup")
    backup_set.mark_suspect(one.directory, ["odd"])
    assert f"{one.name} is suspect" in wrong(stored_url, "backups")


def test_a_schema_changed_by_hand_is_told(stored_url: str) -> None:
    with kagedb.connect(url=stored_url) as storage, storage.transaction():
        storage.engine.database.ddl.run("CREATE INDEX by_hand ON session (title)")
    assert "by_hand" in wrong(stored_url, "schema")


def test_an_event_that_was_changed_is_told(stored_url: str) -> None:
    with kagedb.connect(url=stored_url) as storage, storage.transaction():
        storage.database.ddl.drop_guard("audit_event", "update")
        storage.database.raw("UPDATE audit_event SET actor = 'operator:eve' WHERE seq = 3")
    found = findings(stored_url)
    assert "broken at event 3" in found["audit log"][0]["wrong"]


def test_a_log_that_was_cut_and_grown_again_does_not_match_the_backup(
    stored_url: str, places: Places, engine: str
) -> None:
    """Both chains hold by themselves; the head in the backup's manifest tells."""
    with kagedb.connect(url=stored_url):
        add_more(5)
    answer_json(stored_url, "backup")
    (one,) = the_sets(stored_url)
    manifest = one.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    document["head"][1] = "ab" * 32
    manifest.write_text(json.dumps(document))
    assert f"as the backup {one.name} has it" in wrong(stored_url, "audit log")


def test_backups_of_what_a_restore_replaced_are_not_compared(stored_url: str) -> None:
    answer_json(stored_url, "backup")
    with kagedb.connect(url=stored_url):
        Project.add("garden", actor="operator:ana")
    answer_json(stored_url, "backup")
    answer_json(stored_url, "restore", "1")
    with kagedb.connect(url=stored_url):
        add_more(5)
    assert findings(stored_url) == {}
    answer_json(stored_url, "backup")
    assert findings(stored_url) == {}


@pytest.mark.sqlite_only
def test_a_file_that_others_may_read_is_told(stored_url: str) -> None:
    """A server keeps its own files."""
    path = Path(stored_url.removeprefix("sqlite://"))
    path.chmod(0o644)
    assert f"chmod 600 {path}" in wrong(stored_url, "permissions")


def test_a_backup_directory_that_others_may_read_is_told(stored_url: str) -> None:
    answer_json(stored_url, "backup")
    place = Path(load(url=stored_url).backup_directory)
    place.chmod(0o755)
    assert f"chmod 700 {place}" in wrong(stored_url, "permissions")


@pytest.mark.sqlite_only
def test_a_log_that_a_reader_keeps_growing_is_told(stored_url: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[sqlite]\njournal_size_limit_kib = 0\nwal_autocheckpoint_kib = 256\n")
    path = stored_url.removeprefix("sqlite://")
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM run").fetchone()
    with kagedb.connect(url=stored_url) as storage:
        for _ in range(40):
            with storage.transaction():
                for _ in range(20):
                    kagedb.AuditEvent.record("policy.decision", actor="agent:a", body={"filler": "x" * 2000})
        result = in_process_config(config, stored_url, storage)
    reader.close()
    assert any("something has been reading the store" in finding.wrong for finding in result.findings)


def in_process_config(config: Path, url: str, storage: Any) -> checking.Report:
    storage.settings = load(url=url, config=config)
    return checking.check(storage)


@pytest.mark.sqlite_only
def test_a_damaged_page_is_told(stored_url: str) -> None:
    path = Path(stored_url.removeprefix("sqlite://"))
    connection = sqlite3.connect(path)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'run_session_id'").fetchone()
    connection.close()
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    data[page * size - 30 : page * size - 10] = bytes(20)
    path.write_bytes(data)
    found = findings(stored_url)
    assert "integrity" in found
    assert "kaged restore --latest" in found["integrity"][0]["mend"]


def test_a_clock_before_the_newest_row_is_told(stored_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checking._now
    monkeypatch.setattr(checking, "_now", lambda: real() - 400 * HOUR_MS)
    assert "the clock of this host is before" in wrong(stored_url, "clock")


def test_every_command_that_a_finding_names_is_there() -> None:
    import re

    known = {" ".join(words) for words in commands()}
    source = Path(checking.__file__).read_text()
    named = re.findall(r"kaged ((?:[a-z]+ ?)+)", source.partition('"""\n\nfrom')[2])
    assert named
    for words in named:
        assert any(words.strip().startswith(name) for name in known), words


def test_checking_changes_nothing(stored_url: str) -> None:
    answer_json(stored_url, "backup")
    with kagedb.connect(url=stored_url, read_only=True):
        before = kagedb.AuditEvent.head()
    findings(stored_url)
    with kagedb.connect(url=stored_url, read_only=True):
        assert kagedb.AuditEvent.head() == before
    assert os.listdir(the_sets(stored_url)[0].directory)
