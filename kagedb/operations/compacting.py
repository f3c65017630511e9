"""`kaged compact`: give space that holds nothing back, and say how large the store was and is.

How it is done is the engine's. Nothing of what the store holds is changed, so no audit event tells of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..engines.compacting import Compaction
from ..storage import Storage


@dataclass(frozen=True, slots=True)
class Compacted:
    """What came of it. Sizes in bytes, by part of the store as in `kaged status`."""

    place: str
    before: dict[str, int]
    after: dict[str, int]
    given_back: int
    """Bytes by which the store became smaller; 0 where others wrote more meanwhile."""
    free_bytes: int
    """What still holds nothing."""
    longest_hold_ms: int
    """The longest time for which other writers were kept waiting without a break."""
    took_ms: int
    finished: bool
    """Whether all was done that could be; else the next run goes on."""
    notes: list[str]
    """What could not be done and why; each says what mends it."""


def compact(
    storage: Storage, *, deadline_seconds: float | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Compacted:
    """Give space back in short steps, beside whoever reads and writes; no further one after `deadline_seconds`.

    `progress` is called with what is being done, how much of it is done and of how much. Raises StorageInUse where the
    store has to be rewritten, which a store reloaded from a dump has, and is open elsewhere; StorageBusy, StorageFull.
    """
    engine = storage.engine
    began = time.monotonic()
    run = Compaction(
        ends_at=None if deadline_seconds is None else began + deadline_seconds,
        progress=None if progress is None else lambda done, whole: progress("giving space back", done, whole),
    )
    before = engine.figures().bytes_by_part
    engine.compact(run)
    figures = engine.figures()
    return Compacted(
        place=engine.place,
        before=before,
        after=figures.bytes_by_part,
        given_back=max(0, sum(before.values()) - sum(figures.bytes_by_part.values())),
        free_bytes=figures.free_bytes,
        longest_hold_ms=round(run.longest_hold_seconds * 1000),
        took_ms=round((time.monotonic() - began) * 1000),
        finished=run.finished,
        notes=run.notes,
    )
