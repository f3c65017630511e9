"""`json_text` gives the same answer on both engines, and that is the one that a few lines of Python give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kagedb import AuditEvent, InvalidValue, Project, Run, Session, json_text

if TYPE_CHECKING:
    from kagedb.storage import Storage

Keys = tuple[str | int, ...]

KEYS = ["", "0", "1", "-1", "a", "A", "a.b", "a[0]", "$", "$.a", "*", "#", "[", "]", "#-1", "a b", "'", "?", "%s"]
KEYS += ["é", "e\u0301", "🙂", "null", "\x7f", "\u2028", "\uffff"]
"""What is special to a JSON path, to SQL, or to one of the drivers."""

TEXTS = st.sampled_from(["", "null", "true", "1", '"', "\\", "\n", "é", "\x7f", "<&>/"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([-0.0, 1e2, 1e16, 1e22, 1e-7, 5e-324, 0.1, 1e300, 2**63 - 1, 0])
    | TEXTS
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=5),
)
STEPS = st.sampled_from(KEYS) | st.integers(0, 4) | st.integers(0, 2**31 - 1)
PATHS = st.lists(STEPS, min_size=1, max_size=4).map(tuple)


def expected(document: Any, keys: Keys) -> str | None:
    """The answer, in Python."""
    value = document
    for key in keys:
        try:
            if not isinstance(value, dict if isinstance(key, str) else list):
                return None
            value = value[key]
        except (KeyError, IndexError):
            return None
    if value is None or isinstance(value, dict | list):
        return None
    return value if isinstance(value, str) else json.dumps(value)


def paths_into(value: Any, before: Keys = ()) -> Iterator[Keys]:
    """Every path to something in the document that `json_text` takes."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, int) or not any(character < " " or character in '"\\' for character in key):
            yield (*before, key)
            yield from paths_into(item, (*before, key))


@pytest.fixture
def session(storage: Storage) -> Session:
    return Session.start(Project.add("house", actor="operator:ana"), title="x", actor="operator:ana")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS, guesses=st.lists(PATHS, max_size=6))
@example(document={"": {"": 1e2}, "0": "zero", "a.b": "dotted", "a": {"b": "nested"}}, guesses=[("", ""), ("a", "b")])
@example(document=[["a", {"0": "b"}], "c"], guesses=[(0, 1, "0"), ("0",), (0, "1", "0"), (0, 1, 0)])
@example(document={"a": [True, False, None, "null", -0.0, {}, []]}, guesses=[("a", 3), ("$",), ("a", 2**31 - 1)])
@example(document="scalar", guesses=[("a",), (0,)])
def test_the_answer_is_that_of_python(session: Session, document: Any, guesses: list[Keys]) -> None:
    run = Run.dispatch(session, agent="x", input=document)
    paths = [*list(paths_into(document))[:40], *guesses]
    answers = [expected(document, path) for path in paths]
    this = Run.id == run.id
    if paths:
        row = Run.select(*(json_text(Run.input, *path) for path in paths)).where(this).tuples().get()
        assert list(row) == answers, paths
    for path, answer in zip(paths[:5], answers[:5], strict=True):
        part = json_text(Run.input, *path)
        assert Run.select().where(this & (part.is_null() if answer is None else part == answer)).exists()
        assert Run.select().where(this & (part == None)).exists() == (answer is None)  # noqa: E711
        if answer is not None:
            assert Run.select().where(this & part.in_(["-", answer])).exists()
            assert not Run.select().where(this & (part != answer)).exists()
            assert not Run.select().where(this & (part < answer)).exists()


@pytest.mark.slow
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS, guesses=st.lists(PATHS, max_size=6))
def test_the_answer_is_that_of_python_for_long(session: Session, document: Any, guesses: list[Keys]) -> None:
    test_the_answer_is_that_of_python.hypothesis.inner_test(session, document, guesses)  # type: ignore[attr-defined]


def test_it_stands_wherever_a_column_can(session: Session) -> None:
    for number, colour in enumerate(("red", "blue", None, "red")):
        Run.dispatch(session, agent="x", input={"colour": colour, "number": number}).finish(output={"colour": colour})
    colour = json_text(Run.input, "colour")
    other = Run.alias()
    assert [run.input["number"] for run in Run.select().where(colour == "red").order_by(Run.id.desc())] == [3, 0]
    ordered = Run.select(colour.alias("colour")).order_by(colour.desc(nulls="LAST"), Run.id)
    assert [run.colour for run in ordered] == ["red", "red", "blue", None]
    second = other.select(json_text(other.input, "colour")).where(json_text(other.input, "number") == "1")
    assert second.scalar() == "blue"
    joined = Run.select(Run.id).join(other, on=(json_text(other.output, "colour") == colour))
    assert joined.count() == 5
    counted = Run.select(colour, peewee.fn.COUNT(Run.id)).group_by(colour)
    assert sorted(counted.tuples(), key=str) == [("blue", 1), ("red", 2), (None, 1)]
    assert Run.select(colour).distinct().count() == 3
    assert Run.select().where(colour.in_(Run.select(colour).where(json_text(Run.input, "number") == "0"))).count() == 2


def test_a_comparison_with_anything_but_text_is_refused(session: Session) -> None:
    part = json_text(Run.input, "n")
    comparisons = [
        lambda: part == 5,
        lambda: part != True,  # noqa: E712
        lambda: part < 1.5,
        lambda: part.in_(["5", 5]),
        lambda: part << [None, 5],
        lambda: part.not_in((5,)),
        lambda: part.between("1", 9),
        lambda: part.contains(5),
        lambda: part == b"5",
    ]
    for compare in comparisons:
        with pytest.raises(InvalidValue, match=r"json_text gives text and was compared with .*; compare with text"):
            compare()
    with pytest.raises(InvalidValue, match="holds a NUL character"):
        part.contains("\0")
    with pytest.raises(InvalidValue, match="holds a lone surrogate"):
        part.in_(["\udcff"])


def test_a_path_that_the_engines_would_read_differently_is_refused(session: Session) -> None:
    wrong: list[Any] = [(), ('a"b',), ("a\\b",), ("a\n",), ("\0",), ("\ud800",), (-1,), (2**31,), (True,), (1.0,)]
    for keys in (*wrong, (None,), (["a"],), ("a", b"b")):
        with pytest.raises(InvalidValue):
            json_text(Run.input, *keys)
    for field in (Run.agent, AuditEvent.body, Run, "input", None):
        with pytest.raises(InvalidValue, match="json_text looks into JSON columns"):
            json_text(field, "a")
