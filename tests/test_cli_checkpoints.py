"""`kaged checkpoint`, `kaged plugin` on state, and `kaged run attachment`, on a store that a daemon has left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kagedb
from commands import answer, answer_json, in_process
from kagedb import AuditEvent, Checkpoint, Plugin, Project, Run, Session

ANA = "operator:ana"


@pytest.fixture
def left(migrated_url: str) -> Iterator[Any]:
    """Five checkpoints in two branches, a plugin with state, a run with attachments; nobody has the store open."""
    with kagedb.connect(url=migrated_url):
        project = Project.add("house", actor=ANA)
        session = Session.start(project, title="night watch", actor=ANA)
        run = Run.dispatch(session, agent="planner", input={})
        made = [Checkpoint.pause(run, {"step": step, "log": ["x" * 2_000] * step}) for step in range(3)]
        made[0].rollback(actor=ANA)
        made.append(Checkpoint.pause(run, {"step": "b"}, label="other way", reason="breakpoint"))
        made.append(Checkpoint.pause(run, {"step": "\x1b[31mred"}, binaries={"screen": b"\0\xff"}))
        made[1].pin()
        plugin = Plugin.install(project, {"name": "weather", "version": "1", "permissions": []}, actor=ANA)
        for number in range(3):
            plugin.state.set(f"city/{number}", {"degrees": number})
        plugin.state.set("zone", "x" * 100, ttl=1_000)
        run.attach("log", "one\ntwo\n")
        run.attach("core", b"\0\xff")
        ids = [checkpoint.id for checkpoint in made]
    yield SimpleNamespace(url=migrated_url, ids=ids, session=session.id, run=run.id)


def test_the_list_says_where_the_session_stands(left: Any) -> None:
    rows = answer_json(left.url, "checkpoint", "list")
    assert [row["id"] for row in rows] == left.ids[::-1]
    assert [(row["head"], row["pinned"]) for row in rows] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
        (False, False),
    ]
    assert rows[1]["label"] == "other way"
    assert len(answer_json(left.url, "checkpoint", "list", "--session", left.session.lower(), "--limit", "2")) == 2
    assert answer_json(left.url, "checkpoint", "list", "--project", "house") == rows
    assert answer(left.url, "checkpoint", "list").count("\n") == 6


def test_the_tree_shows_what_came_from_what(left: Any) -> None:
    rows = answer_json(left.url, "checkpoint", "tree", left.session)
    first, second, third, other, last = left.ids
    assert [(row["depth"], row["id"]) for row in rows] == [
        (0, first),
        (1, second),
        (1, third),
        (1, other),
        (1, last),
    ]
    assert f"  {second}" in answer(left.url, "checkpoint", "tree", left.session)


def test_a_checkpoint_is_shown_with_its_state_and_no_escape_gets_through(left: Any) -> None:
    shown = answer_json(left.url, "checkpoint", "show", left.ids[4])
    assert (shown["value"], shown["binaries"]) == ({"step": "\x1b[31mred"}, {"screen": 2})
    assert "\x1b" not in answer(left.url, "checkpoint", "show", left.ids[4])
    assert "screen (2 bytes)" in answer(left.url, "checkpoint", "show", left.ids[4])


def test_the_difference_is_shown_by_place(left: Any) -> None:
    rows = answer_json(left.url, "checkpoint", "diff", left.ids[0], left.ids[4])
    assert rows == [
        {"path": "/step", "change": "changed", "before": 0, "after": "\x1b[31mred"},
        {"path": "/log", "change": "removed", "before": [], "after": None},
        {"path": "binaries:/screen", "change": "added", "before": None, "after": "2 bytes"},
    ]
    assert "\x1b" not in answer(left.url, "checkpoint", "diff", left.ids[0], left.ids[4])
    assert (
        in_process("--url", left.url, "checkpoint", "diff", left.ids[0], left.ids[0]).output == "the states are equal\n"
    )


def test_a_state_is_written_to_a_new_file_for_its_owner_alone(left: Any, tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    answer(left.url, "checkpoint", "restore", left.ids[2], "--output", str(file))
    assert json.loads(file.read_text()) == {"step": 2, "log": ["x" * 2_000] * 2}
    assert file.stat().st_mode & 0o777 == 0o600
    again = in_process("--url", left.url, "checkpoint", "restore", left.ids[1], "--output", str(file))
    assert (again.exit_code, "there is a file" in again.output) == (1, True)
    assert json.loads(answer(left.url, "checkpoint", "restore", left.ids[0])) == {"step": 0, "log": []}
    answer(left.url, "checkpoint", "restore", left.ids[4], "--binary", "screen", "-o", str(tmp_path / "screen"))
    assert (tmp_path / "screen").read_bytes() == b"\0\xff"
    absent = in_process("--url", left.url, "checkpoint", "restore", left.ids[4], "--binary", "other")
    assert (absent.exit_code, "has no byte string 'other'" in absent.output) == (1, True)


def test_a_damaged_state_is_not_written(left: Any, tmp_path: Path) -> None:
    with kagedb.connect(url=left.url) as storage:
        root = Checkpoint.by_id(left.ids[2]).root
        storage.database.execute_sql(
            storage.database.dialect("UPDATE blob SET data = ? WHERE digest = ?"), (b"\0x", root)
        )
    for command in ("show", "restore"):
        failed = in_process("--url", left.url, "checkpoint", command, left.ids[2])
        assert failed.exit_code == 3
        assert f"the state of the checkpoint {left.ids[2]} cannot be restored" in failed.output


def test_pruning_removes_and_says_so(left: Any) -> None:
    assert in_process("--url", left.url, "checkpoint", "prune").exit_code == 2
    assert "would remove 2 checkpoints, and keep 3" in answer(
        left.url, "checkpoint", "prune", "--keep", "2", "--dry-run"
    )
    assert answer_json(left.url, "checkpoint", "prune", "--before", "1d")["removed"] == 0
    answer(left.url, "checkpoint", "pin", left.ids[1], "--off")
    answer(left.url, "checkpoint", "pin", left.ids[0])
    done = answer_json(left.url, "checkpoint", "prune", "--keep", "2")
    assert (done["removed"], done["kept"], done["missing"]) == (2, 3, [])
    assert done["blobs"] > 0
    with kagedb.connect(url=left.url):
        assert [c.id for c in Checkpoint.select().order_by(Checkpoint.id)] == [left.ids[0], *left.ids[3:]]
        assert AuditEvent.select().where(AuditEvent.kind == "checkpoint.pruned").count() == 1


def test_the_keys_of_a_plugin_are_listed(left: Any) -> None:
    rows = answer_json(left.url, "plugin", "state", "house", "weather")
    assert [(row["key"], row["revision"]) for row in rows] == [("city/0", 1), ("city/1", 1), ("city/2", 1), ("zone", 1)]
    assert rows[3]["expires_at"] > 0
    some = answer_json(left.url, "plugin", "state", "house", "weather", "--prefix", "city/", "--after", "city/0")
    assert [row["value"] for row in some] == [{"degrees": 1}, {"degrees": 2}]
    limited = in_process("--url", left.url, "plugin", "state", "house", "weather", "--limit", "1")
    assert "there are more than 1" in limited.output
    assert len(answer_json(left.url, "plugin", "state", "house", "weather", "--limit", "0")) == 4
    assert answer_json(left.url, "plugin", "usage", "house", "weather")["keys"] == 4
    assert answer_json(left.url, "plugin", "show", "house", "weather")["state_keys"] == 4
    assert "4 of 10,000" in answer(left.url, "plugin", "usage", "house", "weather")


def test_state_is_exported_wiped_and_loaded(left: Any, tmp_path: Path) -> None:
    file = tmp_path / "weather.jsonl"
    answer(left.url, "plugin", "export", "house", "weather", "--output", str(file))
    assert answer(left.url, "plugin", "export", "house", "weather") == file.read_text()
    refused = in_process("--url", left.url, "plugin", "wipe", "house", "weather")
    assert refused.exit_code == 1
    answer(left.url, "plugin", "wipe", "house", "weather", "--yes")
    assert answer_json(left.url, "plugin", "state", "house", "weather") == []
    answer(left.url, "plugin", "load", "house", "weather", str(file))
    assert answer(left.url, "plugin", "export", "house", "weather") == file.read_text()
    file.write_text("nonsense")
    wrong = in_process("--url", left.url, "plugin", "load", "house", "weather", str(file))
    assert (wrong.exit_code, "line 1 is not one of an export" in wrong.output) == (2, True)


def test_attachments_are_listed_and_written(left: Any, tmp_path: Path) -> None:
    assert answer_json(left.url, "run", "show", left.run)["attachments"] == [
        {"name": "log", "kind": "text", "size": 8},
        {"name": "core", "kind": "bytes", "size": 2},
    ]
    assert "log (text, 8 bytes)" in answer(left.url, "run", "show", left.run)
    assert answer(left.url, "run", "attachment", left.run, "log") == "one\ntwo\n"
    answer(left.url, "run", "attachment", left.run, "core", "-o", str(tmp_path / "core"))
    assert (tmp_path / "core").read_bytes() == b"\0\xff"
