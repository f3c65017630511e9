"""How long work that removes much holds the writer: batches as large as the host is quick, with pauses between them.

What is removed is elsewhere. One `Pace` is for one piece of work, in one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..engines.compacting import HOLD_SECONDS, PAUSE_FACTOR, SHORTEST_PAUSE_SECONDS
from ..storage import Storage

LONGEST_PAUSE_SECONDS = 0.5
"""Whoever asks the work to end is not to wait for longer."""

FIRST_UNITS = 32
"""Of the first batch, when nothing is measured yet: less than a millisecond on a disk, 10 ms on a slow card."""

MOST_UNITS = 2_000
"""Of any batch: beyond that a quick host gains nothing, and one stall would take back what was measured."""

UNIT_BYTES = 2_048
"""A row costs one unit and one for each so many of its bytes: that many pages are given back with it."""

FORGETTING = 0.7
"""What a measured batch weighs after one more: a stall is forgotten after ten."""

PROBE_EVERY = 8
"""Batches: one in so many is twice as large, since batches of one size do not tell what a larger one would take."""

SMALLEST_SHARE = 0.02
"""A unit is taken to cost at least that much of what it costs with the transaction's own part: estimates are noisy."""


class Stopped(Exception):
    """The work was asked to end; what was removed stays removed."""


class Pace:
    """`units` is what the next batch may cost; `longest_seconds` how long one has held the writer at most."""

    def __init__(self, stop: Callable[[], bool] | None = None, settle: Callable[[int], float] | None = None) -> None:
        """`stop` is asked between batches: once it says True, `pause` raises Stopped. `settle` is of Engine.gently."""
        self.units = FIRST_UNITS
        self.longest_seconds = 0.0
        self._stop = stop
        self._settle = settle
        self._held = 0.0
        self._took = _Line()
        self._cost = 0
        self._batches = 0

    @contextmanager
    def turn(self, storage: Storage, cost: int) -> Iterator[None]:
        """A write transaction of one batch, which costs about `cost` units. Relaxed: a power cut may undo the last."""
        with storage.transaction("relaxed"):
            began = time.monotonic()
            yield
        self._held = time.monotonic() - began
        self.longest_seconds = max(self.longest_seconds, self._held)
        self._cost = cost
        self._took.add(max(1, cost), self._held)
        fitting = HOLD_SECONDS / max(self._took.seconds_a_unit(), 1e-9)
        # Down at once, up by half: a batch that is too long hurts somebody, one that is too short only costs time.
        self.units = max(1, int(min(fitting, self.units * 1.5 + 1)))
        self._batches += 1
        if self._batches % PROBE_EVERY == 0:
            self.units = 2 * self.units + 1
        self.units = min(self.units, MOST_UNITS)

    def check(self) -> None:
        """Raises Stopped once it was asked for."""
        if self._stop is not None and self._stop():
            raise Stopped

    def pause(self) -> None:
        """Let others write. Raises Stopped."""
        self.check()
        time.sleep(min(LONGEST_PAUSE_SECONDS, max(SHORTEST_PAUSE_SECONDS, PAUSE_FACTOR * self._held)))
        if self._settle is not None:
            self.longest_seconds = max(self.longest_seconds, self._settle(self._cost))

    def batches(self, items: Iterable[tuple[Any, int]]) -> Iterator[tuple[list[Any], int]]:
        """Items with their costs, as lists that cost what the pace allows, each with its cost; at least one item."""
        batch: list[Any] = []
        whole = 0
        for item, cost in items:
            if batch and whole + cost > self.units:
                yield batch, whole
                batch, whole = [], 0
            batch.append(item)
            whole += cost
        if batch:
            yield batch, whole


class _Line:
    """The straight line through what batches cost and took, the last ones above all (least squares).

    Where a transaction takes long whatever is in it, as on a slow disk, a smaller batch is not a quicker one: to divide
    time by cost would end at one row a batch.
    """

    def __init__(self) -> None:
        self._n = self._cost = self._seconds = self._cost_cost = self._cost_seconds = 0.0

    def add(self, cost: int, seconds: float) -> None:
        weight = FORGETTING
        self._n = self._n * weight + 1
        self._cost = self._cost * weight + cost
        self._seconds = self._seconds * weight + seconds
        self._cost_cost = self._cost_cost * weight + cost * cost
        self._cost_seconds = self._cost_seconds * weight + cost * seconds

    def seconds_a_unit(self) -> float:
        whole = self._seconds / self._cost
        spread = self._n * self._cost_cost - self._cost**2
        if spread < 0.001 * self._cost**2:
            return whole
        slope = (self._n * self._cost_seconds - self._cost * self._seconds) / spread
        return min(whole, max(slope, SMALLEST_SHARE * whole))


def cost_of(size: int) -> int:
    """What the removal of a row of so many bytes costs, in units."""
    return 1 + size // UNIT_BYTES
