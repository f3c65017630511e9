"""Debug checkpoints: the states of a session to resume from, roll back to or fork.

Each checkpoint has its whole state, as a tree of blobs that it shares with others (state_tree.py); parents only say
where it came from. What to remove, and when, is in kagedb.operations.checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import peewee

from ..errors import LimitExceeded, NotFound, StateError, StorageCorrupt
from ..fields import TITLE_CHARACTERS, BlobField, BooleanField, MillisField, NameField, TextField, UlidField
from ..identity import now_ms
from .audit import AuditEvent
from .base import Hot, Identified, Model, Parameter, bound_store, check_actor, set_pinned
from .blob import Blob, next_id
from .run import Run
from .session import ENDED, Session

if TYPE_CHECKING:
    from .state_diff import Difference

PAUSED, RESUMED = "paused", "resumed"


class Checkpoint(Identified):
    """One state of a session; `root` is the digest of the blob that its tree begins with.

    `state` is "paused" or, once the session has gone on from it, "resumed". `run_id` is None for a fork into
    another session. Nothing of it changes but `state`, `pinned`, and `parent_id` where pruning removes that.
    """

    session = peewee.ForeignKeyField(Session, backref="checkpoints", index=False)
    # Not foreign keys: they would be looked for at each deletion, and the index for that be written at each pause.
    run_id = UlidField(null=True)
    parent_id = UlidField(null=True)
    label = NameField(null=True)
    reason = TextField(max_length=TITLE_CHARACTERS)
    state = TextField()
    pinned = BooleanField(default=False)
    root = BlobField()

    class Meta:
        table_name = "checkpoint"
        indexes = ((("session", "id"), True),)

    _newest = Hot(lambda: Checkpoint.select(Checkpoint.id).order_by(Checkpoint.id.desc()).limit(1))
    _mark = Hot(
        lambda: Checkpoint.update({Checkpoint.state: Parameter("state", Checkpoint.state)}).where(
            Checkpoint.id == Parameter("id", Checkpoint.id)
        )
    )

    @classmethod
    def pause(
        cls,
        run: Run,
        state: Any,
        *,
        label: str | None = None,
        reason: str = "",
        parent: Checkpoint | None = None,
        binaries: Mapping[str, bytes] | None = None,
    ) -> Self:
        """Keep `state` (any JSON value; tuples become lists) and `binaries` as the state that the run's session has.

        `parent` is a checkpoint of the same session, by default the one that the session stands on. Costs what differs
        from states that are kept already. Relaxed: a power cut may lose the last seconds, but never half a state; with
        `storage.transaction()` around it, it is on disk when that is left.
        Raises InvalidValue, LimitExceeded before anything is written; StateError where the session has ended; NotFound.
        """
        from .state_tree import state_tree

        store = bound_store()
        limits = store.database.limits
        tree = state_tree(state, binaries or {}, limits.json_depth)
        if tree.size > limits.state_bytes:
            raise LimitExceeded(
                f"the checkpoint's state has {tree.size:,} bytes; the limit is {limits.state_bytes:,}",
                "raise limits.state_bytes in the config, or attach the large part to the run (run.attach)",
            )
        ready = Blob.pack(tree.nodes)
        with store.transaction("relaxed"):
            found = Run._parent_of.one(id=run.id)
            if found is None:
                raise NotFound(f"there is no run {run.id}", "list them with: kaged run list")
            session_id = found[0]
            _require_open(session_id)
            if parent is None:
                parent_id = CheckpointHead.of(session_id)
            else:
                parent_id = parent.id
                if cls.by_id(parent_id).session_id != session_id:
                    raise NotFound(f"the checkpoint {parent_id} is not in the session {session_id}")
            Blob.keep(tree.nodes, ready)
            return cls._add(session_id, run.id, parent_id, label, reason, tree.root)

    @classmethod
    def _add(
        cls, session_id: str, run_id: str | None, parent_id: str | None, label: str | None, reason: str, root: bytes
    ) -> Self:
        """A new checkpoint, on which its session stands from now on; inside the caller's transaction."""
        checkpoint = cls.put(
            id=next_id(cls._newest),
            session=session_id,
            run_id=run_id,
            parent_id=parent_id,
            label=label,
            reason=reason,
            state=PAUSED,
            root=root,
        )
        bound_store().notify("checkpoint.paused", checkpoint.ref, checkpoint.audited_project)
        return checkpoint

    @classmethod
    def head(cls, session: Session) -> Self | None:
        """The checkpoint that the session stands on; None before its first."""
        found = CheckpointHead.of(session.id)
        return None if found is None else cls.by_id(found)

    @classmethod
    def of(cls, session: Session) -> list[Self]:
        """Every checkpoint of a session, oldest first."""
        return list(cls.rows(cls.select().where(cls.session == session.id).order_by(cls.id)))

    def restore(self) -> Any:
        """The state that was given to `pause`, every byte of it checked. Raises StorageCorrupt."""
        return self.content()[0]

    def binaries(self) -> dict[str, bytes]:
        """The named byte strings that were given to `pause`, checked. Raises StorageCorrupt."""
        return self.content()[1]

    def content(self) -> tuple[Any, dict[str, bytes]]:
        """Both at once: the state, and the byte strings by name. Raises StorageCorrupt."""
        from .state_tree import expand, split_state

        try:
            return split_state(expand(self.root, Blob.fetch))
        except StorageCorrupt as error:
            raise StorageCorrupt(
                f"the state of the checkpoint {self.id} cannot be restored: {error.message}", error.hint
            ) from error

    def resume(self, *, actor: str) -> Any:
        """Note that the session goes on from this checkpoint, and give its state.

        Raises StateError where the session has ended or stands on another checkpoint (roll back first), or where it was
        resumed from this one already; StorageCorrupt, and then nothing is noted.
        """
        check_actor(actor)
        state = self.restore()
        with bound_store().transaction():
            current = Checkpoint.by_id(self.id)
            _require_open(current.session_id)
            if CheckpointHead.of(current.session_id) != self.id:
                raise StateError(
                    f"the session {current.session_id} stands on another checkpoint than {self.id}",
                    "roll back to this one first",
                )
            if current.state != PAUSED:
                raise StateError(f"the checkpoint {self.id} was resumed already", "roll back to it to resume it again")
            self._mark.run(id=self.id, state=RESUMED)
            AuditEvent.record("checkpoint.resumed", actor=actor, subject=current, body={"label": current.label})
        self.__data__.update(current.__data__, state=RESUMED)
        return state

    def rollback(self, *, actor: str) -> None:
        """Make the session stand on this checkpoint, paused; no other checkpoint changes or goes.

        Raises StateError where the session has ended; StorageCorrupt where the state could not be restored.
        """
        check_actor(actor)
        self.restore()
        with bound_store().transaction():
            current = Checkpoint.by_id(self.id)
            _require_open(current.session_id)
            before = CheckpointHead.of(current.session_id)
            CheckpointHead.move(current.session_id, self.id)
            self._mark.run(id=self.id, state=PAUSED)
            AuditEvent.record(
                "checkpoint.rolled_back", actor=actor, subject=current, body={"label": current.label, "from": before}
            )
        self.__data__.update(current.__data__, state=PAUSED)

    def fork(self, *, actor: str, label: str | None = None, session: Session | None = None) -> Self:
        """A new child with the same state, on which its session stands: from there it can go another way.

        `session` is another session to go on in, of the same project; by default the checkpoint's own. No state is
        copied. Raises StateError where the session has ended, NotFound where it is in another project.
        """
        check_actor(actor)
        with bound_store().transaction():
            current = Checkpoint.by_id(self.id)
            session_id = current.session_id if session is None else session.id
            _require_open(session_id)
            elsewhere = session_id != current.session_id
            if elsewhere and Session._project_of.one(id=session_id)[0] != current.audited_project:
                raise NotFound(f"the session {session_id} is not in the project of the checkpoint {self.id}")
            run_id = None if elsewhere else current.run_id
            child = self._add(session_id, run_id, self.id, label, f"fork of {self.id}", current.root)
            AuditEvent.record("checkpoint.forked", actor=actor, subject=child, body={"label": label, "of": self.id})
        return child

    def pin(self) -> None:
        """Keep the checkpoint whatever is pruned."""
        set_pinned(self, True)

    def unpin(self) -> None:
        """Let pruning remove the checkpoint again."""
        set_pinned(self, False)

    def diff(self, other: Checkpoint) -> list[Difference]:
        """What is not the same in `other`, as changes from this state to that one."""
        from .state_diff import differences

        if self.root == other.root:
            return []
        (state, binaries), (other_state, other_binaries) = self.content(), other.content()
        return [*differences(state, other_state), *differences(binaries, other_binaries, "binaries:")]

    @property
    def audited_project(self) -> str | None:
        found = Session._project_of.one(id=self.session_id)
        return None if found is None else str(found[0])


