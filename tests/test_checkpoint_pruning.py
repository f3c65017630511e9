"""Pruning keeps what it should restorable; collecting leaves no orphan and nothing dangling, whatever happens to it."""

from __future__ import annotations

import json
import random
import threading
import time
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from kagedb import AuditEvent, Checkpoint, InvalidValue, Project, Run, Session, StateError
from kagedb import storage as stores
from kagedb.models import Blob, RunAttachment
from kagedb.operations import checkpoints as operation
from kagedb.operations import pace
from kagedb.operations.checkpoints import Page, collect, missing, prune
from programs import kill, start_python, wait_for_line
from retained import needed

if TYPE_CHECKING:
    from kagedb.storage import Storage

ANA = "operator:ana"
HOUR_MS = 3_600_000


@pytest.fixture
def session(storage: Storage) -> Session:
    return Session.start(Project.add("house", actor=ANA), title="night watch", actor=ANA)


@pytest.fixture
def run(session: Session) -> Run:
    return Run.dispatch(session, agent="planner", input={})


def state(step: int, size: int = 40) -> dict[str, Any]:
    """A state that shares most of its elements with those of the steps around it."""
    noise = random.Random(0)
    shared = [{"n": n, "text": f"{noise.getrandbits(800):x}"} for n in range(size)]
    shared[step % size] = {"n": -step, "text": f"{random.Random(step).getrandbits(4_000):x}"}
    return {"step": step, "items": shared}


def pause_many(run: Run, count: int) -> list[Checkpoint]:
    return [Checkpoint.pause(run, state(step)) for step in range(count)]


def test_the_newest_stay_and_can_be_restored(storage: Storage, session: Session, run: Run) -> None:
    made = pause_many(run, 30)
    made[3].pin()
    result = prune(storage, keep=5, actor=ANA)
    stay = [made[3], *made[25:]]
    assert (result.removed, result.kept) == (24, 6)
    assert [c.id for c in Checkpoint.of(session)] == [c.id for c in stay]
    collect(storage)
    assert [c.restore()["step"] for c in Checkpoint.of(session)] == [3, 25, 26, 27, 28, 29]
    assert [c.parent_id for c in Checkpoint.of(session)] == [None, made[3].id, *(c.id for c in made[25:29])]


def test_what_a_session_stands_on_and_what_is_pinned_stays(storage: Storage, session: Session, run: Run) -> None:
    made = pause_many(run, 10)
    made[1].rollback(actor=ANA)
    made[4].pin()
    prune(storage, keep=0, actor=ANA)
    assert [c.id for c in Checkpoint.of(session)] == [made[1].id, made[4].id, made[9].id], "and the newest of the store"
    made[4].unpin()
    prune(storage, keep=0, actor=ANA)
    assert [c.id for c in Checkpoint.of(session)] == [made[1].id, made[9].id]


def test_each_session_keeps_its_own(storage: Storage, session: Session, run: Run) -> None:
    pause_many(run, 5)
    other = Session.start(session.project, title="other", actor=ANA)
    pause_many(Run.dispatch(other, agent="a", input=1), 5)
    prune(storage, keep=2, actor=ANA)
    assert (len(Checkpoint.of(session)), len(Checkpoint.of(other))) == (2, 2)


def test_age_and_number_together_remove_only_what_both_say(storage: Storage, session: Session, run: Run) -> None:
    made = pause_many(run, 10)
    Checkpoint.update(created_at=Checkpoint.created_at - HOUR_MS).where(Checkpoint.id <= made[6].id).execute()
    before = made[9].created_at - HOUR_MS // 2
    prune(storage, keep=5, before=before, actor=ANA)
    assert [c.id for c in Checkpoint.of(session)] == [c.id for c in made[5:]]
    prune(storage, before=before, actor=ANA)
    assert [c.id for c in Checkpoint.of(session)] == [c.id for c in made[7:]]


def test_pruning_is_audited_and_a_dry_run_changes_nothing(storage: Storage, run: Run) -> None:
    pause_many(run, 6)
    assert prune(storage, keep=2, actor=ANA, dry_run=True).removed == 4
    told = AuditEvent.select().where(AuditEvent.kind == "checkpoint.pruned")
    assert (Checkpoint.select().count(), told.count()) == (6, 0)
    prune(storage, keep=2, actor=ANA)
    event = AuditEvent.get(AuditEvent.kind == "checkpoint.pruned")
    assert json.loads(event.body) == {"before": None, "checkpoints": 4, "keep": 2}
    prune(storage, keep=2, actor=ANA)
    assert told.count() == 1


