"""Sessions: long-lived work in a project that an operator attaches to, detaches from and comes back to."""

from __future__ import annotations

from typing import Any, Self

import peewee

from ..errors import StateError
from ..fields import TITLE_CHARACTERS, BooleanField, JSONField, MillisField, TextField
from ..identity import now_ms
from .audit import AuditEvent
from .base import Hot, Identified, Parameter, bound_store, check_actor, set_pinned
from .project import Project

ATTACHED, DETACHED, ENDED = "attached", "detached", "ended"


class Session(Identified):
    """One session; `state` is "attached", "detached" or "ended". Pruning takes nothing of one that is `pinned`."""

    project = peewee.ForeignKeyField(Project, backref="sessions")
    title = TextField(max_length=TITLE_CHARACTERS, one_line=True)
    state = TextField()
    attached_at = MillisField(null=True)
    detached_at = MillisField(null=True)
    ended_at = MillisField(null=True)
    pinned = BooleanField(default=False)
    metadata = JSONField()

    class Meta:
        table_name = "session"

    _change = Hot(
        lambda: Session.update(
            {
                Session.state: Parameter("state", Session.state),
                Session.attached_at: Parameter("attached_at", Session.attached_at),
                Session.detached_at: Parameter("detached_at", Session.detached_at),
                Session.ended_at: Parameter("ended_at", Session.ended_at),
            }
        ).where(Session.id == Parameter("id", Session.id))
    )
    _state_of = Hot(lambda: Session.select(Session.state).where(Session.id == Parameter("id", Session.id)))
    _project_of = Hot(lambda: Session.select(Session.project).where(Session.id == Parameter("id", Session.id)))

    @classmethod
    def start(cls, project: Project, *, title: str, actor: str, metadata: dict[str, Any] | None = None) -> Self:
        """A new session, attached. `metadata` is a JSON object. Raises StateError where the project is archived."""
        check_actor(actor)
        at = now_ms()
        with bound_store().transaction():
            project.require_active()
            metadata = {} if metadata is None else metadata
            cls.metadata.check_object(metadata)
            session = cls.put(
                project=project.id, title=title, state=ATTACHED, attached_at=at, created_at=at, metadata=metadata
            )
            AuditEvent.record("session.started", actor=actor, subject=session, body={"title": title})
        return session

    def attach(self) -> None:
        """Note that somebody looks at the session again. Raises StateError where it has ended."""
        self._move(ATTACHED, attached_at=now_ms())

    def detach(self) -> None:
        """Note that nobody looks at the session any more; its runs go on. Raises StateError where it has ended."""
        self._move(DETACHED, detached_at=now_ms())

    def end(self, *, actor: str) -> None:
        """End the session for good. Raises StateError where it has ended, or has runs that are still open."""
        from .run import Run

        check_actor(actor)
        with bound_store().transaction():
            left = Run.select().where((Run.session == self.id) & Run.finished_at.is_null()).count()
            if left:
                raise StateError(f"runs of the session {self.id} are still open: {left}", "finish or cancel them first")
            self._move(ENDED, ended_at=now_ms())
            AuditEvent.record("session.ended", actor=actor, subject=self, body={"title": self.title})

    def pin(self) -> None:
        """Keep the session and all that is below it, whatever is pruned."""
        set_pinned(self, True)

    def unpin(self) -> None:
        """Let pruning remove the session and what is below it again."""
        set_pinned(self, False)

    def _move(self, state: str, **times: int) -> None:
        store = bound_store()
        with store.transaction():
            current = Session.by_id(self.id)
            if current.state == ENDED:
                raise StateError(f"the session {self.id} has ended", "start another one")
            values = {name: current.__data__[name] for name in ("attached_at", "detached_at", "ended_at")}
            values.update(times, state=state)
            self._change.run(id=self.id, **values)
            if state != ENDED:  # that is told of by its audit event
                store.notify(f"session.{state}", self.ref, current.project_id)
        self.__data__.update(values)

    @property
    def audited_project(self) -> str:
        return str(self.project_id)
