"""Agent runs and the subagent invocations below them, with their input, output and exit status."""

from __future__ import annotations

from typing import Any, Self

import peewee

from ..errors import NotFound, StateError
from ..fields import IntegerField, JSONField, MillisField, NameField, TextField
from ..identity import now_ms
from .base import Hot, Identified, Parameter, bound_store
from .prompt import PromptVersion
from .session import ENDED, Session

RUNNING, FINISHED, FAILED, CANCELLED, INTERRUPTED = "running", "finished", "failed", "cancelled", "interrupted"


class Run(Identified):
    """One run of an agent, or of a subagent where it has a parent.

    `state` is "running", "finished" (it ended by itself, whatever its exit status), "failed" (it could not go on),
    "cancelled" (somebody stopped it) or "interrupted" (the daemon died under it). Once pruning has emptied it at
    `pruned_at`, `input` and `output` are None and there are no attachments.
    """

    session = peewee.ForeignKeyField(Session, backref="runs")
    parent = peewee.ForeignKeyField("self", null=True, backref="children", index=False)
    agent = NameField()
    prompt_version = peewee.ForeignKeyField(PromptVersion, null=True, index=False)
    state = TextField()
    exit_status = IntegerField(null=True)
    error = TextField(null=True)
    started_at = MillisField()
    finished_at = MillisField(null=True)
    pruned_at = MillisField(null=True)
    # The last columns: whoever asks for none of them does not read past them.
    input = JSONField()
    output = JSONField(null=True)

    class Meta:
        table_name = "run"

    _finish = Hot(
        lambda: (
            Run.update(
                {
                    Run.state: Parameter("state", Run.state),
                    Run.exit_status: Parameter("exit_status", Run.exit_status),
                    Run.output: Parameter("output", Run.output),
                    Run.error: Parameter("error", Run.error),
                    Run.finished_at: Parameter("at", Run.finished_at),
                }
            )
            .where((Run.id == Parameter("id", Run.id)) & Run.finished_at.is_null())
            .returning(peewee.SQL("(SELECT project_id FROM session WHERE session.id = run.session_id)"))
        )
    )
    _parent_of = Hot(lambda: Run.select(Run.session, Run.finished_at).where(Run.id == Parameter("id", Run.id)))
    _of_session = Hot(lambda: Run.select().where(Run.session == Parameter("session", Run.session)).order_by(Run.id))

    @classmethod
    def dispatch(
        cls,
        session: Session,
        *,
        agent: str,
        input: Any,
        parent: Run | None = None,
        prompt_version: PromptVersion | None = None,
    ) -> Self:
        """Note that a run begins; `input` is any JSON value. With `parent` it is a subagent's invocation.

        Raises StateError where the session has ended or the parent is over, NotFound where the parent belongs to
        another session.
        """
        store = bound_store()
        with store.transaction():
            found = Session._state_of.one(id=session.id)
            if found is None:
                raise NotFound(f"there is no session {session.id}", "list them with: kaged session list")
            if found[0] == ENDED:
                raise StateError(f"the session {session.id} has ended", "start another one")
            if parent is not None:
                cls._check_parent(parent, session)
            at = now_ms()
            run = cls.put(
                session=session.id,
                parent=parent.id if parent is not None else None,
                agent=agent,
                prompt_version=prompt_version.id if prompt_version is not None else None,
                input=input,
                state=RUNNING,
                started_at=at,
                created_at=at,
            )
            store.notify("run.dispatched", run.ref, session.project_id)
        return run

    @classmethod
    def _check_parent(cls, parent: Run, session: Session) -> None:
        found = cls._parent_of.one(id=parent.id)
        if found is None or found[0] != session.id:
            raise NotFound(f"the parent run {parent.id} is not in the session {session.id}")
        if found[1] is not None:
            raise StateError(f"the parent run {parent.id} is over", "dispatch below a run that is still going on")

    def finish(self, *, exit_status: int = 0, output: Any = None) -> None:
        """Note that the run has ended by itself; `output` is any JSON value. Raises StateError where it is over."""
        self._end(FINISHED, exit_status=exit_status, output=output)

    def fail(self, error: str, *, exit_status: int | None = None, output: Any = None) -> None:
        """Note that the run could not go on, and why. Raises StateError where it is over."""
        self._end(FAILED, error=error, exit_status=exit_status, output=output)

    def cancel(self, reason: str = "") -> None:
        """Note that somebody stopped the run. Raises StateError where it is over."""
        self._end(CANCELLED, error=reason or None)

    def interrupt(self, reason: str) -> None:
        """Note that the run was cut off from outside. Raises StateError where it is over."""
        self._end(INTERRUPTED, error=reason)

    @classmethod
    def left_open(cls) -> list[Self]:
        """The runs that have not ended, oldest first: at a daemon's start, what its predecessor left behind."""
        # By way of the sessions that have not ended: an index on the few open runs would cost every run two writes.
        query = cls.select().join(Session).where((Session.state != ENDED) & cls.finished_at.is_null()).order_by(cls.id)
        return list(cls.rows(query))

    @classmethod
    def of(cls, session: Session) -> list[Self]:
        """Every run of a session, oldest first."""
        return [cls.from_row(row) for row in cls._of_session.run(session=session.id).fetchall()]

    def attach(self, name: str, data: bytes | str) -> None:
        """Keep what JSON cannot hold: bytes, text with NULs, large output. The same again changes nothing.

        Raises AlreadyExists where the name has other data, LimitExceeded beyond `limits.attachment_bytes`.
        """
        from .blob import RunAttachment

        RunAttachment.add(self, name, data)

    def attachment(self, name: str) -> bytes | str:
        """What was attached under that name, as bytes or text as it was given. Raises NotFound, StorageCorrupt."""
        from .blob import RunAttachment

        return RunAttachment.named(self, name).content()

    def tree(self) -> RunNode:
        """This run with all that was dispatched below it, as it is in the store. Raises NotFound."""
        rows = self._of_session.run(session=self.session_id).fetchall()
        for root in RunNode.forest([Run.from_row(row) for row in rows]):
            for node in root.walk():
                if node.run.id == self.id:
                    return node
        raise NotFound(f"there is no run {self.id}", "list them with: kaged run list")

    def _end(self, state: str, *, exit_status: int | None = None, output: Any = None, error: str | None = None) -> None:
        values = {"state": state, "exit_status": exit_status, "output": output, "error": error}
        store = bound_store()
        with store.transaction():
            at = now_ms()
            ended = self._finish.one(id=self.id, at=at, **values)
            if ended is None:
                current = Run.by_id(self.id)
                raise StateError(f"the run {self.id} is {current.state} already")
            store.notify(f"run.{state}", self.ref, ended[0])
        self.__data__.update(values, finished_at=at)

    @property
    def audited_project(self) -> str | None:
        found = Session._project_of.one(id=self.session_id)
        return None if found is None else str(found[0])


# Most runs have no parent and cost this index nothing; deleting a run has to look for its children.
Run.add_index(Run.index(Run.parent, where=Run.parent.is_null(False)))


class RunNode:
    """A run and the nodes of the runs below it, oldest first."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.children: list[RunNode] = []

    @classmethod
    def forest(cls, runs: list[Run]) -> list[RunNode]:
        """The trees that the runs of one session make, oldest first."""
        nodes = {run.id: cls(run) for run in runs}
        roots: list[RunNode] = []
        for node in nodes.values():
            parent = nodes.get(node.run.parent_id)
            (roots if parent is None else parent.children).append(node)
        return roots

    def walk(self) -> list[RunNode]:
        """This node and all below it, parents first."""
        found = [self]
        for node in found:
            found.extend(node.children)
        return found
