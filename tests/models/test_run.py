"""Runs and the subagents' runs below them."""

from __future__ import annotations

import peewee
import pytest

import kagedb
from kagedb import AuditEvent, Change, NotFound, Project, Prompt, Run, RunNode, Session, StateError
from kagedb.identity import new_ulid

ANA = "operator:ana"


@pytest.fixture
def run(session: Session) -> Run:
    return Run.dispatch(session, agent="planner", input={"task": "plan"})


def test_a_dispatched_run_is_running(session: Session) -> None:
    version = Prompt.edit(session.project, "planner", "Plan.", actor=ANA)
    run = Run.dispatch(session, agent="planner", input=["any", {"json": None}], prompt_version=version)
    kept = Run.by_id(run.id)
    assert (kept.state, kept.agent, kept.input) == ("running", "planner", ["any", {"json": None}])
    assert (kept.session_id, kept.parent_id, kept.prompt_version_id) == (session.id, None, version.id)
    assert kept.started_at == kept.created_at
    assert (kept.output, kept.exit_status, kept.error, kept.finished_at) == (None, None, None, None)


ENDS = {
    "finished": (lambda run: run.finish(exit_status=3, output={"ok": False}), 3, {"ok": False}, None),
    "failed": (lambda run: run.fail("no tokens left", exit_status=137, output="half"), 137, "half", "no tokens left"),
    "cancelled": (lambda run: run.cancel("ana pressed ^C"), None, None, "ana pressed ^C"),
    "interrupted": (lambda run: run.interrupt("the daemon died"), None, None, "the daemon died"),
}


@pytest.mark.parametrize("state", ENDS)
def test_a_run_ends_once(run: Run, state: str) -> None:
    end, exit_status, output, error = ENDS[state]
    stale = Run.by_id(run.id)
    end(run)
    for model in (run, Run.by_id(run.id)):
        assert (model.state, model.exit_status, model.output, model.error) == (state, exit_status, output, error)
        assert model.finished_at >= model.started_at
    before = Run.by_id(run.id).__data__
    for again, *_ in ENDS.values():
        for model in (run, stale):
            with pytest.raises(StateError, match=f"the run {run.id} is {state} already"):
                again(model)
    assert Run.by_id(run.id).__data__ == before
    assert stale.state == "running", "a verb that failed leaves the model as it was"


def test_a_run_finishes_with_status_0_and_no_output_where_nothing_is_said(run: Run) -> None:
    run.finish()
    kept = Run.by_id(run.id)
    assert (kept.exit_status, kept.output) == (0, None)


def test_a_cancelled_run_need_not_say_why(run: Run) -> None:
    run.cancel()
    assert Run.by_id(run.id).error is None


def test_runs_are_not_recorded_one_by_one(run: Run) -> None:
    events = AuditEvent.select().count()
    run.finish()
    assert AuditEvent.select().count() == events


def test_an_event_about_a_run_belongs_to_its_project(run: Run, project: Project) -> None:
    AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"allow": False})
    (event,) = AuditEvent.of(run)
    assert (event.subject, event.project) == (f"run:{run.id}", project.id)


def test_a_run_that_is_not_in_the_store_is_said_so(session: Session) -> None:
    stranger = Run(id=new_ulid(), session=session.id)
    for verb in (stranger.finish, stranger.cancel, stranger.tree):
        with pytest.raises(NotFound, match=f"there is no run {stranger.id}"):
            verb()
    with pytest.raises(NotFound, match=f"the parent run {stranger.id} is not in the session"):
        Run.dispatch(session, agent="x", input={}, parent=stranger)


def test_nothing_is_dispatched_in_an_ended_session(session: Session) -> None:
    session.end(actor=ANA)
    with pytest.raises(StateError, match=f"the session {session.id} has ended"):
        Run.dispatch(session, agent="x", input={})
    assert Run.select().count() == 0


def test_a_parent_is_an_open_run_of_the_same_session(run: Run, session: Session) -> None:
    other = Session.start(session.project, title="other", actor=ANA)
    with pytest.raises(NotFound, match=f"the parent run {run.id} is not in the session {other.id}"):
        Run.dispatch(other, agent="x", input={}, parent=run)
    run.finish()
    with pytest.raises(StateError, match=f"the parent run {run.id} is over"):
        Run.dispatch(session, agent="x", input={}, parent=run)
    assert Run.select().count() == 1


