"""The append-only audit log: events in a hash chain, and the seals that close ranges of it.

How the hashes are made is described in docs/audit.md, so that anyone can verify them without this package.
"""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from hashlib import sha256
from typing import Any, Self

from ..errors import InvalidValue, StateError, StorageError
from ..fields import BlobField, IntegerField, MillisField, TextField, UlidField, encode_json
from ..identity import now_ms, raise_floor
from .base import Hot, Model, Parameter, bound_store, check_actor, subject_ref

logger = logging.getLogger("kagedb")

DOMAIN = b"kaged.audit.1"
"""Begins every hashed event, so that no hash made for another purpose can stand for one."""

SEAL_DOMAIN = b"kaged.seal.1"

LOG_KINDS = ("audit.", "store.")
"""Kinds of events that say what was done to the log or the store as a whole; they cannot be redacted."""

GENESIS = bytes(32)
"""What stands for the hash before the first event."""

SALT_BYTES = 16
"""Enough that the body of a redacted event cannot be guessed from its hash."""

SEAL_EVENTS = 1_000
"""A seal at every sequence number that this divides: about a megabyte of events between two anchors."""

DAY_MS = 86_400_000
"""The first event of a UTC day seals the days before it."""

_KIND = re.compile(r"[a-z][a-z0-9_-]*(?:\.[a-z0-9_-]+)*")
KIND_CHARACTERS = 100


class AuditEvent(Model):
    """One thing that happened. Never changed or deleted but by redaction and the pruning of sealed ranges."""

    seq = IntegerField(primary_key=True)
    at = MillisField()  # never decreases along seq: the list by time searches it
    kind = TextField()
    actor = TextField()
    subject = TextField(null=True)
    project = UlidField(null=True)
    salt = BlobField()
    body = TextField()
    body_hash = BlobField()
    hash = BlobField()

    class Meta:
        table_name = "audit_event"
        indexes = ((("subject",), False),)

    _head = Hot(
        lambda: (
            AuditEvent.select(AuditEvent.seq, AuditEvent.at, AuditEvent.hash).order_by(AuditEvent.seq.desc()).limit(1)
        )
    )

    _of = Hot(
        lambda: (
            AuditEvent.select()
            .where(AuditEvent.subject == Parameter("subject", AuditEvent.subject))
            .order_by(AuditEvent.seq.desc())
            .limit(Parameter("limit", AuditEvent.seq))
        )
    )
    _empty = Hot(
        lambda: AuditEvent.update(
            {AuditEvent.body: Parameter("body", AuditEvent.body), AuditEvent.salt: Parameter("salt", AuditEvent.salt)}
        ).where(AuditEvent.seq == Parameter("seq", AuditEvent.seq))
    )

    @classmethod
    def record(
        cls, kind: str, *, actor: str, subject: Any = None, project: Any = None, body: dict[str, Any] | None = None
    ) -> Self:
        """Append an event; on disk when it returns, or with the transaction around it.

        `kind` is dotted words (`policy.decision`; `audit.` and `store.` are reserved), `actor` is `kind:name`,
        `subject` a model or `table:id`, `project` a Project or its id (by default the subject's), `body` a JSON
        object. Raises InvalidValue, LimitExceeded.
        """
        if isinstance(kind, str) and kind.startswith(LOG_KINDS):
            # What is said of the log itself decides what may be redacted and pruned.
            raise InvalidValue(f"the kind {kind!r} is reserved", "begin it with another word than audit or store")
        return cls.append(kind, actor=actor, subject=subject, project=project, body=body)

    @classmethod
    def append(
        cls, kind: str, *, actor: str, subject: Any = None, project: Any = None, body: dict[str, Any] | None = None
    ) -> Self:
        """`record` for the package itself, reserved kinds included."""
        if not isinstance(kind, str) or len(kind) > KIND_CHARACTERS or not _KIND.fullmatch(kind):
            raise InvalidValue(
                f"the kind of audit event {str(kind)[:60]!r} is not dotted lower-case words",
                "write it like policy.decision",
            )
        check_actor(actor)
        if body is not None and not isinstance(body, dict):
            raise InvalidValue("the body of an audit event is a JSON object", "pass a dict")
        store = bound_store()
        text = encode_json(body or {}, "the audit event's body", store.database.limits, sort_keys=True)
        salt = os.urandom(SALT_BYTES)
        with store.transaction():
            if project is None and isinstance(subject, Model):
                project = subject.audited_project
            project_id = cls.project.db_value(getattr(project, "id", project))
            named = subject_ref(subject)
            seq, last, previous = cls._head.one() or (0, 0, GENESIS)
            raise_floor(last)
            at = now_ms()
            if seq and at // DAY_MS != last // DAY_MS:
                AuditSeal.close_in_passing(seq, bytes(previous))
            seq += 1
            body_hash = hash_body(salt, text)
            digest = hash_event(bytes(previous), seq, at, kind, actor, named, project_id, body_hash)
            row = {
                "seq": seq,
                "at": at,
                "kind": kind,
                "actor": actor,
                "subject": named,
                "project": project_id,
                "salt": salt,
                "body": text,
                "body_hash": body_hash,
                "hash": digest,
            }
            cls._insert.run_checked(row)
            if seq % SEAL_EVENTS == 0:
                AuditSeal.close_in_passing(seq, digest)
            store.notify(kind, named or f"audit_event:{seq}", project_id)
        return cls._from_data(row)

    @classmethod
    def head(cls) -> tuple[int, bytes]:
        """The sequence number and hash of the newest event; (0, GENESIS) in an empty log."""
        seq, _, newest = cls._head.one() or (0, 0, GENESIS)
        return seq, bytes(newest)

    @classmethod
    def redact(cls, seq: int, *, reason: str, actor: str) -> Self:
        """Empty the body of an event for good; that, why and by whom is an event of its own, which is returned.

        The chain keeps the hash of the body, so it still verifies. What the database's files still hold of the bytes is
        for `kagedb.operations.audit.redact`. Raises NotFound, and StateError for events that say what was done to the
        log itself, or one that is redacted already.
        """
        check_actor(actor)
        if not reason.strip():
            raise InvalidValue("a redaction needs a reason", "say why, without what is to be redacted")
        with bound_store().transaction():
            event = cls.by_id(seq)
            if event.kind.startswith(LOG_KINDS):
                raise StateError(
                    f"the audit event {seq} ({event.kind}) says what was done to the log and is kept whole"
                )
            if event.redacted:
                raise StateError(f"the audit event {seq} is redacted already")
            done = cls.append(
                "audit.redacted",
                actor=actor,
                subject=event,
                project=event.project,
                body={"seq": seq, "kind": event.kind, "reason": reason},
            )
            cls._empty.run(seq=seq, body="", salt=b"")
        return done

    @property
    def redacted(self) -> bool:
        """Whether the body was emptied: a body that was recorded is at least `{}`."""
        return not self.body

    @classmethod
    def of(cls, subject: Any, limit: int = 100) -> list[Self]:
        """The newest `limit` events about `subject` (a model or `table:id`), newest first. Raises InvalidValue."""
        named = subject_ref(subject)
        if named is None or not isinstance(limit, int) or limit < 1:
            raise InvalidValue("the events of a subject need the subject, and a limit of at least 1")
        return [cls.from_row(row) for row in cls._of.run(subject=named, limit=limit).fetchall()]


