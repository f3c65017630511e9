"""One recorder as the flusher sees it: what waits, where in the store it goes, and whom to tell of trouble."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import KagedError, NotFound
from .backlog import Backlog
from .segment import SEGMENT_CHUNKS, TICK_MS, Packed, pack_whole
from .transcript import SEQUENCE_BITS, Transcript
from .transcript_chunk import TranscriptChunk

logger = logging.getLogger("kagedb")

SEQUENCES = 1 << SEQUENCE_BITS

FILLING_BYTES = 8 * 1024
"""Stored chunks that are at least so large on average fill the pages they are in (2 KiB as usual), and are left alone
when their segment is complete: writing it again as a whole would gain little."""

CLOSED = "is closed"
INHERITED = "belongs to the process that opened it, not to its child"
UNDONE = "records into nothing: the transaction that it was opened in was rolled back"


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a stream is once a transaction is committed."""

    part: Transcript
    sequence: int
    """Of the next chunk."""
    stored_bytes: int
    begins_segment: bool


class Stream:
    """One recorder as the flusher sees it: what waits, where it goes, and whom to tell of trouble."""

    def __init__(
        self, transcript: Transcript, cut: Callable[[], None], on_error: Callable[[KagedError], Any] | None
    ) -> None:
        self.transcript = transcript
        self.backlog = Backlog()
        self.cut = cut
        """Moves the chunk that is being filled into the backlog."""
        self.due_at: float | None = None
        """When the chunk that is being filled must be written, on the monotonic clock; None where there is none."""
        self.filling = threading.Lock()
        """Guards the chunk that is being filled; held for microseconds."""
        self.refusal = ""
        """Why nothing can be recorded any more, as the end of a sentence."""
        self.part = transcript
        """The last of the transcript and its continuations."""
        self._on_error = on_error
        self._sequence = 0
        self._segment: list[Packed] = []
        """The chunks of the segment that is not complete; all are in the store."""
        self._segment_afterwards: list[Packed] = []
        self._wholes: list[Packed | None] = []
        self._known = False
        self._doubtful = False
        self._told = False

    def prepare(self, *, ending: bool) -> None:
        """Pack the segments that this batch completes as one each, and with `ending` the last one too.

        Before the transaction: others wait for that.
        """
        self._wholes, chunks, stored = [], self._segment, bool(self._segment)
        for packed in self.backlog.batch:
            if not packed.place:
                self._wholes.append(_whole(chunks, stored))
                chunks, stored = [], False
            chunks = [*chunks, packed]
        self._wholes.append(_whole(chunks, stored) if ending else None)
        self._segment_afterwards = chunks

    def save(self) -> Saved | None:
        """Insert the batch, in the caller's transaction. None where the transcript is not in the store."""
        part, sequence = self.part, self._sequence
        if not self._known and Transcript._by_id.one(key=part.id) is None:
            return None
        if self._doubtful:
            # The commit that failed may have come through: a server can go away before it says so.
            newest = part.parts()[-1]
            last = TranscriptChunk._last.one(first=newest.first_key, before=newest.end_key)
            if last is not None and last[0] >= part.first_key + sequence:
                return Saved(newest, last[0] - newest.first_key + 1, 0, False)
        self._doubtful = True
        wholes = iter(self._wholes)
        old, new, stored = self._segment, list[Packed](), 0
        for packed in self.backlog.batch:
            if not packed.place:
                stored += self._insert(part, sequence, old, new, next(wholes))
                old, new = [], []
                if sequence + SEGMENT_CHUNKS > SEQUENCES:
                    # A segment is not split over two transcripts.
                    at = self.transcript.created_at + packed.tick * TICK_MS
                    part, sequence = part._continue(packed.columns, packed.rows, at), 0
            new.append(packed)
            sequence += 1
        stored += self._insert(part, sequence, old, new, next(wholes))
        return Saved(part, sequence, stored, len(self._wholes) > 1)

    def _insert(
        self, part: Transcript, sequence: int, old: list[Packed], new: list[Packed], whole: Packed | None
    ) -> int:
        """Insert the new chunks of a segment, or the whole of it instead of the old ones. Gives the bytes more."""
        end, gone = part.first_key + sequence, 0
        if whole is not None:
            TranscriptChunk._delete.run(first=end + whole.place, last=end - 1)
            new, gone = [whole], sum(len(packed.data) for packed in old)
        for key, packed in enumerate(new, end - len(new)):
            TranscriptChunk.insert_packed(key, self.transcript.created_at + packed.tick * TICK_MS, packed)
        return sum(len(packed.data) for packed in new) - gone

    def saved(self, saved: Saved) -> None:
        """What `save` gave is committed."""
        self.part, self._sequence = saved.part, saved.sequence
        self._segment = self._segment_afterwards
        self.backlog.batch.clear()
        self._known = True
        self._doubtful = self._told = False

    def give_up(self, why: str) -> None:
        """Take nothing more, and forget what is held."""
        self.refusal = why
        self.cut()
        self.backlog.forget()

    def tell(self, error: KagedError) -> None:
        """Tell the owner what is wrong, once until it has been right again."""
        if self._told:
            return
        self._told = True
        if self._on_error is None:
            logger.warning("%s: %s", self.transcript.ref, error)
            return
        try:
            self._on_error(error)
        except Exception:
            logger.exception("the error hook of %s failed", self.transcript.ref)


def _whole(chunks: list[Packed], stored: bool) -> Packed | None:
    """The whole of a segment; None where it is not worth to write that, when the first chunks are stored already."""
    if len(chunks) < 2 or (stored and sum(len(chunk.data) for chunk in chunks) >= FILLING_BYTES * len(chunks)):
        return None
    return pack_whole(chunks)


def undone(transcript: Transcript) -> NotFound:
    return NotFound(f"the recorder of {transcript.ref} {UNDONE}", "open it outside, or again")
