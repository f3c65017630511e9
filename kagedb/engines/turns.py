"""Waiting among the threads of this process, first come, first served. Locks between processes are in locks.py."""

from __future__ import annotations

import threading
from collections import deque


class FairSemaphore:
    """A number of places that threads take and give back; who waits longest is next.

    Python's own semaphores and conditions let a thread that has just left overtake those who wait: with eight writers
    on four places one waited for two seconds.
    """

    def __init__(self, places: int) -> None:
        self._guard = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Lock] = deque()

    def enter(self, seconds: float) -> bool:
        """Take a place; False where none became free within `seconds`."""
        with self._guard:
            if self._free and not self._waiting:
                self._free -= 1
                return True
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        if gate.acquire(timeout=max(0.0, seconds)):
            return True
        with self._guard:
            if gate in self._waiting:
                self._waiting.remove(gate)
                return False
        # It was handed over in the same moment.
        return True

    def leave(self) -> None:
        """Give a place back, to whoever waits longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1
