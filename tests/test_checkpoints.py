"""Checkpoints: what is paused comes back, at the cost of what changed; the verbs that move a session about."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagedb import (
    AuditEvent,
    Checkpoint,
    InvalidValue,
    LimitExceeded,
    NotFound,
    Project,
    Run,
    Session,
    StateError,
    StorageCorrupt,
)
from kagedb.models import Blob
from kagedb.models.state_diff import Difference
from kagedb.models.state_tree import NODE_REFERENCES, PIECE_BYTES, expand, references, split_state, state_tree

if TYPE_CHECKING:
    from kagedb.storage import Storage

ANA = "operator:ana"


@pytest.fixture
def session(storage: Storage) -> Session:
    return Session.start(Project.add("house", actor=ANA), title="night watch", actor=ANA)


@pytest.fixture
def run(session: Session) -> Run:
    return Run.dispatch(session, agent="planner", input={})


def again(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint as somebody else would read it."""
    return Checkpoint.by_id(checkpoint.id)


def exactly(value: Any) -> str:
    """A text in which 1, 1.0 and true differ, and the order of keys counts."""
    return repr(value)


STATES: list[Any] = [
    None,
    True,
    0,
    1,
    1.0,
    -0.0,
    1e300,
    2**63,
    -(2**4000),
    "",
    "a\0b",
    "\ud800 alone",
    "ünïcödé 🦊 \u2028",
    [],
    {},
    [[]],
    {"": {"": []}},
    {"b": 1, "a": 2, "10": 3, "2": 4},
    [1, 1.0, True, "1", None],
    "x" * 600,
    "long " * 40_000,
    ["x" * 600] * 200,
    {"k" * 5_000: "v" * 5_000},
    [list(range(50)) for _ in range(300)],
    {str(n): {"n": n, "half": n / 2} for n in range(3_000)},
    [0.1] * 20_000,
]


def test_every_state_comes_back_equal(run: Run) -> None:
    for state in STATES:
        checkpoint = Checkpoint.pause(run, state)
        assert exactly(again(checkpoint).restore()) == exactly(state)
        assert again(checkpoint).binaries() == {}


def test_named_byte_strings_come_back_beside_the_state(run: Run) -> None:
    noise = random.Random(1)
    binaries = {"empty": b"", "nul": b"\0\xff", "screen": noise.randbytes(100_000), "zeros": bytes(300_000)}
    binaries["ключ"] = b"{}"
    checkpoint = again(Checkpoint.pause(run, {"step": 1}, binaries=binaries))
    assert checkpoint.restore() == {"step": 1}
    assert checkpoint.binaries() == binaries
    assert list(checkpoint.binaries()) == list(binaries)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=900),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=30), inner, max_size=30),
    max_leaves=300,
)


@settings(max_examples=40, deadline=None)
@given(values, st.dictionaries(st.text(), st.binary(max_size=40_000), max_size=4))
def test_any_value_survives_the_tree(state: Any, binaries: dict[str, bytes]) -> None:
    tree = state_tree(state, binaries, 64)
    value, found = split_state(expand(tree.root, lambda digests: {d: tree.nodes[d] for d in digests}))
    assert exactly(value) == exactly(state)
    assert found == binaries
    assert all(len(references(node)) <= NODE_REFERENCES for node in tree.nodes.values())
    assert state_tree(json.loads(json.dumps(state)), binaries, 64).root == tree.root


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(values, st.dictionaries(st.text(), st.binary(max_size=40_000), max_size=4))
def test_any_value_survives_the_tree_for_long(state: Any, binaries: dict[str, bytes]) -> None:
    test_any_value_survives_the_tree.hypothesis.inner_test(state, binaries)  # type: ignore[attr-defined]


def items(count: int) -> list[dict[str, Any]]:
    noise = random.Random(7)
    return [
        {"id": n, "name": f"{noise.getrandbits(300):x}", "done": False, "score": noise.random()} for n in range(count)
    ]


def new_nodes(before: Any, after: Any) -> list[bytes]:
    """What the second state costs beyond the first."""
    known = state_tree(before, {}, 64).nodes
    return [node for digest, node in state_tree(after, {}, 64).nodes.items() if digest not in known]