def test_pruning_needs_to_be_told_what_to_remove(storage: Storage, monkeypatch: Any) -> None:
    with pytest.raises(InvalidValue, match="nothing says which"):
        prune(storage, actor=ANA)
    with pytest.raises(InvalidValue, match="-1 checkpoints"):
        prune(storage, keep=-1, actor=ANA)
    monkeypatch.setattr(operation, "clock_is_behind", lambda: True)
    with pytest.raises(StateError, match="the clock is before the newest row"):
        prune(storage, before=1, actor=ANA)
    prune(storage, keep=1, actor=ANA)


def test_a_branching_tree_keeps_its_shape_over_what_is_removed(storage: Storage, session: Session, run: Run) -> None:
    noise = random.Random(5)
    made: list[Checkpoint] = []
    for step in range(60):
        parent = noise.choice(made) if made else None
        made.append(Checkpoint.pause(run, {"step": step}, parent=parent))
    parents = {c.id: c.parent_id for c in Checkpoint.of(session)}
    for c in noise.sample(made, 12):
        c.pin()
    prune(storage, keep=4, actor=ANA)
    stay = {c.id: c.parent_id for c in Checkpoint.of(session)}
    assert 12 < len(stay) <= 17
    for child, parent in stay.items():
        expected = parents[child]
        while expected is not None and expected not in stay:
            expected = parents[expected]
        assert parent == expected


def test_collecting_removes_what_nothing_needs_and_nothing_else(storage: Storage, run: Run) -> None:
    pause_many(run, 20)
    run.attach("log", "line\n" * 30_000)
    assert collect(storage).blobs == 0
    blobs, size = Blob.select().count(), sum(len(blob.data) for blob in Blob.select())
    prune(storage, keep=1, actor=ANA)
    result = collect(storage)
    left = {blob.digest for blob in Blob.select()}
    assert left == needed()
    assert (result.blobs, result.kept) == (blobs - len(left), len(left))
    assert result.bytes == size - sum(len(blob.data) for blob in Blob.select())
    assert result.missing == []
    assert run.attachment("log") == "line\n" * 30_000
    assert collect(storage).blobs == 0


def test_attachments_that_are_gone_are_collected(storage: Storage, run: Run) -> None:
    run.attach("a", bytes(100_000))
    run.attach("b", b"b")
    RunAttachment.delete().where(RunAttachment.name == "a").execute()
    collect(storage)
    assert {blob.digest for blob in Blob.select()} == needed()
    assert run.attachment("b") == b"b"


def test_a_state_is_whole_though_a_half_collected_one_like_it_lies_there(storage: Storage, run: Run) -> None:
    lost = Checkpoint.pause(run, state(1))
    Checkpoint.pause(run, 0)
    prune(storage, keep=0, actor=ANA)
    assert Checkpoint.select().where(Checkpoint.id == lost.id).count() == 0
    # What a collection that was killed leaves: the root is there, some of what it needs is not.
    gone = [blob.digest for blob in Blob.select() if blob.digest != lost.root][::2]
    Blob.delete().where(Blob.digest.in_(gone)).execute()
    assert Checkpoint.pause(run, state(1)).restore() == state(1)


def test_what_is_paused_between_mark_and_sweep_is_not_collected(storage: Storage, run: Run, monkeypatch: Any) -> None:
    pause_many(run, 4)
    prune(storage, keep=0, actor=ANA)
    real = operation.Collection.sweep
    paused: list[Checkpoint] = []

    def sweep(self: Any, *arguments: Any) -> None:
        paused.append(Checkpoint.pause(run, state(1)))
        run.attach("again", json.dumps(state(2)))
        real(self, *arguments)

    monkeypatch.setattr(operation.Collection, "sweep", sweep)
    result = collect(storage)
    assert result.blobs > 0
    assert paused[0].restore() == state(1)
    assert {blob.digest for blob in Blob.select()} == needed()


def test_a_blob_that_is_missing_is_told_of_and_nothing_is_lost_by_it(storage: Storage, run: Run) -> None:
    made = pause_many(run, 5)
    other = Checkpoint.pause(run, {"quite": ["another"] * 500})
    Blob.delete().where(Blob.digest == made[2].root).execute()
    assert missing(storage) == [made[2].root.hex()]
    result = collect(storage)
    assert result.missing == [made[2].root.hex()]
    assert other.restore() == {"quite": ["another"] * 500}
    assert made[3].restore() == state(3)


