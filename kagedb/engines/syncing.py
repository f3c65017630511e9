"""A large file on its way to the disk bit by bit, so that those who commit meanwhile never wait behind much of it.

What is left to one sync at the end holds up every commit on the same disk until all of it is there: half a second for
450 MB where it was measured. The last sync, which makes the file durable, is its writer's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

SYNC_BYTES = 1024 * 1024
"""Sent to the disk at a time by who writes the file itself: a commit then waits for milliseconds, and the copy takes no
longer than with one sync."""

SYNC_SECONDS = 0.02
"""Between two looks at a file that a child writes, who cannot be asked to."""


class Syncs:
    """Syncs of a file that its writer asks for, beside the writing: it is at most one of them ahead."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(1, "kaged sync")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def push(self) -> None:
        """Begin another one when the last has ended. Raises OSError where that failed."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(os.fdatasync, self._descriptor)

    def end(self) -> None:
        """Raises OSError where the last one failed: the kernel tells that once."""
        if self._last is not None:
            self._last.result()


@contextmanager
def syncing(path: Path) -> Iterator[None]:
    """While the block has `path` written by somebody else. Raises OSError where that cannot be made durable."""
    syncer = _Syncer(path)
    syncer.start()
    try:
        yield
    finally:
        syncer.ended.set()
        syncer.join()
        os.close(syncer.descriptor)
    if syncer.error is not None:
        raise syncer.error


class _Syncer(threading.Thread):
    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.ended = threading.Event()
        self.error: OSError | None = None
        """Kept, since the kernel tells it only once."""

    def run(self) -> None:
        size = 0
        while not self.ended.wait(SYNC_SECONDS):
            now = os.fstat(self.descriptor).st_size
            if now == size:
                continue
            size = now
            try:
                os.fdatasync(self.descriptor)
            except OSError as error:
                self.error = error
                return
