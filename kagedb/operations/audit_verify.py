"""Verifying the audit log: every event and seal, what anchors and keys say of them, and how much that assures.

Through plain SQL, so that it works on a copy, on an older schema, and without trusting the models. Memory does not grow
with the log.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..audit_key import SealKey
from ..errors import InvalidValue
from ..models.audit import GENESIS, hash_body, hash_event, seal_message
from ..storage import Storage

PROGRESS_ROWS = 1_000

ASKED_LATER = ("audit.redacted", "audit.pruned")
"""Kinds of events that verifying asks about when it comes to others."""

COLUMNS = ("seq", "at", "kind", "actor", "subject", "project", "salt", "body", "body_hash", "hash")
"""Of an event, in the order in which `Verifying.event` takes them."""

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


def _unlinked(seq: int) -> _Broken:
    return _Broken(seq, f"event {seq} was changed, or does not follow the event before it")


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
    verifying = Verifying(database, expect=expect, keys=keys, progress=progress)
    columns = ", ".join(COLUMNS)
    for row in database.stream(
        f"SELECT {columns} FROM audit_event WHERE seq > ? ORDER BY seq",  # noqa: S608
        (verifying.verdict.pruned_to,),
    ):
        if not verifying.event(*row):
            break
    return verifying.end()


def verify_beforehand(database: Any) -> Verdict:
    """The same of events of which no more is left than `Beforehand.look` gives."""
    verifying = Verifying(database)
    previous = GENESIS
    for row in database.stream(f"SELECT {', '.join(COLUMNS)} FROM audit_event ORDER BY seq"):  # noqa: S608
        seq, at, stored = row[0], row[1], row[-1]
        if not (verifying.event(*row) if at is not None else verifying.linked(seq, previous, stored)):
            break
        previous = stored
    return verifying.end()


class Beforehand:
    """What can be found out of events in whatever order they come, so that little of each has to be kept until they can
    be verified in theirs: of most, who come one after the other after all, the hash.
    """

    def __init__(self) -> None:
        self._seq, self._hash = 0, GENESIS

    def look(
        self,
        seq: int,
        at: int,
        kind: str,
        actor: str,
        subject: str | None,
        project: str | None,
        salt: bytes,
        body: str,
        body_hash: bytes,
        stored: bytes,
    ) -> tuple[Any, ...]:
        """What must be kept of an event, besides its number: its columns, those NULL that are not needed any more."""
        previous, self._hash = self._hash, stored
        follows, self._seq = seq == self._seq + 1, seq
        if at is None:
            # What marks an event of which nothing more is needed.
            raise ValueError(f"event {seq} has no time")
        if (body == "" and len(salt) == 0) or hash_body(salt, body) != body_hash:
            # Redacted, or changed: that is told when its turn comes.
            return at, kind, actor, subject, project, salt, body, body_hash, stored
        if kind in ASKED_LATER:
            kept = body if kind == "audit.pruned" else None
            return at, kind, actor, subject, project, salt, kept, body_hash, stored
        if follows and hash_event(previous, seq, at, kind, actor, subject, project, body_hash) == stored:
            return (*(None,) * (len(COLUMNS) - 2), stored)
        return at, kind, actor, subject, project, salt, None, body_hash, stored


class Verifying:
    """One pass over seals and events side by side, in the order of their sequence numbers.

    Somebody hands over the events, who may need their rows for something else too: every one of the log, in order, then
    the end.
    """

    def __init__(
        self,
        database: Any,
        *,
        expect: list[Anchor] | None = None,
        keys: list[SealKey] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.database = database
        self.expect = sorted(expect or [], key=lambda anchor: anchor.seq)
        self.keys = keys or []
        self.progress = progress
        self.verdict = Verdict()
        self.pruning: dict[str, Any] | None = None
        self.pruned_seal: tuple[int, int, bytes] | None = None
        self._seq, self._head, self._last = 0, GENESIS, 0
        self._rest = self._seals()
        self._seal: tuple[Any, ...] | None = None
        self._over = False
        """Whether the verdict stands already, whatever comes."""
        with self._breaking():
            self._begin()

    def event(
        self,
        seq: int,
        at: int,
        kind: str,
        actor: str,
        subject: str | None,
        project: str | None,
        salt: bytes,
        body: str | None,
        body_hash: bytes,
        stored: bytes,
    ) -> bool:
        """The next event; `body` is None where it was found to fit `body_hash`. Whether there is any use in more."""
        if self._over:
            return False
        if seq <= self.verdict.pruned_to:
            return True  # left over by a pruning that was cut off
        salt, body_hash, stored = bytes(salt), bytes(body_hash), bytes(stored)
        try:
            self._check_number(seq)
            if hash_event(self._head, seq, at, kind, actor, subject, project, body_hash) != stored:
                raise _unlinked(seq)
            if body == "" and len(salt) == 0:
                self.verdict.redacted += 1
                if not self._redaction_recorded(seq):
                    raise _Broken(seq, f"the body of event {seq} is gone, and no event says that it was redacted")
            elif body is not None and hash_body(salt, body) != body_hash:
                raise _Broken(seq, f"the body of event {seq} was changed")
            if kind == "audit.pruned" and body:
                self.pruning = json.loads(body)
            self._go_on(seq, stored)
        except _Broken as broken:
            self._break(broken)
            return False
        return True

    def linked(self, seq: int, previous: bytes, stored: bytes) -> bool:
        """The next event, of whose hash everything but the event before was found to be right: that it is made of
        `previous`, of what the event says, and of its body's hash, which fits the body."""
        if self._over:
            return False
        if seq <= self.verdict.pruned_to:
            return True
        try:
            self._check_number(seq)
            if previous != self._head:
                raise _unlinked(seq)
            self._go_on(seq, stored)
        except _Broken as broken:
            self._break(broken)
            return False
        return True

    def _check_number(self, seq: int) -> None:
        if seq != self._seq + 1:
            raise _Broken(self._seq + 1, f"event {self._seq + 1} is missing")

    def _go_on(self, seq: int, stored: bytes) -> None:
        self.verdict.events += 1
        self._seq, self._head = seq, stored
        seal = self._seal
        if seal is not None and seq == seal[2]:
            if bytes(seal[3]) != stored:
                raise _Broken(seq, f"the events up to {seq} are not those that seal {seal[0]} closed")
            self._check_mac(seal)
            self._seal = self._next_seal(seq)
        if self.expect:
            self._check_anchors(seq, stored, exactly=True)
        if self.progress is not None and seq % PROGRESS_ROWS == 0:
            self.progress(seq - self.verdict.pruned_to, self._last - self.verdict.pruned_to)

    def end(self) -> Verdict:
        """What was found, after the last event."""
        if not self._over:
            with self._breaking():
                self._end()
        return self.verdict

    def _break(self, broken: _Broken) -> None:
        self._over = True
        self.verdict.result, self.verdict.seq, self.verdict.wrong = BROKEN, broken.seq, broken.wrong

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        try:
            yield
        except _Broken as broken:
            self._break(broken)

    def _begin(self) -> None:
        verdict = self.verdict
        last = self._one("SELECT seq FROM audit_event ORDER BY seq DESC LIMIT 1")
        seal = next(self._rest, None)
        if last is None:
            if seal is not None or self.expect:
                raise _Broken(1, "there are no events, but there should be")
            verdict.result, verdict.wrong = UNKNOWN, "the audit log is empty"
            self._over = True
            return
        self._last = last[0]
        seq = 0
        while seal is not None and seal[6] is not None:
            self._follows(seal, seq)
            self._check_mac(seal)
            seq, self._head = seal[2], bytes(seal[3])
            self.pruned_seal = (seal[0], seq, self._head)
            self._check_anchors(seq, self._head, exactly=False)
            seal = next(self._rest, None)
        verdict.pruned_to = self._seq = seq
        verdict.first_seq = seq + 1
        verdict.leftover = self._one("SELECT COUNT(*) FROM audit_event WHERE seq <= ?", seq)[0] if seq else 0
        if seal is not None:
            self._follows(seal, seq)
        self._seal = seal

    def _end(self) -> None:
        verdict, seq = self.verdict, self._seq
        if self._seal is not None:
            n, last = self._seal[0], self._seal[2]
            raise _Broken(seq + 1, f"event {seq + 1} is missing: seal {n} closed the log up to {last}")
        if self.expect:
            raise _Broken(seq + 1, f"event {seq + 1} is missing: an anchor names event {self.expect[0].seq}")
        self._check_pruning()
        verdict.last_seq, verdict.head = seq, self._head.hex()
        self._check_keys()
        verdict.assurance.append("chained")
        if self.keys and verdict.sealed_to:
            verdict.assurance.append("sealed")
        if verdict.anchored_at:
            verdict.assurance.append("anchored")

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

    def _next_seal(self, seq: int) -> tuple[Any, ...] | None:
        seal = next(self._rest, None)
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