def test_a_parent_may_end_before_its_children(run: Run, session: Session) -> None:
    child = Run.dispatch(session, agent="x", input={}, parent=run)
    run.finish()
    child.finish()
    assert [model.state for model in Run.of(session)] == ["finished", "finished"]


def test_a_prompt_version_that_is_not_in_the_store_is_refused(session: Session) -> None:
    stranger = kagedb.PromptVersion(id=new_ulid())
    with pytest.raises(peewee.IntegrityError):
        Run.dispatch(session, agent="x", input={}, prompt_version=stranger)
    assert Run.select().count() == 0


def shape(node: RunNode) -> tuple[str, list[object]]:
    return node.run.agent, [shape(child) for child in node.children]


def test_a_run_has_the_tree_of_what_was_dispatched_below_it(session: Session) -> None:
    root = Run.dispatch(session, agent="root", input={})
    left = Run.dispatch(session, agent="left", input={}, parent=root)
    right = Run.dispatch(session, agent="right", input={}, parent=root)
    Run.dispatch(session, agent="deep", input={}, parent=left)
    Run.dispatch(session, agent="late", input={}, parent=root)
    alone = Run.dispatch(session, agent="alone", input={})
    Run.dispatch(Session.start(session.project, title="other", actor=ANA), agent="elsewhere", input={})
    right.fail("why")
    assert shape(root.tree()) == ("root", [("left", [("deep", [])]), ("right", []), ("late", [])])
    assert shape(left.tree()) == ("left", [("deep", [])])
    assert shape(alone.tree()) == ("alone", [])
    assert [node.run.agent for node in root.tree().walk()] == ["root", "left", "right", "late", "deep"]
    assert [node.run.agent for node in RunNode.forest(Run.of(session))] == ["root", "alone"]
    assert root.tree().children[1].run.error == "why"
    assert [child.agent for child in root.children.order_by(Run.id)] == ["left", "right", "late"]


def test_a_very_deep_tree_is_no_trouble(session: Session, storage: kagedb.Storage) -> None:
    with storage.transaction():
        first = run = Run.dispatch(session, agent="x", input=0)
        for depth in range(1, 1500):  # more than Python's stack takes
            run = Run.dispatch(session, agent="x", input=depth, parent=run)
    assert [node.run.input for node in first.tree().walk()] == list(range(1500))


def test_a_new_daemon_finds_what_the_last_one_left_open(session: Session, project: Project) -> None:
    finished, left, below = (Run.dispatch(session, agent=agent, input={}) for agent in ("finished", "left", "below"))
    other = Session.start(project, title="other", actor=ANA)
    far = Run.dispatch(other, agent="far", input={})
    finished.finish()
    other.detach()
    assert [run.id for run in Run.left_open()] == [left.id, below.id, far.id]
    for run in Run.left_open():
        run.interrupt("the daemon died")
    assert Run.left_open() == []
    session.end(actor=ANA)
    assert Run.by_id(left.id).state == "interrupted"


def test_a_run_that_was_undone_can_be_finished_again(run: Run, storage: kagedb.Storage) -> None:
    with pytest.raises(LookupError), storage.transaction():
        run.finish(output=1)
        raise LookupError
    assert Run.by_id(run.id).state == "running"
    run.finish(output=2)
    assert Run.by_id(run.id).output == 2


def test_subscribers_are_told_of_dispatch_and_end_with_the_project(
    session: Session, project: Project, changes: list[Change]
) -> None:
    changes.clear()
    for state, (end, *_) in ENDS.items():
        run = Run.dispatch(session, agent="x", input={})
        end(run)
        with pytest.raises(StateError):
            run.finish()
        assert changes == [Change("run.dispatched", run.ref, project.id), Change(f"run.{state}", run.ref, project.id)]
        changes.clear()


def test_subscribers_are_told_after_the_outermost_commit_and_never_of_what_was_undone(
    session: Session, storage: kagedb.Storage, changes: list[Change]
) -> None:
    changes.clear()
    with storage.transaction():
        kept = Run.dispatch(session, agent="x", input={})
        with pytest.raises(LookupError), storage.transaction():
            Run.dispatch(session, agent="y", input={})
            raise LookupError
        kept.finish()
        assert changes == []
    assert [change.kind for change in changes] == ["run.dispatched", "run.finished"]
    with pytest.raises(LookupError), storage.transaction():
        Run.dispatch(session, agent="z", input={})
        raise LookupError
    assert len(changes) == 2
