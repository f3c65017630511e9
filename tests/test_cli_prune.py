"""`kaged prune` and the pins: what they say, and how they end."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import kagedb
from commands import KAGED, answer, answer_json, in_process, run_kaged
from contents import contents
from extra_scripts import MORE, ExtraScripts
from kagedb import Run, Session
from kagedb.operations.checkpoints import missing
from programs import start_python, wait_for_line
from retained import days_later, lived, of, project

YEARS_LATER = """
from kagedb.identity import now_ms
from kagedb.operations import retention
retention.now_ms = lambda: now_ms() + 4_000 * 86_400_000
"""


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    """A store with three sessions that have ended."""
    with kagedb.connect(url=migrated_url):
        owner = project()
        for seed in range(3):
            lived(owner, runs=2, seed=seed)
    return migrated_url


def test_a_dry_run_says_what_the_run_does_and_changes_nothing(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    days_later(monkeypatch, 400)
    with kagedb.connect(url=filled_url) as storage:
        before = contents(storage)
    said = answer_json(filled_url, "prune", "--dry-run")
    assert said["removed"] is None
    assert said["limits"]["sessions_days"] == 365
    assert said["would_remove"]["sessions"]["rows"]["session"] == 2
    assert said["would_remove"]["blobs"]["bytes"] > 0
    with kagedb.connect(url=filled_url) as storage:
        assert contents(storage) == before
    done = answer_json(filled_url, "prune")
    assert done["removed"] == done["would_remove"] == said["would_remove"]
    assert not done["stopped"]
    assert done["longest_hold_ms"] > 0
    with kagedb.connect(url=filled_url):
        assert Session.select().count() == 1


def test_it_says_rows_and_bytes_and_then_what_it_did(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    days_later(monkeypatch, 400)
    shown = answer(filled_url, "prune", "--dry-run").splitlines()
    assert shown[0].split() == ["CLASS", "SIZE", "ROWS"]
    assert [line.split()[0] for line in shown[1:]] == ["sessions", "transcripts", "runs", "blobs"]
    assert "KiB" in shown[1]
    assert "session 2" in shown[1]
    done = in_process("--url", filled_url, "prune")
    assert done.stdout.splitlines()[: len(shown)] == shown
    assert "removed or emptied" in done.stdout
    assert "kaged compact" in done.stderr
    assert "nothing to remove" in in_process("--url", filled_url, "prune").stderr


def test_the_limits_are_those_of_the_config(filled_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[retention]\nsessions_days = 0\ntranscripts_days = 0\nruns_days = 0\ncheckpoints_days = 0\n")
    days_later(monkeypatch, 36_000)
    said = answer_json(filled_url, "--config", str(config), "prune", "--dry-run")
    assert not any(going["rows"] for going in said["would_remove"].values())
    config.write_text("[retention]\nsessions_days = 36_001\n")
    said = answer_json(filled_url, "--config", str(config), "prune", "--dry-run")
    assert said["limits"]["sessions_days"] == 36_001
    assert not said["would_remove"]["sessions"]["rows"]
    assert said["would_remove"]["runs"]["rows"]


def test_a_pinned_session_is_shown_and_stays_until_it_is_unpinned(
    filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    days_later(monkeypatch, 400)
    session = answer_json(filled_url, "session", "list")[-1]["id"]
    answer(filled_url, "session", "pin", session.lower())
    assert answer_json(filled_url, "session", "show", session)["pinned"] is True
    assert [row["pinned"] for row in answer_json(filled_url, "session", "list")] == [False, False, True]
    with kagedb.connect(url=filled_url):
        was = of(Session.by_id(session))
    answer(filled_url, "prune")
    with kagedb.connect(url=filled_url):
        assert of(Session.by_id(session)) == was
    answer(filled_url, "session", "unpin", session)
    answer(filled_url, "prune")
    assert f"there is no session {session}" in in_process("--url", filled_url, "session", "show", session).output


def test_a_run_that_was_emptied_is_shown_as_such(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    days_later(monkeypatch, 200)
    answer(filled_url, "prune")
    run = answer_json(filled_url, "run", "list")[-1]["id"]
    assert "input, output and attachments were pruned: " in answer(filled_url, "run", "show", run)
    shown = answer_json(filled_url, "run", "show", run)
    assert shown["pruned_at"] > shown["finished_at"]
    assert (shown["input"], shown["output"], shown["attachments"]) == (None, None, [])


def test_a_clock_that_is_behind_is_an_error(filled_url: str) -> None:
    clock = "import time; real = time.time_ns; time.time_ns = lambda: real() - 86_400 * 10**9"
    for arguments in (["--dry-run"], []):
        done = run_kaged("--url", filled_url, "prune", *arguments, before=clock)
        assert done.returncode != 0
        assert "the clock is before the newest row of the store\nset the clock" in done.stderr


def test_told_to_end_it_says_what_it_did_and_the_next_goes_on(filled_url: str) -> None:
    """SIGTERM comes while a batch is being removed."""
    slow = YEARS_LATER + (
        "from kagedb.operations import pace\n"
        "real = pace.time.sleep\n"
        "pace.MOST_UNITS = 20\n"
        "pace.time.sleep = lambda seconds: (print('pause', flush=True), real(0.2))\n"
    )
    pruner = start_python(slow + KAGED, "--url", filled_url, "prune", "--json")
    wait_for_line(pruner, "pause")
    pruner.send_signal(signal.SIGTERM)
    out, _ = pruner.communicate(timeout=30)
    assert pruner.returncode == 130
    said = json.loads("".join(line for line in out.splitlines(keepends=True) if not line.startswith("pause")))
    assert said["stopped"]
    went = sum(sum(going["rows"].values()) for going in said["removed"].values())
    whole = sum(sum(going["rows"].values()) for going in said["would_remove"].values())
    assert 0 < went < whole
    done = run_kaged("--url", filled_url, "prune", before=YEARS_LATER)
    assert done.returncode == 0, done.stderr
    with kagedb.connect(url=filled_url) as storage:
        assert (Session.select().count(), missing(storage)) == (1, [])
        assert Run.select().where(Run.pruned_at.is_null(False)).count() > 0


def test_a_store_of_an_older_schema_is_left_as_it_is(scripts: ExtraScripts, filled_url: str) -> None:
    scripts.add("9001_more", MORE)
    for arguments in (["--dry-run"], []):
        done = in_process("--url", filled_url, "prune", *arguments)
        assert done.exit_code != 0
        assert "pending: 9001_more" in done.output
        assert "kaged migrate" in done.output
