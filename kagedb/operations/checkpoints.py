"""Whole-store work on checkpoints: which of them go, and which blobs nothing refers to any more.

Strategy of the collection: mark what can be reached from checkpoints and attachments, without holding anything; then
remove the rest in short transactions, each of which first marks what was added since. It may be killed at any place,
and others may add what they like meanwhile: a blob goes only inside a turn to write in which nothing reaches it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import peewee

from ..engines.scratch import ScratchSet
from ..errors import InvalidValue, StateError
from ..identity import clock_is_behind
from ..models import AuditEvent, Blob, Checkpoint, CheckpointHead, RunAttachment
from ..models.base import check_actor
from ..models.blob import batches
from ..models.state_tree import DIGEST_BYTES, NODE_REFERENCES, references
from ..storage import Storage

SWEEP_ROWS = 100
"""Blobs or checkpoints removed in one transaction: at 2 KiB each a few milliseconds of holding the writer on a card."""

PAUSE_SECONDS = 0.002
"""Between two of them, so that other writers are not kept waiting."""

ROOTS = 100
"""Checkpoints or attachments whose trees are walked together."""

LOOK_ROWS = 500
"""Digests looked at in one read of the sweep."""

_HEAD_BYTES = 1 + NODE_REFERENCES * DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many checkpoints `prune` removed, or would, and how many stay."""

    removed: int
    kept: int


@dataclass(slots=True)
class Collected:
    """How many blobs `collect` removed, their bytes, and how many stay. `missing` should be there and are not."""

    blobs: int = 0
    bytes: int = 0
    kept: int = 0
    missing: list[str] = field(default_factory=list)


def prune(
    storage: Storage, *, keep: int | None = None, before: int | None = None, actor: str, dry_run: bool = False
) -> Pruned:
    """Remove checkpoints: of each session all but the newest `keep`, and of those only what is older than `before`.

    `before` is in Unix milliseconds; at least one of the two is needed. What is pinned, and what a session stands on,
    stays for ever. Every state that stays is whole; its parent becomes the nearest one that stays. Blobs are left to
    `collect`. Raises InvalidValue; StateError while the clock is before the newest row.
    """
    check_actor(actor)
    if keep is None and before is None:
        raise InvalidValue("nothing says which checkpoints to remove", "give keep= or before=")
    if keep is not None and keep < 0:
        raise InvalidValue(f"{keep} checkpoints cannot be kept", "give a number from 0")
    if before is not None and clock_is_behind():
        raise StateError("the clock is before the newest row of the store", "set the clock, then prune")
    sessions = _sessions(storage)
    doomed = sum(len(_doomed(session, keep, before)) for session in sessions)
    total = Checkpoint.select().count()
    if dry_run or not doomed:
        return Pruned(doomed, total - doomed)
    # Said before it is done: what an interruption leaves is for the next pruning.
    AuditEvent.record("checkpoint.pruned", actor=actor, body={"checkpoints": doomed, "keep": keep, "before": before})
    removed = 0
    for session in sessions:
        while True:
            with storage.transaction("relaxed"):
                going = _doomed(session, keep, before)[-SWEEP_ROWS:]
                _remove(going)
            removed += len(going)
            time.sleep(PAUSE_SECONDS)
            if len(going) < SWEEP_ROWS:
                break
    return Pruned(removed, total - removed)


def _sessions(storage: Storage) -> list[str]:
    return [row[0] for row in storage.database.execute_sql("SELECT DISTINCT session_id FROM checkpoint").fetchall()]


def _doomed(session: str, keep: int | None, before: int | None) -> list[str]:
    """The ids of the checkpoints of a session that go, oldest first."""
    newest = Checkpoint.select(Checkpoint.id).order_by(Checkpoint.id.desc()).limit(1)
    rows = (
        Checkpoint.select(Checkpoint.id, Checkpoint.created_at)
        .where(
            (Checkpoint.session == session)
            & ~Checkpoint.pinned
            & (Checkpoint.id != CheckpointHead.of(session))
            # New ids are made above the newest: a collection that goes on must not meet a lower one.
            & (Checkpoint.id != newest)
        )
        .order_by(Checkpoint.id)
        .tuples()
    )
    found = list(rows)
    if keep:
        last = Checkpoint.select(Checkpoint.id).where(Checkpoint.session == session)
        kept = {row[0] for row in last.order_by(Checkpoint.id.desc()).limit(keep).tuples()}
        found = [row for row in found if row[0] not in kept]
    return [id for id, created_at in found if before is None or created_at < before]


