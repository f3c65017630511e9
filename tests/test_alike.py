"""Both engines answer alike: whatever is called in whatever order gives the same, and leaves the same.

Two programs (alike_side.py), one with a store on each engine, are told the same generated calls: verbs, queries, writes
that go by Peewee, nested transactions left well or by an error, snapshots. Every answer is compared (values, errors and
their words, what subscribers are told), and at the end all that the two stores hold, audit hashes included.
"""

from __future__ import annotations

import base64
import itertools
import pickle
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from programs import kill, start_python

if TYPE_CHECKING:
    from postgres_server import DatabaseServer

SIDE = Path(__file__).parent / "alike_side.py"
DEEPEST = 4
"""Transactions inside each other: enough for an error to pass two levels and be caught at the third."""

START_MS = 1_900_000_000_000
"""When the clock of the sides begins (`START_NS` there)."""


class Pair:
    """The two programs, and a new store for each at the beginning of every example."""

    def __init__(self, server: DatabaseServer, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._numbers = itertools.count()
        self._databases: list[str] = []
        self._sides: list[subprocess.Popen[str]] = []
        self.steps = 0
        self._start()
        self._templates = directory / "template.db", self._new_name()
        server.create_database(self._templates[1])
        self.open(sqlite_url(self._templates[0]), server.url(self._templates[1]))
        self.both("close")

    def _start(self) -> None:
        self._sides = [start_python(SIDE) for _ in range(2)]

    def _new_name(self) -> str:
        self._databases.append(f"kaged_test_{secrets.token_hex(6)}")
        return self._databases[-1]

    def open_new(self) -> None:
        path, name = self._directory / f"{next(self._numbers)}.db", self._new_name()
        shutil.copy(self._templates[0], path)
        self._server.create_database(name, self._templates[1])
        self.open(sqlite_url(path), self._server.url(name))

    def open(self, *urls: str) -> None:
        for side, url in zip(self._sides, urls, strict=True):
            tell(side, "open", {"url": url})
        assert [answer_of(side)[0][0] for side in self._sides] == ["gave", "gave"]

    def both(
        self, name: str, arguments: Any = None, models: Any = None, keep_as: int = 0, elsewhere: bool = False
    ) -> Any:
        """The answer of both, which has to be one."""
        for side in self._sides:
            tell(side, name, arguments, models, keep_as, elsewhere)
        on_sqlite, on_postgres = (answer_of(side) for side in self._sides)
        self.steps += 1
        assert on_sqlite == on_postgres, name
        return on_sqlite

    def close(self) -> None:
        (kind, _), *_ = self.both("close")
        assert kind == "gave"
        self._server.drop_database(self._databases.pop())

    def start_anew(self) -> None:
        """After an example that found something: a side may be in the middle of anything."""
        for side in self._sides:
            kill(side)
        while len(self._databases) > 1:
            self._server.drop_database(self._databases.pop())
        self._start()

    def end(self) -> None:
        for side in self._sides:
            kill(side)
        for name in self._databases:
            self._server.drop_database(name)


def sqlite_url(path: Path) -> str:
    return "sqlite://" + quote(str(path))


def tell(
    side: subprocess.Popen[str],
    name: str,
    arguments: Any = None,
    models: Any = None,
    keep_as: int = 0,
    elsewhere: bool = False,
) -> None:
    assert side.stdin
    call = name, arguments or {}, models or {}, keep_as, elsewhere
    side.stdin.write(base64.b64encode(pickle.dumps(call)).decode() + "\n")
    side.stdin.flush()


def answer_of(side: subprocess.Popen[str]) -> Any:
    assert side.stdout
    line = side.stdout.readline()
    assert line, f"the program ended with {side.wait()}"
    return pickle.loads(base64.b64decode(line))


ANA = {"actor": "operator:ana"}

good_names = st.sampled_from(["house", "House", "garden", "äpfel", "🌙 moon", "10", "9", "a_b", "a%b"])
bad_names = st.sampled_from(["", " x", "x" * 201, "a\0b", "\ud800", "a\nb", "\x9b"])
prompts = st.sampled_from(["planner", "planner", "writer", "nobody"])
labels = st.sampled_from(["production", "staging"])
agents = st.sampled_from(["planner", "Planner", "ärzte", "zebra"])
good_texts = st.sampled_from(["", "x", "one\n", "one\ntwo\n", "two", "é\u0301🙂", "'; --", "%", "\\", "y" * 5000])
bad_texts = st.sampled_from(["a\0b", "\ud800"])
good_statuses = st.sampled_from([0, 1, 137, -1, 2**63 - 1, -(2**63), None])
bad_statuses = st.sampled_from([2**63, -(2**63) - 1, True, 1.0, "1"])
good_scalars = st.sampled_from([0, 2**63 - 1, 1.0, 1e2, -0.0, 1e-7, 1e22, True, False, None]) | st.sampled_from(
    ["", "true", "1", "é", "🙂", "\n", '"', "\\", "z" * 2000]
)
bad_scalars = st.sampled_from([2**63, float("nan"), float("inf"), "a\0b", "\udcff", {1: 2}, {1}, b"x"])
json_keys = st.sampled_from(["task", "", "0", "a.b", "é"])
usual_paths = st.sampled_from([("task",), ("task", 0), ("task", "task"), ("",), ("task", 1, "é"), ("a.b", "0")])
paths = usual_paths | st.lists(json_keys | st.integers(0, 2), min_size=1, max_size=3).map(tuple)
good_documents = st.recursive(
    good_scalars | st.fixed_dictionaries({"task": good_scalars}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_keys, inner, max_size=4),
    max_leaves=6,
).flatmap(lambda value: st.sampled_from([value, {"task": value}, {"task": [value]}]))
good_objects = st.dictionaries(st.sampled_from(["a", "b", "é"]), good_scalars, max_size=3)
bad_objects = st.sampled_from([[], 5, "{}"])
good_manifests = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["weather", "mail"]),
        "version": st.sampled_from(["1", "2.0"]),
        "permissions": st.sampled_from([[], ["state"], ["network", "files"]]),
    }
)
bad_manifests = st.sampled_from([{}, None, {"name": "Mail", "version": "1", "permissions": []}])


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One in nine is bad: an error is soon followed by what a broken transaction refuses."""
    return st.integers(0, 8).flatmap(lambda chance: bad if chance == 8 else good)


names = mostly(good_names, bad_names)
texts = mostly(good_texts, bad_texts)
statuses = mostly(good_statuses, bad_statuses)
documents = mostly(good_documents, bad_scalars | st.lists(bad_scalars, min_size=1, max_size=2))
objects = mostly(good_objects, bad_objects)
configs = st.none() | objects
manifests = mostly(good_manifests, bad_manifests)
which = st.integers(0, 6)
"""One of the models of a kind that calls have given so far, also those whose rows were undone or deleted."""
maybe_which = st.none() | which
milliseconds = st.sampled_from([0, 1, 1000, 86_400_000])


class Alike(RuleBasedStateMachine):
    """What a daemon, an operator and a plugin may call, in any order."""

    pair: ClassVar[Pair]

    def __init__(self) -> None:
        super().__init__()
        self.made = itertools.count(1)
        self.depth = 0
        self.writing = False
        self.models: dict[str, list[int]] = {}
        self.pair.open_new()
        self.call("Project.add", {"name": "house", **ANA})
        self.edit(0, "planner", "one\n", None, None)
        self.label(0, "planner", "production", 1, None)
        self.start(0, "night watch", None)
        self.dispatch(0, "planner", {"task": "plan", "": [1.0, {"a.b": "é"}]}, None, 0)
        self.install(0, {"name": "weather", "version": "1", "permissions": []})

    def teardown(self) -> None:
        try:
            self.pair.close()
        except BaseException:
            self.pair.start_anew()
            raise

    def call(self, call: str, arguments: Any = None, /, elsewhere: bool = False, **models: int | None) -> None:
        """Have both sides do it, with the models of these numbers; keep the number of the model that came of it."""
        number = next(self.made)
        chosen = {parameter: model for parameter, model in models.items() if model is not None}
        (kind, value), _, self.depth, _ = self.pair.both(call, arguments, chosen, number, elsewhere)
        if kind == "gave" and isinstance(value, tuple):
            self.models.setdefault(value[0], []).append(number)

    def one(self, kind: str, index: int | None) -> int | None:
        return None if index is None else self.models[kind][index % len(self.models[kind])]

    # Transactions.

    @precondition(lambda self: self.depth < DEEPEST)
    @rule(how=st.sampled_from(["full", "full", "relaxed", "atomic", "snapshot", "sometimes"]))
    def enter(self, how: str) -> None:
        if not self.depth:
            self.writing = how != "snapshot"
        if how in ("atomic", "snapshot"):
            self.call(f"enter_{how}")
        else:
            self.call("enter", {"durability": how})

    @precondition(lambda self: self.depth)
    @rule()
    def leave(self) -> None:
        self.call("leave")

    @precondition(lambda self: self.depth)
    @rule(well=st.booleans(), levels=st.integers(1, DEEPEST))
    def leave_several(self, well: bool, levels: int) -> None:
        for _ in range(min(levels, self.depth)):
            self.call("leave" if well else "leave_by_an_error")

    @precondition(lambda self: self.depth)
    @rule(text=st.sampled_from(["", "BEGIN", "  commit", "SAVEPOINT x", "SELECT 1", "SELECT nothing FROM nowhere"]))
    def odd(self, text: str) -> None:
        self.call("sql", {"text": text}) if text else self.call("close_too_early")

    @rule(ms=milliseconds)
    def tick(self, ms: int) -> None:
        self.call("tick", {"ms": ms})

    # Projects and prompts.

    @rule(name=names, new=st.booleans())
    def project(self, name: str, new: bool) -> None:
        self.call("Project.add" if new else "Project.named", {"name": name, **(ANA if new else {})})

    @rule(project=which, source=texts, parsed=objects, message=texts)
    def configure(self, project: int, source: str, parsed: Any, message: str) -> None:
        arguments = {"source": source, "parsed": parsed, "message": message, **ANA}
        self.call("Project.configure", arguments, it=self.one("Project", project))
        self.call("Project.config", it=self.one("Project", project))

    @rule(project=which, really=st.integers(0, 5))
    def archive(self, project: int, really: int) -> None:
        if not really:  # an archived project is the end of most that could happen to it
            self.call("Project.archive", {**ANA}, it=self.one("Project", project))

    @rule(project=which, name=prompts, body=texts, config=configs, parent=maybe_which)
    def edit(self, project: int, name: str, body: str, config: Any, parent: int | None) -> None:
        arguments = {"name": name, "body": body, "config": config, **ANA}
        before = self.one("PromptVersion", parent)
        self.call("Prompt.edit", arguments, project=self.one("Project", project), parent=before)

    @rule(
        project=which,
        name=prompts,
        label=labels,
        version=st.integers(0, 3) | labels,
        revision=st.none() | st.integers(0, 3),
    )
    def label(self, project: int, name: str, label: str, version: Any, revision: int | None) -> None:
        arguments = {"name": name, "label": label, "version": version, "if_revision": revision, **ANA}
        self.call("Prompt.label", arguments, project=self.one("Project", project))

    @rule(project=which, name=prompts, label=labels, version=which)
    def label_model(self, project: int, name: str, label: str, version: int) -> None:
        models = {"project": self.one("Project", project), "version": self.one("PromptVersion", version)}
        self.call("Prompt.label", {"name": name, "label": label, **ANA}, **models)

    @rule(project=which, name=prompts, label=labels, after=milliseconds, other=st.integers(1, 3) | labels)
    def read_prompt(self, project: int, name: str, label: str, after: int, other: Any) -> None:
        of = self.one("Project", project)
        self.call("Prompt.resolve", {"name": name, "label": label}, project=of)
        self.call("Prompt.resolve_at", {"name": name, "label": label, "at": START_MS + after}, project=of)
        self.call("Prompt.diff", {"name": name, "old": label, "new": other}, project=of)

    # Plugins.

    @rule(project=which, manifest=manifests)
    def install(self, project: int, manifest: Any) -> None:
        self.call("Plugin.install", {"manifest": manifest, **ANA}, project=self.one("Project", project))
        self.call("Plugin.named", {"name": "weather"}, project=self.one("Project", project))

    @rule(plugin=which, verb=st.sampled_from(["enable", "disable", "uninstall"]))
    def switch(self, plugin: int, verb: str) -> None:
        self.call(f"Plugin.{verb}", {**ANA}, it=self.one("Plugin", plugin))

    # Sessions and runs.

    @rule(project=which, title=names, metadata=configs)
    def start(self, project: int, title: str, metadata: Any) -> None:
        arguments = {"title": title, "metadata": metadata, **ANA}
        self.call("Session.start", arguments, project=self.one("Project", project))

    @rule(session=which, verb=st.sampled_from(["attach", "detach", "end"]))
    def move_session(self, session: int, verb: str) -> None:
        self.call(f"Session.{verb}", {**ANA} if verb == "end" else {}, it=self.one("Session", session))

    @rule(session=which, agent=agents, value=documents, parent=maybe_which, version=maybe_which)
    def dispatch(self, session: int, agent: str, value: Any, parent: int | None, version: int | None) -> None:
        models = {
            "session": self.one("Session", session),
            "parent": self.one("Run", parent),
            "prompt_version": self.one("PromptVersion", version),
        }
        self.call("Run.dispatch", {"agent": agent, "input": value}, **models)

    @rule(session=which, agent=agents, value=documents, keys=paths)
    def dispatch_alone(self, session: int, agent: str, value: Any, keys: Any) -> None:
        self.dispatch(session, agent, value, None, None)
        self.call("parts", {"keys": keys, "text": "1"})

    @rule(run=which, status=statuses, value=documents)
    def finish(self, run: int, status: Any, value: Any) -> None:
        self.call("Run.finish", {"exit_status": status, "output": value}, it=self.one("Run", run))

    @rule(run=which, how=st.sampled_from([("fail", "error"), ("cancel", "reason"), ("interrupt", "reason")]), why=texts)
    def stop(self, run: int, how: tuple[str, str], why: str) -> None:
        self.call(f"Run.{how[0]}", {how[1]: why}, it=self.one("Run", run))
        self.call("Run.tree", it=self.one("Run", run))

    # The log.

    @rule(kind=st.sampled_from(["Run", "Session", "Project", "PromptVersion"]), index=which, body=objects)
    def record(self, kind: str, index: int, body: Any) -> None:
        subject = self.one(kind, index)
        self.call("AuditEvent.record", {"kind": "policy.decision", "body": body, **ANA}, subject=subject)
        self.call("AuditEvent.of", {}, subject=subject)

    @rule(
        kind=st.sampled_from(["sandbox.event", "x", "Bad", "store.restored"]),
        subject=st.sampled_from(["run:1", "no subject", "x:\0", "x:\ud800", None]),
    )
    def record_text(self, kind: str, subject: str | None) -> None:
        self.call("AuditEvent.record", {"kind": kind, "subject": subject, **ANA})

    # Queries.

    @rule(descending=st.booleans(), text=texts, number=st.integers(1, 3))
    def ask(self, descending: bool, text: str, number: int) -> None:
        self.call("names", {"descending": descending, "text": text})
        self.call("totals")
        self.call("Run.left_open")
        self.call("page", {"number": number})

    @rule(keys=paths, text=st.sampled_from(["", "1", "true", "é", "a\0"]))
    def ask_for_parts(self, keys: Any, text: str) -> None:
        self.call("parts", {"keys": keys, "text": text})

    @rule(kind=st.sampled_from(["Project", "PromptVersion", "Plugin", "Session", "Run"]), index=which)
    def ask_for_one(self, kind: str, index: int) -> None:
        self.call("state_of", {}, model=self.one(kind, index))

    # Another thread, which sees what is committed and no more; while we write it would have to wait.

    @rule(descending=st.booleans(), number=st.integers(1, 3))
    def ask_elsewhere(self, descending: bool, number: int) -> None:
        self.call("names", {"descending": descending, "text": ""}, elsewhere=True)
        self.call("totals", elsewhere=True)
        self.call("page", {"number": number}, elsewhere=True)

    @precondition(lambda self: not (self.depth and self.writing))
    @rule(name=names, session=which, value=documents)
    def write_elsewhere(self, name: str, session: int, value: Any) -> None:
        self.call("Project.add", {"name": name, **ANA}, elsewhere=True)
        arguments = {"agent": "zebra", "input": value}
        self.call("Run.dispatch", arguments, elsewhere=True, session=self.one("Session", session))
        self.call("names", {"descending": False, "text": ""})
        self.call("totals")

    @precondition(lambda self: not self.depth)
    @rule(name=names, session=which, value=documents)
    def write_beside_a_snapshot(self, name: str, session: int, value: Any) -> None:
        self.enter("snapshot")
        self.write_elsewhere(name, session, value)
        self.leave()

    # Peewee.

    @rule(name=names, how=st.sampled_from(["create_project", "add_or_keep", "upsert"]), at=statuses)
    def write_project(self, name: str, how: str, at: Any) -> None:
        self.call(how, {"name": name, **({"at": at} if how == "upsert" else {})})

    @rule(names=st.lists(good_names, min_size=2, max_size=2), index=which, name=names)
    def write_projects(self, names: list[str], index: int, name: str) -> None:
        self.call("create_two", {"names": names})
        self.call("rename", {"name": name}, project=self.one("Project", index))

    @rule(agent=agents, error=st.none() | texts, status=statuses)
    def write_runs(self, agent: str, error: str | None, status: Any) -> None:
        self.call("set_errors", {"agent": agent, "error": error})
        self.call("returning", {"agent": agent, "status": status})

    @rule(kind=st.sampled_from(["Project", "Plugin", "Session", "Run"]), index=which, really=st.integers(0, 3))
    def delete(self, kind: str, index: int, really: int) -> None:
        self.call("delete", {}, model=self.one(kind, index)) if not really else None

    @rule(agent=agents, really=st.integers(0, 3))
    def delete_runs(self, agent: str, really: int) -> None:
        self.call("delete_runs", {"agent": agent}) if not really else None

    @rule(version=which, seq=st.integers(1, 5))
    def forge(self, version: int, seq: int) -> None:
        self.call("forge", {"seq": seq})
        self.call("change_version", {}, version=self.one("PromptVersion", version))


@pytest.fixture
def pair(postgres_server: DatabaseServer, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(postgres_server, tmp_path)
    yield pair
    pair.end()


def compare(pair: Pair, examples: int, steps_each: int) -> None:
    Alike.pair = pair
    run_state_machine_as_test(
        Alike,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps_each,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_both_engines_answer_alike(pair: Pair) -> None:
    compare(pair, examples=20, steps_each=50)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_engines_answer_alike_for_long(pair: Pair) -> None:
    compare(pair, examples=150, steps_each=80)
    assert pair.steps >= 2_000


def test_a_difference_is_found(pair: Pair) -> None:
    """A comparison that cannot fail would be worth nothing: one side is told another time than the other."""
    pair.open_new()
    sqlite, postgres = pair._sides
    for side, ms in ((sqlite, 1), (postgres, 2)):
        tell(side, "tick", {"ms": ms})
        answer_of(side)
    with pytest.raises(AssertionError, match=r"Project\.add"):
        pair.both("Project.add", {"name": "house", **ANA})
    with pytest.raises(AssertionError, match="close"):
        pair.close()
