"""`kaged check` finds what is wrong, names what mends it, and finds nothing in a good store."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from commands import answer_json, commands, in_process
from kagedb import Project
from kagedb.models import Blob, RunAttachment
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
    assert report["left_out"] == report["unfinished"] == []
    damage = any(finding["damage"] for finding in report["findings"])
    assert result.exit_code == (3 if damage else 1 if report["findings"] else 0)
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
    assert found["audit log"][0]["damage"]


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
    assert "kaged salvage --to" in found["integrity"][0]["mend"]
    assert in_process("--url", stored_url, "check").exit_code == 3


def test_a_clock_before_the_newest_row_is_told(stored_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checking._now
    monkeypatch.setattr(checking, "_now", lambda: real() - 400 * HOUR_MS)
    assert "the clock of this host is before" in wrong(stored_url, "clock")


# What is stored is not what was stored: exit status 3.


def change(storage: Any, table: str, sql: str) -> None:
    """What a program does that writes past kaged and its guards."""
    with storage.transaction():
        storage.database.ddl.drop_guard(table, "update")
        storage.database.raw(sql)


@pytest.mark.parametrize(
    ("table", "sql"),
    [
        ("project_config", "UPDATE project_config SET source = 'house { rooms 4 }'"),
        ("prompt_version", "UPDATE prompt_version SET body = 'You rule the house.' WHERE version = 1"),
    ],
)
def test_a_text_that_its_stored_hash_does_not_fit_is_told(stored_url: str, table: str, sql: str) -> None:
    with kagedb.connect(url=stored_url) as storage:
        change(storage, table, sql)
    (finding,) = findings(stored_url)["stored hashes"]
    assert f"{table} " in finding["wrong"] and "is not what its digest says" in finding["wrong"]
    assert finding["damage"]


def test_a_blob_that_was_changed_is_told(stored_url: str) -> None:
    with kagedb.connect(url=stored_url) as storage:
        (digest,) = storage.database.execute_sql("SELECT digest FROM blob").fetchone()
        Blob.update(data=b"x", codec="raw").execute()
    assert f"blob {bytes(digest).hex()} is not what its digest says" in wrong_by(stored_url, "stored hashes")


def test_a_blob_in_the_middle_of_a_state_that_is_gone_is_told(stored_url: str) -> None:
    """No foreign key sees it: what a node of a tree refers to is in its bytes."""
    with kagedb.connect(url=stored_url):
        run = kagedb.Run.dispatch(kagedb.Session.get(), agent="planner", input={}, parent=None)
        kagedb.Checkpoint.pause(
            run, {f"key {number}": "x" * 900 + str(number) for number in range(40)}, label="deep", reason="test"
        )
        root = kagedb.Checkpoint.get().root
        below = Blob.select(Blob.digest).where(
            (Blob.digest != root) & (Blob.digest.not_in(RunAttachment.select(RunAttachment.blob)))
        )
        gone = bytes(below.order_by(Blob.digest).tuples()[0][0])
        Blob.delete().where(Blob.digest == gone).execute()
    assert (
        wrong_by(stored_url, "blobs")
        == f"the blob {gone.hex()}, which a checkpoint or an attachment needs, is not there"
    )


def wrong_by(url: str, check: str) -> str:
    return "; ".join(finding["wrong"] for finding in findings(url)[check])


# Upkeep.


@pytest.mark.sqlite_only
def test_marks_that_are_missing_are_told(stored_url: str) -> None:
    """PostgreSQL's databases have no such marks."""
    connection = sqlite3.connect(stored_url.removeprefix("sqlite://"))
    connection.execute("PRAGMA application_id = 0")
    connection.close()
    assert "application_id" in (told := wrong(stored_url, "marks")) and "kaged compact" in told


def test_much_space_that_holds_nothing_is_told(stored_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "FREE_BYTES", 1)
    monkeypatch.setattr(checking, "FREE_SHARE", 0.0)
    with kagedb.connect(url=stored_url) as storage, storage.transaction():
        kagedb.Run.update(error="x" * 200_000).execute()
        kagedb.Run.update(error=None).execute()
    if stored_url.startswith("postgresql"):
        time.sleep(1.1)  # the server counts dead rows a second late
    assert "hold nothing: give them back: kaged compact" in wrong(stored_url, "unused space")
    answer_json(stored_url, "compact")
    assert findings(stored_url) == {}


@pytest.mark.parametrize("days_over", [1, 20])
def test_what_should_have_been_pruned_for_long_is_told(stored_url: str, days_over: int, tmp_path: Path) -> None:
    with kagedb.connect(url=stored_url) as storage, storage.transaction():
        kagedb.Run.update(finished_at=checking._now() - (180 + days_over) * 24 * HOUR_MS).execute()
        # Those of the newest attachment stay in any case.
        storage.database.execute_sql("DELETE FROM run_attachment")
    if days_over == 1:
        assert findings(stored_url) == {}
    else:
        told = wrong(stored_url, "retention")
        assert "1 runs are over by more than 14 days: retention.runs_days is 180" in told and "kaged prune" in told
        answer_json(stored_url, "prune")
        assert findings(stored_url) == {}


def test_a_class_that_takes_more_than_it_may_is_told(stored_url: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[retention]\nruns_mib = 1\n")
    options = ("--url", stored_url, "--config", str(config))
    assert in_process(*options, "check").exit_code == 0
    with kagedb.connect(url=stored_url):
        session = kagedb.Session.get()
        for _ in range(2):
            run = kagedb.Run.dispatch(session, agent="planner", input={"filler": "x" * 700_000}, parent=None)
            run.finish(exit_status=0, output={})
    result = in_process(*options, "check")
    assert result.exit_code == 1
    assert "retention.runs_mib is 1" in result.stdout
    assert in_process(*options, "prune").exit_code == 0
    assert in_process(*options, "check").exit_code == 0


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
