"""Whole-store work on checkpoints: which of them go, and which blobs nothing refers to any more.

Strategy of the collection: mark what can be reached from checkpoints and attachments, without holding anything; then
remove the rest in short transactions, each of which first marks what was added since. It may be killed at any place,
and others may add what they like meanwhile: a blob goes only inside a turn to write in which nothing reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import peewee

from ..engines.scratch import ScratchSet
from ..errors import InvalidValue, StateError
from ..identity import clock_is_behind, now_ms
from ..models import AuditEvent, Blob, Checkpoint, CheckpointHead, RunAttachment
from ..models.base import check_actor
from ..models.state_tree import DIGEST_BYTES, NODE_REFERENCES, references
from ..storage import Storage
from .pace import Pace, cost_of
from .retention_rules import EVERYTHING, IN_SESSION, Bound, Condition, Rules

PAGE_CHECKPOINTS = 50
"""Looked for at once; several pages may be removed in one transaction."""

AFTER_EVERY_ULID = "8"
"""ULIDs begin with 0 to 7."""

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

    `before` is in Unix milliseconds; at least one of the two is needed. What is pinned, or of a pinned session, and
    what a session stands on, stays for ever. Every state that stays is whole; its parent becomes the nearest one that
    stays. Blobs are left to `collect`. Raises InvalidValue; StateError while the clock is before the newest row.
    """
    check_actor(actor)
    if keep is None and before is None:
        raise InvalidValue("nothing says which checkpoints to remove", "give keep= or before=")
    if keep is not None and keep < 0:
        raise InvalidValue(f"{keep} checkpoints cannot be kept", "give a number from 0")
    if before is not None and clock_is_behind():
        raise StateError("the clock is before the newest row of the store", "set the clock, then prune")
    bound = EVERYTHING if before is None else Bound(before)
    doomed = Rules(now=now_ms(), checkpoints_bound=bound, keep=keep or 0).checkpoints()
    found = storage.database.execute_sql(
        storage.database.dialect(f"SELECT COUNT(*) FROM {IN_SESSION['checkpoints']} WHERE {doomed.sql}"),  # noqa: S608
        doomed.params,
    ).fetchone()[0]
    total = Checkpoint.select().count()
    if dry_run or not found:
        return Pruned(found, total - found)
    # Said before it is done: what an interruption leaves is for the next pruning.
    AuditEvent.record("checkpoint.pruned", actor=actor, body={"checkpoints": found, "keep": keep, "before": before})
    removed = 0
    pace = Pace()
    for batch, cost in pace.batches(doomed_pages(storage, doomed)):
        with pace.turn(storage, cost):
            removed += sum(remove_page(storage, page, doomed).checkpoints for page in batch)
        pace.pause()
    return Pruned(removed, total - removed)


@dataclass(slots=True)
class _Lineage:
    """What is becoming of a session's checkpoints while they are removed."""

    last: str
    count: int
    """The newest one when the removal began, and how many there were up to it."""
    removed: int = 0
    """How many of these have been removed here."""
    moved: dict[str, str] = field(default_factory=dict)
    """Child to the parent that it was given when its own was removed: one that may be on a later page."""

    def disturbed(self, storage: Storage, session: str) -> bool:
        """Whether somebody else removes checkpoints of the session too, and gives parents that are not known here."""
        there = storage.database.execute_sql(
            storage.database.dialect("SELECT COUNT(*) FROM checkpoint WHERE session_id = ? AND id <= ?"),
            (session, self.last),
        ).fetchone()[0]
        return bool(there != self.count - self.removed)


@dataclass(frozen=True, slots=True)
class Page:
    """Some checkpoints of a session, newest first, and of its others those whose parent is among them."""

    session: str
    ids: list[str]
    children: list[tuple[str, str]]
    """Child and parent; of the checkpoints that were there up to the one with the id `seen`."""
    seen: str
    lineage: _Lineage


class RemovedPage(NamedTuple):
    """How many rows went."""

    checkpoints: int
    heads: int


