"""Plugin state: keys, values and revisions, alike on both engines; quotas, expiry, compare-and-set, moving house."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kagedb
from kagedb import Conflict, InvalidValue, LimitExceeded, NotFound, Plugin, Project, StateError
from kagedb.identity import new_ulid
from kagedb.models import PluginState, plugin_state
from kagedb.models.plugin_state import Entry, State, sweep
from programs import start_python, wait_for_line

if TYPE_CHECKING:
    from kagedb.storage import Storage
    from places import Places

ANA = "operator:ana"


def install(project: Project, name: str = "weather") -> Plugin:
    return Plugin.install(project, {"name": name, "version": "1.0", "permissions": ["state"]}, actor=ANA)


@pytest.fixture
def plugin(storage: Storage) -> Plugin:
    return install(Project.add("house", actor=ANA))


@pytest.fixture
def state(plugin: Plugin) -> State:
    return plugin.state


class Clock:
    """The time as plugin state sees it; a test moves it on."""

    ms = 2_000_000_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(plugin_state, "now_ms", clock)
    return clock


def limit(monkeypatch: pytest.MonkeyPatch, storage: Storage, **limits: int) -> None:
    monkeypatch.setattr(storage.database, "limits", storage.database.limits._replace(**limits))


VALUES: list[Any] = [None, True, 0, 1.0, -0.0, "", "ü\u2028", [], {}, {"b": [1, {"a": None}], "a": 1e100}, 2**63 - 1]


def test_what_is_set_is_got_with_its_revision(state: State) -> None:
    for number, value in enumerate(VALUES):
        assert state.set(f"key {number}", value) == 1
        found, revision = state.get(f"key {number}")
        assert (repr(found), revision) == (repr(value), 1)
    assert state.set("key 0", 5) == 2
    assert state.get("key 0") == (5, 2)


def test_an_absent_key_is_the_default_with_revision_zero(state: State) -> None:
    assert state.get("nothing") == (None, 0)
    assert state.get("nothing", []) == ([], 0)


def test_two_plugins_and_two_projects_have_states_of_their_own(plugin: Plugin) -> None:
    others = [install(plugin.project, "other"), install(Project.add("garden", actor=ANA))]
    plugin.state.set("a", 1)
    for other in others:
        assert other.state.get("a") == (None, 0)
        other.state.set("a", 2)
        other.state.wipe()
    assert plugin.state.get("a") == (1, 1)


def test_compare_and_set_takes_only_the_revision_that_is_there(state: State) -> None:
    first = state.set("k", "a", if_revision=0)
    with pytest.raises(Conflict, match="the key 'k' has revision 1, not 0"):
        state.set("k", "b", if_revision=0)
    second = state.set("k", "b", if_revision=first)
    for stale in (0, first, 3):
        with pytest.raises(Conflict):
            state.set("k", "c", if_revision=stale)
        with pytest.raises(Conflict):
            state.delete("k", if_revision=stale)
    assert state.get("k") == ("b", second)
    assert state.delete("k", if_revision=second)


def test_deleting_says_whether_the_key_was_there(state: State) -> None:
    state.set("k", 1)
    assert state.delete("k")
    assert not state.delete("k")
    assert state.get("k") == (None, 0)
    assert state.delete("never", if_revision=0) is False


def test_a_revision_is_never_given_to_another_value(state: State, clock: Clock) -> None:
    mine = state.set("lock", "mine", ttl=10)
    clock.ms += 10_001
    theirs = state.set("lock", "theirs", ttl=10, if_revision=0)
    with pytest.raises(Conflict):
        state.delete("lock", if_revision=mine)
    state.delete("lock", if_revision=theirs)
    sweep()
    again = state.set("lock", "again")
    assert len({mine, theirs, again}) == 3
    with pytest.raises(Conflict):
        state.set("lock", "x", if_revision=theirs)


def test_an_expired_key_is_absent_in_the_statement_that_looks(state: State, clock: Clock) -> None:
    state.set("a", 1, ttl=1)
    state.set("b", 2, ttl=0.5)
    state.set("c", 3)
    clock.ms += 500
    assert (state.get("a")[0], state.get("b")) == (1, (None, 0))
    clock.ms += 500
    assert state.get("a") == (None, 0)
    assert [entry.key for entry in state.list()] == ["c"]
    assert state.usage().keys == 1
    assert state.delete("a") is False
    assert state.increment("a", 5) == 5
    assert json.loads(state.export().splitlines()[0])["keys"] == 2


def test_setting_without_a_ttl_makes_a_key_stay(state: State, clock: Clock) -> None:
    state.set("k", 1, ttl=1)
    state.set("k", 2)
    state.increment("n", ttl=1)
    state.increment("n")
    clock.ms += 5_000
    assert state.get("k")[0] == 2
    assert state.get("n") == (None, 0), "incrementing leaves the time as it is"


def test_a_ttl_that_is_no_time_is_refused(state: State) -> None:
    for ttl in (0, -1, float("nan"), float("inf"), True, "5", 1e300):
        with pytest.raises(InvalidValue, match="a ttl is a number of seconds"):
            state.set("k", 1, ttl=ttl)  # type: ignore[arg-type]
    assert state.get("k") == (None, 0)


def test_what_is_long_absent_is_swept_by_somebodys_write(
    storage: Storage, plugin: Plugin, clock: Clock, monkeypatch: Any
) -> None:
    silent = install(plugin.project, "silent").state
    for number in range(5):
        silent.set(f"k{number}", "secret", ttl=1)
    plugin.state.set("gone", "secret")
    plugin.state.delete("gone")
    assert "secret" not in [row.value for row in PluginState.select().where(PluginState.key == "gone")]
    clock.ms += plugin_state.GRACE_MS + 1_001
    monkeypatch.setattr(plugin_state, "_last_sweep", 0.0)
    plugin.state.set("stays", 1)
    assert [row.key for row in PluginState.select()] == ["stays"]


HOSTILE = [
    "",
    "%",
    "%%",
    "_",
    "a_b",
    "a%b",
    "axb",
    "\\",
    "\\%",
    "'",
    '"',
    "'; DROP TABLE plugin_state; --",
    "a b",
    " a",
    "a\n",
    "\x01",
    "\x7f",
    "A",
    "a",
    "ä",
    "a\u0308",
    "Z",
    "ß",
    "ss",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U00010000",
    "\U0010ffff",
    "\U0010ffff\U0010ffff",
    "🦊",
    "ключ",
    "x" * 500,
    "🦊" * 500,
]


def test_hostile_keys_are_keys_like_others(state: State) -> None:
    for number, key in enumerate(HOSTILE):
        state.set(key, number)
    assert [entry.key for entry in state.list(limit=1_000)] == sorted(HOSTILE)
    for number, key in enumerate(HOSTILE):
        assert state.get(key) == (number, 1)
    prefixes = {key[:length] for key in HOSTILE for length in range(4)} | {"\ud7ff", "\U0010ffff"}
    for prefix in prefixes:
        expected = sorted(key for key in HOSTILE if key.startswith(prefix))
        assert [entry.key for entry in state.list(prefix, limit=1_000)] == expected, prefix
    for number, key in enumerate(HOSTILE):
        assert state.increment(key) == number + 1
        assert state.delete(key)
    assert state.list() == []


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)


@pytest.mark.sqlite_only  # the engines' orders are compared by the test above; this looks for keys that it forgot
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(KEYS, max_size=20), st.data())
def test_any_key_is_found_by_any_of_its_prefixes(state: State, keys: set[str], data: Any) -> None:
    state.wipe()
    for key in keys:
        state.set(key, 0)
    prefix = data.draw(st.sampled_from(sorted({key[:n] for key in keys for n in range(4)} | {""})))
    after = data.draw(st.none() | st.sampled_from(sorted(keys)) if keys else st.none())
    expected = [key for key in sorted(keys) if key.startswith(prefix) and (after is None or key > after)]
    assert [entry.key for entry in state.list(prefix, after=after)] == expected


def test_a_key_that_no_engine_can_keep_is_refused(state: State) -> None:
    for key in ("a\0", "\ud800", "x" * 501, 5, None):
        with pytest.raises(InvalidValue):
            state.set(key, 1)  # type: ignore[arg-type]
    assert state.list() == []


def test_a_long_list_is_read_page_by_page(state: State) -> None:
    with state.transaction():
        for number in range(250):
            state.set(f"item/{number:03}", number)
        state.set("item0", "other")
    found: list[Entry] = []
    while page := state.list("item/", after=found[-1].key if found else None, limit=100):
        found += page
    assert [entry.value for entry in found] == list(range(250))
    assert state.list("item/", after="zzz") == []
    assert len(state.list("item/", after="a")) == 100, "what is before the prefix changes nothing"


def test_incrementing_counts_integers_only(state: State) -> None:
    assert [state.increment("n"), state.increment("n", 5), state.increment("n", -10)] == [1, 6, -4]
    assert state.get("n") == (-4, 3)
    for value in ("1", 1.0, True, None, [1]):
        state.set("other", value)
        with pytest.raises(InvalidValue, match="is no integer"):
            state.increment("other")
    state.set("n", 2**63 - 1)
    with pytest.raises(InvalidValue, match="more than 64 bits"):
        state.increment("n")
    with pytest.raises(InvalidValue, match="an increment is an integer"):
        state.increment("n", 1.5)  # type: ignore[arg-type]
    assert state.get("n")[0] == 2**63 - 1


def test_a_transaction_is_all_or_nothing(state: State) -> None:
    state.set("a", 1)
    with pytest.raises(ZeroDivisionError), state.transaction():
        state.set("a", 2)
        state.increment("b")
        state.delete("a")
        raise ZeroDivisionError
    assert ([entry.key for entry in state.list()], state.get("a")) == (["a"], (1, 1))
    with state.transaction() as same:
        same.set("a", 2)
        same.increment("b")
    assert [(entry.key, entry.value) for entry in state.list()] == [("a", 2), ("b", 1)]


def test_the_quota_of_keys_is_hard(storage: Storage, state: State, monkeypatch: Any) -> None:
    limit(monkeypatch, storage, plugin_keys=3)
    for key in "abc":
        state.set(key, 1)
    for refused in (lambda: state.set("d", 1), lambda: state.increment("d")):
        with pytest.raises(LimitExceeded, match=r"would have 4 keys; the limit is 3; .*raise limits\.plugin_keys"):
            refused()
    state.set("a", "another")
    state.delete("b")
    state.set("d", 1)
    assert state.usage().keys == 3


def test_the_quota_of_bytes_is_hard_and_counts_what_is_stored(storage: Storage, state: State, monkeypatch: Any) -> None:
    limit(monkeypatch, storage, plugin_bytes=1_000)
    state.set("ü", "ü" * 400)
    assert state.usage() == plugin_state.Usage(1, 2 + 802, 10_000, 1_000)
    with pytest.raises(LimitExceeded, match=r"would have 1,007 bytes; the limit is 1,000; .*limits\.plugin_bytes"):
        state.set("k", "x" * 200)
    assert state.get("k") == (None, 0)
    state.set("k", "x" * 193)
    with pytest.raises(LimitExceeded):
        state.set("k", "x" * 194)
    state.set("k", "x" * 10)
    state.set("ü", "x")
    assert state.usage().bytes == 2 + 3 + 1 + 12


def test_what_has_expired_or_is_deleted_counts_no_more(
    storage: Storage, state: State, clock: Clock, monkeypatch: Any
) -> None:
    limit(monkeypatch, storage, plugin_keys=2, plugin_bytes=300)
    state.set("a", "x" * 200, ttl=1)
    state.set("b", 1)
    clock.ms += 1_000
    state.set("c", "x" * 200)
    state.delete("c")
    state.set("d", "x" * 200)
    assert state.usage().keys == 2


def test_an_uninstalled_plugin_leaves_no_row_and_takes_none(plugin: Plugin) -> None:
    state = plugin.state
    state.set("a", 1)
    state.set("b", 1, ttl=100)
    state.delete("a")
    plugin.uninstall(actor=ANA)
    for verb in (
        lambda: state.set("a", 1),
        lambda: state.increment("a"),
        lambda: state.set("a", 1, flush_seconds=5),
        lambda: state.load(EMPTY),
    ):
        with pytest.raises(StateError, match="the plugin 'weather' is uninstalled"):
            verb()
    assert PluginState.select().count() == 0
    stranger = Plugin(id=new_ulid(), name="stranger")
    with pytest.raises(NotFound, match="there is no plugin"):
        stranger.state.set("a", 1)


EMPTY = '{"kagedb":"plugin state","version":1,"plugin":"weather","keys":0}\n'


def test_wiping_removes_every_key(plugin: Plugin) -> None:
    state = plugin.state
    assert state.export() == EMPTY
    state.set("a", 1)
    state.set("b", 1)
    state.delete("b")
    assert state.wipe() == 1
    assert PluginState.select().count() == 0
    assert state.set("a", 1) == 1


def fill(state: State) -> None:
    noise = random.Random(4)
    for number, key in enumerate(HOSTILE):
        for value in [*VALUES[: number % 3], VALUES[number % len(VALUES)]]:
            state.set(key, value, ttl=noise.choice([None, 10_000]))
    state.set("expired", 1, ttl=0.001)
    state.set("deleted", 1)
    state.delete("deleted")


def test_an_export_comes_out_of_the_other_engine_byte_for_byte(engine: str, places: Places) -> None:
    with kagedb.connect(url=places.migrated(engine)):
        state = install(Project.add("house", actor=ANA)).state
        fill(state)
        exported = state.export()
        listed = state.list(limit=1_000)
    other = "postgres" if engine == "sqlite" else "sqlite"
    with kagedb.connect(url=places.migrated(other)):
        state = install(Project.add("elsewhere", actor=ANA)).state
        assert state.load(exported) == len(HOSTILE)
        assert state.export() == exported
        assert state.list(limit=1_000) == listed


def test_loading_takes_the_place_of_what_was_there(state: State) -> None:
    state.set("a", 1)
    exported = state.export()
    stale = state.set("a", 2)
    other = state.set("b", 3)
    assert state.load(exported) == 1
    assert state.get("a")[0] == 1
    assert state.get("b") == (None, 0)
    for key, revision in (("a", stale), ("a", 1), ("b", other)):
        with pytest.raises(Conflict):
            state.set(key, "x", if_revision=revision)


def test_what_has_expired_since_the_export_is_not_loaded(state: State, clock: Clock) -> None:
    state.set("short", 1, ttl=1)
    state.set("long", 1, ttl=100)
    exported = state.export()
    clock.ms += 1_000
    assert state.load(exported) == 1
    assert [entry.key for entry in state.list()] == ["long"]


WRONG = [
    "",
    "\n",
    "{}",
    "[]",
    "not json",
    '{"kagedb":"plugin state","version":2,"plugin":"weather","keys":0}',
    '{"kagedb":"plugin state","version":1,"plugin":"weather","keys":1}\n',
    EMPTY + '{"key":"a","revision":1,"expires_at":null,"value":1}\n',
    EMPTY.replace("0", "1") + '{"key":"a","revision":1,"value":1}\n',
    EMPTY.replace("0", "1") + '{"key":"a","revision":0,"expires_at":null,"value":1}\n',
    EMPTY.replace("0", "1") + '{"key":"a","revision":"1","expires_at":null,"value":1}\n',
    EMPTY.replace("0", "1") + '{"key":"a","revision":1,"expires_at":1.5,"value":1}\n',
    EMPTY.replace("0", "1") + '{"key":"a\\u0000","revision":1,"expires_at":null,"value":1}\n',
    EMPTY.replace("0", "1") + '{"key":"a","revision":1,"expires_at":null,"value":NaN}\n',
    EMPTY.replace("0", "1") + '{"key":5,"revision":1,"expires_at":null,"value":1}\n',
    EMPTY.replace("0", "2") + '{"key":"a","revision":1,"expires_at":null,"value":1}\n' * 2,
]


def test_what_is_no_export_is_refused_and_nothing_changes(storage: Storage, state: State, monkeypatch: Any) -> None:
    state.set("a", "kept")
    for text in WRONG:
        with pytest.raises(InvalidValue):
            state.load(text)
    big = EMPTY.replace("0", "1") + json.dumps({"key": "b", "revision": 1, "expires_at": None, "value": "x" * 2_000})
    limit(monkeypatch, storage, plugin_bytes=1_000)
    with pytest.raises(LimitExceeded, match=r"limits\.plugin_bytes"):
        state.load(big)
    assert [(entry.key, entry.value, entry.revision) for entry in state.list()] == [("a", "kept", 1)]


COUNTER = """
import sys, kagedb
from kagedb import Conflict, Plugin, Project
storage = kagedb.connect(url=sys.argv[1])
state = Plugin.named(Project.named("house"), "weather").state
print("ready", flush=True)
input()
for _ in range(int(sys.argv[2])):
    while True:
        value, revision = state.get("n", 0)
        try:
            state.set("n", value + 1, if_revision=revision)
            break
        except Conflict:
            pass
    state.increment("m")
print("done", flush=True)
"""


def count_up(url: str, processes: int, times: int) -> None:
    with kagedb.connect(url=url):
        state = install(Project.add("house", actor=ANA)).state
        counters = [start_python(COUNTER, url, str(times)) for _ in range(processes)]
        for counter in counters:
            wait_for_line(counter, "ready")
        for counter in counters:
            assert counter.stdin
            counter.stdin.write("\n")
            counter.stdin.flush()
        for counter in counters:
            wait_for_line(counter, "done", 120)
        total = processes * times
        assert (state.get("n"), state.get("m")) == ((total, total), (total, total))


def test_eight_processes_count_to_exactly_their_sum(migrated_url: str) -> None:
    count_up(migrated_url, 8, 25)


@pytest.mark.slow
def test_eight_processes_count_to_exactly_their_sum_for_long(migrated_url: str) -> None:
    count_up(migrated_url, 8, 500)