class AuditSeal(Model):
    """A closed range of events: its last hash, and a MAC where the operator asked for a key. Outlives its events."""

    n = IntegerField(primary_key=True)
    first_seq = IntegerField()
    last_seq = IntegerField()
    head = BlobField()
    at = MillisField()
    mac = BlobField(null=True)
    pruned_at = MillisField(null=True)

    class Meta:
        table_name = "audit_seal"

    _last = Hot(
        lambda: AuditSeal.select(AuditSeal.n, AuditSeal.last_seq, AuditSeal.mac).order_by(AuditSeal.n.desc()).limit(1)
    )

    @classmethod
    def close(cls, seq: int, head: bytes) -> Self | None:
        """Seal what is not sealed yet, up to the event `seq` with the hash `head`; inside the caller's transaction.

        None where there is nothing to seal. Raises StorageError where the key that the operator asked for cannot be
        used: a seal is not made without it.
        """
        store = bound_store()
        n, sealed, last_mac = cls._last.one() or (0, 0, None)
        if seq <= sealed:
            return None
        at = now_ms()
        mac = store.seal_mac(n + 1, seal_message(n + 1, sealed + 1, seq, head, at))
        if mac is None and last_mac is not None:
            raise StorageError(
                f"the last seal was made with a key, and {store.seal_key_place} is not there",
                "put it back, or begin a new key: kaged audit key --new",
            )
        seal = cls.put(n=n + 1, first_seq=sealed + 1, last_seq=seq, head=head, at=at, mac=mac)
        store.database.after_commit(partial(logger.info, "audit seal %d: anchor %d:%s", n + 1, seq, head.hex()))
        return seal

    @classmethod
    def close_in_passing(cls, seq: int, head: bytes) -> None:
        """`close`, while an event is recorded: that must not fail because of the key. The next seal covers it all."""
        try:
            cls.close(seq, head)
        except StorageError as error:
            logger.error("the audit log is not sealed up to %d:%s: %s", seq, head.hex(), error)

    @classmethod
    def close_all(cls) -> Self | None:
        """Seal everything that is not sealed yet; None where there is nothing. Raises StorageError for a bad key."""
        with bound_store().transaction():
            return cls.close(*AuditEvent.head())


_BEGINNING = b"%d:%b" % (len(DOMAIN), DOMAIN)


def seal_message(n: int, first_seq: int, last_seq: int, head: bytes, at: int) -> bytes:
    """What the MAC of a seal is made over."""
    parts = (SEAL_DOMAIN, b"%d" % n, b"%d" % first_seq, b"%d" % last_seq, head, b"%d" % at)
    return b"".join(b"%d:%b" % (len(part), part) for part in parts)


def hash_body(salt: bytes, text: str) -> bytes:
    return sha256(salt + text.encode()).digest()


def hash_event(
    previous: bytes,
    seq: int,
    at: int,
    kind: str,
    actor: str,
    subject: str | None,
    project: str | None,
    body_hash: bytes,
) -> bytes:
    """The hash of an event: SHA-256 over its parts, each preceded by its length, "-" for one that is not there."""
    number, time = b"%d" % seq, b"%d" % at
    what, who = kind.encode(), actor.encode()
    whom = b"-" if subject is None else _part(subject)
    where = b"-" if project is None else _part(project)
    # Written out: verifying a log does little else, and a loop over the parts takes half as long again.
    return sha256(
        b"%b%d:%b%d:%b%d:%b%d:%b%d:%b%b%b%d:%b"
        % (
            _BEGINNING,
            len(previous),
            previous,
            len(number),
            number,
            len(time),
            time,
            len(what),
            what,
            len(who),
            who,
            whom,
            where,
            len(body_hash),
            body_hash,
        )
    ).digest()


def _part(text: str) -> bytes:
    encoded = text.encode()
    return b"%d:%b" % (len(encoded), encoded)
