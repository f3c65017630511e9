"""The file locks that SQLite believes to hold in a forked child, and taking them there.

Its locks belong to the parent's process, while its memory in the child believes to hold them. So the child takes the
locks that the inherited memory believes in before it opens a connection of its own. (Tried without: the
parent closed its store, saw no other process, removed the WAL, and five commits of the child were gone.)
"""

from __future__ import annotations

import fcntl
import os
import time

from ..errors import StorageError
from .locks import SHORTEST_POLL_SECONDS, holder_of

# os_unix.c and wal.c: where SQLite's own locks are. A connection to a WAL database holds SHARED on the database and
# the dead man's switch on the -shm for its whole life; a reader holds one of the five read marks.
_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510
_DEAD_MAN_SWITCH = 128
_READ_MARKS_FIRST, _READ_MARKS = 123, 5

READ_MARK_WAIT_SECONDS = 5.0
"""A read mark is held exclusively for microseconds, but by a process that may not be running just then."""


def read_marks_of_parent(path: str) -> list[int]:
    """Which of the read marks the parent holds in the moment of the fork: the child's memory believes in those.

    To be asked in the child at once; `take_believed_locks` takes them later.
    """
    for descriptor in _descriptors(path + "-shm"):
        return [
            mark
            for mark in range(_READ_MARKS_FIRST, _READ_MARKS_FIRST + _READ_MARKS)
            if holder_of(descriptor, mark) == os.getppid()
        ]
    return []


def take_believed_locks(path: str, read_marks: list[int]) -> None:
    """Take, in a forked child, the locks that the inherited SQLite believes to hold on `path`.

    Done on the descriptors that SQLite itself opened. Raises StorageError where the parent has closed the store, or
    somebody replaced it, since the fork: then what was inherited belongs to files that are gone.
    """
    database, shared, wal = (_descriptors(path + suffix) for suffix in ("", "-shm", "-wal"))
    try:
        if not (database and shared and wal):
            raise BlockingIOError
        fcntl.lockf(database[0], fcntl.LOCK_SH | fcntl.LOCK_NB, _SHARED_SIZE, _SHARED_FIRST)
        fcntl.lockf(shared[0], fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _DEAD_MAN_SWITCH)
        for mark in read_marks:
            _take_read_mark(shared[0], mark)
        if not (_descriptors(path) and _descriptors(path + "-shm") and _descriptors(path + "-wal")):
            raise BlockingIOError
    except (BlockingIOError, PermissionError):
        raise StorageError(
            f"the store {path} was closed by the parent since this process was forked, and SQLite cannot open it here",
            "start the child with a fresh interpreter (subprocess, or multiprocessing's spawn)",
        ) from None


def _take_read_mark(descriptor: int, mark: int) -> None:
    # Readers and checkpoints take one exclusively for the instant in which they move it.
    deadline = time.monotonic() + READ_MARK_WAIT_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, mark)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                raise
        time.sleep(SHORTEST_POLL_SECONDS)


def _descriptors(path: str) -> list[int]:
    """This process's descriptors of the file that is at `path` now."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == path and os.path.samestat(os.fstat(int(name)), os.stat(path)):
                found.append(int(name))
        except OSError:
            continue
    return found
