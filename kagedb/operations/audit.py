"""Whole-log work on the audit log: list, export, prune, redact, a new key. Verifying it is in audit_verify.py.

Memory does not grow with the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..audit_key import SealKey
from ..errors import InvalidValue, StateError, StorageError
from ..fields import INTEGER_MAX
from ..identity import clock_is_behind, now_ms
from ..models.audit import AuditEvent, AuditSeal
from ..models.base import check_actor
from ..storage import Storage
from .pace import Pace

logger = logging.getLogger("kagedb")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events to list; None where it does not matter. Times in Unix milliseconds."""

    since: int | None = None
    until: int | None = None
    kind: str | None = None
    actor: str | None = None
    subject: str | None = None
    project: str | None = None
    above: int = 0
    """Only events after this sequence number."""


def newest(storage: Storage, wanted: Filter, limit: int = 0) -> Iterator[AuditEvent]:
    """The events that fit, newest first; at most `limit`, or all of them with 0.

    Subjects go by the index, times by a search over the sequence numbers; the rest is read and left out.
    """
    last = AuditEvent.head()[0]
    low = max(first_at(storage, wanted.since) if wanted.since is not None else 0, wanted.above + 1)
    high = first_at(storage, wanted.until) - 1 if wanted.until is not None else last
    query = AuditEvent.select().where(AuditEvent.seq.between(low, high))
    if wanted.kind is not None:
        # "policy" means everything below it as well.
        query = query.where((AuditEvent.kind == wanted.kind) | AuditEvent.kind.startswith(wanted.kind + "."))
    for name in ("actor", "subject", "project"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(getattr(AuditEvent, name) == value)
    query = query.order_by(AuditEvent.seq.desc())
    return AuditEvent.rows(query.limit(limit) if limit else query)


def first_at(storage: Storage, at: int) -> int:
    """The number of the first event at or after a time (Unix milliseconds); the next one where there is none."""
    raw = storage.database.execute_sql
    low, high = raw("SELECT MIN(seq), MAX(seq) FROM audit_event").fetchone()
    if low is None:
        return 1
    low, high = int(low), int(high) + 1
    sql = storage.database.dialect("SELECT at FROM audit_event WHERE seq = ?")
    while low < high:
        middle = (low + high) // 2
        row = raw(sql, (middle,)).fetchone()
        if row is not None and row[0] < at:
            low = middle + 1
        else:
            high = middle
    return low


def new_key(storage: Storage, *, replace: bool, actor: str) -> SealKey:
    """A new key for the seals from the next one on; what is not sealed yet is sealed first, with the key before it.

    That there is one is an event, which does not hold it. Raises StateError where there is a key, unless `replace`.
    """
    file = storage.seal_key_file()
    file.refuse_replacing(replace)
    try:
        AuditSeal.close_all()
    except StorageError as error:
        logger.warning("what is not sealed yet will be sealed with the new key: %s", error.message)
    n = (AuditSeal.select(AuditSeal.n).order_by(AuditSeal.n.desc()).scalar() or 0) + 1
    key = file.make(n, replace=replace)
    AuditEvent.append("audit.keyed", actor=actor, subject=f"audit_seal:{n}", body={"seal": n})
    return key


def as_json(event: AuditEvent) -> dict[str, Any]:
    """An event with everything a verifier needs; bytes in hex, the body as the exact text that was hashed."""
    data = dict(event.__data__)
    return {
        name: bytes(value).hex() if name in ("salt", "body_hash", "hash") else value for name, value in data.items()
    }


def export(storage: Storage) -> Iterator[str]:
    """The log as lines of JSON, oldest first: the seals, then the events. docs/audit.md describes them."""
    with storage.snapshot():
        for row in storage.database.stream(
            "SELECT n, first_seq, last_seq, head, at, mac, pruned_at FROM audit_seal ORDER BY n"
        ):
            seal = dict(zip(("seal", "first_seq", "last_seq", "head", "at", "mac", "pruned_at"), row, strict=True))
            seal["head"] = bytes(row[3]).hex()
            seal["mac"] = None if row[5] is None else bytes(row[5]).hex()
            yield json.dumps(seal, ensure_ascii=False)
        names = [f.name for f in AuditEvent._meta.sorted_fields]
        columns = ", ".join(names)
        # What a pruning that was cut off has not deleted yet is not part of the log any more.
        for row in storage.database.stream(
            f"SELECT {columns} FROM audit_event WHERE seq > (SELECT COALESCE(MAX(last_seq), 0) FROM audit_seal"  # noqa: S608
            " WHERE pruned_at IS NOT NULL) ORDER BY seq"
        ):
            yield json.dumps(as_json(AuditEvent.from_row(row)), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` removed, or would: up to which seal and event, and how many events."""

    seal: int
    last_seq: int
    events: int


def prune(
    storage: Storage,
    before: int,
    *,
    actor: str,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    pace: Pace | None = None,
    seal: int | None = None,
) -> Pruned | None:
    """Remove the sealed ranges whose events are all older than `before` (Unix milliseconds); their seals stay.

    With `seal` no range of a later one. None where there is no such range. An interrupted pruning is taken up by the
    next. Raises StateError while the clock is before the newest row: what is old cannot be told then.
    """
    check_actor(actor)
    if clock_is_behind():
        raise StateError("the clock is before the newest row of the store", "set the clock, then prune")
    pace = pace or Pace()
    found = _prunable(storage, before, seal)
    if dry_run or found is None:
        if not dry_run:
            _delete_pruned(storage, None, pace)
        return found
    with storage.transaction():
        found = _prunable(storage, before, seal)
        if found is None:
            return None
        head = AuditSeal.by_id(found.seal).head
        AuditEvent.append(
            "audit.pruned",
            actor=actor,
            subject=f"audit_seal:{found.seal}",
            body={"seal": found.seal, "seq": found.last_seq, "hash": head.hex(), "events": found.events},
        )
        AuditSeal.update(pruned_at=now_ms()).where(
            (AuditSeal.n <= found.seal) & AuditSeal.pruned_at.is_null()
        ).execute()
    _delete_pruned(storage, progress, pace)
    return found


def _prunable(storage: Storage, before: int, seal: int | None) -> Pruned | None:
    last_old = first_at(storage, before) - 1
    row = storage.database.execute_sql(
        storage.database.dialect(
            "SELECT MAX(n), MAX(last_seq), MIN(first_seq) FROM audit_seal"
            " WHERE pruned_at IS NULL AND last_seq <= ? AND n <= ?"
        ),
        (last_old, INTEGER_MAX if seal is None else seal),
    ).fetchone()
    return None if row[0] is None else Pruned(row[0], row[1], row[1] - row[2] + 1)


def _delete_pruned(storage: Storage, progress: Callable[[int, int], None] | None, pace: Pace) -> None:
    raw = storage.database.execute_sql
    dialect = storage.database.dialect
    last = raw("SELECT MAX(last_seq) FROM audit_seal WHERE pruned_at IS NOT NULL").fetchone()[0]
    first = raw("SELECT MIN(seq) FROM audit_event").fetchone()[0]
    if last is None or first is None:
        return
    start = first
    while start <= last:
        # From the oldest on, so that what an interruption leaves is the end of a pruned range.
        end = min(start + pace.units, last + 1)
        with pace.turn(storage, end - start):
            raw(dialect("DELETE FROM audit_event WHERE seq BETWEEN ? AND ?"), (start, end - 1))
        start = end
        if progress is not None:
            progress(start - first, last + 1 - first)
        pace.pause()


def redact(storage: Storage, seq: int, *, reason: str, actor: str) -> AuditEvent:
    """Empty the body of an event and see to it that its bytes are gone from the database's own files too.

    Raises StorageBusy where a reader keeps them there: the redaction stands, and doing it again ends it. Backups,
    archived WAL and what the disk's own wear levelling keeps are beyond reach.
    """
    if not isinstance(seq, int):
        raise InvalidValue(f"{seq!r} is not a sequence number", "kaged audit list shows them")
    event = AuditEvent.by_id(seq)
    done = _redaction_of(event) if event.redacted else AuditEvent.redact(seq, reason=reason, actor=actor)
    storage.engine.erase_traces("audit_event")
    return done


def _redaction_of(event: AuditEvent) -> AuditEvent:
    for found in AuditEvent.of(event):
        if found.kind == "audit.redacted":
            return found
    raise StateError(
        f"the audit event {event.seq} is empty, but no event says that it was redacted", "kaged audit verify"
    )
