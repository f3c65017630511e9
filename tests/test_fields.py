"""What may be stored is refused or kept alike on both engines: every message here is expected of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kagedb
from contents import contents
from kagedb import AuditEvent, InvalidValue, LimitExceeded, Plugin, Project, Prompt, Run, Session
from kagedb.fields import INTEGER_MAX, INTEGER_MIN, Limits, encode_json

if TYPE_CHECKING:
    from kagedb.storage import Storage
    from places import Places

ANA = "operator:ana"

STORABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(INTEGER_MIN, INTEGER_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | STORABLE,
    lambda inner: st.lists(inner) | st.dictionaries(STORABLE, inner),
    max_leaves=20,
)
ON_A_STORE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""One store for all examples of a test: each makes rows of its own."""


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def endless() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


class Colour(str):
    """Text to Python; what else it may be is lost in a store."""


@pytest.fixture
def session(storage: Storage) -> Session:
    return Session.start(Project.add("house", actor=ANA), title="night watch", actor=ANA)


def dispatch(session: Session, value: Any) -> None:
    Run.dispatch(session, agent="planner", input=value)


TEXTS: list[tuple[str, Any, type[Exception], str]] = [
    ("NUL", "a\0b", InvalidValue, "holds a NUL character"),
    ("a lone surrogate", "a\ud800b", InvalidValue, "holds a lone surrogate at character 1"),
    ("a pair of surrogates", "\ud83d\ude00", InvalidValue, "holds a lone surrogate at character 0"),
    ("bytes", b"x", InvalidValue, "takes text, not b'x' (bytes)"),
    ("an integer", 5, InvalidValue, "takes text, not 5 (int)"),
    ("a boolean", True, InvalidValue, "takes text, not True (bool)"),
    ("a list", ["x"], InvalidValue, "takes text, not ['x'] (list)"),
]
NAMES = [
    *TEXTS,
    ("nothing", None, InvalidValue, "takes no None"),
    ("10,000 characters", "x" * 10_000, LimitExceeded, "has 10,000 characters; the limit is 200"),
    ("201 characters of 4 bytes", "🌙" * 201, LimitExceeded, "has 201 characters; the limit is 200"),
    ("the empty name", "", InvalidValue, "takes a name that is not empty and has no white space around it"),
    ("space before", " x", InvalidValue, "takes a name that is not empty and has no white space around it"),
    ("an odd space after", "x\u3000", InvalidValue, "takes a name that is not empty and has no white space around it"),
    ("a line end", "a\nb", InvalidValue, "takes one line without control characters"),
    ("escape", "a\x1b[31mb", InvalidValue, "takes one line without control characters"),
    ("the one-byte form of escape [", "a\x9b31mb", InvalidValue, "takes one line without control characters"),
    ("a line separator", "a\u2028b", InvalidValue, "takes one line without control characters"),
]
BODIES = [
    *TEXTS,
    ("too much text", "é" * 600_000, LimitExceeded, "has 1,200,000 bytes; the limit is 1,048,576"),
]
INTEGERS: list[tuple[str, Any, type[Exception], str]] = [
    ("2**63", 2**63, InvalidValue, "takes an integer of at most 64 bits"),
    ("-2**63-1", -(2**63) - 1, InvalidValue, "takes an integer of at most 64 bits"),
    ("true", True, InvalidValue, "takes an integer, not True (bool)"),
    ("a float", 1.0, InvalidValue, "takes an integer, not 1.0 (float)"),
    ("digits", "1", InvalidValue, "takes an integer, not '1' (str)"),
    ("not a number", float("nan"), InvalidValue, "takes an integer, not nan (float)"),
]
ULIDS: list[tuple[str, Any, type[Exception], str]] = [
    ("a letter that base 32 has not", "U" * 26, InvalidValue, f"takes a ULID, not '{'U' * 26}' (str)"),
    ("lower case", "01jab3c4d5e6f7g8h9jkmnpqrs", InvalidValue, "takes a ULID, not '01jab3c4d5e6f7g8h9jkmnpqrs' (str)"),
    ("more than 128 bits", "Z" * 26, InvalidValue, f"takes a ULID, not '{'Z' * 26}' (str)"),
    ("128 bits and 2", "8" + "0" * 25, InvalidValue, f"takes a ULID, not '8{'0' * 25}' (str)"),
    ("a line end after it", "0" * 26 + "\n", InvalidValue, f"takes a ULID, not '{'0' * 26}\\n' (str)"),
    ("digits of another script", "٠" * 26, InvalidValue, f"takes a ULID, not '{'٠' * 26}' (str)"),
    ("NUL", "\0" * 26, InvalidValue, "takes a ULID, not"),
    ("an integer", 1, InvalidValue, "takes a ULID, not 1 (int)"),
]
JSONS: list[tuple[str, Any, type[Exception], str]] = [
    ("NUL", {"a": "\0"}, InvalidValue, "holds a NUL character"),
    ("NUL in a key", {"a\0": 1}, InvalidValue, "holds a NUL character"),
    ("a lone surrogate", ["\udcff"], InvalidValue, "holds a lone surrogate at character 0"),
    ("a lone surrogate in a key", {"\udcff": 1}, InvalidValue, "holds a lone surrogate at character 0"),
    ("not a number", [float("nan")], InvalidValue, "holds nan, which JSON cannot hold"),
    ("infinity", {"a": float("inf")}, InvalidValue, "holds inf, which JSON cannot hold"),
    ("minus infinity", float("-inf"), InvalidValue, "holds -inf, which JSON cannot hold"),
    ("2**63", [2**63], InvalidValue, "holds an integer beyond 64 bits"),
    ("-2**63-1", -(2**63) - 1, InvalidValue, "holds an integer beyond 64 bits"),
    ("a huge integer", 10**5000, InvalidValue, "holds an integer beyond 64 bits"),
    ("an integer as a key", {1: 2}, InvalidValue, "has the key 1 (int)"),
    ("true as a key", {True: 2}, InvalidValue, "has the key True (bool)"),
    ("nothing as a key", {None: 2}, InvalidValue, "has the key None (NoneType)"),
    ("a tuple as a key", {("a",): 2}, InvalidValue, "has the key ('a',) (tuple)"),
    ("a set", {"a": {1}}, InvalidValue, "holds {1} (set), which JSON cannot hold"),
    ("bytes", [b"x"], InvalidValue, "holds b'x' (bytes), which JSON cannot hold"),
    ("a kind of text", [Colour("red")], InvalidValue, "holds 'red' (Colour), which JSON cannot hold"),
    ("65 levels", deep(65), LimitExceeded, "is nested too deeply"),
    ("50,000 levels", deep(50_000), LimitExceeded, "is nested too deeply"),
    ("itself", endless(), LimitExceeded, "is nested too deeply"),
    ("too much of it", ["é" * 600_000], LimitExceeded, "has 1,200,004 bytes of JSON; the limit is 1,048,576"),
]
BLOBS: list[tuple[str, Any, type[Exception], str]] = [
    ("text", "x", InvalidValue, "takes bytes, not 'x' (str)"),
    ("an integer", 5, InvalidValue, "takes bytes, not 5 (int)"),
]
BOOLEANS: list[tuple[str, Any, type[Exception], str]] = [
    ("one", 1, InvalidValue, "takes true or false, not 1 (int)"),
    ("zero", 0, InvalidValue, "takes true or false, not 0 (int)"),
    ("text", "true", InvalidValue, "takes true or false, not 'true' (str)"),
]


