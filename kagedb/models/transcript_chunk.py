"""The rows that transcripts are kept in, and the statements over them. What is in one is in segment.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peewee

from ..fields import BlobField, IntegerField, MillisField
from .base import Hot, Model, Parameter

if TYPE_CHECKING:
    from .segment import Packed

PAGE_CHUNKS = 16
"""Chunks read by one statement: a MiB in memory where they are whole segments, and no statement that lasts."""

SIZES_PAGE_CHUNKS = 1_000
"""The same where only their sizes are read."""


class TranscriptChunk(Model):
    """A piece of a recording; the key is number << 24 | sequence, so that a transcript lies in one place.

    `at` is the time of its first event, `size` its bytes of output, `place` its position in its segment, 0 beginning
    one. A segment that is complete is one row, under the key of its last chunk; its `place` is minus their number.
    """

    key = IntegerField(primary_key=True)
    at = MillisField()
    place = IntegerField()
    size = IntegerField()
    data = BlobField()

    class Meta:
        table_name = "transcript_chunk"

    _page = Hot(lambda: TranscriptChunk._range().select(*TranscriptChunk._meta.sorted_fields).limit(PAGE_CHUNKS))
    _sizes = Hot(
        lambda: (
            TranscriptChunk._range()
            .select(
                TranscriptChunk.key,
                TranscriptChunk.place,
                TranscriptChunk.at,
                TranscriptChunk.size,
                peewee.fn.LENGTH(TranscriptChunk.data),
            )
            .limit(SIZES_PAGE_CHUNKS)
        )
    )
    _seek = Hot(
        lambda: (
            TranscriptChunk.select(TranscriptChunk.key, TranscriptChunk.at)
            .where(
                (TranscriptChunk.key >= Parameter("key", TranscriptChunk.key))
                & (TranscriptChunk.key < Parameter("end", TranscriptChunk.key))
            )
            .order_by(TranscriptChunk.key)
            .limit(1)
        )
    )
    _last = Hot(
        lambda: (
            TranscriptChunk.select(TranscriptChunk.key, TranscriptChunk.place)
            .where(
                (TranscriptChunk.key >= Parameter("first", TranscriptChunk.key))
                & (TranscriptChunk.key < Parameter("before", TranscriptChunk.key))
            )
            .order_by(TranscriptChunk.key.desc())
            .limit(1)
        )
    )
    _span = Hot(
        lambda: (
            TranscriptChunk.select(TranscriptChunk.key, TranscriptChunk.place, TranscriptChunk.data)
            .where(TranscriptChunk._between())
            .order_by(TranscriptChunk.key)
        )
    )
    _delete = Hot(lambda: TranscriptChunk.delete().where(TranscriptChunk._between()))

    @classmethod
    def _range(cls) -> Any:
        return (
            cls.select()
            .where((cls.key > Parameter("after", cls.key)) & (cls.key < Parameter("end", cls.key)))
            .order_by(cls.key)
        )

    @classmethod
    def _between(cls) -> Any:
        return (cls.key >= Parameter("first", cls.key)) & (cls.key <= Parameter("last", cls.key))

    @classmethod
    def insert_packed(cls, key: int, at: int, packed: Packed) -> None:
        cls._insert.run(key=key, at=at, place=packed.place, size=packed.size, data=packed.data)

    @classmethod
    def lost_bytes_of(cls, key: int) -> int:
        """What is missing where a chunk that begins a segment is nothing but a gap; else 0."""
        from .segment import Gap, Unpacker

        rows = cls._span.run(first=key, last=key).fetchall()
        events = (event for _, place, data in rows for event in Unpacker().events(key, place, bytes(data), 0))
        return sum(event.lost_bytes for event in events if isinstance(event, Gap))
