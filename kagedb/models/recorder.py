"""Recording a terminal while it runs. What is written goes into memory at once, and into the store by the flusher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from ..errors import InvalidValue, KagedError, LimitExceeded, StateError, TransactionError
from ..fields import TITLE_CHARACTERS, check_text
from .backlog import BATCH_BYTES
from .base import bound_store
from .flusher import flusher_of
from .segment import CHUNK_BYTES, TICK_MS, Chunk, Event, Mark, Output, Resize
from .stream import CLOSED, UNDONE, Stream, undone
from .transcript import Transcript, check_size

FLUSH_SECONDS = 2.0
"""How long output stays in memory alone, and so what a crash can lose: one second would cost 1.5 times the wear of a
busy terminal, ten seconds would save a third of it."""

RESIZE_SECONDS = 0.25
"""The same after a resize: soon, but a window that is dragged is resized dozens of times a second."""

ENDING = "is being closed"

_TICKS_PER_SECOND = 1000 / TICK_MS


class Recorder:
    """What a terminal is being recorded with; made by `Transcript.open`. Also a context manager that closes it.

    Every method may be called by any thread. `write` only fills memory: 16 KiB, two seconds, `flush`, `close` or the
    session's detaching bring it into the store. Where the store cannot be written, `on_error` hears of it once, 8 MiB
    are kept (packed: usually 30 MiB of output and more), and beyond that the oldest is dropped for a Gap event.
    """

    def __init__(self, transcript: Transcript, on_error: Callable[[KagedError], Any] | None) -> None:
        self.transcript = transcript
        """What it records into; where that outgrows its keys, the first part of it."""
        self._stream = Stream(transcript, self._cut, on_error)
        self._began = time.monotonic()
        # Guarded by the stream's lock.
        self._chunk: Chunk | None = None
        self._tick = 0
        self._columns, self._rows = int(transcript.columns), int(transcript.rows)
        self._flusher = flusher_of(bound_store())
        self._flusher.add(self._stream)

    def __repr__(self) -> str:
        return f"<Recorder of {self.transcript.ref}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Record bytes that the terminal is sent, as they are. Does not wait for the store and never fails for it.

        Raises StateError once it is closed.
        """
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise InvalidValue(f"a recorder takes bytes, not {type(data).__name__}", "encode text first")
            data = bytes(data)
        self._output(None, data)

    def resize(self, columns: int, rows: int) -> None:
        """Record that the terminal has this size from now on. Raises InvalidValue, StateError once it is closed."""
        check_size(columns, rows)
        self._resize(None, columns, rows)

    def mark(self, label: str) -> None:
        """Mark this moment. Raises InvalidValue beyond 1,000 characters, StateError once it is closed."""
        _check_label(label)
        self._note(None, Chunk.mark, label)

    def flush(self) -> None:
        """Bring what was recorded so far into the store: it can be read when this returns, and outlives the process.

        Raises StorageError where it cannot be written (it is kept, and tried again), TransactionError inside a
        transaction: rolled back, it would be lost.
        """
        _require_no_transaction()
        self._write("relaxed")

    def close(self) -> None:
        """End the recording: all of it is safe, from a power cut too, when this returns. Again is harmless.

        Raises what `flush` raises; nothing is forgotten then, and closing can be tried again.
        """
        stream = self._stream
        if stream.refusal and stream.refusal != ENDING:
            return
        _require_no_transaction()
        with stream.filling:
            stream.refusal = ENDING
        self._write("full", closing=True)
        stream.refusal = CLOSED
        self._flusher.discard(stream)

    def load(self, events: Iterable[Event]) -> None:
        """Record what happened elsewhere, at the times that the events bring; for `Transcript.load`."""
        for event in events:
            tick = event.at_ms // TICK_MS
            if isinstance(event, Output):
                self._output(tick, event.data)
            elif isinstance(event, Resize):
                check_size(event.columns, event.rows)
                self._resize(tick, event.columns, event.rows)
            elif isinstance(event, Mark):
                _check_label(event.label)
                self._note(tick, Chunk.mark, event.label)
            else:
                self._note(tick, Chunk.gap, event.lost_bytes)
            if self._stream.backlog.waiting_bytes >= BATCH_BYTES:
                self.flush()

    def _write(self, durability: str, *, closing: bool = False) -> None:
        self._flusher.write([self._stream], durability, closing=closing)
        if self._stream.refusal == UNDONE:
            raise undone(self.transcript)

    # Filling a chunk. A tick of None is now.

    def _output(self, tick: int | None, data: bytes) -> None:
        at, size = 0, len(data)
        while at < size:
            with self._stream.filling:
                chunk = self._open_chunk(tick)
                room = CHUNK_BYTES - chunk.size
                piece = data[at : at + room]  # which for bytes that fit whole is no copy
                at += len(piece)
                chunk.output(self._tick, piece)
                full = chunk.full
                if full:
                    self._hand_over(chunk)
            if full:
                self._flusher.wake(self._stream)
                self._stream.backlog.help()

    def _resize(self, tick: int | None, columns: int, rows: int) -> None:
        with self._stream.filling:
            self._require_open()
            if (columns, rows) == (self._columns, self._rows):
                return
            chunk = self._open_chunk(tick)
            self._columns, self._rows = columns, rows
            chunk.resize(self._tick, columns, rows)
            self._due_within(RESIZE_SECONDS)

    def _note(self, tick: int | None, add: Callable[[Chunk, int, Any], None], value: Any) -> None:
        with self._stream.filling:
            chunk = self._open_chunk(tick)
            add(chunk, self._tick, value)
            full = chunk.full
            if full:
                self._hand_over(chunk)
        if full:
            self._flusher.wake(self._stream)

    def _open_chunk(self, tick: int | None) -> Chunk:
        """The chunk that is being filled, with the time moved on."""
        self._require_open()
        if tick is None:
            tick = int((time.monotonic() - self._began) * _TICKS_PER_SECOND)
        if tick > self._tick:
            self._tick = tick
        chunk = self._chunk
        if chunk is None:
            chunk = self._chunk = Chunk(self._tick, self._columns, self._rows)
            self._due_within(FLUSH_SECONDS)
        return chunk

    def _require_open(self) -> None:
        if self._stream.refusal:
            raise StateError(f"the recorder of {self.transcript.ref} {self._stream.refusal}", "open another one")

    def _due_within(self, seconds: float) -> None:
        due_at = time.monotonic() + seconds
        if self._stream.due_at is None or due_at < self._stream.due_at:
            self._stream.due_at = due_at
            self._flusher.arm(due_at)

    def _hand_over(self, chunk: Chunk) -> None:
        self._chunk = self._stream.due_at = None
        self._stream.backlog.add(chunk)

    def _cut(self) -> None:
        with self._stream.filling:
            if self._chunk is not None:
                self._hand_over(self._chunk)


def _require_no_transaction() -> None:
    if bound_store().database.in_transaction():
        raise TransactionError(
            "a recorder was flushed inside a transaction, which may still be rolled back", "leave the block first"
        )


def _check_label(label: Any) -> None:
    if not isinstance(label, str):
        raise InvalidValue(f"a mark takes text, not {type(label).__name__}")
    check_text(label, "the mark")
    if len(label) > TITLE_CHARACTERS:
        raise LimitExceeded(f"a mark of {len(label):,} characters; the limit is {TITLE_CHARACTERS:,}", "shorten it")
