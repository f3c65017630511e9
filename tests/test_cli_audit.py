"""`kaged audit` as an operator and a timer meet it: what it prints and the status it ends with."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

import kagedb
from audit_attacks import change, drop_guards, fill
from commands import KAGED, in_process
from commands import answer as stored_answer
from kagedb.models import AuditEvent
from kagedb.operations.audit import redact
from programs import kill, start_python, wait_for_line

ANCHOR = re.compile(r"\d+:[0-9a-f]{64}\n")


def kaged(url: str, *arguments: str) -> Result:
    return in_process("--url", url, "audit", *arguments)


def answer(url: str, *arguments: str) -> str:
    return stored_answer(url, "audit", *arguments)


@pytest.fixture
def log(migrated_url: str) -> str:
    """The URL of a store with twelve events that nobody has open."""
    with kagedb.connect(url=migrated_url) as storage:
        fill(storage, 12)
    return migrated_url


def tamper(url: str) -> None:
    with kagedb.connect(url=url) as storage:
        drop_guards(storage)
        change(storage, "UPDATE audit_event SET actor = 'agent:x' WHERE seq = 7")


class TestVerify:
    def test_a_log_that_holds_ends_with_0(self, log: str) -> None:
        said = answer(log, "verify")
        assert said.splitlines()[:3] == ["result     holds", "assurance  chained", "events     12"]

    def test_a_broken_log_ends_with_1_and_names_the_event(self, log: str) -> None:
        tamper(log)
        done = kaged(log, "verify")
        assert done.exit_code == 1
        assert done.stdout == ""
        assert "broken at event 7: event 7 was changed" in done.stderr.splitlines()[0]
        assert len(done.stderr.splitlines()) == 2

    def test_the_same_in_json(self, log: str) -> None:
        tamper(log)
        done = kaged(log, "verify", "--json")
        found = json.loads(done.stdout)
        assert (done.exit_code, found["result"], found["seq"]) == (1, "broken", 7)

    def test_no_store_ends_with_4(self, url: str) -> None:
        done = kaged(url, "verify")
        assert done.exit_code == 4
        assert "there is no store" in done.stderr

    def test_an_empty_log_ends_with_4(self, migrated_url: str) -> None:
        with kagedb.connect(url=migrated_url) as storage:
            drop_guards(storage)
            change(storage, "DELETE FROM audit_event")
        assert kaged(migrated_url, "verify").exit_code == 4

    def test_an_anchor_and_a_key_from_elsewhere_are_checked(self, log: str, tmp_path: Path) -> None:
        printed = kaged(log, "key", "--new")
        assert printed.exit_code == 0 and printed.stdout.startswith("kaged-audit-key-1:2:")
        file = tmp_path / "first.key"
        file.write_text(printed.stdout)
        anchor = answer(log, "seal").strip()
        found = json.loads(answer(log, "verify", "--expect", anchor, "--key", str(file), "--json"))
        assert found["assurance"] == ["chained", "sealed", "anchored"]
        seq, _, digest = anchor.partition(":")
        assert kaged(log, "verify", "--expect", f"{seq}:{digest[::-1]}").exit_code == 1
        assert kaged(log, "verify", "--expect", f"{int(seq) + 1}:{digest}").exit_code == 1
        file.write_text(printed.stdout.replace("key-1:2:", "key-1:2:0")[:-2] + "\n")
        assert kaged(log, "verify", "--key", str(file)).exit_code == 1

    @pytest.mark.parametrize("arguments", [("--expect", "nonsense"), ("--key", "/nowhere/key")])
    def test_wrong_usage_ends_with_2(self, log: str, arguments: tuple[str, str]) -> None:
        assert kaged(log, "verify", *arguments).exit_code == 2

    def test_works_beside_a_daemon(self, log: str) -> None:
        daemon = start_python(
            "import sys, kagedb; kagedb.connect(url=sys.argv[1], exclusive=True); print('up', flush=True); input()", log
        )
        wait_for_line(daemon, "up")
        answer(log, "verify")
        kill(daemon)

    def test_shows_its_progress_to_a_terminal(self, log: str) -> None:
        with kagedb.connect(url=log) as storage:
            fill(storage, 1_200)
        controller, terminal = pty.openpty()
        done = subprocess.run(
            [sys.executable, "-m", "kagedb", "--url", log, "audit", "verify"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal,
            timeout=60,
        )
        os.close(terminal)
        shown = os.read(controller, 10_000)
        os.close(controller)
        assert done.returncode == 0
        assert b"verifying" in shown and b"%" in shown


class TestList:
    def rows(self, url: str, *arguments: str) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = json.loads(answer(url, "list", "--json", *arguments))
        return rows

    def test_is_newest_first_and_limited(self, log: str) -> None:
        assert [row["seq"] for row in self.rows(log, "--limit", "3")] == [12, 11, 10]
        assert len(self.rows(log, "--limit", "0")) == 12

    def test_goes_by_kind_actor_and_subject(self, log: str) -> None:
        with kagedb.connect(url=log):
            AuditEvent.record("sandbox.denied", actor="agent:other", subject="run:77")
        assert [row["seq"] for row in self.rows(log, "--kind", "sandbox")] == [13]
        assert [row["seq"] for row in self.rows(log, "--kind", "sandbox.denied")] == [13]
        assert self.rows(log, "--kind", "sand") == []
        assert [row["seq"] for row in self.rows(log, "--actor", "agent:other")] == [13]
        assert [row["seq"] for row in self.rows(log, "--subject", "run:77")] == [13]
        assert [row["seq"] for row in self.rows(log, "--subject", "run:1")] == [11, 8, 5, 2]

    def test_goes_by_project(self, log: str) -> None:
        with kagedb.connect(url=log):
            kagedb.Project.add("house", actor="operator:ana")
        assert [row["kind"] for row in self.rows(log, "--project", "house")] == ["project.added"]
        assert kaged(log, "list", "--project", "other").exit_code == 1

    def test_goes_by_time(self, log: str) -> None:
        assert len(self.rows(log, "--since", "1h")) == 12
        assert self.rows(log, "--until", "1h") == []
        assert self.rows(log, "--since", "2999-01-01") == []
        assert len(self.rows(log, "--until", "2999-01-01T10:00")) == 12
        assert kaged(log, "list", "--since", "soon").exit_code == 2

    def test_shows_a_hostile_actor_without_its_escapes(self, log: str) -> None:
        with kagedb.connect(url=log):
            AuditEvent.record("policy.decision", actor="agent:x", subject="run:\u202e31m")
        assert "\u202e" not in answer(log, "list")

    def test_follows_new_events_as_they_come(self, log: str) -> None:
        program = start_python(KAGED, "--url", log, "audit", "list", "--follow", "--limit", "1")
        wait_for_line(program, "12  ")
        with kagedb.connect(url=log):
            AuditEvent.record("sandbox.denied", actor="agent:other")
        assert "sandbox.denied" in wait_for_line(program, "13  ")
        kill(program)


def test_show_prints_the_body_and_what_is_redacted(log: str) -> None:
    assert '"allow": true' in answer(log, "show", "2")
    with kagedb.connect(url=log) as storage:
        redact(storage, 2, reason="x", actor="operator:ana")
    said = answer(log, "show", "2")
    assert "redacted  yes" in said and "body" not in said.split("redacted")[1]
    assert kaged(log, "show", "99").exit_code == 1
    assert kaged(log, "show", "0").exit_code == 2


def test_head_and_seal_print_the_anchor_line_alone(log: str) -> None:
    head = answer(log, "head")
    assert ANCHOR.fullmatch(head)
    assert answer(log, "seal") == head
    again = kaged(log, "seal")
    assert (again.exit_code, again.stdout) == (0, head)
    assert "sealed already" in again.stderr


def test_a_first_key_is_made_once(log: str, home: Path) -> None:
    first = kaged(log, "key", "--new")
    assert first.exit_code == 0
    refused = kaged(log, "key", "--new")
    assert refused.exit_code == 1 and "--replace" in refused.stderr
    assert answer(log, "key", "--new", "--replace").startswith("kaged-audit-key-1:3:")
    secret = first.stdout.strip().rpartition(":")[2]
    for file in home.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes()
    assert kaged(log, "key").exit_code == 2


def test_export_gives_lines_of_json(log: str) -> None:
    answer(log, "seal")
    lines = [json.loads(line) for line in answer(log, "export").splitlines()]
    assert lines[0]["seal"] == 1
    assert [line["seq"] for line in lines[1:]] == list(range(1, 13))


def test_prune_says_beforehand_and_then_does_it(log: str) -> None:
    answer(log, "seal")
    assert answer(log, "prune", "--before", "2999-01-01", "--dry-run") == (
        "would remove 12 events, up to event 12 (seal 1)\n"
    )
    assert answer(log, "head").startswith("12:")
    assert json.loads(answer(log, "prune", "--before", "2999-01-01", "--json")) == {
        "events": 12,
        "last_seq": 12,
        "seal": 1,
    }
    assert json.loads(answer(log, "verify", "--json"))["pruned_to"] == 12
    assert kaged(log, "prune", "--before", "30d").exit_code == 0


def test_redact_says_where_it_is_recorded(log: str) -> None:
    assert answer(log, "redact", "3", "--reason", "a name in it") == "the body of event 3 is gone; event 13 says so\n"
    row = json.loads(answer(log, "show", "13", "--json"))
    assert row["actor"].startswith("operator:") and "a name in it" in row["body"]
    assert kaged(log, "redact", "1", "--reason", "x").exit_code == 1
    assert kaged(log, "redact", "3").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("head",), ("show", "1"), ("export",), ("seal",), ("key", "--new"), ("prune", "--before", "1d")],
)
def test_no_command_makes_a_store(url: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = kaged(url, *arguments)
    assert done.exit_code == 1 and "there is no store" in done.stderr
    assert not list(tmp_path.glob("kaged.db*"))
