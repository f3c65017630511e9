"""Projects and the versions of their DSL config."""

from __future__ import annotations

import json

import pytest

from kagedb import (
    AlreadyExists,
    AuditEvent,
    Change,
    InvalidValue,
    NotFound,
    Plugin,
    Project,
    ProjectConfig,
    Prompt,
    Session,
    StateError,
)
from kagedb.identity import is_ulid, new_ulid, now_ms

ANA = "operator:ana"
BEN = "operator:ben"


def test_a_project_is_found_by_its_name_and_id(project: Project) -> None:
    assert is_ulid(project.id)
    assert abs(now_ms() - project.created_at) < 60_000
    for found in (Project.named("house"), Project.by_id(project.id), Project.get(Project.name == "house")):
        assert (found.id, found.created_at) == (project.id, project.created_at)
        assert (found.name, found.archived_at) == ("house", None)


def test_a_project_that_is_not_there_is_said_so(project: Project) -> None:
    with pytest.raises(NotFound, match="there is no project 'House'; list them with: kaged project list"):
        Project.named("House")
    nowhere = new_ulid()
    with pytest.raises(NotFound, match=f"there is no project {nowhere}; see what there is with: kaged project list"):
        Project.by_id(nowhere)
    with pytest.raises(LookupError):
        ProjectConfig.by_id(nowhere)


def test_a_name_is_taken_once_and_for_all(project: Project) -> None:
    for _ in range(2):
        with pytest.raises(AlreadyExists, match="there is a project 'house' already"):
            Project.add("house", actor=ANA)
        if project.archived_at is None:
            project.archive(actor=ANA)
    assert Project.select().count() == 1
    # Names are text: case and composition make another one.
    for name in ("House", "house.", "hou\u0073\u0301e", "hou\u015be"):
        Project.add(name, actor=ANA)
    assert Project.select().count() == 5


def test_adding_is_recorded(project: Project) -> None:
    (event,) = AuditEvent.of(project)
    assert (event.kind, event.actor, event.project) == ("project.added", ANA, project.id)
    assert json.loads(event.body) == {"name": "house"}


def test_each_config_is_a_version(project: Project) -> None:
    assert project.config() is None
    first = project.configure("agent planner {}\n", parsed={"agents": ["planner"]}, actor=ANA, message="first")
    second = project.configure("agent other {}\n", parsed={"agents": ["other"]}, actor=BEN)
    kept = project.config()
    assert kept is not None
    assert (kept.id, kept.version) == (second.id, 2)
    assert (kept.source, kept.parsed) == ("agent other {}\n", {"agents": ["other"]})
    old = ProjectConfig.by_id(first.id)
    assert (old.version, old.source, old.author, old.message) == (1, "agent planner {}\n", ANA, "first")
    assert (kept.author, kept.message) == (BEN, "")
    assert first.digest != second.digest
    (event,) = AuditEvent.of(second)
    assert (event.kind, event.actor, event.project) == ("project.configured", BEN, project.id)
    assert json.loads(event.body) == {"version": 2, "digest": second.digest, "message": ""}


def test_the_same_config_again_is_no_version(project: Project) -> None:
    first = project.configure("x", parsed={"a": 1}, actor=ANA)
    events = AuditEvent.select().count()
    assert project.configure("x", parsed={"a": 1}, actor=BEN, message="again").id == first.id
    assert (ProjectConfig.select().count(), AuditEvent.select().count()) == (1, events)
    for source, parsed in (("x", {"a": 2}), ("x ", {"a": 2}), ("x", {"a": 1})):
        project.configure(source, parsed=parsed, actor=ANA)
    assert [row.version for row in ProjectConfig.select().order_by(ProjectConfig.version)] == [1, 2, 3, 4]


def test_what_belongs_to_the_source_and_what_to_the_parsed_is_part_of_the_digest(project: Project) -> None:
    first = project.configure("x", parsed={}, actor=ANA)
    second = project.configure("x{}", parsed={}, actor=ANA)
    assert first.digest != second.digest


def test_versions_are_counted_for_each_project_alone(project: Project) -> None:
    other = Project.add("garden", actor=ANA)
    for place in (project, other):
        assert place.configure("x", parsed={}, actor=ANA).version == 1
    assert [config.project_id for config in other.configs] == [other.id]


def test_an_archived_project_takes_no_new_work(project: Project) -> None:
    Prompt.edit(project, "planner", "x", actor=ANA)
    stale = Project.named("house")
    project.archive(actor=BEN)
    assert Project.named("house").archived_at == project.archived_at
    (event, *_) = AuditEvent.of(project)
    assert (event.kind, event.actor, json.loads(event.body)) == ("project.archived", BEN, {"name": "house"})
    events = AuditEvent.select().count()
    manifest = {"name": "weather", "version": "1", "permissions": []}
    for place in (project, stale):
        for work in (
            lambda place=place: place.configure("x", parsed={}, actor=ANA),
            lambda place=place: Prompt.edit(place, "planner", "y", actor=ANA),
            lambda place=place: Prompt.label(place, "planner", "production", 1, actor=ANA),
            lambda place=place: Session.start(place, title="x", actor=ANA),
            lambda place=place: Plugin.install(place, manifest, actor=ANA),
        ):
            with pytest.raises(StateError, match="the project 'house' is archived; work in another project"):
                work()
        with pytest.raises(StateError, match="the project 'house' is archived already"):
            place.archive(actor=ANA)
    assert AuditEvent.select().count() == events


def test_work_in_a_project_that_is_not_in_the_store_is_refused(project: Project) -> None:
    stranger = Project(id=new_ulid(), name="elsewhere")
    with pytest.raises(NotFound, match=f"there is no project {stranger.id}"):
        Session.start(stranger, title="x", actor=ANA)


ACTORS = ["operator:ana", "agent:planner", "a:b", "daemon:kaged 1.0", "operator:Ana Ω", "x-1_y:ana@host"]
ACTORS.append("a:" + "x" * 200)
NO_ACTORS = ["", "ana", ":ana", "operator:", "operator: ana", "operator:ana ", "Operator:ana", "1:ana", "operator:a\nb"]
NO_ACTORS += ["operator:\x1b[31m", "operator:\x9b31m", "operator:a\0b", "operator:\ud800", "a:\u2028", "a:\u00a0"]
NO_ACTORS += ["a:" + "x" * 201, "o" * 32 + ":ana", "operator:ana\n", None, 5, b"operator:ana", ["operator", "ana"]]


@pytest.mark.parametrize("actor", ACTORS)
def test_an_actor_is_a_kind_and_a_name(project: Project, actor: str) -> None:
    other = Project.add("garden", actor=actor)
    assert AuditEvent.of(other)[0].actor == actor


def test_anything_else_is_no_actor(project: Project) -> None:
    for actor in NO_ACTORS:
        with pytest.raises(InvalidValue) as caught:
            Project.add("garden", actor=actor)  # type: ignore[arg-type]
        str(caught.value).encode()
    assert Project.select().count() == 1


def test_subscribers_are_told_what_happened_to_what_and_where(project: Project, changes: list[Change]) -> None:
    config = project.configure("x", parsed={}, actor=ANA)
    project.configure("x", parsed={}, actor=ANA)  # nothing happens
    project.archive(actor=ANA)
    assert changes == [
        Change("project.configured", config.ref, project.id),
        Change("project.archived", project.ref, project.id),
    ]
