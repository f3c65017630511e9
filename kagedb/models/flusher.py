"""The thread that writes what is being recorded into the store: a commit every two seconds for all terminals together,
since commits are what wears a flash card.

A `Stream` is what it knows of one recorder, the `Flusher` is one for a store.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import KagedError, NotFound, StorageBusy, StorageError
from ..identity import now_ms
from .backlog import Backlog
from .base import BoundStore
from .segment import SEGMENT_CHUNKS, TICK_MS
from .transcript import SEQUENCE_BITS, Transcript, TranscriptChunk

logger = logging.getLogger("kagedb")

RETRY_SECONDS = 2.0
"""Between attempts where the store cannot be written."""

BUDGET_SHARE = 16
"""A session over its budget is cut back by at least this part of the budget, so that it is not looked at all the
time."""

SEQUENCES = 1 << SEQUENCE_BITS


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
        self._known = False
        self._doubtful = False
        self._told = False

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
        for packed in self.backlog.batch:
            at = self.transcript.created_at + packed.tick * TICK_MS
            if not packed.place and sequence + SEGMENT_CHUNKS > SEQUENCES:
                # A segment is not split over two transcripts.
                part, sequence = part._continue(packed.columns, packed.rows, at), 0
            TranscriptChunk.insert_packed(part.first_key + sequence, at, packed)
            sequence += 1
        stored = sum(len(packed.data) for packed in self.backlog.batch)
        return Saved(part, sequence, stored, any(not packed.place for packed in self.backlog.batch))

    def saved(self, saved: Saved) -> None:
        """What `save` gave is committed."""
        self.part, self._sequence = saved.part, saved.sequence
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


class Flusher:
    """Writes what the recorders of a store hold. Its thread begins with the first output and ends with the store."""

    def __init__(self, store: BoundStore) -> None:
        self.store = store
        # Held from the first statement of a transaction to its commit: one write at a time.
        self._writing = threading.Lock()
        self._stored_bytes: dict[str, int] = {}
        """What each session that is being recorded takes, to be compared with its budget."""
        # Guards what follows, for microseconds.
        self._waking = threading.Condition(threading.Lock())
        self._streams: set[Stream] = set()
        self._full: set[Stream] = set()
        self._wake_at: float | None = None
        self._durability = "relaxed"
        self._thread: threading.Thread | None = None
        self._ended = False
        store.before_close(self._end)
        store.subscribe(self._hear)

    def add(self, stream: Stream) -> None:
        with self._waking:
            self._streams.add(stream)

    def discard(self, stream: Stream) -> None:
        with self._waking:
            self._streams.discard(stream)
            self._full.discard(stream)

    def arm(self, due_at: float) -> None:
        """Look at that time (of the monotonic clock) at the latest whether something is due."""
        with self._waking:
            if self._wake_at is None or due_at < self._wake_at:
                self._wake_at = due_at
                self._notify()

    def wake(self, stream: Stream) -> None:
        """Write now what this stream has cut."""
        with self._waking:
            self._full.add(stream)
            self._notify()

    def _notify(self) -> None:
        if self._thread is None and not self._ended:
            thread = threading.Thread(target=self._run, name="kaged-transcripts", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The interpreter is ending, or has no thread to give: a later attempt or closing the store writes it.
                return
            self._thread = thread
        self._waking.notify()

    def _hear(self, change: Any) -> None:
        if change.kind == "session.detached":
            # Nobody looks at it any more, perhaps because the host is about to be switched off.
            with self._waking:
                for stream in self._streams:
                    if change.subject == f"session:{stream.transcript.session_id}" and stream.due_at is not None:
                        stream.due_at = self._wake_at = 0.0
                        self._durability = "full"
                        self._notify()

    # The thread.

    def _run(self) -> None:
        while (work := self._wait()) is not None:
            streams, durability, cut = work
            try:
                self.write(streams, durability, cut=cut)
            except KagedError:
                # Their owners have been told, and nothing is forgotten.
                self._pause()

    def _wait(self) -> tuple[list[Stream], str, bool] | None:
        """Wait for work: what is to be written, how safely, and whether with the chunks that are not full."""
        with self._waking:
            while not self._ended:
                now = time.monotonic()
                if self._wake_at is not None and self._wake_at <= now:
                    self._wake_at = min(
                        (stream.due_at for stream in self._streams if stream.due_at is not None), default=None
                    )
                    if self._wake_at is not None and self._wake_at <= now:
                        # All there is: another commit for the rest a moment later would wear the card as much again.
                        self._wake_at = None
                        self._full.clear()
                        durability, self._durability = self._durability, "relaxed"
                        return list(self._streams), durability, True
                if self._full:
                    streams = list(self._full)
                    self._full.clear()
                    return streams, "relaxed", False
                self._waking.wait(None if self._wake_at is None else self._wake_at - now)
        return None

    def _pause(self) -> None:
        until = time.monotonic() + RETRY_SECONDS
        with self._waking:
            while not self._ended and (left := until - time.monotonic()) > 0:
                self._waking.wait(left)
            self._full.update(self._streams)

    def _end(self) -> None:
        """The store is about to be closed."""
        with self._waking:
            self._ended = True
            self._waking.notify()
            streams = list(self._streams)
        for stream in streams:
            stream.refusal = stream.refusal or CLOSED
        try:
            if streams:
                self.write(streams, "full", closing=True)
        except KagedError as error:
            logger.error("the store was closed without the last of what was recorded: %s", error)
        for stream in streams:
            stream.give_up(CLOSED)
            self.discard(stream)

    # Writing.

    def write(self, streams: list[Stream], durability: str, *, cut: bool = True, closing: bool = False) -> None:
        """Write what these streams hold; with `cut` also chunks that are not full; with `closing`, note that they end.

        Raises StorageError; nothing is forgotten then, and their owners have been told.
        """
        news: list[tuple[Stream, KagedError]] = []
        try:
            with self._writing:
                if cut:
                    for stream in streams:
                        stream.cut()
                more = True
                while more:
                    streams = [stream for stream in streams if stream.refusal != UNDONE]
                    ready = [stream for stream in streams if stream.backlog.next_batch()]
                    more = any(stream.backlog.has_more() for stream in ready)
                    ending = streams if closing and not more else []
                    if ready or ending:
                        self._write_batches(ready, ending, durability, news)
        finally:
            # Out of the lock: whoever is told may flush or close.
            for stream, error in news:
                stream.tell(error)

    def _write_batches(
        self, ready: list[Stream], ending: list[Stream], durability: str, news: list[tuple[Stream, KagedError]]
    ) -> None:
        stored_bytes = dict(self._stored_bytes)
        saved: dict[Stream, Saved] = {}
        try:
            with self.store.transaction(durability):
                for stream in ready:
                    result = stream.save()
                    if result is None:
                        stream.give_up(UNDONE)
                        self.discard(stream)
                        news.append((stream, undone(stream.transcript)))
                    else:
                        saved[stream] = result
                        self._keep_budget(stream.transcript.session_id, result, stored_bytes)
                for stream in ending:
                    part = saved[stream].part if stream in saved else stream.part
                    Transcript._close.run(id=part.id, at=now_ms())
        except KagedError as error:
            news.extend((stream, error) for stream in {*ready, *ending})
            raise
        except Exception as error:
            told = StorageError(f"transcripts cannot be written: {type(error).__name__}: {error}", "report this")
            news.extend((stream, told) for stream in {*ready, *ending})
            raise told from error
        self._stored_bytes = stored_bytes
        for stream, result in saved.items():
            stream.saved(result)
            if stream.backlog.dropped_bytes:
                news.append((stream, _dropped(stream)))

    def _keep_budget(self, session: str, saved: Saved, stored_bytes: dict[str, int]) -> None:
        """Once in a segment, drop the oldest of a session that is over its budget; in the same transaction."""
        if session not in stored_bytes:
            stored_bytes[session] = Transcript.stored_bytes(session)
        else:
            stored_bytes[session] += saved.stored_bytes
        budget = self.store.settings.transcript_session_bytes
        if saved.begins_segment and stored_bytes[session] > budget:
            # Counted anew: another process may record or prune there too.
            stored = Transcript.stored_bytes(session)
            if stored > budget:
                stored -= Transcript.drop_oldest(session, stored - budget + budget // BUDGET_SHARE)
            stored_bytes[session] = stored


CLOSED = "is closed"
INHERITED = "belongs to the process that opened it, not to its child"
UNDONE = "records into nothing: the transaction that it was opened in was rolled back"


def undone(transcript: Transcript) -> NotFound:
    return NotFound(f"the recorder of {transcript.ref} {UNDONE}", "open it outside, or again")


def _dropped(stream: Stream) -> StorageBusy:
    dropped, stream.backlog.dropped_bytes = stream.backlog.dropped_bytes, 0
    return StorageBusy(
        f"{dropped:,} bytes of {stream.transcript.ref} were dropped: the store did not take them in time",
        "where the disk is well, flush the recorder now and then to slow the program down",
    )


_flusher: Flusher | None = None
_choosing = threading.Lock()


def flusher_of(store: BoundStore) -> Flusher:
    """The flusher of that store; made when it is first asked for."""
    global _flusher
    with _choosing:
        if _flusher is None or _flusher.store is not store:
            _flusher = Flusher(store)
        return _flusher


def _forget_after_fork() -> None:
    # The thread is the parent's, and so is what is being recorded; a lock may be held by a thread that is not here.
    global _flusher, _choosing
    _choosing = threading.Lock()
    if _flusher is not None:
        flusher, _flusher = _flusher, None
        flusher._waking = threading.Condition(threading.Lock())
        flusher._writing = threading.Lock()
        for stream in flusher._streams:
            stream.filling = threading.Lock()
            stream.refusal = INHERITED
        flusher._streams.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
