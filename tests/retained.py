"""What the tests of retention share: a store with something of every class, time that passes, and what must hold."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import peewee

from kagedb import Checkpoint, Plugin, Project, Prompt, Run, Session, Transcript
from kagedb.models import Blob, Model, RunAttachment, TranscriptChunk
from kagedb.models.base import bound_store
from kagedb.models.state_tree import references
from kagedb.operations import retention

if TYPE_CHECKING:
    import pytest

    from kagedb.storage import Storage

ANA = "operator:ana"
DAY_MS = 86_400_000

HOSTILE = retention.Limits(
    sessions_days=1, transcripts_days=1, runs_days=1, checkpoints_days=1, sessions_mib=1, transcripts_mib=1, runs_mib=1
)
"""Everything that may go goes, once a day has passed."""


def days_later(patch: pytest.MonkeyPatch, days: float) -> None:
    """Retention believes that so many days have passed; nothing else does."""
    from kagedb.identity import now_ms

    patch.setattr(retention, "now_ms", lambda: now_ms() + round(days * DAY_MS))


def project(name: str = "house") -> Project:
    """A project with a config, a prompt and a plugin that keeps something."""
    made = Project.add(name, actor=ANA)
    made.configure("mode = 1", parsed={"mode": 1}, actor=ANA, message="first")
    version = Prompt.edit(made, "planner", "You look after a house.", actor=ANA, message="first")
    Prompt.label(made, "planner", "production", version, actor=ANA)
    plugin = Plugin.install(made, {"name": "weather", "version": "1", "permissions": []}, actor=ANA)
    plugin.state.set("place", {"lat": 1})
    return made


def lived(owner: Project, *, runs: int = 3, pauses: int = 2, kib: int = 4, end: bool = True, seed: int = 0) -> Session:
    """A session with runs, subagents, attachments, checkpoints and a transcript, and about so many KiB in each."""
    noise = random.Random(f"{owner.name}{seed}{Session.select().count()}")
    session = Session.start(owner, title="night watch", actor=ANA)
    with Transcript.open(session, 80, 24) as recorder:
        recorder.write(noise.randbytes(kib * 1024))
    with bound_store().transaction():
        for number in range(runs):
            run = Run.dispatch(
                session, agent="planner", input={"n": number, "text": f"{noise.getrandbits(kib * 4096):x}"}
            )
            child = Run.dispatch(session, agent="scout", input=[], parent=run)
            child.attach("image", noise.randbytes(kib * 1024))
            child.finish(output={"seen": number})
            for step in range(pauses):
                Checkpoint.pause(run, {"n": number, "step": step, "text": f"{noise.getrandbits(kib * 4096):x}"})
            run.finish(output={"good": True})
    if end:
        session.end(actor=ANA)
    return session


def counts() -> dict[str, int]:
    """The rows of each table."""
    return {model._meta.table_name: model.select().count() for model in Model.all()}


def of(session: Session) -> dict[str, int]:
    """The rows below a session, and how many of its runs have their input."""
    of_session = Run.select().where(Run.session == session.id)
    transcripts = [row.number for row in Transcript.select().where(Transcript.session == session.id)]
    return {
        "session": Session.select().where(Session.id == session.id).count(),
        "run": of_session.count(),
        "whole": of_session.where(Run.pruned_at.is_null()).count(),
        "attachment": RunAttachment.select().join(Run).where(Run.session == session.id).count(),
        "checkpoint": Checkpoint.select().where(Checkpoint.session == session.id).count(),
        "transcript": len(transcripts),
        "chunk": sum(
            TranscriptChunk.select()
            .where((TranscriptChunk.key >= number << 24) & (TranscriptChunk.key < number + 1 << 24))
            .count()
            for number in transcripts
        ),
    }


def assert_sound(storage: Storage) -> None:
    """No reference leads nowhere, no chunk is nobody's, every state is whole, and no blob is left over."""
    from kagedb.operations import audit_verify

    for model in Model.all():
        for field in model._meta.refs:
            there = field.rel_model.select(field.rel_field)
            lost = model.select().where(field.is_null(False) & field.not_in(there)).count()
            assert not lost, f"{model._meta.table_name}.{field.name} leads nowhere, {lost} times"
    numbers = {row.number for row in Transcript.select()}
    assert {row.key >> 24 for row in TranscriptChunk.select(TranscriptChunk.key)} <= numbers
    ids = {row.id for row in Checkpoint.select(Checkpoint.id)}
    for checkpoint in Checkpoint.select():
        checkpoint.restore()
        assert checkpoint.parent_id is None or checkpoint.parent_id in ids, "the parent is one that stays"
    assert audit_verify.verify(storage).result == "holds"


def needed() -> set[bytes]:
    """Every blob that a checkpoint or an attachment needs, found without the marks of the code under test."""
    waiting = [row.root for row in Checkpoint.select()] + [row.blob for row in RunAttachment.select()]
    found: set[bytes] = set()
    while waiting:
        digest = waiting.pop()
        if digest not in found:
            found.add(digest)
            waiting += references(Blob.by_id(digest).data)
    return found


def stored(model: Any, column: Any) -> int:
    """The bytes that a column of blobs takes in all rows."""
    return int(model.select(peewee.fn.SUM(peewee.fn.LENGTH(column))).scalar() or 0)
