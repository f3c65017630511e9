"""Rests of a long piece of work, so that it never keeps a processor from whoever commits beside it.

Linux lets a process that wakes up wait for the next tick, four milliseconds on many kernels, while every processor is
busy, whatever the nice values. Two programs of one backup at work at once, a dump and the server that feeds it, do that
to a host with two processors; those that rest half of the time in pieces of less than a millisecond do not.
"""

from __future__ import annotations

import time

WORK_SECONDS = 0.0005
"""Work between two rests, at least: about what a commit takes."""

LONGEST_REST_SECONDS = 0.02
"""After a piece that was held up by something else there is no need to make up for it."""


class Rests:
    """Called between pieces of work: rests for as long as was worked since the last rest."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def rest(self) -> None:
        worked = time.monotonic() - self._since
        if worked >= WORK_SECONDS:
            time.sleep(min(worked, LONGEST_REST_SECONDS))
            self._since = time.monotonic()
