"""Every audited verb and its event are one: both are in the store, or neither is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from contents import contents
from kagedb import AuditEvent, Change, ImmutableError, InvalidValue, Plugin, Project, Prompt, Session

if TYPE_CHECKING:
    from kagedb.storage import Storage

ANA = "operator:ana"
BEN = "operator:ben"


def install(project: Project) -> Plugin:
    return Plugin.install(project, {"name": "weather", "version": "1", "permissions": []}, actor=ANA)


def disabled(project: Project) -> Plugin:
    plugin = install(project)
    plugin.disable(actor=ANA)
    return plugin


Act = Callable[[Any, str], Any]
VERBS: dict[str, tuple[Callable[[Project], Any], Act]] = {
    "project.added": (lambda project: project, lambda _, actor: Project.add("garden", actor=actor)),
    "project.configured": (lambda project: project, lambda it, actor: it.configure("x", parsed={}, actor=actor)),
    "project.archived": (lambda project: project, lambda it, actor: it.archive(actor=actor)),
    "prompt.edited": (lambda project: project, lambda it, actor: Prompt.edit(it, "planner", "x", actor=actor)),
    "prompt.labelled": (
        lambda project: Prompt.edit(project, "planner", "x", actor=ANA) and project,
        lambda it, actor: Prompt.label(it, "planner", "production", 1, actor=actor),
    ),
    "plugin.installed": (
        lambda project: project,
        lambda it, actor: Plugin.install(it, {"name": "x", "version": "1", "permissions": []}, actor=actor),
    ),
    "plugin.disabled": (install, lambda it, actor: it.disable(actor=actor)),
    "plugin.enabled": (disabled, lambda it, actor: it.enable(actor=actor)),
    "plugin.uninstalled": (install, lambda it, actor: it.uninstall(actor=actor)),
    "session.started": (lambda project: project, lambda it, actor: Session.start(it, title="x", actor=actor)),
    "session.ended": (
        lambda project: Session.start(project, title="x", actor=ANA),
        lambda it, actor: it.end(actor=actor),
    ),
}
"""The kind of each verb's event to what the verb works on and the verb."""


@pytest.fixture(params=VERBS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_verb_appends_one_event_and_tells_of_it_once(
    storage: Storage, project: Project, kind: str, changes: list[Change]
) -> None:
    prepare, act = VERBS[kind]
    it = prepare(project)
    changes.clear()
    before = AuditEvent.select().count()
    act(it, BEN)
    (event,) = AuditEvent.select().order_by(AuditEvent.seq).offset(before)
    assert (event.kind, event.actor) == (kind, BEN)
    assert event.project == (Project.named("garden").id if kind == "project.added" else project.id)
    assert changes == [Change(kind, event.subject, event.project)]
    table, _, key = event.subject.partition(":")
    assert any(row[0] == key for row in contents(storage)[table]), "the subject is a row of the store"


def test_a_verb_undone_by_the_transaction_around_it_leaves_neither(
    storage: Storage, project: Project, kind: str, changes: list[Change]
) -> None:
    prepare, act = VERBS[kind]
    it = prepare(project)
    changes.clear()
    before = contents(storage)
    with pytest.raises(LookupError), storage.transaction():
        act(it, BEN)
        assert contents(storage) != before
        raise LookupError
    assert contents(storage) == before
    with storage.transaction():
        with pytest.raises(LookupError), storage.transaction():
            act(it, BEN)
            raise LookupError
    assert contents(storage) == before
    assert changes == []


def test_a_verb_whose_event_cannot_be_written_does_nothing(
    storage: Storage, project: Project, kind: str, changes: list[Change]
) -> None:
    prepare, act = VERBS[kind]
    it = prepare(project)
    changes.clear()
    with storage.transaction():
        storage.database.ddl.drop_guard("audit_event", "insert")
        storage.database.ddl.guard("audit_event", "insert", "the log is full", unless="1 = 0")
    before = contents(storage)
    with pytest.raises(ImmutableError, match="the log is full"):
        act(it, BEN)
    assert contents(storage) == before
    assert changes == []


def test_a_verb_without_a_proper_actor_does_nothing(storage: Storage, project: Project, kind: str) -> None:
    prepare, act = VERBS[kind]
    it = prepare(project)
    before = contents(storage)
    with pytest.raises(InvalidValue, match="the actor 'ana' is not of the form kind:name"):
        act(it, "ana")
    assert contents(storage) == before


def test_a_verb_in_a_relaxed_transaction_makes_it_full(storage: Storage, project: Project, kind: str) -> None:
    prepare, act = VERBS[kind]
    it = prepare(project)
    with storage.transaction(durability="relaxed"):
        assert storage.database._state.durability == "relaxed"
        act(it, BEN)
        assert storage.database._state.durability == "full"
