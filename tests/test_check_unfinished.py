"""`kaged check` says what it did not look at, ends when it has to, and has a report on a store that does not open."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kagedb
from commands import in_process
from kagedb.operations import checking
from kagedb.settings import load
from test_check import change

if TYPE_CHECKING:
    from extra_scripts import ExtraScripts


# What it did not look at.


def test_a_quick_check_says_what_it_left_out_and_calls_none_of_it_good(stored_url: str) -> None:
    result = in_process("--url", stored_url, "check", "--quick", "--json")
    report = json.loads(result.stdout)
    whole = {name for name, one in checking._CHECKS.items() if one.whole}
    assert whole >= {"integrity", "stored hashes", "blobs", "audit log"}
    assert {one["check"] for one in report["left_out"]} == whole
    assert set(report["checked"]) == set(checking._CHECKS) - whole
    assert (result.exit_code, report["unfinished"]) == (0, [])
    said = in_process("--url", stored_url, "check", "--quick").stdout
    for name in whole:
        assert f"{name}: good" not in said
        assert name in said.partition("left out")[2]


def test_a_quick_check_of_a_damaged_store_does_not_find_what_it_did_not_look_at(stored_url: str) -> None:
    with kagedb.connect(url=stored_url) as storage:
        change(storage, "audit_event", "UPDATE audit_event SET actor = 'operator:eve' WHERE seq = 3")
    result = in_process("--url", stored_url, "check", "--quick")
    assert "audit log: good" not in result.stdout
    assert in_process("--url", stored_url, "check").exit_code == 3


def test_what_the_deadline_leaves_is_cannot_tell(stored_url: str) -> None:
    result = in_process("--url", stored_url, "check", "--deadline", "0", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 4
    assert {one["check"] for one in report["unfinished"]} == {n for n, one in checking._CHECKS.items() if one.whole}
    assert "cannot be told, the time was up: " in in_process("--url", stored_url, "check", "--deadline", "0").stdout
    directory = Path(load(url=stored_url).backup_directory)
    directory.mkdir(0o700, parents=True)
    directory.chmod(0o755)
    assert in_process("--url", stored_url, "check", "--deadline", "0").exit_code == 1, "a finding says more"


def test_with_time_enough_a_deadline_changes_nothing(stored_url: str) -> None:
    report = json.loads(in_process("--url", stored_url, "check", "--deadline", "600", "--json").stdout)
    assert set(report["checked"]) == set(checking._CHECKS)


@pytest.mark.parametrize("name", ["integrity", "stored hashes", "blobs", "audit log", "retention"])
def test_a_long_check_is_ended_in_the_middle(
    stored_url: str, name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins in time and then would go on for minutes."""
    long = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000000) SELECT COUNT(*) FROM n"
    one = checking._CHECKS[name]

    def look(watch: checking.Watch) -> checking.Told:
        yield from one.look(watch)
        watch.storage.database.raw(long).fetchall()

    monkeypatch.setattr(checking, "_CHECKS", {name: checking.Check(look, whole=True)})
    with kagedb.connect(url=stored_url, read_only=True) as storage:
        began = time.monotonic()
        report = checking.check(storage, deadline_seconds=0.3)
        assert time.monotonic() - began < 5
        assert [unchecked.check for unchecked in report.unfinished] == [name]
        assert report.exit_status == 4
        # And the connection is as it was.
        assert storage.database.execute_sql("SELECT COUNT(*) FROM session").fetchone()[0] == 1


def test_a_store_with_a_table_missing_is_told_and_the_rest_looked_at(stored_url: str) -> None:
    with kagedb.connect(url=stored_url) as storage, storage.transaction():
        storage.database.ddl.run("ALTER TABLE blob RENAME TO elsewhere")
    report = json.loads(in_process("--url", stored_url, "check", "--json").stdout)
    assert "schema" in {finding["check"] for finding in report["findings"]}
    assert [one["check"] for one in report["unfinished"]] == ["blobs"]
    assert {"integrity", "audit log"} <= set(report["checked"])


# Stores that do not open. What each kind of damage to a SQLite file is called is in test_damage.py.


@pytest.mark.sqlite_only
@pytest.mark.parametrize(("text", "status"), [(b"", 3), (b"not a database\n" * 300, 3), (None, 1)])
def test_a_file_that_does_not_open_is_a_finding(url: str, text: bytes | None, status: int) -> None:
    path = Path(url.removeprefix("sqlite://"))
    if text is not None:
        path.write_bytes(text)
        path.chmod(0o600)
    result = in_process("--url", url, "check", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == status
    assert report["checked"] == ["opening"]
    assert {one["check"] for one in report["unfinished"]} == set(checking._CHECKS)
    (finding,) = report["findings"]
    assert finding["mend"]
    assert (path.read_bytes() if text is not None else path.exists()) == (text if text is not None else False)


def test_a_store_of_a_newer_version_is_a_finding_and_no_damage(stored_url: str, scripts: ExtraScripts) -> None:
    path = scripts.add("9001_more", "pass")
    kagedb.connect(url=stored_url).close()
    path.unlink()
    result = in_process("--url", stored_url, "check", "--json")
    (finding,) = json.loads(result.stdout)["findings"]
    assert (result.exit_code, finding["check"], finding["damage"]) == (1, "opening", False)
    assert "9001_more" in finding["wrong"]


def test_a_store_that_is_not_migrated_yet_is_told_and_looked_at_as_far_as_it_can_be(
    stored_url: str, scripts: ExtraScripts
) -> None:
    scripts.add("9001_more", "pass")
    result = in_process("--url", stored_url, "check", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert any("kaged migrate" in finding["mend"] for finding in report["findings"])
    assert {"integrity", "audit log", "stored hashes"} <= set(report["checked"])


def test_a_server_that_is_away_is_an_error_and_no_finding() -> None:
    result = in_process("--url", "postgresql://nobody@127.0.0.1:1/nothing", "check", "--json")
    assert (result.exit_code, result.stdout) == (75, "")