def refused(
    cases: list[tuple[str, Any, type[Exception], str]], column: str, write: Callable[[Any], Any], storage: Storage
) -> None:
    """Each value is refused with its error, which names the column, and not a row is written."""
    before = contents(storage)
    for name, value, kind, message in cases:
        with pytest.raises(kind) as caught:
            write(value)
        assert type(caught.value) is kind, name
        assert caught.value.message.startswith(f"{column} {message}"), name
        caught.value.message.encode()  # It can be shown and logged, whatever was refused.
    assert contents(storage) == before


def test_names_that_cannot_be_stored_are_refused(storage: Storage) -> None:
    refused(NAMES, "project.name", lambda name: Project.add(name, actor=ANA), storage)


def test_texts_that_cannot_be_stored_are_refused(storage: Storage) -> None:
    project = Project.add("house", actor=ANA)
    refused(BODIES, "prompt_version.body", lambda body: Prompt.edit(project, "planner", body, actor=ANA), storage)
    refused(BODIES, "project_config.source", lambda text: project.configure(text, parsed={}, actor=ANA), storage)


def test_errors_of_runs_that_cannot_be_stored_are_refused(session: Session, storage: Storage) -> None:
    run = Run.dispatch(session, agent="planner", input={})
    refused(BODIES, "run.error", run.fail, storage)
    assert Run.by_id(run.id).state == "running"