def doomed_pages(storage: Storage, doomed: Condition, of: str | None = None) -> Iterator[tuple[Page, int]]:
    """The checkpoints that a condition over them and their session dooms, with the cost of their removal.

    `of` is a session all of whose checkpoints go; without it every session is looked at.
    """
    raw, dialect = storage.database.execute_sql, storage.database.dialect
    next_session = dialect("SELECT MIN(session_id) FROM checkpoint WHERE session_id > ?")
    # Newest first: a checkpoint is made after its parent, so where all of them go, none is left without one.
    select = dialect(
        f"SELECT checkpoint.id FROM {IN_SESSION['checkpoints']} WHERE checkpoint.session_id = ?"  # noqa: S608
        f" AND checkpoint.id < ? AND {doomed.sql} ORDER BY checkpoint.id DESC LIMIT {PAGE_CHECKPOINTS}"
    )
    session = of or raw(next_session, ("",)).fetchone()[0]
    while session is not None:
        count = dialect("SELECT COALESCE(MAX(id), ''), COUNT(*) FROM checkpoint WHERE session_id = ?")
        last, lineage = AFTER_EVERY_ULID, _Lineage(*raw(count, (session,)).fetchone())
        while True:
            seen = raw(dialect("SELECT MAX(id) FROM checkpoint WHERE session_id = ?"), (session,)).fetchone()[0] or ""
            ids = [row[0] for row in raw(select, (session, last, *doomed.params)).fetchall()]
            if not ids:
                break
            children = [] if of else _children(storage, session, ids)
            yield Page(session, ids, children, seen, lineage), len(ids)
            last = ids[-1]
            if len(ids) < PAGE_CHECKPOINTS:
                break
        session = None if of else raw(next_session, (session,)).fetchone()[0]


def _children(storage: Storage, session: str, ids: list[str], above: str = "") -> list[tuple[str, str]]:
    """Of a session's checkpoints above an id those whose parent is one of `ids`, with that."""
    places = ", ".join("?" * len(ids))
    sql = f"SELECT id, parent_id FROM checkpoint WHERE session_id = ? AND id > ? AND parent_id IN ({places})"  # noqa: S608
    return [
        (child, parent)
        for child, parent in storage.database.execute_sql(
            storage.database.dialect(sql), (session, above, *ids)
        ).fetchall()
    ]


def remove_page(storage: Storage, page: Page, doomed: Condition) -> RemovedPage:
    """Remove what of a page is still doomed, and its states' places in the trees; inside the caller's transaction."""
    raw, dialect = storage.database.execute_sql, storage.database.dialect
    places = ", ".join("?" * len(page.ids))
    select = (
        f"SELECT checkpoint.id, checkpoint.parent_id FROM {IN_SESSION['checkpoints']}"  # noqa: S608
        f" WHERE checkpoint.id IN ({places}) AND {doomed.sql}"
    )
    parents = dict(raw(dialect(select), (*page.ids, *doomed.params)).fetchall())
    going = sorted(parents)
    if not going:
        return RemovedPage(0, 0)
    # Of the session itself, most looked for before the transaction: there is no index by parent, which would be written
    # at each pause. And forks into other sessions, for which there is one.
    lineage = page.lineage
    if lineage.disturbed(storage, page.session):
        children = _children(storage, page.session, going)
    else:
        children = [*page.children, *lineage.moved.items(), *_children(storage, page.session, going, above=page.seen)]
    places = ", ".join("?" * len(going))
    forks = f"SELECT id, parent_id FROM checkpoint WHERE run_id IS NULL AND parent_id IN ({places})"  # noqa: S608
    children += raw(dialect(forks), going).fetchall()
    for child, parent in children:
        if parent in parents and child not in parents:
            nearest = parents[parent]
            while nearest in parents:
                nearest = parents[nearest]
            if nearest is not None:
                lineage.moved[child] = nearest
            Checkpoint.update(parent_id=nearest).where(
                (Checkpoint.id == child) & (Checkpoint.parent_id == parent)
            ).execute()
    # What is removed is where no session stands any more.
    heads = CheckpointHead.delete().where(CheckpointHead.checkpoint.in_(going)).execute()
    gone = Checkpoint.delete().where(Checkpoint.id.in_(going)).execute()
    lineage.removed += gone
    return RemovedPage(gone, heads)


def collect(storage: Storage, progress: Callable[[int], None] | None = None, *, pace: Pace | None = None) -> Collected:
    """Remove the blobs that no checkpoint and no attachment needs. Memory does not grow with the store.

    `progress` is called with the number of blobs looked at. An interrupted collection leaves blobs to the next one.
    """
    with Collection(storage) as collection:
        collection.mark()
        collection.sweep(progress, pace or Pace())
    return collection.result


def missing(storage: Storage, tick: Callable[[], None] = lambda: None) -> list[str]:
    """The digests, in hex, of blobs that checkpoints or attachments need and that are not there. Changes nothing.

    Calls `tick` between reads.
    """

    def none(_model: Any, _ids: list[str]) -> set[str]:
        tick()
        return set()

    with Collection(storage, none) as collection:
        collection.mark()
    return collection.result.missing