CHANGES = {
    "appended": lambda items: [*items, {"id": -1, "name": "new"}],
    "put first": lambda items: [{"id": -1, "name": "new"}, *items],
    "put in the middle": lambda items: [*items[:2_500], {"id": -1, "name": "new"}, *items[2_500:]],
    "removed": lambda items: [*items[:1_234], *items[1_235:]],
    "changed": lambda items: [*items[:4_000], {**items[4_000], "done": True}, *items[4_001:]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_element_of_five_thousand_costs_a_path(change: Any) -> None:
    before = items(5_000)
    new = new_nodes({"step": 1, "items": before}, {"step": 2, "items": change(before)})
    assert len(new) <= 6
    assert sum(map(len, new)) <= 16_000, "of 600,000"


def test_a_log_that_grows_costs_its_last_piece() -> None:
    log = "line of a log\n" * 20_000
    new = new_nodes({"log": log}, {"log": log + "one more\n"})
    assert sum(map(len, new)) <= PIECE_BYTES + 2_000


def test_the_same_state_again_adds_no_blob(run: Run) -> None:
    state = {"items": items(500)}
    Checkpoint.pause(run, state)
    blobs = Blob.select().count()
    Checkpoint.pause(run, state)
    assert Blob.select().count() == blobs


def test_pausing_makes_the_session_stand_on_the_checkpoint(session: Session, run: Run) -> None:
    assert Checkpoint.head(session) is None
    first = Checkpoint.pause(run, 1, label="before deploy", reason="breakpoint")
    assert (first.state, first.label, first.reason, first.parent_id, first.pinned) == (
        "paused",
        "before deploy",
        "breakpoint",
        None,
        False,
    )
    second = Checkpoint.pause(run, 2)
    side = Checkpoint.pause(run, 3, parent=first)
    assert (second.parent_id, side.parent_id) == (first.id, first.id)
    assert Checkpoint.head(session).id == side.id  # type: ignore[union-attr]
    assert [checkpoint.id for checkpoint in Checkpoint.of(session)] == [first.id, second.id, side.id]
    assert AuditEvent.select().where(AuditEvent.kind.startswith("checkpoint")).count() == 0


def test_subscribers_are_told_of_a_pause_after_it_is_there(storage: Storage, run: Run) -> None:
    told: list[Any] = []
    storage.subscribe(lambda change: told.append((change.kind, change.subject, Checkpoint.select().count())))
    checkpoint = Checkpoint.pause(run, 1)
    assert told == [("checkpoint.paused", checkpoint.ref, 1)]


def test_a_parent_in_another_session_is_refused(session: Session, run: Run) -> None:
    other = Session.start(session.project, title="other", actor=ANA)
    stranger = Checkpoint.pause(Run.dispatch(other, agent="a", input=1), 1)
    with pytest.raises(NotFound, match="is not in the session"):
        Checkpoint.pause(run, 1, parent=stranger)
    assert Checkpoint.select().count() == 1


def test_resuming_gives_the_state_once_and_is_audited(session: Session, run: Run) -> None:
    checkpoint = Checkpoint.pause(run, {"n": 1}, label="here")
    assert again(checkpoint).resume(actor=ANA) == {"n": 1}
    assert again(checkpoint).state == "resumed"
    with pytest.raises(StateError, match="was resumed already"):
        checkpoint.resume(actor=ANA)
    (event,) = AuditEvent.of(checkpoint)
    assert (event.kind, event.actor, event.project) == ("checkpoint.resumed", ANA, session.project_id)


def test_only_the_checkpoint_that_the_session_stands_on_is_resumed(run: Run) -> None:
    first = Checkpoint.pause(run, 1)
    Checkpoint.pause(run, 2)
    with pytest.raises(StateError, match="stands on another checkpoint"):
        first.resume(actor=ANA)
    assert AuditEvent.of(first) == []


def test_rolling_back_moves_the_pointer_and_deletes_nothing(session: Session, run: Run) -> None:
    first, second = Checkpoint.pause(run, {"n": 1}), Checkpoint.pause(run, {"n": 2})
    second.resume(actor=ANA)
    again(first).rollback(actor=ANA)
    assert Checkpoint.head(session).id == first.id  # type: ignore[union-attr]
    assert again(first).resume(actor=ANA) == {"n": 1}
    third = Checkpoint.pause(run, {"n": 3})
    assert third.parent_id == first.id
    assert [c.restore()["n"] for c in Checkpoint.of(session)] == [1, 2, 3]
    rolled = AuditEvent.of(first)[1]
    assert (rolled.kind, json.loads(rolled.body)) == ("checkpoint.rolled_back", {"label": None, "from": second.id})
    again(second).rollback(actor=ANA)
    assert again(second).state == "paused", "what was resumed can be resumed again after a rollback to it"


def test_a_fork_is_a_child_with_the_same_state_and_no_blob_of_its_own(session: Session, run: Run) -> None:
    first = Checkpoint.pause(run, {"items": items(2_000)})
    blobs = Blob.select().count()
    child = first.fork(actor=ANA, label="try")
    assert (child.parent_id, child.root, child.label, child.state) == (first.id, first.root, "try", "paused")
    assert Blob.select().count() == blobs
    assert Checkpoint.head(session).id == child.id  # type: ignore[union-attr]
    assert AuditEvent.of(child)[0].kind == "checkpoint.forked"


def test_a_fork_goes_on_in_another_session_of_the_project_only(session: Session, run: Run) -> None:
    first = Checkpoint.pause(run, [1, 2])
    other = Session.start(session.project, title="other way", actor=ANA)
    child = first.fork(actor=ANA, session=other)
    assert (child.session_id, child.run_id, Checkpoint.head(session).id) == (other.id, None, first.id)  # type: ignore[union-attr]
    assert child.resume(actor=ANA) == [1, 2]
    abroad = Session.start(Project.add("garden", actor=ANA), title="abroad", actor=ANA)
    with pytest.raises(NotFound, match="not in the project"):
        first.fork(actor=ANA, session=abroad)


def test_a_hundred_forks_add_less_than_a_kilobyte_each(storage: Storage, run: Run) -> None:
    first = Checkpoint.pause(run, {"items": items(5_000)})
    before = size(storage)
    for _ in range(100):
        first.fork(actor=ANA)
    assert (size(storage) - before) / 100 < 1024


def size(storage: Storage) -> int:
    """Bytes of rows and indexes. A page or block that is begun counts whole."""
    database = storage.database
    if storage.engine.name == "sqlite":
        used = database.execute_sql("PRAGMA page_count").fetchone()[0]
        return int(used) * int(database.execute_sql("PRAGMA page_size").fetchone()[0])
    return storage.engine.size_bytes()


def test_an_ended_session_is_left_alone(session: Session, run: Run) -> None:
    checkpoint = Checkpoint.pause(run, 1)
    run.finish()
    session.end(actor=ANA)
    verbs = [
        lambda: Checkpoint.pause(run, 2),
        lambda: checkpoint.resume(actor=ANA),
        lambda: checkpoint.rollback(actor=ANA),
        lambda: checkpoint.fork(actor=ANA),
    ]
    for verb in verbs:
        with pytest.raises(StateError, match="has ended"):
            verb()
    assert Checkpoint.select().count() == 1
    assert checkpoint.restore() == 1
    other = Session.start(session.project, title="next", actor=ANA)
    assert checkpoint.fork(actor=ANA, session=other).restore() == 1


REFUSED: list[tuple[Any, str]] = [
    (float("nan"), "holds nan"),
    ([1, float("-inf")], "holds -inf"),
    ({1: 2}, "a key of the type int"),
    ({"a": b"bytes"}, "holds a bytes, which JSON cannot hold; .*binaries="),
    ({"a": {1, 2}}, "holds a set"),
    (2**5000, "beyond 4,096 bits"),
]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(run: Run) -> None:
    for state, message in REFUSED:
        with pytest.raises(InvalidValue, match=message):
            Checkpoint.pause(run, state)
    with pytest.raises(InvalidValue, match="binaries are bytes"):
        Checkpoint.pause(run, 1, binaries={"a": "text"})  # type: ignore[dict-item]
    deep: Any = []
    for _ in range(64):
        deep = [deep]
    with pytest.raises(LimitExceeded, match=r"nested too deeply; raise limits\.json_depth"):
        Checkpoint.pause(run, deep)
    assert (Checkpoint.select().count(), Blob.select().count()) == (0, 0)


def test_the_deepest_state_that_settings_allow_survives(storage: Storage, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage.database, "limits", storage.database.limits._replace(json_depth=200))
    deep: Any = ["leaf " * 200]
    for level in range(199):
        deep = [deep, "x" * 520] if level % 2 else {"k": deep, "y": "z" * 520}
    checkpoint = Checkpoint.pause(run, deep)
    assert again(checkpoint).restore() == deep


def test_an_oversize_state_is_refused_with_the_limit_named(storage: Storage, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage.database, "limits", storage.database.limits._replace(state_bytes=10_000))
    Checkpoint.pause(run, "x" * 9_998)
    before = Blob.select().count()
    for state, binaries in (("x" * 9_999, {}), ("x", {"b": bytes(10_000)}), (["ü" * 5_000], {})):
        with pytest.raises(LimitExceeded, match=r"the limit is 10,000; raise limits\.state_bytes in the config"):
            Checkpoint.pause(run, state, binaries=binaries)
    assert (Checkpoint.select().count(), Blob.select().count()) == (1, before)


def test_a_flipped_bit_in_any_blob_is_refused(storage: Storage, run: Run) -> None:
    state = {"items": items(300), "log": "line\n" * 9_000}
    checkpoint = Checkpoint.pause(run, state, binaries={"b": bytes(range(256)) * 100})
    noise = random.Random(3)
    for blob in list(Blob.select()):
        places = {0, len(blob.data) - 1, *(noise.randrange(len(blob.data)) for _ in range(8))}
        for place in places:
            flipped = bytearray(blob.data)
            flipped[place] ^= 1 << noise.randrange(8)
            set_data(storage, blob.digest, bytes(flipped))
            for read in (checkpoint.restore, checkpoint.binaries, lambda: checkpoint.resume(actor=ANA)):
                with pytest.raises(StorageCorrupt, match=f"{checkpoint.id} cannot be restored: the blob"):
                    read()
            with pytest.raises(StorageCorrupt):
                checkpoint.rollback(actor=ANA)
        set_data(storage, blob.digest, blob.data)
    assert again(checkpoint).state == "paused"
    assert checkpoint.restore() == state


def set_data(storage: Storage, digest: bytes, data: bytes) -> None:
    sql = storage.database.dialect("UPDATE blob SET data = ? WHERE digest = ?")
    storage.database.execute_sql(sql, (data, digest))


def test_a_changed_codec_or_a_missing_blob_is_refused(run: Run) -> None:
    checkpoint = Checkpoint.pause(run, {"items": items(300)})
    for blob in list(Blob.select()):
        other = "raw" if blob.codec == "zlib" else "zlib"
        Blob.update(codec=other).where(Blob.digest == blob.digest).execute()
        with pytest.raises(StorageCorrupt):
            checkpoint.restore()
        Blob.update(codec=blob.codec).where(Blob.digest == blob.digest).execute()
    Blob.delete().where(Blob.digest == checkpoint.root).execute()
    with pytest.raises(StorageCorrupt, match="is missing"):
        checkpoint.restore()


def test_a_pause_that_is_rolled_back_leaves_nothing(storage: Storage, session: Session, run: Run) -> None:
    with pytest.raises(ZeroDivisionError), storage.transaction():
        Checkpoint.pause(run, items(100))
        raise ZeroDivisionError
    assert (Checkpoint.head(session), Blob.select().count()) == (None, 0)


def test_a_checkpoint_that_is_gone_is_not_found(run: Run) -> None:
    checkpoint = Checkpoint.pause(run, 1)
    Checkpoint.pause(run, 2)
    Checkpoint.delete().where(Checkpoint.id == checkpoint.id).execute()
    for verb in (
        lambda: checkpoint.resume(actor=ANA),
        lambda: checkpoint.rollback(actor=ANA),
        lambda: checkpoint.fork(actor=ANA),
        checkpoint.pin,
    ):
        with pytest.raises(NotFound, match="there is no checkpoint"):
            verb()


def test_the_difference_of_two_states_is_told_by_place(run: Run) -> None:
    before = {"a": 1, "list": [1, 2, 3, 4], "gone": None, "k/~": {"x": True}}
    after = {"list": [1, 2.0, 3, 9, 4], "a": 1, "k/~": {"x": 1}, "new": []}
    first = Checkpoint.pause(run, before, binaries={"same": b"1", "old": b"2", "b": b"3"})
    second = Checkpoint.pause(run, after, binaries={"same": b"1", "b": b"4"})
    assert first.diff(second) == [
        Difference("/list/1", "changed", 2, 2.0),
        Difference("/list/3", "added", after=9),
        Difference("/gone", "removed", before=None),
        Difference("/k~1~0/x", "changed", True, 1),
        Difference("/new", "added", after=[]),
        Difference("binaries:/old", "removed", before=b"2"),
        Difference("binaries:/b", "changed", b"3", b"4"),
    ]
    assert first.diff(first.fork(actor=ANA)) == []
