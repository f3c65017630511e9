"""Whole-log work on the audit log: verify, list, export, prune, redact.

Verifying reads the log through plain SQL, so that it works on a copy, on an older schema, and without trusting the
models. Memory does not grow with the log.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..audit_key import SealKey
from ..errors import InvalidValue, StateError, StorageError
from ..identity import clock_is_behind, now_ms
from ..models.audit import GENESIS, AuditEvent, AuditSeal, hash_body, hash_event, seal_message
from ..models.base import check_actor
from ..storage import Storage

logger = logging.getLogger("kagedb")

PRUNE_ROWS = 500
"""Events deleted in one transaction: a few milliseconds of holding the writer on a card."""

PRUNE_PAUSE_SECONDS = 0.002
"""Between two of them, so that other writers are not kept waiting (measured: a tenth of their waiting time)."""

PROGRESS_ROWS = 1_000

HOLDS, BROKEN, UNKNOWN = "holds", "broken", "cannot tell"


@dataclass(frozen=True, slots=True)
class Anchor:
    """A sequence number and the hash that the event had, kept outside the store."""

    seq: int
    hash: bytes

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """From `SEQ:HASH`, as `kaged audit head` prints it. Raises InvalidValue."""
        seq, _, digest = text.strip().partition(":")
        try:
            anchor = cls(int(seq), bytes.fromhex(digest))
        except ValueError:
            anchor = cls(0, b"")
        if anchor.seq < 1 or len(anchor.hash) != 32:
            raise InvalidValue(f"{text[:80]!r} is not an anchor", "it is SEQ:HASH as kaged audit head prints it")
        return anchor

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()}"


@dataclass(slots=True)
class Verdict:
    """What verifying found. `seq` is the first sequence number that is not right, `wrong` what is wrong there."""

    result: str = HOLDS
    seq: int | None = None
    wrong: str = ""
    events: int = 0
    first_seq: int = 0
    last_seq: int = 0
    head: str = ""
    seals: int = 0
    pruned_to: int = 0
    redacted: int = 0
    assurance: list[str] = field(default_factory=list)
    """Which of "chained", "sealed" and "anchored" holds; see docs/audit.md."""
    sealed_to: int = 0
    anchored_at: list[int] = field(default_factory=list)
    leftover: int = 0
    """Events of pruned ranges that an interrupted pruning has not deleted yet."""


class _Broken(Exception):
    def __init__(self, seq: int, wrong: str) -> None:
        super().__init__(wrong)
        self.seq = seq
        self.wrong = wrong


def verify(
    storage: Storage,
    *,
    expect: list[Anchor] | None = None,
    keys: list[SealKey] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Check every event and seal, and what the caller knows from elsewhere: anchors, and the first key of the seals.

    `progress` is called with (events done, last sequence number). Changes nothing.
    """
    with storage.snapshot():
        return verify_in(storage.database, expect=expect, keys=keys, progress=progress)


