"""The thread that writes what is being recorded into the store: a commit every two seconds for all terminals together,
since commits are what wears a flash card. What it knows of each recorder is in stream.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from ..errors import KagedError, StorageBusy, StorageError
from ..identity import now_ms
from .base import BoundStore
from .stream import CLOSED, INHERITED, UNDONE, Saved, Stream, undone
from .transcript import Transcript

logger = logging.getLogger("kagedb")

RETRY_SECONDS = 2.0
"""Between attempts where the store cannot be written."""

BUDGET_SHARE = 16
"""A session over its budget is cut back by at least this part of the budget, so that it is not looked at all the
time."""


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
                    for stream in {*ready, *ending}:
                        stream.prepare(ending=stream in ending)
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
                for stream in {*ready, *ending}:
                    result = stream.save()
                    if result is None:
                        stream.give_up(UNDONE)
                        self.discard(stream)
                        news.append((stream, undone(stream.transcript)))
                    else:
                        saved[stream] = result
                        self._keep_budget(stream.transcript.session_id, result, stored_bytes)
                for stream in ending:
                    if stream in saved:
                        Transcript._close.run(id=saved[stream].part.id, at=now_ms())
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
