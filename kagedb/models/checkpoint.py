"""Debug checkpoints: the states of a session to resume from or roll back to."""

from __future__ import annotations

import peewee

from ..fields import TITLE_CHARACTERS, BooleanField, MillisField, NameField, TextField
from ..identity import now_ms
from .base import Identified, Model
from .blob import Blob
from .run import Run
from .session import Session


class Checkpoint(Identified):
    """One state; `root` is the blob that its tree of nodes begins with."""

    session = peewee.ForeignKeyField(Session, backref="checkpoints")
    run = peewee.ForeignKeyField(Run, null=True, backref="checkpoints", index=False)
    parent = peewee.ForeignKeyField("self", null=True, backref="children", index=False)
    label = NameField(null=True)
    reason = TextField(max_length=TITLE_CHARACTERS)
    state = TextField()
    pinned = BooleanField(default=False)
    root = peewee.ForeignKeyField(Blob, column_name="root", object_id_name="root_digest", index=False)

    class Meta:
        table_name = "checkpoint"


class CheckpointHead(Model):
    """The checkpoint a session stands on now."""

    session = peewee.ForeignKeyField(Session, primary_key=True)
    checkpoint = peewee.ForeignKeyField(Checkpoint, index=False)
    moved_at = MillisField(default=now_ms)

    class Meta:
        table_name = "checkpoint_head"