def _remove(going: list[str]) -> None:
    """Remove these checkpoints of one session, oldest first; inside the caller's transaction."""
    parents = dict(Checkpoint.select(Checkpoint.id, Checkpoint.parent_id).where(Checkpoint.id.in_(going)).tuples())
    # Of the same session, or forks into others: there is no index by parent, since only this would need it.
    children = Checkpoint.select(Checkpoint.id, Checkpoint.parent_id).where(Checkpoint.parent_id.in_(going))
    for child, parent in list(children.tuples()):
        if child not in parents:
            while parent in parents:
                parent = parents[parent]
            Checkpoint.update(parent_id=parent).where(Checkpoint.id == child).execute()
    # What is removed is where no session stands any more.
    CheckpointHead.delete().where(CheckpointHead.checkpoint.in_(going)).execute()
    Checkpoint.delete().where(Checkpoint.id.in_(going)).execute()


def collect(storage: Storage, progress: Callable[[int], None] | None = None) -> Collected:
    """Remove the blobs that no checkpoint and no attachment needs. Memory does not grow with the store.

    `progress` is called with the number of blobs looked at. An interrupted collection leaves blobs to the next one.
    """
    collection = _Collection(storage)
    try:
        collection.mark()
        collection.sweep(progress)
    finally:
        collection.marks.close()
    return collection.result


def missing(storage: Storage) -> list[str]:
    """The digests, in hex, of blobs that checkpoints or attachments need and that are not there. Changes nothing."""
    collection = _Collection(storage)
    try:
        collection.mark()
    finally:
        collection.marks.close()
    return collection.result.missing


@dataclass(slots=True)
class _Roots:
    """A table whose rows need blobs, and the last row whose tree was walked."""

    model: Any
    column: Any
    last: str = "0" * 26  # the lowest ULID there can be


class _Collection:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.marks = ScratchSet()
        self.result = Collected()
        self._roots = [_Roots(Checkpoint, Checkpoint.root), _Roots(RunAttachment, RunAttachment.blob)]

    def mark(self) -> None:
        """Mark everything that can be reached from the roots that were added since the last call."""
        for roots in self._roots:
            while True:
                model, column = roots.model, roots.column
                query = model.select(model.id, column).where(model.id > roots.last).order_by(model.id).limit(ROOTS)
                rows = [(id, bytes(root)) for id, root in query.tuples()]
                if not rows:
                    break
                absent = self._walk([root for _, root in rows])
                if absent:
                    # Whoever pruned a root in between may have collected what was below it.
                    there = model.select(column).where(model.id.in_([id for id, _ in rows])).tuples()
                    absent &= self._below([bytes(root) for (root,) in there])
                    self.result.missing += sorted(digest.hex() for digest in absent)
                roots.last = rows[-1][0]

    def _walk(self, roots: list[bytes]) -> set[bytes]:
        """Mark these blobs and all below them; gives those that are not there."""
        absent: set[bytes] = set()
        waiting = [root for root in roots if self.marks.add(root)]
        while waiting:
            looked, waiting = waiting[-ROOTS:], waiting[:-ROOTS]
            heads = Blob.heads(looked, _HEAD_BYTES)
            absent.update(digest for digest in looked if digest not in heads)
            for head in heads.values():
                waiting += [digest for digest in references(head) if self.marks.add(digest)]
        return absent

    def _below(self, roots: list[bytes]) -> set[bytes]:
        """All digests at and below these roots, as far as the blobs are there."""
        found, waiting = set(roots), list(roots)
        while waiting:
            looked, waiting = waiting[-ROOTS:], waiting[:-ROOTS]
            for head in Blob.heads(looked, _HEAD_BYTES).values():
                new = [digest for digest in references(head) if digest not in found]
                found.update(new)
                waiting += new
        return found

    def sweep(self, progress: Callable[[int], None] | None) -> None:
        looked, last = 0, b""
        while True:
            query = Blob.select(Blob.digest).where(Blob.digest > last).order_by(Blob.digest).limit(LOOK_ROWS)
            digests = [bytes(digest) for (digest,) in query.tuples()]
            if not digests:
                break
            doomed = [digest for digest in digests if digest not in self.marks]
            for batch in batches(doomed, SWEEP_ROWS):
                with self.storage.transaction("relaxed"):
                    self._remove(batch)
                time.sleep(PAUSE_SECONDS)
            looked, last = looked + len(digests), digests[-1]
            if progress is not None:
                progress(looked)
        self.result.kept = looked - self.result.blobs

    def _remove(self, batch: Iterable[bytes]) -> None:
        # Others may have come to need them between the mark and this turn to write.
        self.mark()
        going = [digest for digest in batch if digest not in self.marks]
        if going:
            where = Blob.digest.in_(going)
            length = peewee.fn.SUM(peewee.fn.LENGTH(Blob.data))
            self.result.bytes += int(Blob.select(length).where(where).scalar() or 0)
            self.result.blobs += Blob.delete().where(where).execute()
