"""Terminal transcripts: raw bytes as the terminal sent them, in chunks under one packed key."""

from __future__ import annotations

import peewee

from ..fields import BlobField, IntegerField, MillisField
from .base import Identified, Model
from .run import Run
from .session import Session


class Transcript(Identified):
    """One recording; `number` is never used again and begins the keys of its chunks."""

    session = peewee.ForeignKeyField(Session, backref="transcripts")
    run = peewee.ForeignKeyField(Run, null=True, backref="transcripts", index=False)
    number = IntegerField(unique=True)
    continues = peewee.ForeignKeyField("self", null=True, backref="continuations", index=False)
    columns = IntegerField()
    rows = IntegerField()
    closed_at = MillisField(null=True)

    class Meta:
        table_name = "transcript"


class TranscriptChunk(Model):
    """A piece of a recording; the key is number << 24 | sequence, so that a transcript lies in one place."""

    key = IntegerField(primary_key=True)
    at = MillisField()
    size = IntegerField()
    data = BlobField()

    class Meta:
        table_name = "transcript_chunk"
