"""What retention removes: by age and by bytes, class by class; and what no limit makes it touch."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from contents import contents
from kagedb import (
    AuditEvent,
    Checkpoint,
    InvalidValue,
    NotFound,
    Plugin,
    Run,
    Session,
    StateError,
    Transcript,
)
from kagedb.errors import ReadOnlyStorage
from kagedb.identity import now_ms
from kagedb.models import AuditSeal, Blob, RunAttachment, TranscriptChunk
from kagedb.operations import audit_verify, pace, retention
from kagedb.operations.checkpoints import missing
from kagedb.operations.retention import Limits, plan, prune
from kagedb.operations.retention_removal import Removal
from retained import ANA, DAY_MS, HOSTILE, assert_sound, counts, days_later, lived, needed, of, project, stored

if TYPE_CHECKING:
    from kagedb.storage import Storage

MIB = 1024 * 1024


def pruned(storage: Storage, limits: Limits) -> retention.Done:
    """Prune by limits; what was said beforehand must be what went, and nothing may be left to do or be broken."""
    before = contents(storage)
    found = plan(storage, limits)
    assert contents(storage) == before, "planning changes nothing"
    done = prune(storage, found, actor=ANA)
    assert done.classes == found.classes, "what was said is what went"
    assert not done.stopped
    assert plan(storage, limits).empty(), "nothing is left for a second time"
    assert_sound(storage)
    assert {blob.digest for blob in Blob.select()} == needed()
    return done


# By age.


@pytest.mark.parametrize(
    ("limits", "gone"),
    [
        (Limits(sessions_days=30), {"session", "run", "whole", "attachment", "checkpoint", "transcript", "chunk"}),
        (Limits(transcripts_days=30), {"transcript", "chunk"}),
        (Limits(runs_days=30), {"whole", "attachment"}),
        (Limits(checkpoints_days=30, checkpoints_keep=1), {"checkpoint"}),
    ],
    ids=["sessions", "transcripts", "runs", "checkpoints"],
)
def test_each_class_goes_by_its_age_and_no_other_with_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, limits: Limits, gone: set[str]
) -> None:
    old, young = lived(owner := project()), lived(owner)
    lived(owner, runs=1)  # what is newest stays whatever its age
    Session.update(ended_at=Session.ended_at - 20 * DAY_MS).where(Session.id == old.id).execute()
    Transcript.update(closed_at=Transcript.closed_at - 20 * DAY_MS).where(Transcript.session == old.id).execute()
    Run.update(finished_at=Run.finished_at - 20 * DAY_MS).where(Run.session == old.id).execute()
    Checkpoint.update(created_at=Checkpoint.created_at - 20 * DAY_MS).where(Checkpoint.session == old.id).execute()
    was_old, was_young = of(old), of(young)
    days_later(monkeypatch, 9)
    assert plan(storage, limits).empty(), "29 days are not 30"
    days_later(monkeypatch, 11)
    pruned(storage, limits)
    kept = {"checkpoint": 1} if gone == {"checkpoint"} else {}
    assert of(old) == {name: kept.get(name, 0) if name in gone else rows for name, rows in was_old.items()}
    assert of(young) == was_young


def test_a_run_that_was_emptied_says_so_and_keeps_what_else_is_known_of_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.start(project(), title="night watch", actor=ANA)
    run = Run.dispatch(session, agent="planner", input={"secret": 1})
    run.attach("image", b"\0" * 100)
    run.fail("no lint", exit_status=127, output=[1])
    newer = Run.dispatch(session, agent="planner", input=1)
    newer.attach("image", b"\1" * 100)
    days_later(monkeypatch, 2)
    pruned(storage, Limits(runs_days=1))
    found = Run.by_id(run.id)
    assert [found.input, found.output] == [None, None]
    assert found.pruned_at is not None
    assert (found.state, found.error, found.exit_status, found.agent) == ("failed", "no lint", 127, "planner")
    with pytest.raises(NotFound, match=r"attachments of the run \w+ were pruned"):
        found.attachment("image")
    assert newer.attachment("image") == b"\1" * 100


def test_a_run_with_many_attachments_is_emptied_in_pieces_and_first_says_so(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.start(project(), title="night watch", actor=ANA)
    run = Run.dispatch(session, agent="planner", input=1)
    with storage.transaction("relaxed"):
        for number in range(120):
            run.attach(f"a{number}", bytes([number]))
    run.finish()
    Run.dispatch(session, agent="planner", input=1).attach("newest", b"1")
    days_later(monkeypatch, 2)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 1

    found = plan(storage, Limits(runs_days=1))
    done = prune(storage, found, actor=ANA, stop=stop)
    assert done.stopped
    assert Run.by_id(run.id).pruned_at is not None
    assert 0 < RunAttachment.select().where(RunAttachment.run == run.id).count() < 120
    pruned(storage, Limits(runs_days=1))
    assert RunAttachment.select().count() == 1


# By bytes.


def test_transcripts_beyond_their_bytes_go_oldest_first(storage: Storage) -> None:
    sessions = [lived(owner, runs=0, kib=300, seed=seed) for owner in [project()] for seed in range(5)]
    limits = Limits(transcripts_mib=1)
    pruned(storage, limits)
    assert [of(session)["transcript"] for session in sessions] == [0, 0, 1, 1, 1]
    assert stored(TranscriptChunk, TranscriptChunk.data) <= MIB


def test_runs_beyond_their_bytes_are_emptied_oldest_first(storage: Storage) -> None:
    session = Session.start(project(), title="night watch", actor=ANA)
    runs = []
    for number in range(5):
        runs.append(Run.dispatch(session, agent="planner", input="x" * 200_000))
        runs[-1].attach("text", f"{number}" * 100_000)
        runs[-1].finish()
    limits = Limits(runs_mib=1)
    pruned(storage, limits)
    assert [Run.by_id(run.id).pruned_at is None for run in runs] == [False, False, True, True, True]


def test_checkpoints_beyond_their_bytes_go_oldest_first_and_shared_states_count_once(storage: Storage) -> None:
    session = lived(project(), runs=1, pauses=0, end=False)
    run = Run.dispatch(session, agent="planner", input=1)
    shared = [Checkpoint.pause(run, "same", binaries={"b": bytes(range(256)) * 2_000}) for _ in range(8)]
    noise = random.Random(1)
    own = [Checkpoint.pause(run, n, binaries={"b": noise.randbytes(300_000)}) for n in range(5)]
    pruned(storage, Limits(checkpoints_mib=1, checkpoints_keep=1))
    assert stored(Blob, Blob.data) <= MIB
    assert [one.id for one in Checkpoint.of(session)] == [one.id for one in own[-3:]]
    assert not {one.id for one in shared} & {one.id for one in Checkpoint.of(session)}


def test_what_stays_in_any_case_counts_for_the_bytes_of_checkpoints(storage: Storage) -> None:
    session = lived(project(), runs=1, pauses=0, end=False)
    run = Run.dispatch(session, agent="planner", input=1)
    noise = random.Random(1)
    made = [Checkpoint.pause(run, n, binaries={"b": noise.randbytes(300_000)}) for n in range(6)]
    for one in made[:3]:
        one.pin()
    pruned(storage, Limits(checkpoints_mib=1, checkpoints_keep=1))
    assert [one.id for one in Checkpoint.of(session)] == [one.id for one in (*made[:3], made[5])]


def test_sessions_beyond_their_bytes_go_oldest_first(storage: Storage) -> None:
    owner = project()
    sessions = [lived(owner, runs=1, kib=100, seed=seed) for seed in range(5)]
    pruned(storage, Limits(sessions_mib=1))
    assert [of(session)["session"] for session in sessions] == [0, 0, 1, 1, 1]


def test_the_audit_log_goes_by_age_and_bytes_in_sealed_ranges_and_verifies(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    for number in range(12):
        AuditEvent.record("policy.decision", actor=ANA, body={"text": f"{number}" * 120_000})
        if number % 4 == 3:
            AuditSeal.close_all()
    before = AuditEvent.select().count()
    pruned(storage, Limits(audit_mib=1))
    assert before > AuditEvent.select().count() > 0
    assert audit_verify.verify(storage).result == "holds"
    AuditSeal.close_all()
    AuditEvent.record("policy.decision", actor=ANA)
    days_later(monkeypatch, 2)
    pruned(storage, Limits(audit_days=1))
    assert "policy.decision" in [event.kind for event in AuditEvent.select()], "what is not sealed stays"
    assert audit_verify.verify(storage).result == "holds"


# What stays.


def test_a_pinned_session_keeps_everything_below_it_against_every_limit(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    pinned, other = lived(owner, kib=150), lived(owner, kib=150)
    lived(owner, runs=1)
    pinned.pin()
    was = of(pinned)
    days_later(monkeypatch, 400)
    pruned(storage, HOSTILE)
    assert of(pinned) == was
    assert of(other)["session"] == 0
    Session.by_id(pinned.id).unpin()
    pruned(storage, HOSTILE)
    assert of(pinned)["session"] == 0


def test_a_pinned_checkpoint_keeps_itself_and_its_session_and_runs_as_rows(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    session = lived(owner)
    lived(owner, runs=1)
    made = Checkpoint.of(session)
    state = made[1].restore()
    made[1].pin()
    runs = of(session)["run"]
    days_later(monkeypatch, 400)
    pruned(storage, HOSTILE)
    assert [one.id for one in Checkpoint.of(session)] == [made[1].id, made[-1].id], "and what the session stands on"
    assert Checkpoint.by_id(made[1].id).restore() == state
    left = of(session)
    assert (left["session"], left["run"], left["whole"], left["transcript"]) == (1, runs, 0, 0)


def test_what_goes_on_stays_whatever_the_limits(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = project()
    lived(owner, runs=1)
    session = Session.start(owner, title="for years", actor=ANA)
    recorder = Transcript.open(session, 80, 24)
    recorder.write(b"before")
    recorder.flush()
    run = Run.dispatch(session, agent="planner", input={"running": True})
    run.attach("image", b"1" * 100)
    state = Checkpoint.pause(run, {"n": 1})
    lived(owner, runs=1)  # the newest attachment and checkpoint are not the ones above
    days_later(monkeypatch, 10_000)
    pruned(storage, HOSTILE)
    recorder.write(b" and after")
    recorder.close()
    assert b"".join(recorder.transcript.raw()) == b"before and after"
    assert (Run.by_id(run.id).input, run.attachment("image")) == ({"running": True}, b"1" * 100)
    assert state.restore() == {"n": 1}
    run.finish()
    session.end(actor=ANA)


def test_a_transcript_that_was_never_closed_goes_once_its_session_has_ended_and_it_is_silent(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    session = lived(owner, runs=0)
    lived(owner, runs=1)
    Transcript.update(closed_at=None).where(Transcript.session == session.id).execute()
    days_later(monkeypatch, 0.9)
    limits = replace(HOSTILE, sessions_days=0, transcripts_days=0, transcripts_mib=0)
    assert plan(storage, replace(limits, sessions_days=1)).empty()
    days_later(monkeypatch, 1.1)
    pruned(storage, replace(limits, transcripts_days=1))
    assert of(session)["transcript"] == 0
    assert of(session)["session"] == 1


def test_prompts_configs_plugins_and_the_audit_log_are_never_touched_by_the_defaults(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    for _ in range(3):
        lived(owner)
    AuditSeal.close_all()
    days_later(monkeypatch, 36_000)
    never = ["project", "project_config", "prompt", "prompt_version", "prompt_label", "prompt_label_move", "plugin"]
    never += ["plugin_state", "audit_seal"]
    before = contents(storage)
    assert Limits.of(storage.settings).checkpoints_keep == 20
    pruned(storage, Limits.of(storage.settings))
    after = contents(storage)
    assert {name: after[name] for name in never} == {name: before[name] for name in never}
    assert after["audit_event"][: len(before["audit_event"])] == before["audit_event"]
    assert [row[2] for row in after["audit_event"][len(before["audit_event"]) :]] == ["store.pruned"]
    assert len(after["session"]) == 1, "and the others did go"


def test_the_newest_checkpoint_and_attachment_stay_so_that_ids_go_up(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = lived(project())
    days_later(monkeypatch, 400)
    pruned(storage, HOSTILE)
    assert of(session)["session"] == 1
    assert RunAttachment.select().count() == 1
    assert Checkpoint.select().count() == 1


def test_the_newest_checkpoints_of_each_session_stay(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = project()
    few, many = lived(owner, runs=1, pauses=2, end=False), lived(owner, runs=3, pauses=4, end=False)
    days_later(monkeypatch, 400)
    pruned(storage, Limits(checkpoints_days=1, checkpoints_keep=5))
    assert (of(few)["checkpoint"], of(many)["checkpoint"]) == (2, 5)


# Children and relations.


def test_what_was_forked_into_another_session_outlives_where_it_came_from(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    session = lived(owner, end=False)
    other = Session.start(owner, title="other", actor=ANA)
    source = Checkpoint.of(session)[1]
    state = source.restore()
    fork = source.fork(actor=ANA, session=other)
    session.end(actor=ANA)
    lived(owner, runs=1)
    days_later(monkeypatch, 400)
    pruned(storage, Limits(sessions_days=1))
    assert of(session)["session"] == 0
    assert [Checkpoint.by_id(fork.id).parent_id, fork.restore()] == [None, state]


def test_a_transcript_outlives_the_part_that_it_continues(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = project()
    session = lived(owner, runs=0)
    (first,) = Transcript.of(session)
    with storage.transaction():
        second = first._continue(80, 24, first.created_at)
        TranscriptChunk.insert(key=second.first_key, at=second.created_at, place=0, size=0, data=b"\0" * 10).execute()
    Transcript.update(closed_at=first.closed_at + 5 * DAY_MS).where(Transcript.id == second.id).execute()
    days_later(monkeypatch, 3)
    pruned(storage, Limits(transcripts_days=2))
    assert [one.id for one in Transcript.of(session)] == [second.id]


def test_runs_go_whatever_the_order_of_their_ids(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that a process made whose clock was behind has a lower id than its parent; chains may be deep."""
    owner = project()
    session = lived(owner, runs=0, end=False)
    parent = None
    for _ in range(130):
        parent = Run.dispatch(session, agent="a", input=1, parent=parent)
    ids = sorted(run.id for run in Run.of(session))
    for child, above in pairwise(ids):
        Run.update(parent=above).where(Run.id == child).execute()
    Run.update(parent=None).where(Run.id == ids[-1]).execute()
    Run.update(finished_at=1, state="finished").execute()
    session.end(actor=ANA)
    days_later(monkeypatch, 2)
    pruned(storage, Limits(sessions_days=1))
    assert Run.select().count() == 0


