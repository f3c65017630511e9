"""The append-only audit log: events in a hash chain, and the seals that close ranges of it.

How the hashes are made is described in docs/audit.md, so that anyone can verify them without this package.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any, Self


from ..errors import InvalidValue
from ..fields import BlobField, IntegerField, MillisField, TextField, UlidField, encode_json
from ..identity import now_ms, raise_floor
from .base import Hot, Model, bound_store, check_actor, subject_ref

DOMAIN = b"kaged.audit.1"
"""Begins every hashed event, so that no hash made for another purpose can stand for one."""

GENESIS = bytes(32)
"""What stands for the hash before the first event."""

SALT_BYTES = 16
"""Enough that the body of a redacted event cannot be guessed from its hash."""

_KIND = re.compile(r"[a-z][a-z0-9_-]*(?:\.[a-z0-9_-]+)*")
KIND_CHARACTERS = 100


class AuditEvent(Model):
    """One thing that happened. Never changed or deleted but by redaction and the pruning of sealed ranges."""

    seq = IntegerField(primary_key=True)
    at = MillisField()
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
        lambda: AuditEvent.select(AuditEvent.seq, AuditEvent.at, AuditEvent.hash).order_by(AuditEvent.seq.desc()).limit(1)
    )

    @classmethod
    def record(
        cls, kind: str, *, actor: str, subject: Any = None, project: Any = None, body: dict[str, Any] | None = None
    ) -> Self:
        """Append an event; on disk when it returns, or with the transaction around it.

        `kind` is dotted words (`policy.decision`), `actor` is `kind:name`, `subject` a model or `table:id`, `project` a
        Project or its id (by default the subject's), `body` a JSON object. Raises InvalidValue, LimitExceeded.
        """
        if not isinstance(kind, str) or len(kind) > KIND_CHARACTERS or not _KIND.fullmatch(kind):
            raise InvalidValue(
                f"the kind of audit event {str(kind)[:60]!r} is not dotted lower-case words", "write it like policy.decision"
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
            project_id = getattr(project, "id", project)
            named = subject_ref(subject)
            seq, at, previous = cls._head.one() or (0, 0, GENESIS)
            raise_floor(at)
            row = {
                "seq": seq + 1,
                "at": now_ms(),
                "kind": kind,
                "actor": actor,
                "subject": named,
                "project": project_id,
                "salt": salt,
                "body": text,
                "body_hash": hash_body(salt, text),
            }
            row["hash"] = hash_event(bytes(previous), **{name: row[name] for name in _HASHED})
            cls._insert.run(**row)
            store.notify(kind, named or f"audit_event:{seq + 1}", project_id)
        return cls._from_data(row)

    @classmethod
    def of(cls, subject: Any, limit: int = 100) -> list[Self]:
        """The newest `limit` events about `subject` (a model or `table:id`), newest first."""
        query = cls.select().where(cls.subject == subject_ref(subject)).order_by(cls.seq.desc()).limit(limit)
        return list(cls.rows(query))


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


_HASHED = ("seq", "at", "kind", "actor", "subject", "project", "body_hash")


def hash_body(salt: bytes, text: str) -> bytes:
    return hashlib.sha256(salt + text.encode()).digest()


def hash_event(
    previous: bytes,
    *,
    seq: int,
    at: int,
    kind: str,
    actor: str,
    subject: str | None,
    project: str | None,
    body_hash: bytes,
) -> bytes:
    """The hash of an event: SHA-256 over its parts, each preceded by its length, "-" for one that is not there."""
    parts = (
        DOMAIN,
        previous,
        b"%d" % seq,
        b"%d" % at,
        kind.encode(),
        actor.encode(),
        None if subject is None else subject.encode(),
        None if project is None else project.encode(),
        body_hash,
    )
    return hashlib.sha256(b"".join(b"-" if part is None else b"%d:%b" % (len(part), part) for part in parts)).digest()


