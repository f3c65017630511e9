"""Content-addressed bytes, and the attachments of runs that refer to them."""

from __future__ import annotations

import peewee

from ..fields import BlobField, IntegerField, MillisField, NameField, TextField
from ..identity import now_ms
from .base import Identified, Model
from .run import Run


class Blob(Model):
    """Bytes under their SHA-256; stored once, whoever refers to them."""

    digest = BlobField(primary_key=True)
    created_at = MillisField(default=now_ms)
    codec = TextField()
    size = IntegerField()
    data = BlobField()

    class Meta:
        table_name = "blob"


class RunAttachment(Identified):
    """What JSON cannot hold of a run: bytes, text with NULs, large output."""

    run = peewee.ForeignKeyField(Run, backref="attachments", index=False)
    name = NameField()
    blob = peewee.ForeignKeyField(Blob, backref="attachments", column_name="blob", object_id_name="blob_digest")

    class Meta:
        table_name = "run_attachment"
        indexes = ((("run", "name"), True),)