def test_expired_keys_of_plugins_go_and_the_others_stay(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Plugin.named(project(), "weather")
    plugin.state.set("short", 1, ttl=1)
    past = now_ms() - 3 * DAY_MS
    storage.database.execute_sql(
        storage.database.dialect("UPDATE plugin_state SET expires_at = ? WHERE key = ?"), (past, "short")
    )
    done = pruned(storage, Limits())
    assert done.classes["plugin_state"].rows == {"plugin_state": 1}
    assert [entry.key for entry in plugin.state.list()] == ["place"]


# Being asked.


def test_the_event_is_recorded_before_anything_goes(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = project()
    lived(owner), lived(owner, runs=1)
    days_later(monkeypatch, 2)
    before = counts()
    found = plan(storage, HOSTILE)
    with monkeypatch.context() as crash:
        crash.setattr(Removal, "sessions", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(storage, found, actor=ANA)
    (event,) = AuditEvent.select().where(AuditEvent.kind == "store.pruned")
    body = json.loads(event.body)
    assert body["limits"]["sessions_days"] == 1
    assert body["classes"]["sessions"] == {
        "rows": found.classes["sessions"].rows,
        "bytes": found.classes["sessions"].bytes,
    }
    before["audit_event"] += 1
    assert counts() == before
    pruned(storage, HOSTILE)


def test_where_there_is_nothing_to_remove_nothing_is_recorded(storage: Storage) -> None:
    lived(project())
    before = contents(storage)
    done = prune(storage, actor=ANA)
    assert not any(going.count() for going in done.classes.values())
    assert contents(storage) == before


def test_a_clock_before_the_newest_row_removes_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    lived(project())
    real = time.time_ns
    before = contents(storage)
    monkeypatch.setattr("kagedb.identity.time.time_ns", lambda: real() - 3_600 * 10**9)
    for ask in (lambda: plan(storage, HOSTILE), lambda: prune(storage, actor=ANA)):
        with pytest.raises(StateError, match="the clock is before the newest row"):
            ask()
    monkeypatch.undo()
    assert contents(storage) == before


@pytest.mark.parametrize("value", [-1, 1.5, "7", True, None])
def test_a_limit_that_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValue, match="runs_days cannot be"):
        Limits(runs_days=value)


def test_limits_beyond_all_time_and_space_remove_nothing(storage: Storage) -> None:
    lived(project())
    most = 10**9
    assert plan(storage, Limits(most, most, most, most, most, most, most, most, most, most, most)).empty()


def test_an_actor_that_is_none_is_refused(storage: Storage) -> None:
    with pytest.raises(InvalidValue, match="not of the form kind:name"):
        prune(storage, actor="ana")


def test_a_store_that_was_opened_to_be_read_is_planned_and_not_pruned(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kagedb.connect(url=migrated_url):
        lived(owner := project())
        lived(owner, runs=1)
    days_later(monkeypatch, 400)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        before = contents(storage)
        found = plan(storage, HOSTILE)
        assert not found.empty()
        with pytest.raises(ReadOnlyStorage):
            prune(storage, found, actor=ANA)
        assert contents(storage) == before
        assert missing(storage) == []


def test_memory_does_not_grow_with_the_store(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(pace, "HOLD_SECONDS", 1)  # the largest batches, which take the most of it
    owner = project()
    session = lived(owner, runs=0)
    lived(owner, runs=1)
    run = {"session": session.id, "agent": "a", "state": "finished", "started_at": 1, "finished_at": 1}
    with storage.transaction("relaxed"):
        for _ in range(10):
            Run.insert_many([{**run, "input": "x" * 3_000, "output": [1]} for _ in range(100)]).execute()
    days_later(monkeypatch, 2)
    prune(
        storage, plan(storage, Limits(runs_days=1, runs_mib=1)), actor=ANA, stop=lambda: True
    )  # imports what it needs
    tracemalloc.start()
    done = prune(storage, plan(storage, Limits(runs_days=1, runs_mib=1)), actor=ANA)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.classes["runs"].rows["run"] > 900
    assert peak < 1_000_000, "a third of the inputs"
