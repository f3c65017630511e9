"""Locks between processes as POSIX record locks on one file beside a SQLite store, and the turn to write.

The kernel gives these locks back when their process ends, however it dies, and a forked child does not inherit them.
They belong to the process: closing any descriptor of the file drops them all, so the file is opened once a process,
kept, and never unlinked. Waiting is by polling, because the kernel's own waiting cannot be bounded.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from pathlib import Path

from ..errors import StorageBusy, TransactionError
from .turns import FairSemaphore

USE, OWNER, WRITER, TURNSTILE, MIGRATION = range(5)
"""The locks, each one byte of the file. USE is shared by every open store and exclusive for migrate and restore; OWNER
is the daemon's; WRITER is held from BEGIN to the end of COMMIT; TURNSTILE, its neighbour, is the queue of one before
it; MIGRATION lines up starters that find an old schema."""

_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux, for F_GETLK (fcntl(2)): type, whence, start, length, pid."""

SHORTEST_POLL_SECONDS = 0.0002
LONGEST_POLL_SECONDS = 0.005
"""Between tries for a lock: a commit takes 0.1 to 10 ms, so the wait starts below one and never adds more than half."""


class LockFile:
    """The lock file of one store in this process. `open` and `close` count, so that it is opened once."""

    _by_path: dict[str, LockFile] = {}  # noqa: RUF012
    _guard = threading.Lock()

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._users = 0

    @classmethod
    def open(cls, path: Path, *, create: bool) -> LockFile | None:
        """The lock file at `path`; None where it is missing and not to be created, or the place is read-only."""
        key = os.path.realpath(path)
        with cls._guard:
            found = cls._by_path.get(key)
            if found is None:
                flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
                try:
                    descriptor = os.open(key, flags, 0o600)
                except FileNotFoundError:
                    return None
                except OSError:
                    if create:
                        raise
                    return None
                found = cls._by_path[key] = cls(key, descriptor)
            found._users += 1
            return found

    @classmethod
    def start_anew(cls) -> None:
        """In a forked child: the thread that held the guard is not here."""
        cls._guard = threading.Lock()

    def close(self) -> None:
        """Give back every lock of this process on the file, once the last user is done."""
        with self._guard:
            self._users -= 1
            if self._users == 0:
                del self._by_path[self.path]
                os.close(self._descriptor)

    def try_lock(self, byte: int, *, shared: bool = False, count: int = 1) -> bool:
        """Take the lock (`count` of them, from `byte` on), or change its kind, if nobody is in the way now."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._descriptor, kind | fcntl.LOCK_NB, count, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def lock(self, byte: int, seconds: float, *, shared: bool = False) -> bool:
        """The same, trying for `seconds`."""
        if self.try_lock(byte, shared=shared):
            return True
        deadline = time.monotonic() + seconds
        pause = SHORTEST_POLL_SECONDS
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
            if self.try_lock(byte, shared=shared):
                return True

    def unlock(self, byte: int) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)

    def holder(self, byte: int) -> int | None:
        """The process id of somebody else who holds the lock; 0 where it cannot be seen from here; None if nobody."""
        return holder_of(self._descriptor, byte)


def holder_of(descriptor: int, byte: int) -> int | None:
    """The process id of somebody else with a record lock on that byte, 0 where it cannot be seen, None if nobody."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else max(pid, 0)


class WriterTurn:
    """The turn to write: one holder among all threads of all processes, in the order they asked.

    Threads of this process queue first in, first out. Between processes the turnstile makes waiting fair: whoever has
    just written has to pass it again, and finds the one who waits inside.
    """

    def __init__(self, file: LockFile, timeout_seconds: float) -> None:
        self._file = file
        self.timeout_seconds = timeout_seconds
        self._holder: int | None = None
        self._queue = FairSemaphore(1)

    def acquire(self, seconds: float | None = None) -> None:
        """Wait for the turn.

        Raises StorageBusy after `seconds` (by default the timeout), TransactionError where this thread has it already.
        """
        deadline = time.monotonic() + (self.timeout_seconds if seconds is None else seconds)
        self._enter_queue(deadline)
        try:
            self._lock_against_processes(deadline)
        except BaseException:
            self._leave_queue()
            raise

    def release(self) -> None:
        self._file.unlock(WRITER)
        self._leave_queue()

    def held_by_this_thread(self) -> bool:
        return self._holder == threading.get_ident()

    def pause(self, seconds: float) -> bool:
        """Keep every thread of this process from writing until `resume`, for a fork. False if a writer is too slow."""
        if self.held_by_this_thread():
            return False
        try:
            self._enter_queue(time.monotonic() + seconds)
        except StorageBusy:
            return False
        return True

    def resume(self) -> None:
        self._leave_queue()

    def start_anew(self) -> None:
        """In a forked child: the threads that held or waited are not here."""
        self._holder = None
        self._queue = FairSemaphore(1)

    def _enter_queue(self, deadline: float) -> None:
        me = threading.get_ident()
        if self._holder == me:
            raise TransactionError(
                "a second connection wants to write in a thread that is already writing",
                "finish the first transaction, or do both writes in it",
            )
        if not self._queue.enter(deadline - time.monotonic()):
            raise self._too_long()
        self._holder = me

    def _leave_queue(self) -> None:
        self._holder = None
        self._queue.leave()

    def _lock_against_processes(self, deadline: float) -> None:
        file = self._file
        # Both in one call where nobody is in the way of either: a tenth of what an empty transaction costs.
        if file.try_lock(WRITER, count=2):
            file.unlock(TURNSTILE)
            return
        if not file.lock(TURNSTILE, max(0.0, deadline - time.monotonic())):
            raise self._too_long()
        try:
            if not file.lock(WRITER, max(0.0, deadline - time.monotonic())):
                raise self._too_long()
        finally:
            file.unlock(TURNSTILE)

    def _too_long(self) -> StorageBusy:
        holder = self._file.holder(WRITER)
        who = f"process {holder}" if holder else "another thread of this process"
        return StorageBusy(
            f"waited {self.timeout_seconds:g} s for {who} to finish writing",
            "try again, shorten that transaction, or raise storage.busy_timeout_ms",
        )
