"""Plugin state that is held back (`flush_seconds`): seen at once, written together, at the latest when closing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from kagedb import Conflict, InvalidValue, LimitExceeded, Plugin, Project, StorageBusy
from kagedb.models import PluginState, plugin_state, write_behind
from kagedb.models.plugin_state import PENDING, State
from programs import kill, start_python, wait_for_line

if TYPE_CHECKING:
    from kagedb.storage import Storage

ANA = "operator:ana"


def install(project: Project) -> Plugin:
    return Plugin.install(project, {"name": "weather", "version": "1.0", "permissions": ["state"]}, actor=ANA)


@pytest.fixture
def plugin(storage: Storage) -> Iterator[Plugin]:
    yield install(Project.add("house", actor=ANA))


@pytest.fixture
def state(plugin: Plugin) -> State:
    return plugin.state


def stored(state: State) -> dict[str, Any]:
    """What is in the table, past what is held."""
    return {row.key: row.value for row in PluginState.select().where(PluginState.plugin == state.id)}


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_what_is_held_is_read_at_once_and_written_later(state: State) -> None:
    for number in range(50):
        assert state.set("n", number, flush_seconds=0.3) == PENDING
        assert state.get("n") == (number, PENDING)
    assert stored(state) == {}
    wait_until(lambda: stored(state))
    assert state.get("n") == (49, 1), "fifty values, one write"


def test_the_shortest_wish_writes_everything(state: State) -> None:
    state.set("a", 1, flush_seconds=3_000)
    state.set("b", 2, flush_seconds=0.1)
    wait_until(lambda: stored(state) == {"a": 1, "b": 2})


def test_closing_the_store_writes_what_is_held(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        install(Project.add("house", actor=ANA)).state.set("a", 1, flush_seconds=3_000)
    with kagedb.connect(url=migrated_url):
        assert Plugin.named(Project.named("house"), "weather").state.get("a") == (1, 1)


@pytest.mark.parametrize(
    "verb",
    [
        lambda state: state.list(),
        lambda state: state.usage(),
        lambda state: state.export(),
        lambda state: state.flush(),
        lambda state: state.increment("n"),
        lambda state: state.delete("other"),
        lambda state: state.set("other", 1),
    ],
    ids=["list", "usage", "export", "flush", "increment", "delete", "set"],
)
def test_other_verbs_see_what_is_held(state: State, verb: Any) -> None:
    state.set("n", 5, flush_seconds=3_000)
    verb(state)
    assert stored(state)["n"] in (5, 6)
    assert state.get("n")[1] >= 1


def test_compare_and_set_cannot_take_a_held_value_for_a_stored_one(state: State) -> None:
    state.set("n", 1)
    state.set("n", 2, flush_seconds=3_000)
    value, revision = state.get("n")
    assert value == 2
    for stale in (revision, 1):
        with pytest.raises(Conflict, match="has revision 2"):
            state.set("n", 3, if_revision=stale)
    value, revision = state.get("n")
    state.set("n", 3, if_revision=revision)
    assert state.get("n") == (3, 3)
    with pytest.raises(InvalidValue, match="leave out flush_seconds"):
        state.set("n", 4, if_revision=3, flush_seconds=1)


def test_a_later_set_wins_over_a_held_one(state: State) -> None:
    state.set("n", "held", flush_seconds=0.2)
    state.set("n", "now")
    time.sleep(0.5)
    assert state.get("n")[0] == "now"
    state.set("n", "held", flush_seconds=0.2)
    state.delete("n")
    time.sleep(0.5)
    assert state.get("n") == (None, 0)


def test_a_rolled_back_transaction_does_not_lose_what_was_held(state: State) -> None:
    state.set("n", 1, flush_seconds=3_000)
    with pytest.raises(ZeroDivisionError), state.transaction():
        assert state.get("n")[0] == 1
        raise ZeroDivisionError
    assert (state.get("n"), stored(state)) == ((1, PENDING), {})
    state.flush()
    assert stored(state) == {"n": 1}


def test_inside_a_transaction_nothing_is_held(state: State) -> None:
    with pytest.raises(ZeroDivisionError), state.transaction():
        assert state.set("n", 1, flush_seconds=0.1) == 1
        raise ZeroDivisionError
    time.sleep(0.3)
    assert state.get("n") == (None, 0)


def test_what_is_held_expires_from_when_it_was_set(state: State) -> None:
    state.set("n", 1, ttl=0.2, flush_seconds=3_000)
    time.sleep(0.25)
    assert state.get("n") == (None, 0)
    state.flush()
    assert state.get("n") == (None, 0)


def test_the_quota_is_hard_before_anything_is_held(storage: Storage, state: State, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage.database, "limits", storage.database.limits._replace(plugin_keys=3, plugin_bytes=300))
    state.set("a", 1)
    state.set("b", 1, flush_seconds=3_000)
    state.set("c", 1, flush_seconds=3_000)
    for _ in range(2):
        with pytest.raises(LimitExceeded, match="4 keys"):
            state.set("d", 1, flush_seconds=3_000)
    state.set("a", "x" * 200, flush_seconds=3_000)
    with pytest.raises(LimitExceeded, match="bytes"):
        state.set("b", "x" * 200, flush_seconds=3_000)
    state.set("a", 2, flush_seconds=3_000)
    state.set("b", "x" * 200, flush_seconds=3_000)
    assert state.usage().keys == 3


def test_a_wrong_flush_time_is_refused(state: State) -> None:
    for seconds in (0, -1, float("nan"), 3_601):
        with pytest.raises(InvalidValue, match="flush_seconds is"):
            state.set("a", 1, flush_seconds=seconds)


def test_what_is_held_of_an_uninstalled_plugin_is_dropped(plugin: Plugin) -> None:
    plugin.state.set("a", 1, flush_seconds=0.2)
    plugin.uninstall(actor=ANA)
    again = install(plugin.project)
    time.sleep(0.4)
    assert again.state.get("a") == (None, 0)
    again.state.set("b", 1, flush_seconds=0.2)
    again.state.wipe()
    time.sleep(0.4)
    assert again.state.list() == []


def test_a_store_that_cannot_be_written_is_tried_again(state: State, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(write_behind, "RETRY_SECONDS", 0.2)
    failing = [True, True]

    def busy(self: State, *arguments: Any) -> int:
        if failing:
            failing.pop()
            raise StorageBusy("somebody writes", "wait")
        return real(self, *arguments)

    real = State._put
    monkeypatch.setattr(plugin_state.State, "_put", busy)
    with caplog.at_level(logging.ERROR, "kagedb"):
        state.set("a", 1, flush_seconds=0.05)
        wait_until(lambda: stored(state) == {"a": 1})
    assert caplog.messages == ["plugin state cannot be written, and is tried again: somebody writes; wait"] * 2


def test_a_forked_child_does_not_write_what_its_parent_holds(storage: Storage, state: State) -> None:
    state.set("n", "parent", flush_seconds=3_000)
    child = os.fork()
    if not child:
        try:
            assert state.get("n") == (None, 0)
            state.set("child", 1, flush_seconds=3_000)
            storage.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert stored(state) == {"child": 1}
    state.flush()
    assert stored(state) == {"child": 1, "n": "parent"}


HOLDER = """
import sys, time, kagedb
from kagedb import Plugin, Project
storage = kagedb.connect(url=sys.argv[1])
state = Plugin.named(Project.named("house"), "weather").state
state.set("kept", 1)
state.set("early", 1, flush_seconds=0.2)
time.sleep(0.6)
state.set("lost", 1, flush_seconds=60)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_loses_what_it_held_and_nothing_else(state: State, migrated_url: str) -> None:
    holder = start_python(HOLDER, migrated_url)
    wait_for_line(holder, "held")
    kill(holder)
    assert sorted(stored(state)) == ["early", "kept"]


EXITING = """
import sys, kagedb
from kagedb import Plugin, Project
storage = kagedb.connect(url=sys.argv[1])
Plugin.named(Project.named("house"), "weather").state.set("a", 1, flush_seconds=60)
"""


def test_a_program_that_ends_without_closing_writes_what_it_held(state: State, migrated_url: str) -> None:
    assert start_python(EXITING, migrated_url).wait(30) == 0
    assert stored(state) == {"a": 1}