def verify_in(
    database: Any,
    *,
    expect: list[Anchor] | None = None,
    keys: list[SealKey] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """The same of anything that has `raw` and `stream` and does not change meanwhile: a backup set's contents."""
    check = _Verification(database, expect or [], keys or [], progress)
    try:
        check.run()
    except _Broken as broken:
        check.verdict.result, check.verdict.seq, check.verdict.wrong = BROKEN, broken.seq, broken.wrong
    return check.verdict


class _Verification:
    """One pass over seals and events side by side, in the order of their sequence numbers."""

    def __init__(
        self,
        database: Any,
        expect: list[Anchor],
        keys: list[SealKey],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.database = database
        self.expect = sorted(expect, key=lambda anchor: anchor.seq)
        self.keys = keys
        self.progress = progress
        self.verdict = Verdict()
        self.pruning: dict[str, Any] | None = None
        self.pruned_seal: tuple[int, int, bytes] | None = None

    def run(self) -> None:
        verdict = self.verdict
        last = self._one("SELECT seq FROM audit_event ORDER BY seq DESC LIMIT 1")
        seals = self._seals()
        seal = next(seals, None)
        if last is None:
            if seal is not None or self.expect:
                raise _Broken(1, "there are no events, but there should be")
            verdict.result, verdict.wrong = UNKNOWN, "the audit log is empty"
            return
        seq, head = 0, GENESIS
        while seal is not None and seal[6] is not None:
            self._follows(seal, seq)
            self._check_mac(seal)
            seq, head = seal[2], bytes(seal[3])
            self.pruned_seal = (seal[0], seq, head)
            self._check_anchors(seq, head, exactly=False)
            seal = next(seals, None)
        verdict.pruned_to = seq
        verdict.first_seq = seq + 1
        verdict.leftover = self._one("SELECT COUNT(*) FROM audit_event WHERE seq <= ?", seq)[0] if seq else 0
        if seal is not None:
            self._follows(seal, seq)

        for row in self.database.stream(
            "SELECT seq, at, kind, actor, subject, project, salt, body, body_hash, hash FROM audit_event"
            " WHERE seq > ? ORDER BY seq",
            (seq,),
        ):
            head = self._check_event(row, seq, head)
            seq += 1
            if seal is not None and seq == seal[2]:
                if bytes(seal[3]) != head:
                    raise _Broken(seq, f"the events up to {seq} are not those that seal {seal[0]} closed")
                self._check_mac(seal)
                seal = self._next_seal(seals, seq)
            self._check_anchors(seq, head, exactly=True)
            if self.progress is not None and seq % PROGRESS_ROWS == 0:
                self.progress(seq - verdict.pruned_to, last[0] - verdict.pruned_to)
        if seal is not None:
            raise _Broken(seq + 1, f"event {seq + 1} is missing: seal {seal[0]} closed the log up to {seal[2]}")
        if self.expect:
            raise _Broken(seq + 1, f"event {seq + 1} is missing: an anchor names event {self.expect[0].seq}")
        self._check_pruning()
        self._check_keys()
        verdict.last_seq, verdict.head = seq, head.hex()
        verdict.assurance.append("chained")
        if self.keys and verdict.sealed_to:
            verdict.assurance.append("sealed")
        if verdict.anchored_at:
            verdict.assurance.append("anchored")

    def _check_event(self, row: tuple[Any, ...], before: int, previous: bytes) -> bytes:
        seq, at, kind, actor, subject, project, salt, body, body_hash, stored = row
        body_hash, stored = bytes(body_hash), bytes(stored)
        if seq != before + 1:
            raise _Broken(before + 1, f"event {before + 1} is missing")
        if hash_event(previous, seq, at, kind, actor, subject, project, body_hash) != stored:
            raise _Broken(seq, f"event {seq} was changed, or does not follow the event before it")
        if body == "" and len(salt) == 0:
            self.verdict.redacted += 1
            if not self._redaction_recorded(seq):
                raise _Broken(seq, f"the body of event {seq} is gone, and no event says that it was redacted")
        elif hash_body(bytes(salt), body) != body_hash:
            raise _Broken(seq, f"the body of event {seq} was changed")
        if kind == "audit.pruned" and body:
            self.pruning = json.loads(body)
        self.verdict.events += 1
        return stored

    def _redaction_recorded(self, seq: int) -> bool:
        # By the index on subject, one event at a time: a list of redactions could grow with the log.
        return (
            self._one(
                "SELECT 1 FROM audit_event WHERE subject = ? AND kind = 'audit.redacted' AND seq > ?",
                f"audit_event:{seq}",
                seq,
            )
            is not None
        )

    def _seals(self) -> Iterator[tuple[Any, ...]]:
        seals: Iterator[tuple[Any, ...]] = self.database.stream(
            "SELECT n, first_seq, last_seq, head, at, mac, pruned_at FROM audit_seal ORDER BY n"
        )
        return seals

    def _next_seal(self, seals: Iterator[tuple[Any, ...]], seq: int) -> tuple[Any, ...] | None:
        seal = next(seals, None)
        if seal is not None:
            self._follows(seal, seq)
            if seal[6] is not None:
                raise _Broken(seal[1], f"seal {seal[0]} says its events were pruned, but those before it are there")
        return seal

    def _follows(self, seal: tuple[Any, ...], seq: int) -> None:
        self.verdict.seals += 1
        if seal[0] != self.verdict.seals or seal[1] != seq + 1 or seal[2] < seal[1]:
            raise _Broken(seq + 1, f"seal {self.verdict.seals}, which begins at event {seq + 1}, is missing")

    def _check_mac(self, seal: tuple[Any, ...]) -> None:
        n, first, last, head, at, mac, _ = seal
        first_keys = [key for key in self.keys if key.n <= n]
        if not first_keys:
            return
        expected = first_keys[-1].at(n).mac(seal_message(n, first, last, bytes(head), at))
        if mac is None or not hmac.compare_digest(bytes(mac), expected):
            what = "has no MAC" if mac is None else "has a MAC of another key or other content"
            raise _Broken(last, f"seal {n} of the events {first} to {last} {what}")
        self.verdict.sealed_to = last

    def _check_keys(self) -> None:
        for key in self.keys:
            if key.n > self.verdict.seals + 1:
                raise _Broken(
                    self.verdict.last_seq + 1,
                    f"the key begins at seal {key.n}, but there are only {self.verdict.seals}",
                )

    def _check_anchors(self, seq: int, head: bytes, *, exactly: bool) -> None:
        while self.expect and self.expect[0].seq <= seq:
            anchor = self.expect[0]
            if anchor.seq < seq and not exactly:
                # Inside a pruned range only the last hash is known.
                self.expect.pop(0)
                self.verdict.result, self.verdict.wrong = (
                    UNKNOWN,
                    f"event {anchor.seq}, which an anchor names, is pruned",
                )
                continue
            if anchor.hash != head:
                raise _Broken(anchor.seq, f"event {anchor.seq} has another hash than the anchor says")
            self.expect.pop(0)
            self.verdict.anchored_at.append(anchor.seq)

    def _check_pruning(self) -> None:
        if self.pruned_seal is None:
            return
        n, seq, head = self.pruned_seal
        said = self.pruning or {}
        if (said.get("seal"), said.get("seq"), said.get("hash")) != (n, seq, head.hex()):
            raise _Broken(1, f"the events up to {seq} are gone, and no event says that they were pruned")

    def _one(self, sql: str, *params: Any) -> Any:
        return self.database.raw(sql, params).fetchone()


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
) -> Pruned | None:
    """Remove the sealed ranges whose events are all older than `before` (Unix milliseconds); their seals stay.

    None where there is no such range. An interrupted pruning is taken up by the next. Raises StateError while the
    clock is before the newest row: what is old cannot be told then.
    """
    check_actor(actor)
    if clock_is_behind():
        raise StateError("the clock is before the newest row of the store", "set the clock, then prune")
    found = _prunable(storage, before)
    if dry_run or found is None:
        if not dry_run:
            _delete_pruned(storage, None)
        return found
    with storage.transaction():
        found = _prunable(storage, before)
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
    _delete_pruned(storage, progress)
    return found


def _prunable(storage: Storage, before: int) -> Pruned | None:
    last_old = first_at(storage, before) - 1
    row = storage.database.execute_sql(
        storage.database.dialect(
            "SELECT MAX(n), MAX(last_seq), MIN(first_seq) FROM audit_seal WHERE pruned_at IS NULL AND last_seq <= ?"
        ),
        (last_old,),
    ).fetchone()
    return None if row[0] is None else Pruned(row[0], row[1], row[1] - row[2] + 1)


def _delete_pruned(storage: Storage, progress: Callable[[int, int], None] | None) -> None:
    raw = storage.database.execute_sql
    dialect = storage.database.dialect
    last = raw("SELECT MAX(last_seq) FROM audit_seal WHERE pruned_at IS NOT NULL").fetchone()[0]
    first = raw("SELECT MIN(seq) FROM audit_event").fetchone()[0]
    if last is None or first is None:
        return
    for start in range(first, last + 1, PRUNE_ROWS):
        with storage.transaction(durability="relaxed"):
            # From the oldest on, so that what an interruption leaves is the end of a pruned range.
            raw(
                dialect("DELETE FROM audit_event WHERE seq BETWEEN ? AND ?"),
                (start, min(start + PRUNE_ROWS - 1, last)),
            )
        if progress is not None:
            progress(min(start + PRUNE_ROWS, last + 1) - first, last + 1 - first)
        time.sleep(PRUNE_PAUSE_SECONDS)


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