def test_collecting_a_large_store_keeps_to_its_memory(
    storage: Storage, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the largest batches, which take the most of it; small ones with their pauses would take a minute here."""
    import tracemalloc

    monkeypatch.setattr(pace, "HOLD_SECONDS", 1)
    with storage.transaction("relaxed"):
        for step in range(60):
            noise = random.Random(step)
            Checkpoint.pause(run, [f"{noise.getrandbits(5_000):x}" for _ in range(60)])
    prune(storage, keep=30, actor=ANA)
    tracemalloc.start()
    result = collect(storage)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (result.blobs, result.kept) > (1_800, 1_800)
    assert peak < 1_500_000


def test_pausing_while_threads_prune_and_collect_loses_nothing(storage: Storage, session: Session, run: Run) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def clean() -> None:
        try:
            while not stop.is_set():
                prune(storage, keep=3, actor=ANA)
                collect(storage)
        except BaseException as error:
            errors.append(error)

    cleaners = [threading.Thread(target=clean) for _ in range(2)]
    for cleaner in cleaners:
        cleaner.start()
    ended = time.monotonic() + 2
    step = 0
    while time.monotonic() < ended and not errors:
        step += 1
        made = Checkpoint.pause(run, state(step % 7))
        assert made.restore() == state(step % 7)
    stop.set()
    for cleaner in cleaners:
        cleaner.join()
    assert errors == []
    assert step > 5
    for checkpoint in Checkpoint.of(session):
        checkpoint.restore()
    collect(storage)
    assert {blob.digest for blob in Blob.select()} == needed()


CLEANER = """
import sys, kagedb
from kagedb.operations.checkpoints import collect, prune
storage = kagedb.connect(url=sys.argv[1])
print("ready", flush=True)
while True:
    prune(storage, keep=2, actor="operator:ana")
    collect(storage)
    print("round", flush=True)
"""


def kill_cleaners(url: str, times: int) -> None:
    """Pause, and kill -9 whoever prunes and collects at another moment each time; then look."""
    noise = random.Random(times)
    with stores.connect(url=url) as storage:
        session = Session.start(Project.add("house", actor=ANA), title="night watch", actor=ANA)
        run = Run.dispatch(session, agent="planner", input={})
        pinned = Checkpoint.pause(run, state(1_000))
        pinned.pin()
        step = 0
        for _ in range(times):
            cleaner = start_python(CLEANER, url)
            wait_for_line(cleaner, "ready")
            ended = time.monotonic() + noise.uniform(0, 0.15)
            while time.monotonic() < ended:
                step += 1
                Checkpoint.pause(run, state(step % 11))
            kill(cleaner)
            for checkpoint in Checkpoint.of(session):
                checkpoint.restore()
        assert missing(storage) == []
        assert pinned.restore() == state(1_000)
        prune(storage, keep=1, actor=ANA)
        collect(storage)
        assert {blob.digest for blob in Blob.select()} == needed()


def test_killed_while_collecting_leaves_nothing_that_dangles_or_stays(migrated_url: str) -> None:
    kill_cleaners(migrated_url, 4)


@pytest.mark.slow
def test_killed_forty_times_while_collecting_leaves_nothing_that_dangles_or_stays(migrated_url: str) -> None:
    kill_cleaners(migrated_url, 40)


def test_a_parent_that_is_on_a_later_page_is_given_and_taken_in_one_batch(
    storage: Storage, session: Session, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "PAGE_CHECKPOINTS", 3)
    made = pause_many(run, 12)
    prune(storage, keep=2, actor=ANA)
    assert [(one.id, one.parent_id) for one in Checkpoint.of(session)] == [
        (made[-2].id, None),
        (made[-1].id, made[-2].id),
    ]


def test_a_parent_that_another_pruning_gives_meanwhile_is_known(
    storage: Storage, session: Session, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has removed the newest page, and not yet the one with the parent that it gave."""
    monkeypatch.setattr(operation, "PAGE_CHECKPOINTS", 3)
    made = pause_many(run, 12)
    real, firsts = operation.remove_page, iter([True])

    def removing(storage: Storage, page: Page, doomed: Any) -> Any:
        for _ in firsts:
            real(storage, replace(page, lineage=deepcopy(page.lineage)), doomed)
        return real(storage, page, doomed)

    monkeypatch.setattr(operation, "remove_page", removing)
    prune(storage, keep=2, actor=ANA)
    assert [(one.id, one.parent_id) for one in Checkpoint.of(session)] == [
        (made[-2].id, None),
        (made[-1].id, made[-2].id),
    ]