def test_integers_that_cannot_be_stored_are_refused(session: Session, storage: Storage) -> None:
    run = Run.dispatch(session, agent="planner", input={})
    refused(INTEGERS, "run.exit_status", lambda status: run.finish(exit_status=status), storage)
    refused(INTEGERS, "run.started_at", lambda at: _create_run(session, started_at=at), storage)
    assert run.state == "running", "what the store refused must not be seen in the model"


def test_ids_that_cannot_be_stored_are_refused(session: Session, storage: Storage) -> None:
    refused(ULIDS, "run.id", Run.by_id, storage)
    refused(ULIDS, "run.id", lambda id: _create_run(session, id=id), storage)
    refused(ULIDS, "session.id", lambda id: _create_run(id), storage)
    refused(ULIDS, "audit_event.project", lambda id: AuditEvent.record("a.b", actor=ANA, project=id), storage)


def test_json_that_cannot_be_stored_is_refused(session: Session, storage: Storage) -> None:
    run = Run.dispatch(session, agent="planner", input={})
    refused(JSONS, "run.input", lambda value: dispatch(session, value), storage)
    refused(JSONS, "run.output", lambda value: run.finish(output=value), storage)
    refused(JSONS, "run.input", lambda value: _create_run(session, input=value), storage)


def test_json_that_is_no_object_is_refused_where_an_object_belongs(session: Session, storage: Storage) -> None:
    project = session.project
    values: list[Any] = [[], 5, "x", ("a", 1), True]
    no_objects = [(repr(value), value, InvalidValue, "takes a JSON object, not") for value in values]
    configure = [*no_objects, ("nothing", None, InvalidValue, "takes a JSON object, not None")]
    refused(configure, "project_config.parsed", lambda value: project.configure("x", parsed=value, actor=ANA), storage)
    refused(
        no_objects,
        "prompt_version.config",
        lambda value: Prompt.edit(project, "p", "x", actor=ANA, config=value),
        storage,
    )
    refused(
        no_objects,
        "session.metadata",
        lambda value: Session.start(project, title="x", actor=ANA, metadata=value),
        storage,
    )


def test_bytes_and_booleans_that_cannot_be_stored_are_refused(session: Session, storage: Storage) -> None:
    manifest = {"name": "weather", "version": "1", "permissions": []}
    Plugin.install(session.project, manifest, actor=ANA)
    blob = kagedb.models.Blob
    refused(BLOBS, "blob.digest", lambda key: blob.put(digest=key, codec="raw", size=0, data=b""), storage)
    refused(BOOLEANS, "plugin.enabled", lambda on: Plugin.update(enabled=on).execute(), storage)


def test_what_cannot_be_stored_cannot_be_asked_for_either(storage: Storage) -> None:
    for _, value, kind, _ in NAMES:
        if value is not None and not isinstance(value, list):  # to Peewee a list is a list of values
            with pytest.raises(kind):
                list(Project.select().where(Project.name == value))
            with pytest.raises(kind):
                list(Project.select().where(Project.name.in_(["house", value])))
            with pytest.raises(kind):
                Project.named(value)
    for _, value, kind, _ in INTEGERS:
        with pytest.raises(kind):
            list(Run.select().where(Run.exit_status < value))


def test_a_transaction_goes_on_after_a_refused_value(session: Session, storage: Storage) -> None:
    with storage.transaction():
        kept = Run.dispatch(session, agent="planner", input=1)
        with pytest.raises(InvalidValue):
            dispatch(session, "\0")
    assert [run.id for run in Run.of(session)] == [kept.id]


