"""The chunks of one transcript on their way into the store: cut, then packed, then written in batches.

What they hold is in segment.py, who writes them in flusher.py. Beyond a bound the oldest are dropped, for a gap.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from .segment import Chunk, Packed, Packer, pack_gap

BACKLOG_BYTES = 8 * 1024 * 1024
"""Packed output (a quarter of what the terminal was sent, or less) that is kept while the store cannot be written:
hours of a full-screen program. Beyond it the oldest is dropped."""

BATCH_BYTES = 1024 * 1024
"""Packed output that goes into one transaction: other writers wait for the store meanwhile."""

UNPACKED_CHUNKS = 64
"""Chunks that wait to be packed before whoever adds one packs one himself, so that a program that is faster than
packing (25 MB a second on a desktop) is slowed down instead of filling the memory."""

SLOWED_SECONDS = 0.002
"""What each further chunk costs whoever adds it while half of the backlog is full: 8 MB a second, which a disk that is
well takes, so that only one that is not makes the backlog overflow. Nobody waits for the disk itself."""


class Backlog:
    """Takes chunks from any thread; gives batches to one."""

    def __init__(self) -> None:
        self.dropped_bytes = 0
        """Output that was dropped since somebody set this to 0."""
        self.batch: list[Packed] = []
        """What is being written; emptied by whoever has written it. One that failed is tried again as it was."""
        self.waiting_bytes = 0
        """Of what is packed, without the batch."""
        self._cut: deque[Chunk] = deque()
        self._packed: deque[Packed] = deque()
        self._packer = Packer()
        # Held while a chunk is packed, a millisecond on a desktop, and never while the disk is waited for.
        self._packing = threading.Lock()

    def add(self, chunk: Chunk) -> None:
        self._cut.append(chunk)

    def help(self) -> None:
        """For whoever has added a chunk: pack one where too many wait for that, take it slowly where too much waits."""
        if len(self._cut) > UNPACKED_CHUNKS:
            self._pack(1)
        if self.waiting_bytes > BACKLOG_BYTES // 2:
            time.sleep(SLOWED_SECONDS)

    def has_more(self) -> bool:
        """Whether there is anything besides the batch."""
        return bool(self._cut or self._packed)

    def next_batch(self) -> list[Packed]:
        """The batch, filled anew where it is empty; empty where there is nothing to write."""
        if not self.batch:
            self._pack(len(self._cut))
            with self._packing:
                while self._packed and sum(len(packed.data) for packed in self.batch) < BATCH_BYTES:
                    packed = self._packed.popleft()
                    self.waiting_bytes -= len(packed.data)
                    self.batch.append(packed)
        return self.batch

    def forget(self) -> None:
        with self._packing:
            self._cut.clear()
            self._packed.clear()
            self.batch.clear()

    def _pack(self, limit: int) -> None:
        with self._packing:
            while limit and self._cut:
                packed = self._packer.pack(self._cut.popleft())
                self._packed.append(packed)
                self.waiting_bytes += len(packed.data)
                if self.waiting_bytes > BACKLOG_BYTES:
                    self._drop_oldest()
                limit -= 1

    def _drop_oldest(self) -> None:
        """Make room by whole segments: one without its beginning could not be read."""
        lost = tick = columns = rows = 0
        while self._packed and (self.waiting_bytes > BACKLOG_BYTES or self._packed[0].place):
            oldest = self._packed.popleft()
            self.waiting_bytes -= len(oldest.data)
            if not oldest.lost_bytes:
                self.dropped_bytes += oldest.size
            lost += oldest.size + oldest.lost_bytes
            tick, columns, rows = oldest.tick, oldest.columns, oldest.rows
        if not self._packed:
            self._packer.begin_segment()
        gap = pack_gap(tick, lost, columns, rows)
        self._packed.appendleft(gap)
        self.waiting_bytes += len(gap.data)
