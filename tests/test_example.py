"""The miniature daemon of docs/examples does what the documentation says of it, also when it is killed midway."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import kagedb
from kagedb import AuditEvent, Project, Prompt, Run, Session
from programs import kill, run_python, start_python, wait_for_line

DAEMON = Path(__file__).parent.parent / "docs" / "examples" / "daemon.py"

RUNS_OF_A_SESSION = 6
"""The planner's and one for each of its commands."""


def test_it_keeps_what_its_commands_really_did(migrated_url: str) -> None:
    done = run_python(DAEMON, migrated_url)
    assert (done.returncode, done.stderr) == (0, "")
    with kagedb.connect(migrated_url, migrate=False):
        planner, good, bad, slow, missing, forbidden = Run.select().order_by(Run.id)
        assert (good.state, good.exit_status, good.output) == ("finished", 0, {"stdout": "Linux\n", "stderr": ""})
        assert (bad.state, bad.exit_status, bad.input) == ("finished", 2, {"command": ["ls", "/no/such/place"]})
        assert "/no/such/place" in bad.output["stderr"]
        assert (slow.state, slow.exit_status) == ("finished", 0)
        assert slow.finished_at - slow.started_at >= 500
        assert (missing.state, missing.exit_status) == ("failed", 127)
        assert (forbidden.state, forbidden.exit_status) == ("cancelled", None)
        assert (planner.state, planner.exit_status, planner.output) == ("finished", 1, {"good": 2, "of": 5})
        assert [node.run.id for node in planner.tree().children] == [
            run.id for run in (good, bad, slow, missing, forbidden)
        ]
        assert planner.prompt_version.body == "You look after a house.\n"
        assert [event.kind for event in AuditEvent.of(good)] == ["sandbox.entered", "policy.decision"]
        assert '"allowed":false' in AuditEvent.of(forbidden)[0].body


def test_a_second_time_it_goes_on_with_what_is_there(migrated_url: str) -> None:
    for _ in range(2):
        assert run_python(DAEMON, migrated_url).returncode == 0
    with kagedb.connect(migrated_url, migrate=False):
        (project,) = Project.select()
        assert [config.version for config in project.configs] == [1]
        assert Prompt.resolve(project, "planner", "production").version == 2
        assert [session.state for session in Session.select()] == ["ended", "ended"]
        assert Run.select().count() == 2 * RUNS_OF_A_SESSION


@pytest.mark.parametrize(
    "line", ["  project.added", "  prompt.edited", "  session.detached", "  policy.decision", "  run.finished"]
)
def test_killed_at_any_point_it_goes_on_when_it_is_started_again(migrated_url: str, line: str) -> None:
    victim = start_python(DAEMON, migrated_url)
    wait_for_line(victim, line)
    kill(victim)
    with kagedb.connect(migrated_url, migrate=False):
        left = Run.left_open()
        begun = Session.select().count()
    done = run_python(DAEMON, migrated_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("left open by a predecessor") == len(left)
    with kagedb.connect(migrated_url, migrate=False):
        assert Run.left_open() == []
        assert [Run.by_id(run.id).state for run in left] == ["interrupted"] * len(left)
        # The session of the victim is the one that went on.
        (session,) = Session.select()
        assert (session.state, done.stdout.count("goes on")) == ("ended", begun)
        assert Run.select().where(Run.state != "interrupted").count() >= RUNS_OF_A_SESSION
        (project,) = Project.select()
        assert [version.version for version in Prompt.named(project, "planner").versions] == [1, 2]
        assert [event.seq for event in AuditEvent.select().order_by(AuditEvent.seq)] == list(
            range(1, AuditEvent.select().count() + 1)
        )


def test_killed_while_a_command_runs_it_leaves_runs_that_are_closed_as_interrupted(migrated_url: str) -> None:
    victim = start_python(DAEMON, migrated_url)
    for _ in range(3):  # the third command sleeps
        wait_for_line(victim, "  sandbox.entered")
    kill(victim)
    assert run_python(DAEMON, migrated_url).returncode == 0
    with kagedb.connect(migrated_url, migrate=False):
        interrupted = Run.select().where(Run.state == "interrupted").order_by(Run.id)
        assert [(run.agent, run.error) for run in interrupted] == [
            ("planner", "the daemon ended under it"),
            ("watcher", "the daemon ended under it"),
        ]


def test_a_second_one_beside_it_is_told_who_holds_the_store(migrated_url: str) -> None:
    first = start_python(DAEMON, migrated_url)
    wait_for_line(first, "  sandbox.entered")
    first.send_signal(signal.SIGSTOP)  # or it would have ended before a slow machine has started the second
    second = run_python(DAEMON, migrated_url)
    assert (second.returncode, second.stdout) == (75, "")
    assert f"pid {first.pid}" in second.stderr or f"process {first.pid}" in second.stderr
    assert len(second.stderr.splitlines()) == 2


def test_it_says_what_is_wrong_with_a_url_and_makes_nothing(home: Path) -> None:
    done = run_python(DAEMON, "kaged.db")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sqlite:///" in done.stderr
    assert list(home.iterdir()) == []


def test_it_is_short() -> None:
    assert len(DAEMON.read_text().splitlines()) < 150