def test_the_error_of_a_refused_value_is_a_value_error_and_says_what_to_do(session: Session) -> None:
    with pytest.raises(ValueError, match=r"run\.input holds a NUL character; keep bytes with NUL as an attachment"):
        dispatch(session, "\0")


def test_the_largest_values_are_kept(session: Session) -> None:
    longest = "🌙" * 200
    whole = "x" * (1_048_576 - 2)
    for value in (INTEGER_MAX, INTEGER_MIN, 5e-324, 1.7976931348623157e308, -0.0, deep(64), whole):
        run = Run.dispatch(session, agent=longest, input=value)
        kept = Run.by_id(run.id)
        assert repr(kept.input) == repr(value)
        assert kept.agent == longest
    run.finish(exit_status=INTEGER_MIN)
    assert Run.by_id(run.id).exit_status == INTEGER_MIN


def test_null_in_json_is_kept_where_the_column_takes_no_null(session: Session, storage: Storage) -> None:
    run = Run.dispatch(session, agent="planner", input=None)
    run.finish(output=None)
    kept = Run.by_id(run.id)
    assert (kept.input, kept.output) == (None, None)
    stored = storage.database.execute_sql("SELECT CAST(input AS TEXT), output IS NULL FROM run").fetchone()
    assert (stored[0], bool(stored[1])) == ("null", True)
    assert Run.select().where(Run.output.is_null() & (Run.output == None) & (Run.input != None)).count() == 1  # noqa: E711


def test_json_columns_have_no_comparison(session: Session) -> None:
    dispatch(session, {"a": 1})
    comparisons: list[Callable[[Any], Any]] = [
        lambda field: field == {"a": 1},
        lambda field: field != "x",
        lambda field: field < 5,
        lambda field: field >= [],
        lambda field: field.in_([{"a": 1}]),
        lambda field: field << [1],
        lambda field: field.not_in([1]),
        lambda field: field.between(1, 2),
        lambda field: field.contains("a"),
        lambda field: field.startswith("{"),
        lambda field: field % "x",
    ]
    for compare in comparisons:
        with pytest.raises(InvalidValue, match=r'run\.input is JSON and cannot be compared; .*json_text\(input, "'):
            list(Run.select().where(compare(Run.input)))


@ON_A_STORE
@given(value=DOCUMENTS)
def test_any_json_comes_back_as_it_was(session: Session, storage: Storage, value: Any) -> None:
    run = Run.dispatch(session, agent="planner", input=value)
    run.finish(output=value)
    kept = Run.by_id(run.id)
    # Text, because 1 == 1.0 == True and -0.0 == 0.0; in order, because keys keep theirs.
    assert json.dumps(kept.input) == json.dumps(kept.output) == json.dumps(value)
    stored = storage.database.execute_sql("SELECT CAST(input AS TEXT) FROM run ORDER BY id DESC LIMIT 1").fetchone()
    assert stored[0] == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@ON_A_STORE
@given(value=STORABLE)
def test_any_text_comes_back_as_it_was(session: Session, value: str) -> None:
    run = Run.dispatch(session, agent="planner", input=1)
    run.fail(value)
    assert Run.by_id(run.id).error == value
    found = list(Run.select(Run.id).where((Run.error == value) & (Run.id == run.id)))
    assert [row.id for row in found] == [run.id]


@ON_A_STORE
@given(data=st.binary())
def test_any_bytes_come_back_as_they_were(storage: Storage, data: bytes) -> None:
    blob = kagedb.models.Blob
    with storage.transaction():
        blob.delete().execute()
        blob.put(digest=data, codec="raw", size=len(data), data=memoryview(data))
    kept = blob.by_id(data)
    assert (type(kept.digest), kept.digest, kept.data) == (bytes, data, data)
    assert type(blob.select().get().data) is bytes


ALPHABET = "aAbBzZäÄéeßßıİ09 _-.~🙂🌙中文ﬀ\u00ad\u0301\uffff\U0010ffff"

NAMES_OF_IT = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=4).filter(lambda name: name.strip() == name)


