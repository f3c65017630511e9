"""Sessions: started, attached to, detached from, ended."""

from __future__ import annotations

import json

import pytest

from kagedb import AuditEvent, Change, InvalidValue, NotFound, Project, Run, Session, StateError
from kagedb.identity import new_ulid

ANA = "operator:ana"
BEN = "operator:ben"


def test_a_started_session_is_attached(project: Project) -> None:
    session = Session.start(project, title="night watch", actor=ANA, metadata={"cwd": "/srv"})
    kept = Session.by_id(session.id)
    assert (kept.project_id, kept.state, kept.title) == (project.id, "attached", "night watch")
    assert kept.metadata == {"cwd": "/srv"}
    assert kept.attached_at == kept.created_at
    assert (kept.detached_at, kept.ended_at) == (None, None)
    (event,) = AuditEvent.of(session)
    assert (event.kind, event.actor, event.project) == ("session.started", ANA, project.id)
    assert json.loads(event.body) == {"title": "night watch"}


def test_a_session_without_metadata_has_an_empty_object(session: Session) -> None:
    assert Session.by_id(session.id).metadata == {}


def test_it_is_detached_from_and_attached_to_again_any_number_of_times(session: Session) -> None:
    events = AuditEvent.select().count()
    stale = Session.by_id(session.id)
    for _ in range(2):
        session.detach()
        kept = Session.by_id(session.id)
        assert (session.state, kept.state) == ("detached", "detached")
        assert kept.detached_at == session.detached_at >= session.attached_at
        stale.attach()
        assert Session.by_id(session.id).state == "attached"
    assert stale.detached_at == kept.detached_at, "a stale model writes what it changes, and no more"
    assert AuditEvent.select().count() == events, "too many to be recorded"


def test_an_ended_session_stays_ended(session: Session) -> None:
    session.detach()
    session.end(actor=BEN)
    kept = Session.by_id(session.id)
    assert (session.state, kept.state, kept.ended_at) == ("ended", "ended", session.ended_at)
    assert kept.detached_at is not None
    (event, _) = AuditEvent.of(session)
    assert (event.kind, event.actor) == ("session.ended", BEN)
    for again in (session.attach, session.detach, lambda: session.end(actor=ANA)):
        with pytest.raises(StateError, match=f"the session {session.id} has ended; start another one"):
            again()
    assert len(AuditEvent.of(session)) == 2


def test_a_session_with_open_runs_does_not_end(session: Session) -> None:
    runs = [Run.dispatch(session, agent="planner", input={}) for _ in range(2)]
    with pytest.raises(StateError, match=f"runs of the session {session.id} are still open: 2; finish or cancel"):
        session.end(actor=ANA)
    runs[0].finish()
    with pytest.raises(StateError, match="open: 1"):
        session.end(actor=ANA)
    assert Session.by_id(session.id).state == "attached"
    runs[1].cancel()
    session.end(actor=ANA)


def test_a_session_that_is_not_in_the_store_is_said_so(project: Project) -> None:
    stranger = Session(id=new_ulid(), project=project.id, title="x")
    for verb in (stranger.attach, stranger.detach, lambda: stranger.end(actor=ANA)):
        with pytest.raises(NotFound, match=f"there is no session {stranger.id}"):
            verb()
    with pytest.raises(NotFound, match=f"there is no session {stranger.id}"):
        Run.dispatch(stranger, agent="x", input={})


def test_a_title_is_one_line_of_at_most_1000_characters(project: Project) -> None:
    Session.start(project, title="x" * 1000, actor=ANA)
    Session.start(project, title="", actor=ANA)
    for title in ("x" * 1001, "a\nb", "\x1b]0;title\x07", None):
        with pytest.raises(InvalidValue, match=r"session\.title"):
            Session.start(project, title=title, actor=ANA)  # type: ignore[arg-type]


def test_sessions_go_on_when_their_project_is_archived(session: Session) -> None:
    session.project.archive(actor=ANA)
    session.detach()
    Run.dispatch(session, agent="x", input={}).finish()
    session.end(actor=ANA)


def test_subscribers_are_told_of_each_verb_once(project: Project, changes: list[Change]) -> None:
    session = Session.start(project, title="x", actor=ANA)
    session.detach()
    session.attach()
    session.end(actor=ANA)
    kinds = ("session.started", "session.detached", "session.attached", "session.ended")
    assert changes == [Change(kind, session.ref, project.id) for kind in kinds]