# Removing a checkpoint has to look for what was forked from it into other sessions, which alone has no run.
Checkpoint.add_index(Checkpoint.index(Checkpoint.parent_id, where=Checkpoint.run_id.is_null()))


class CheckpointHead(Model):
    """Where a session was rolled back to; it stands there until it has a checkpoint newer than `newest_id`.

    Without a row, and once it has, it stands on its newest checkpoint: pausing need not write another table.
    """

    session = peewee.ForeignKeyField(Session, primary_key=True)
    checkpoint = peewee.ForeignKeyField(Checkpoint, index=False)
    newest_id = UlidField()
    moved_at = MillisField(default=now_ms)

    class Meta:
        table_name = "checkpoint_head"

    _newest = Hot(
        lambda: (
            Checkpoint.select(Checkpoint.id)
            .where(Checkpoint.session == Parameter("session", Checkpoint.session))
            .order_by(Checkpoint.id.desc())
            .limit(1)
        )
    )
    _moved = Hot(
        lambda: CheckpointHead.select(CheckpointHead.checkpoint, CheckpointHead.newest_id).where(
            CheckpointHead.session == Parameter("session", CheckpointHead.session)
        )
    )

    @classmethod
    def of(cls, session_id: str) -> str | None:
        """The id of the checkpoint that a session stands on; None before its first."""
        newest = cls._newest.one(session=session_id)
        moved = cls._moved.one(session=session_id)
        if moved is not None and (newest is None or newest[0] <= moved[1]):
            return str(moved[0])
        return None if newest is None else str(newest[0])

    @classmethod
    def move(cls, session_id: str, checkpoint_id: str) -> None:
        """Make the session stand on that checkpoint of its own; inside the caller's transaction."""
        newest = cls._newest.one(session=session_id)
        cls.delete().where(cls.session == session_id).execute()
        cls.put(session=session_id, checkpoint=checkpoint_id, newest_id=newest[0])


def _require_open(session_id: str) -> None:
    found = Session._state_of.one(id=session_id)
    if found is None:
        raise NotFound(f"there is no session {session_id}", "list them with: kaged session list")
    if found[0] == ENDED:
        raise StateError(f"the session {session_id} has ended", "start another one, and fork a checkpoint into it")