@ON_A_STORE
@given(names=st.lists(NAMES_OF_IT))
def test_text_sorts_by_its_code_points(storage: Storage, names: list[str]) -> None:
    with pytest.raises(LookupError), storage.transaction():
        session = Session.start(Project.add("house", actor=ANA), title="x", actor=ANA)
        for name in names:
            Run.dispatch(session, agent=name, input={"name": name})
        agents = Run.select(Run.agent).where(Run.session == session).tuples()
        assert [row[0] for row in agents.order_by(Run.agent)] == sorted(names)
        assert [row[0] for row in agents.order_by(Run.agent.desc())] == sorted(names, reverse=True)
        part = kagedb.json_text(Run.input, "name")
        assert [row[0] for row in agents.order_by(part)] == sorted(names)
        for name in names:
            below = sum(other < name for other in names)
            assert agents.where(Run.agent < name).count() == agents.where(part < name).count() == below
        raise LookupError("each example begins with an empty store")


@pytest.mark.postgres_only
def test_text_sorts_the_same_whatever_the_collation_of_the_database(session: Session) -> None:
    """On PostgreSQL alone: SQLite has no collation of the file. (Most builds for tests have no other than C to try.)"""
    dispatch(session, {"name": "x"})
    for text in (Run.agent, Run.error, Run.id, kagedb.json_text(Run.input, "name")):
        assert Run.select(peewee.fn.pg_collation_for(text)).scalar() == '"C"'


def test_text_is_looked_for_in_literally_and_without_the_case_of_ascii_letters(session: Session) -> None:
    for agent in ("Plan", "planner", "PLÄN", "plän", "pl_n", "pl%n", "pl\\n"):
        Run.dispatch(session, agent=agent, input={"name": agent})
    for field in (Run.agent, kagedb.json_text(Run.input, "name")):
        for expression, expected in (
            (field.contains("LAN"), {"Plan", "planner"}),
            (field.startswith("plan"), {"Plan", "planner"}),
            (field.contains("ä"), {"plän"}),
            (field.contains("_"), {"pl_n"}),
            (field.contains("%"), {"pl%n"}),
            (field.endswith("\\n"), {"pl\\n"}),
        ):
            assert {run.agent for run in Run.select().where(expression)} == expected


def test_the_limits_of_the_settings_hold(places: Places, engine: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text("[limits]\njson_bytes = 4096\njson_depth = 8\ntext_bytes = 4096\n")
    with kagedb.connect(places.migrated(engine), config=config):
        session = Session.start(Project.add("house", actor=ANA), title="x", actor=ANA)
        Run.dispatch(session, agent="x", input=["x" * 4092])
        Run.dispatch(session, agent="x", input=deep(8)).fail("x" * 4096)
        with pytest.raises(LimitExceeded, match=r"4,097 bytes of JSON; the limit is 4,096; raise limits\.json_bytes"):
            dispatch(session, ["x" * 4093])
        with pytest.raises(LimitExceeded, match=r"nested too deeply; raise limits\.json_depth"):
            dispatch(session, deep(9))
        with pytest.raises(LimitExceeded, match=r"has 4,097 bytes; the limit is 4,096; raise limits\.text_bytes"):
            Run.dispatch(session, agent="x", input=1).fail("x" * 4097)
        with pytest.raises(LimitExceeded, match="the audit event's body has 4,"):
            AuditEvent.record("a.b", actor=ANA, body={"x": "x" * 4096})


def test_json_is_written_compactly_and_sorted_only_where_asked() -> None:
    value = {"b": [1, 2.0, None], "a": ("ä", True)}
    assert encode_json(value, "x", Limits()) == '{"b":[1,2.0,null],"a":["ä",true]}'
    assert encode_json(value, "x", Limits(), sort_keys=True) == '{"a":["ä",true],"b":[1,2.0,null]}'


def test_a_row_without_a_value_that_it_needs_is_refused(storage: Storage) -> None:
    before = contents(storage)
    with pytest.raises(peewee.IntegrityError):
        Project.create()
    with pytest.raises(InvalidValue, match=r"project\.name takes no None"):
        Project.put()
    with pytest.raises(TypeError, match="Project has no field colour"):
        Project.put(name="house", colour="red")
    assert contents(storage) == before


def _create_run(session: Session | str, **values: Any) -> None:
    row = {"session": session, "agent": "x", "input": 1, "state": "running", "started_at": 1, **values}
    Run.create(**row)
