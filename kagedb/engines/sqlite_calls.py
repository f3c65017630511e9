"""Who is inside SQLite at this moment, so that a fork, and closing, can wait until nobody is.

SQLite runs without Python's lock. A thread that a fork catches inside it does not exist in the child, but the mutexes
that it holds do: the child would wait for them for ever. So every call goes through the gate, the steps of a query
(rows.py) too.
"""

from __future__ import annotations

import threading
import time

PAUSE_POLL_SECONDS = 0.0005
"""Between looks at whether the other threads' calls have ended; most take 10 microseconds."""


class CallGate:
    """Open, but while a fork or closing is under way; as a context manager it is around each call into SQLite."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self._paused_by: int | None = None
        self._pause = threading.Lock()

    def __enter__(self) -> None:
        me = threading.get_ident()
        depth = self._inside.get(me, 0)
        # First said, then asked: whoever closes the gate says so first, and then looks who is inside.
        self._inside[me] = depth + 1
        while not depth and self._paused_by not in (None, me):
            del self._inside[me]
            with self._pause:
                self._inside[me] = 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        depth = self._inside[me] - 1
        if depth:
            self._inside[me] = depth
        else:
            del self._inside[me]

    def pause(self, seconds: float) -> bool:
        """Close the gate, and wait until the other threads are out; False where one stays. `resume` opens it."""
        self._pause.acquire()
        self._paused_by = threading.get_ident()
        return self.wait_until_alone(seconds)

    def wait_until_alone(self, seconds: float) -> bool:
        """While it is closed, wait again; False where somebody stays."""
        me = threading.get_ident()
        deadline = time.monotonic() + seconds
        while set(self._inside) - {me}:
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_POLL_SECONDS)
        return True

    def resume(self) -> None:
        self._paused_by = None
        self._pause.release()
