"""A large file on its way to the disk bit by bit, so that those who commit meanwhile never wait behind much of it.

It is written into the kernel's memory, as fast as that goes, and sent from there in small pieces with rests between
them. One sync at the end would hold up every commit on the same disk until all of it is there, half a second for 450 MB
where it was measured; a sync for each piece costs the file system's journal a write, where sync_file_range(2) does not.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

PIECE_BYTES = 96 * 1024
"""Sent at a time: a commit waits behind one of them, and with 256 KiB it waited twice as long."""

SYNC_BYTES = 1024 * 1024
"""Sent at a time where only whole files can be synced."""

LEAD_PART = 32
"""A writer may be ahead of the disk by this part of the host's memory. Well below what the kernel lets lie before it
sends by itself, all at once: a tenth of the memory that is available (vm.dirty_background_ratio)."""

_WHOLE = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER of linux/fs.h

_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ESPIPE)
"""What kernels, file systems and filters of system calls say that do not know sync_file_range."""


class Sending:
    """The file at `path`, while somebody writes it from its beginning to its end.

    Who writes it must not have truncated it: ext4 then sends all of it when it is closed (auto_da_alloc). Not for a
    database that this process has open: closing the descriptor drops SQLite's locks.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._pieces = _Pieces()
        self._lead = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // LEAD_PART
        self._sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def written(self, size: int, *, hurry: bool = False) -> None:
        """Say how much there is now. Sends as much of it as is too far ahead, with no rests in a hurry.

        Raises OSError where the disk refuses it: the kernel tells that once.
        """
        while size - self._sent > self._lead:
            self._next(rest=not hurry)

    def finish(self, progress: Callable[[int, int], None] | None = None) -> str:
        """Send the rest of it and make it durable. Gives its SHA-256 in hex, of the bytes as they were written."""
        digest, size = hashlib.sha256(), os.fstat(self._descriptor).st_size
        # All of it: a copy's first pages may have been written again after they were sent.
        self._sent = 0
        while data := os.pread(self._descriptor, PIECE_BYTES, self._sent):
            digest.update(data)
            self._next(rest=True)
            if progress is not None:
                progress(min(self._sent, size), size)
        os.fdatasync(self._descriptor)
        return digest.hexdigest()

    def _next(self, *, rest: bool) -> None:
        began = time.monotonic()
        self._pieces.send(self._descriptor, self._sent, PIECE_BYTES)
        self._sent += PIECE_BYTES
        if rest:
            time.sleep(time.monotonic() - began)


def send(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """Make a file durable that is whole. Gives its SHA-256 in hex. Raises OSError.

    `progress` is called with bytes done and in all.
    """
    with Sending(path) as sending:
        return sending.finish(progress)


class _Pieces:
    """How pieces of a file are sent here."""

    def __init__(self) -> None:
        import ctypes

        self._error = ctypes.get_errno
        self._unsynced = 0
        try:
            self._function: Any = ctypes.CDLL(None, use_errno=True).sync_file_range
        except (OSError, AttributeError):
            self._function = None
        else:
            # File, offset, length, flags; of 32-bit processors too, whose order the C library knows.
            self._function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def send(self, descriptor: int, offset: int, length: int) -> None:
        """Send these bytes, and wait until the disk has taken them."""
        if self._function is not None:
            if self._function(descriptor, offset, length, _WHOLE) == 0:
                return
            number = self._error()
            if number not in _UNKNOWN:
                raise OSError(number, os.strerror(number))
            self._function = None
        self._unsynced += length
        if self._unsynced >= SYNC_BYTES:
            os.fdatasync(descriptor)
            self._unsynced = 0
