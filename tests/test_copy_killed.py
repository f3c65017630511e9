"""`kaged copy` killed at any moment: the target is whole or as it was, and nothing is in the way of the next try."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

import kagedb
from commands import answer_json, in_process
from contents import digests_at
from kagedb import AuditEvent
from kagedb.operations import transfer
from kagedb.settings import load
from stored import ACTOR, fill_fully

if TYPE_CHECKING:
    from places import Places


def copy_in_a_child(url: str, target: str, kill_after_s: float | None = None) -> bool:
    """Whether it came to its end. A fork: nothing is open here, and a program would take longer to start."""
    child = os.fork()
    if child == 0:
        try:
            with kagedb.connect(url=url) as storage:
                transfer.copy(storage, load(url=target), actor=ACTOR)
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def killed(url: str, target_engine: str, places: Places, times: int) -> None:
    """At moments spread over the whole of a copy, some before and after its end; half of them into an empty store."""
    took = []
    for _ in range(2):
        began = time.monotonic()
        assert copy_in_a_child(url, places.empty(target_engine))
        took.append(time.monotonic() - began)
    unfinished = 0
    for number in range(times):
        was_there = number % 2 == 1
        target = places.migrated(target_engine) if was_there else places.empty(target_engine)
        before = digests_at(target) if was_there else None
        moment = (number + random.random()) / times * min(took)
        finished = copy_in_a_child(url, target, moment)
        try:
            now = digests_at(target)
        except kagedb.StorageNotFound:
            assert not was_there
            now = None
        if now == before:
            assert not finished
            unfinished += 1
            # Whatever was left in the way of the next try is not in its way.
            assert in_process("--url", url, "copy", "--to", target).exit_code == 0
            now = digests_at(target)
        assert now is not None
        source = digests_at(url)
        assert {name for name in source if now[name] != source[name]} <= {"audit_event"}
        assert answer_json(target, "audit", "verify")["result"] == "holds"
    assert unfinished > times // 3, "the moments were not those of the copy"


@pytest.fixture(params=["same", "other"])
def target_engine(engine: str, request: pytest.FixtureRequest) -> str:
    return engine if request.param == "same" else {"sqlite": "postgres", "postgres": "sqlite"}[engine]


def test_killed_at_any_moment_the_target_is_as_it_was_or_whole(
    migrated_url: str, target_engine: str, places: Places
) -> None:
    fill_fully(migrated_url)
    killed(migrated_url, target_engine, places, 4)


@pytest.mark.slow
def test_killed_at_twenty_moments_the_target_is_as_it_was_or_whole(
    migrated_url: str, target_engine: str, places: Places
) -> None:
    fill_fully(migrated_url)
    with kagedb.connect(url=migrated_url) as storage, storage.transaction():
        for number in range(5000):
            AuditEvent.record("policy.decision", actor="agent:planner", body={"number": number, "text": "x" * 200})
    killed(migrated_url, target_engine, places, 20)
