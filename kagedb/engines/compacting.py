"""What is said when an engine is asked to give space back: how long it may work, and what came of it.

How each engine does it is in sqlite_compact.py and postgres_compact.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

HOLD_SECONDS = 0.0015
"""What work that removes much aims to hold the writer for at a time: about what a durable commit takes on a disk, so
that a writer who meets it takes twice as long. None is to wait for more than 25 ms, and a disk may stall."""

PAUSE_FACTOR = 4
"""A pause is so many times the turn before it: a writer meets a turn one time in five, and waits for half of it."""

SHORTEST_PAUSE_SECONDS = 0.002


class TimeIsUp(Exception):
    """A statement was ended at the moment until which it might run (Engine.until); never reaches a caller of kagedb."""


@dataclass(slots=True)
class Compaction:
    """One run: its bounds when it begins, and what was done when it has ended."""

    ends_at: float | None = None
    """When no further step is begun, by time.monotonic(); None for no bound."""
    progress: Callable[[int, int], None] | None = None
    """Called with how much is done, and of how much."""
    finished: bool = True
    longest_hold_seconds: float = 0.0
    """The longest time for which other writers were kept waiting without a break."""
    notes: list[str] = field(default_factory=list)
    """What could not be done and why; each says what mends it."""

    def time_is_up(self) -> bool:
        """Whether it has to stop here; then it is not finished."""
        if self.ends_at is not None and time.monotonic() >= self.ends_at:
            self.finished = False
            return True
        return False

    def tell(self, done: int, whole: int) -> None:
        if self.progress is not None:
            self.progress(done, whole)
