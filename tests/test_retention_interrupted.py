"""Pruning beside others who write, prune and die: nothing that stays is harmed, and the next one ends it."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from kagedb import Checkpoint, Project, Run, Session, Transcript
from kagedb.models import Blob
from kagedb.operations import pace as pacing
from kagedb.operations.checkpoints import missing
from kagedb.operations.pace import Pace, Stopped
from kagedb.operations.retention import Limits, plan, prune
from programs import kill, start_python, wait_for_line
from retained import ANA, HOSTILE, assert_sound, days_later, lived, needed, of, project

if TYPE_CHECKING:
    from kagedb.storage import Storage

PRUNER = """
import sys, kagedb
from kagedb.identity import now_ms
from kagedb.operations import retention
retention.now_ms = lambda: now_ms() + 400 * 86_400_000
limits = retention.Limits(sessions_days=300, transcripts_days=1, runs_days=1, checkpoints_days=1, checkpoints_keep=1)
storage = kagedb.connect(url=sys.argv[1])
print("ready", flush=True)
retention.prune(
    storage, retention.plan(storage, limits), actor="operator:ana", progress=lambda *_: print("batch", flush=True)
)
print("done", flush=True)
"""


def killed(url: str, patch: pytest.MonkeyPatch, times: int) -> None:
    """Kill -9 whoever prunes at another moment each time; afterwards nothing is broken, and another pruning ends it."""
    noise = random.Random(times)
    with kagedb.connect(url=url) as storage:
        owner = project()
        kept = lived(owner)
        kept.pin()
        was = of(kept)
    cut = 0
    for number in range(times):
        with kagedb.connect(url=url) as storage:
            owner = Project.named("house")
            for seed in range(4):
                lived(owner, seed=100 * number + seed, end=seed != 0)
        pruner = start_python(PRUNER, url)
        wait_for_line(pruner, "ready")
        for _ in range(noise.randrange(4)):
            wait_for_line(pruner, "batch")
        time.sleep(noise.uniform(0, 0.02))
        cut += pruner.poll() is None
        kill(pruner)
        with kagedb.connect(url=url) as storage:
            assert_sound(storage)
            assert missing(storage) == []
            assert of(kept) == was
    assert cut
    days_later(patch, 400)
    limits = Limits(sessions_days=300, transcripts_days=1, runs_days=1, checkpoints_days=1, checkpoints_keep=1)
    with kagedb.connect(url=url) as storage:
        prune(storage, plan(storage, limits), actor=ANA)
        assert plan(storage, limits).empty()
        assert_sound(storage)
        assert {blob.digest for blob in Blob.select()} == needed()
        assert of(kept) == was


def test_killed_at_any_moment_it_leaves_a_store_that_is_whole_and_the_next_ends_it(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(migrated_url, monkeypatch, 2)


@pytest.mark.slow
def test_killed_thirty_times_it_leaves_a_store_that_is_whole(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(migrated_url, monkeypatch, 30)


def test_asked_to_end_it_does_so_after_any_batch_and_says_what_went(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    for seed in range(3):
        lived(owner, seed=seed)
    days_later(monkeypatch, 2)
    monkeypatch.setattr(pacing, "MOST_UNITS", 10)
    whole = plan(storage, HOSTILE).classes
    stops, went, noise = 0, 0, random.Random(0)
    while not (found := plan(storage, HOSTILE)).empty():
        # Collecting asks a few times before it has removed anything.
        asked = iter([False] * noise.randrange(12))
        done = prune(storage, found, actor=ANA, stop=partial(next, asked, True))
        assert done.stopped or plan(storage, HOSTILE).empty()
        stops += done.stopped
        went += sum(going.count() for going in done.classes.values())
        assert_sound(storage)
    assert stops >= 3
    assert went == sum(going.count() for going in whole.values()), "each row was said once"


def test_two_at_once_and_a_daemon_that_writes_do_each_other_no_harm(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    for seed in range(4):
        lived(owner, seed=seed)
    session = Session.start(owner, title="goes on", actor=ANA)
    run = Run.dispatch(session, agent="planner", input={"kept": True})
    recorder = Transcript.open(session, 80, 24)
    days_later(monkeypatch, 400)
    errors: list[BaseException] = []
    stop = threading.Event()
    limits = Limits(sessions_days=1, transcripts_days=1, runs_days=1, checkpoints_days=1, checkpoints_keep=2)

    def clean() -> None:
        try:
            while not stop.is_set():
                prune(storage, plan(storage, limits), actor=ANA)
        except BaseException as error:
            errors.append(error)

    cleaners = [threading.Thread(target=clean) for _ in range(2)]
    for cleaner in cleaners:
        cleaner.start()
    written: list[bytes] = []
    ended = time.monotonic() + 1.5
    try:
        while time.monotonic() < ended and not errors:
            written.append(f"line {len(written)}\r\n".encode())
            recorder.write(written[-1])
            recorder.flush()
            made = Checkpoint.pause(run, {"step": len(written) % 5, "text": "x" * 4_000})
            assert made.restore()["step"] == len(written) % 5
            lived(owner, runs=1, pauses=1)
    finally:
        stop.set()
        for cleaner in cleaners:
            cleaner.join()
    assert errors == []
    recorder.close()
    assert b"".join(recorder.transcript.raw()) == b"".join(written)
    assert Run.by_id(run.id).input == {"kept": True}
    assert len(written) > 3
    prune(storage, plan(storage, limits), actor=ANA)
    assert_sound(storage)
    assert {blob.digest for blob in Blob.select()} == needed()


def test_a_session_that_is_pinned_meanwhile_loses_nothing_more(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = project()
    session = lived(owner)
    lived(owner, runs=1)
    days_later(monkeypatch, 400)
    found = plan(storage, HOSTILE)
    assert found.classes["sessions"].count()
    session.pin()
    was = of(session)
    done = prune(storage, found, actor=ANA)
    assert of(session) == was
    assert "session" not in done.classes["sessions"].rows
    assert_sound(storage)
    assert {blob.digest for blob in Blob.select()} == needed(), "and its blobs were asked for again"


# How long a batch is.


class Clock:
    """A clock for Pace: a unit takes `unit_seconds`, whoever sleeps is told of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        patch.setattr(pacing, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class NoStorage:
    """A transaction that costs nothing: what a batch takes is for the clock to say."""

    def transaction(self, durability: str) -> Any:
        from contextlib import nullcontext

        assert durability == "relaxed"
        return nullcontext()


@pytest.mark.parametrize("unit_ms", [0.001, 0.05, 0.4, 3.0, 20.0])
def test_batches_come_to_what_the_host_does_in_the_time_of_a_commit(
    unit_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, pace, held = Clock(monkeypatch), Pace(), []
    for batch, cost in pace.batches([(n, 1) for n in range(20_000 if unit_ms < 1 else 100)]):
        with pace.turn(NoStorage(), cost):  # type: ignore[arg-type]
            clock.now += len(batch) * unit_ms / 1000
        held.append(len(batch) * unit_ms)
        pace.pause()
        pause = max(pacing.SHORTEST_PAUSE_SECONDS, held[-1] / 1000 * pacing.PAUSE_FACTOR * 0.999)
        assert clock.slept[-1] >= min(pause, pacing.LONGEST_PAUSE_SECONDS)
    probes = held[pacing.PROBE_EVERY :: pacing.PROBE_EVERY]
    settled = [one for number, one in enumerate(held[:-1]) if number > 8 and number % pacing.PROBE_EVERY]
    assert settled and probes
    assert max(settled) <= max(pacing.HOLD_SECONDS * 1000 * 1.01, unit_ms)
    assert max(probes[1:], default=0) <= max(2 * pacing.HOLD_SECONDS * 1000, 2 * unit_ms) + 2 * unit_ms
    if 0.005 < unit_ms < 1:
        assert max(settled) >= pacing.HOLD_SECONDS * 1000 / 2


@pytest.mark.parametrize("empty_ms", [2.0, 8.0, 40.0])
def test_a_host_on_which_an_empty_transaction_takes_long_does_not_come_to_single_rows(
    empty_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, pace, units = Clock(monkeypatch), Pace(), []
    noise = random.Random(1)
    for batch, cost in pace.batches([(n, 1) for n in range(3_000)]):
        with pace.turn(NoStorage(), cost):  # type: ignore[arg-type]
            clock.now += (empty_ms * noise.uniform(0.9, 1.1) + len(batch) * 0.05) / 1000
        units.append(len(batch))
    assert len(units) < 300, "thirty units fit into the time of a commit"
    assert max(units) <= 400


def test_one_stall_makes_the_next_batch_small_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace()
    pace.units = 1_000
    with pace.turn(NoStorage(), 1_000):  # type: ignore[arg-type]
        clock.now += 0.25
    assert pace.units == 6
    assert pace.longest_seconds == 0.25


def test_a_large_item_is_a_batch_of_its_own() -> None:
    pace = Pace()
    pace.units = 10
    items = [("a", 4), ("b", 4), ("c", 4), ("d", 500), ("e", 1)]
    assert list(pace.batches(items)) == [(["a", "b"], 8), (["c"], 4), (["d"], 500), (["e"], 1)]


def test_a_pause_ends_the_work_that_was_asked_to_stop() -> None:
    with pytest.raises(Stopped):
        Pace(lambda: True).pause()