def unneeded(storage: Storage, going: Callable[[Any, list[str]], set[str]] | None = None) -> Collected:
    """What `collect` would remove once those rows were gone that `going` picks out of ids of a model."""
    with Collection(storage, going) as collection:
        collection.mark()
        for rows in collection.pages():
            doomed = [length for digest, length in rows if digest not in collection.marks]
            collection.result.blobs += len(doomed)
            collection.result.bytes += sum(doomed)
            collection.result.kept += len(rows) - len(doomed)
    return collection.result


@dataclass(slots=True)
class _Roots:
    """A table whose rows need blobs, and the last row whose tree was walked."""

    model: Any
    column: Any
    last: str = "0" * 26  # the lowest ULID there can be


class Collection:
    """The marks of what is needed, and the blobs that are not. Also a context manager that gives back the marks."""

    def __init__(
        self,
        storage: Storage,
        going: Callable[[Any, list[str]], set[str]] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Rows that `going` picks out of ids of a model need nothing; `check` may end the work by what it raises."""
        self.storage = storage
        self.marks = ScratchSet()
        self.result = Collected()
        self._going = going
        self._check = check
        self._roots = [_Roots(Checkpoint, Checkpoint.root), _Roots(RunAttachment, RunAttachment.blob)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.marks.close()

    def mark(self) -> None:
        """Mark everything that can be reached from the roots that were added since the last call."""
        for roots in self._roots:
            while True:
                if self._check is not None:
                    self._check()
                model, column = roots.model, roots.column
                query = model.select(model.id, column).where(model.id > roots.last).order_by(model.id).limit(ROOTS)
                rows = [(id, bytes(root)) for id, root in query.tuples()]
                if not rows:
                    break
                going = self._going(model, [id for id, _ in rows]) if self._going is not None else set[str]()
                absent = self._walk([root for id, root in rows if id not in going])
                if absent:
                    # Whoever pruned a root in between may have collected what was below it.
                    there = model.select(column).where(model.id.in_([id for id, _ in rows])).tuples()
                    absent &= self._below([bytes(root) for (root,) in there])
                    self.result.missing += sorted(digest.hex() for digest in absent)
                roots.last = rows[-1][0]

    def measure(self, root: bytes) -> int:
        """Mark a tree; gives the bytes of what is stored of it that was not marked before."""
        size = 0

        def add(looked: list[bytes]) -> None:
            nonlocal size
            size += Blob.stored_bytes(looked)

        self._walk([root], add)
        return size

    def _walk(self, roots: list[bytes], found: Callable[[list[bytes]], None] | None = None) -> set[bytes]:
        """Mark these blobs and all below them, and tell `found` of them; gives those that are not there."""
        absent: set[bytes] = set()
        waiting = [root for root in roots if self.marks.add(root)]
        while waiting:
            looked, waiting = waiting[-ROOTS:], waiting[:-ROOTS]
            if found is not None:
                found(looked)
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

    def pages(self) -> Iterator[list[tuple[bytes, int]]]:
        """All blobs as digest and stored bytes, a page at a time; what is added meanwhile may be among them."""
        last = b""
        while True:
            query = Blob.select(Blob.digest, peewee.fn.LENGTH(Blob.data).coerce(False)).where(Blob.digest > last)
            rows = [(bytes(digest), length) for digest, length in query.order_by(Blob.digest).limit(LOOK_ROWS).tuples()]
            if not rows:
                return
            yield rows
            last = rows[-1][0]

    def sweep(self, progress: Callable[[int], None] | None, pace: Pace) -> None:
        """Remove what is not marked."""
        looked = 0
        for rows in self.pages():
            doomed = ((row, cost_of(row[1])) for row in rows if row[0] not in self.marks)
            for batch, cost in pace.batches(doomed):
                # Most of what others have added is walked before anything is held.
                self.mark()
                with pace.turn(self.storage, cost):
                    self._remove(batch)
                pace.pause()
            looked += len(rows)
            if progress is not None:
                progress(looked)
        self.result.kept = looked - self.result.blobs

    def _remove(self, batch: Iterable[tuple[bytes, int]]) -> None:
        # Others may have come to need them between the mark and this turn to write.
        self.mark()
        going = {digest: length for digest, length in batch if digest not in self.marks}
        if going:
            # Another collection may have been quicker.
            there = [bytes(row[0]) for row in Blob.select(Blob.digest).where(Blob.digest.in_(list(going))).tuples()]
            self.result.bytes += sum(going[digest] for digest in there)
            self.result.blobs += Blob.delete().where(Blob.digest.in_(there)).execute()
