"""What somebody with the database in hand can do to an audit log: with the triggers gone, as its owner would.

Each attack gives the sequence number that verifying has to name, by what it can know.
"""

from __future__ import annotations

import os

from kagedb.audit_key import SealKey
from kagedb.models import AuditEvent, AuditSeal
from kagedb.models.audit import GENESIS, hash_body, hash_event, seal_message
from kagedb.storage import Storage

HASHED = ("seq", "at", "kind", "actor", "subject", "project", "body_hash")


def fill(storage: Storage, events: int, *, seal_every: int = 0) -> None:
    """Record until the log has `events` events, sealing whenever `seal_every` divides the newest number."""
    while (seq := AuditEvent.head()[0]) < events:
        AuditEvent.record(
            "policy.decision",
            actor="agent:planner",
            subject=f"run:{seq % 3}",
            body={"allow": bool(seq % 2), "n": seq + 1},
        )
        if seal_every and (seq + 1) % seal_every == 0:
            AuditSeal.close_all()


def drop_guards(storage: Storage) -> None:
    """What the owner of the tables can always do."""
    raw = storage.database.raw
    for table in ("audit_event", "audit_seal"):
        for event in ("insert", "update", "delete"):
            storage.database.ddl.drop_guard(table, event)
    storage.database.statement_done()
    assert raw("SELECT COUNT(*) FROM audit_event").fetchone()[0]
    storage.database.statement_done()


def change(storage: Storage, sql: str, *params: object) -> None:
    with storage.transaction():
        storage.database.raw(sql, params)


def rehash_from(storage: Storage, seq: int, *, seals: bool = False) -> None:
    """Make the chain consistent again from `seq` on; with `seals` the seals' hashes too (their MACs cannot be made)."""
    with storage.transaction():
        before = AuditEvent.select().where(AuditEvent.seq < seq).order_by(AuditEvent.seq.desc()).first()
        previous = before.hash if before else GENESIS
        for event in list(AuditEvent.select().where(AuditEvent.seq >= seq).order_by(AuditEvent.seq)):
            event.body_hash = hash_body(event.salt, event.body)
            event.hash = hash_event(previous, **{name: getattr(event, name) for name in HASHED})
            AuditEvent.update(body_hash=event.body_hash, hash=event.hash).where(AuditEvent.seq == event.seq).execute()
            previous = event.hash
        if seals:
            for seal in list(AuditSeal.select().where(AuditSeal.last_seq >= seq)):
                AuditSeal.update(head=AuditEvent.by_id(seal.last_seq).hash).where(AuditSeal.n == seal.n).execute()


def forge_macs(storage: Storage) -> None:
    """MACs under a key of the attacker's own."""
    key = SealKey(1, os.urandom(32))
    with storage.transaction():
        for seal in list(AuditSeal.select().order_by(AuditSeal.n)):
            message = seal_message(seal.n, seal.first_seq, seal.last_seq, seal.head, seal.at)
            AuditSeal.update(mac=key.at(seal.n).mac(message)).where(AuditSeal.n == seal.n).execute()
