"""Seals and their key, pruning and redaction: what each keeps and what is gone."""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path

import pytest

import kagedb
from audit_attacks import change, drop_guards, fill
from kagedb.audit_key import KeyFile, SealKey, parse_keys
from kagedb.errors import ImmutableError, InvalidValue, NotFound, StateError, StorageBusy, StorageError
from kagedb.identity import now_ms
from kagedb.models import AuditEvent, AuditSeal
from kagedb.models import audit as audit_model
from kagedb.operations.audit import export, new_key, prune, redact
from kagedb.operations.audit_verify import Anchor, verify
from kagedb.storage import Storage

SECRET = "correct-horse-battery-staple"
ANA = "operator:ana"


class TestTheKey:
    def test_is_beside_the_store_for_its_owner_alone_and_never_the_first_one(self, storage: Storage) -> None:
        old = os.umask(0)
        try:
            first = storage.seal_key_file().make(1, replace=False)
            fill(storage, 5, seal_every=5)
        finally:
            os.umask(old)
        path = storage.engine.audit_key_path
        assert path.name == "audit.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert first.secret.hex() not in path.read_text()
        assert storage.seal_key_file().load() == first.at(2)

    def test_moves_forward_at_each_seal(self, storage: Storage) -> None:
        first = storage.seal_key_file().make(1, replace=False)
        fill(storage, 20, seal_every=5)
        assert storage.seal_key_file().load() == first.at(5)
        assert verify(storage, keys=[first]).sealed_to == 20

    def test_stays_when_the_seal_is_rolled_back(self, storage: Storage) -> None:
        first = storage.seal_key_file().make(1, replace=False)
        with pytest.raises(ZeroDivisionError), storage.transaction():
            AuditSeal.close_all()
            raise ZeroDivisionError
        assert storage.seal_key_file().load() == first
        fill(storage, 5, seal_every=5)
        assert verify(storage, keys=[first]).assurance == ["chained", "sealed"]

    def test_that_was_not_moved_because_of_a_crash_is_moved_by_the_next_seal(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = storage.seal_key_file().make(1, replace=False)
        with monkeypatch.context() as crash:
            crash.setattr(KeyFile, "advance", lambda *_: None)
            fill(storage, 5, seal_every=5)
        assert storage.seal_key_file().load() == first
        fill(storage, 10, seal_every=5)
        assert verify(storage, keys=[first]).sealed_to == 10

    def test_is_not_replaced_unless_asked(self, storage: Storage) -> None:
        first = storage.seal_key_file().make(1, replace=False)
        with pytest.raises(StateError):
            storage.seal_key_file().make(1, replace=False)
        assert storage.seal_key_file().load() == first

    def test_after_a_replacement_both_first_keys_verify(self, storage: Storage) -> None:
        first = storage.seal_key_file().make(1, replace=False)
        fill(storage, 5, seal_every=5)
        second = storage.seal_key_file().make(2, replace=True)
        fill(storage, 10, seal_every=5)
        assert verify(storage, keys=[first, second]).sealed_to == 10
        found = verify(storage, keys=[first])
        assert (found.result, found.seq) == ("broken", 10)

    @pytest.mark.parametrize(
        "damage", ["", "{}", "garbage", '{"seal": 1, "key": "00"}', '{"seal": 0, "key": "%s"}' % ("00" * 32)]
    )
    def test_that_is_damaged_stops_sealing_but_not_recording(
        self, storage: Storage, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(audit_model, "SEAL_EVENTS", 10)
        file = storage.seal_key_file()
        file.make(1, replace=False)
        file.path.write_text(damage)
        with caplog.at_level(logging.ERROR, logger="kagedb"):
            fill(storage, 11)
        assert AuditSeal.select().count() == 0
        assert "is not sealed up to 10:" in caplog.text
        with pytest.raises(StorageError, match="damaged"):
            AuditSeal.close_all()

    def test_that_is_gone_stops_sealing_until_there_is_a_new_one(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(audit_model, "SEAL_EVENTS", 20)
        first = new_key(storage, replace=False, actor=ANA)
        fill(storage, 10, seal_every=5)
        storage.seal_key_file().path.unlink()
        fill(storage, 21)
        assert AuditSeal.select().order_by(AuditSeal.n.desc()).get().last_seq == 10
        with pytest.raises(StorageError, match="made with a key"):
            AuditSeal.close_all()
        second = new_key(storage, replace=False, actor=ANA)
        AuditSeal.close_all()
        assert verify(storage, keys=[first, second]).sealed_to == AuditEvent.head()[0]

    def test_of_another_store_is_not_used(self, storage: Storage) -> None:
        storage.seal_key_file().make(7, replace=False)
        fill(storage, 3)
        with pytest.raises(StorageError, match="belongs to another store"):
            AuditSeal.close_all()

    def test_never_shows_in_a_repr(self) -> None:
        key = SealKey(3, os.urandom(32))
        assert key.secret.hex() not in repr(key) and str(key.secret) not in repr(key)

    def test_survives_print_and_parse(self) -> None:
        keys = [SealKey(9, os.urandom(32)), SealKey(1, os.urandom(32))]
        text = "# mine\n\n" + "\n".join(key.printed() for key in keys)
        assert parse_keys(text, "FILE") == sorted(keys, key=lambda key: key.n)

    @pytest.mark.parametrize(
        "text", ["", "# nothing\n", "kaged-audit-key-1:1:00", "00" * 32, "kaged-audit-key-2:1:" + "0" * 64]
    )
    def test_that_is_no_key_is_refused_without_being_quoted(self, text: str) -> None:
        with pytest.raises(InvalidValue) as refused:
            parse_keys(text, "FILE")
        assert "00" not in str(refused.value)


class TestSeals:
    def test_each_is_logged_with_its_anchor_after_the_commit(
        self, storage: Storage, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(storage, 5)
        with caplog.at_level(logging.INFO, logger="kagedb"):
            with pytest.raises(ZeroDivisionError), storage.transaction():
                AuditSeal.close_all()
                raise ZeroDivisionError
            assert not caplog.messages
            AuditSeal.close_all()
        found = re.fullmatch(r"audit seal 1: anchor (5:[0-9a-f]{64})", caplog.messages[-1])
        assert found
        assert verify(storage, expect=[Anchor.parse(found[1])]).anchored_at == [5]

    def test_with_nothing_to_seal_there_is_none(self, storage: Storage) -> None:
        assert AuditSeal.close_all() is not None
        assert AuditSeal.close_all() is None


class TestPruning:
    def test_removes_whole_sealed_ranges_and_leaves_their_seals(self, storage: Storage) -> None:
        first = storage.seal_key_file().make(1, replace=False)
        fill(storage, 25, seal_every=10)
        anchor = Anchor(*AuditEvent.head())
        boundary = Anchor(20, AuditEvent.by_id(20).hash)
        done = prune(storage, now_ms() + 1, actor=ANA)
        assert done is not None and (done.seal, done.last_seq, done.events) == (2, 20, 20)
        assert [event.seq for event in AuditEvent.select().order_by(AuditEvent.seq)] == [21, 22, 23, 24, 25, 26]
        assert AuditEvent.by_id(26).kind == "audit.pruned"
        found = verify(storage, keys=[first], expect=[boundary, anchor])
        assert (found.result, found.pruned_to, found.anchored_at) == ("holds", 20, [20, 25]), found.wrong

    def test_keeps_what_is_not_older(self, storage: Storage) -> None:
        fill(storage, 10, seal_every=5)
        assert prune(storage, AuditEvent.by_id(1).at, actor=ANA) is None
        assert AuditEvent.head()[0] == 10

    def test_says_beforehand_what_it_would_remove_and_removes_nothing(self, storage: Storage) -> None:
        fill(storage, 10, seal_every=5)
        would = prune(storage, now_ms() + 1, actor=ANA, dry_run=True)
        assert would is not None and would.events == 10
        assert AuditEvent.select().count() == 10

    def test_twice_is_proved_by_the_newer_event_alone(self, storage: Storage) -> None:
        fill(storage, 10, seal_every=5)
        prune(storage, now_ms() + 1, actor=ANA)
        fill(storage, 20, seal_every=5)
        prune(storage, now_ms() + 1, actor=ANA)
        assert AuditEvent.select().where(AuditEvent.kind == "audit.pruned").count() == 1
        assert verify(storage).pruned_to == 20

    def test_that_was_cut_off_still_verifies_and_is_ended_by_the_next(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kagedb.operations import pace

        fill(storage, 20, seal_every=5)
        with monkeypatch.context() as crash:
            crash.setattr(pace, "FIRST_UNITS", 7)
            crash.setattr(pace.time, "sleep", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prune(storage, now_ms() + 1, actor=ANA)
        found = verify(storage)
        assert (found.result, found.leftover) == ("holds", 13)
        exported = [line for line in export(storage) if '"kind"' in line]
        assert len(exported) == 1
        prune(storage, 1, actor=ANA)
        assert verify(storage).leftover == 0

    def test_an_event_of_a_pruned_range_says_so_to_an_anchor(self, storage: Storage) -> None:
        fill(storage, 10, seal_every=10)
        anchor = Anchor(4, AuditEvent.by_id(4).hash)
        prune(storage, now_ms() + 1, actor=ANA)
        found = verify(storage, expect=[anchor])
        assert (found.result, found.wrong) == ("cannot tell", "event 4, which an anchor names, is pruned")

    def test_refuses_while_the_clock_is_before_the_newest_row(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kagedb import identity

        fill(storage, 10, seal_every=5)
        monkeypatch.setattr(identity, "_last_ms", identity._last_ms)
        monkeypatch.setattr(identity.time, "time_ns", lambda: 1_000_000_000)
        with pytest.raises(StateError, match="clock"):
            prune(storage, now_ms() + 1, actor=ANA)
        assert AuditEvent.select().count() == 10

    def test_a_marked_seal_cannot_be_marked_anew(self, storage: Storage) -> None:
        fill(storage, 10, seal_every=5)
        prune(storage, now_ms() + 1, actor=ANA)
        with pytest.raises(ImmutableError):
            AuditSeal.update(pruned_at=None).execute()


class TestRedaction:
    @pytest.fixture
    def secret(self, storage: Storage) -> AuditEvent:
        fill(storage, 3)
        event = AuditEvent.record("sandbox.event", actor="agent:planner", body={"argv": [SECRET]})
        fill(storage, 8)
        return event

    def test_empties_the_body_says_so_and_keeps_the_chain(self, storage: Storage, secret: AuditEvent) -> None:
        anchor = Anchor(*AuditEvent.head())
        done = redact(storage, secret.seq, reason="a password", actor=ANA)
        after = AuditEvent.by_id(secret.seq)
        assert (after.body, after.salt, after.redacted) == ("", b"", True)
        assert (after.kind, after.hash, after.body_hash) == (secret.kind, secret.hash, secret.body_hash)
        assert (done.kind, done.actor, done.subject) == ("audit.redacted", ANA, f"audit_event:{secret.seq}")
        assert '"reason":"a password"' in done.body
        found = verify(storage, expect=[anchor])
        assert (found.result, found.redacted) == ("holds", 1)

    @pytest.mark.parametrize("column", ["kind", "actor", "subject", "project", "at", "body_hash"])
    def test_nothing_else_of_a_redacted_event_changes_unseen(
        self, storage: Storage, secret: AuditEvent, column: str
    ) -> None:
        redact(storage, secret.seq, reason="a password", actor=ANA)
        drop_guards(storage)
        value: object = {"at": 5, "body_hash": bytes(32)}.get(column, "01JAB3C4D5E6F7G8H9JKMNPQRS")
        change(storage, f"UPDATE audit_event SET {column} = ? WHERE seq = ?", value, secret.seq)
        found = verify(storage)
        assert (found.result, found.seq) == ("broken", secret.seq)

    def test_a_body_put_back_is_found(self, storage: Storage, secret: AuditEvent) -> None:
        redact(storage, secret.seq, reason="a password", actor=ANA)
        drop_guards(storage)
        change(storage, "UPDATE audit_event SET body = ? WHERE seq = ?", "{}", secret.seq)
        assert verify(storage).seq == secret.seq

    @pytest.mark.parametrize("length", [20, 30_000])
    def test_the_bytes_are_gone_from_every_file_of_the_store(self, storage: Storage, length: int) -> None:
        # Random, so that PostgreSQL does not compress it beyond recognition.
        body = SECRET + os.urandom(length // 2).hex()
        fill(storage, 40)
        event = AuditEvent.record("sandbox.event", actor="agent:planner", body={"argv": body})
        fill(storage, 80)
        before = files_with(storage, SECRET[:18])
        redact(storage, event.seq, reason="a password", actor=ANA)
        assert before
        assert not files_with(storage, SECRET[:18])

    @pytest.mark.sqlite_only
    def test_a_reader_that_keeps_the_bytes_is_told_of_and_again_ends_it(
        self, storage: Storage, secret: AuditEvent
    ) -> None:
        """A reader that holds back the WAL is SQLite's."""
        import peewee

        reader = peewee.sqlite3.connect(storage.engine.place, isolation_level=None)
        try:
            reader.execute("BEGIN")
            reader.execute("SELECT COUNT(*) FROM audit_event").fetchall()
            with pytest.raises(StorageBusy):
                redact(storage, secret.seq, reason="a password", actor=ANA)
            assert AuditEvent.by_id(secret.seq).redacted
        finally:
            reader.close()
        done = redact(storage, secret.seq, reason="a password", actor=ANA)
        assert done.kind == "audit.redacted"
        assert AuditEvent.select().where(AuditEvent.kind == "audit.redacted").count() == 1
        assert not files_with(storage, SECRET)

    def test_is_refused_for_what_says_what_was_done_to_the_log(self, storage: Storage, secret: AuditEvent) -> None:
        done = redact(storage, secret.seq, reason="a password", actor=ANA)
        for seq in (1, done.seq):
            with pytest.raises(StateError, match="kept whole"):
                redact(storage, seq, reason="x", actor=ANA)

    def test_is_refused_without_a_reason_an_event_or_an_actor(self, storage: Storage, secret: AuditEvent) -> None:
        with pytest.raises(InvalidValue):
            redact(storage, secret.seq, reason="  ", actor=ANA)
        with pytest.raises(InvalidValue):
            redact(storage, secret.seq, reason="x", actor="ana")
        with pytest.raises(NotFound):
            redact(storage, 99, reason="x", actor=ANA)
        assert SECRET in AuditEvent.by_id(secret.seq).body


def files_with(storage: Storage, text: str) -> list[str]:
    """The files of the store in which `text` stands; on PostgreSQL, those of its tables."""
    if storage.engine.name == "sqlite":
        path = Path(storage.engine.place)
        # Read by another program: this process must not open the file beside SQLite.
        import subprocess

        names = [str(file) for file in path.parent.glob(path.name + "*")]
        found = subprocess.run(["grep", "-l", "-a", "-F", text, *names], capture_output=True, text=True)
        return found.stdout.split()
    import psycopg2

    connection = psycopg2.connect(storage.settings.url.dsn.replace("kaged@", "postgres@"))
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("CHECKPOINT")
            cursor.execute(
                "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE c.relkind IN ('r', 't') AND (n.nspname = 'kaged' OR n.nspname = 'pg_toast')"
                " AND pg_relation_size(c.oid) > 0"
                " AND position(%s::bytea IN pg_read_binary_file(pg_relation_filepath(c.oid))) > 0",
                (text.encode(),),
            )
            return [row[0] for row in cursor.fetchall()]
    finally:
        connection.close()


def test_an_exported_log_is_checked_by_the_program_in_the_documentation(storage: Storage, tmp_path: Path) -> None:
    import subprocess
    import sys

    page = (Path(__file__).parent.parent / "docs" / "audit.md").read_text()
    program = tmp_path / "verify.py"
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found
    program.write_text(found[1])
    assert "kagedb" not in found[1] and len(found[1].splitlines()) <= 45

    def check(*expect: str) -> subprocess.CompletedProcess[str]:
        lines = "\n".join(export(storage)) + "\n"
        return subprocess.run([sys.executable, program, *expect], input=lines, capture_output=True, text=True)

    fill(storage, 30, seal_every=10)
    redact(storage, 24, reason="x", actor=ANA)
    prune(storage, AuditEvent.by_id(22).at + 1, actor=ANA)
    head = Anchor(*AuditEvent.head())
    held = check(str(head))
    assert held.returncode == 0 and held.stdout == f"holds: {head}\n", held.stderr
    assert check(f"{head.seq + 1}:{head.hash.hex()}").returncode != 0
    assert check(f"{head.seq}:{'00' * 32}").returncode != 0
    drop_guards(storage)
    change(storage, "UPDATE audit_event SET actor = 'agent:x' WHERE seq = 25")
    assert "event 25 was changed" in check().stderr


def test_no_store_is_not_a_log_that_holds(url: str) -> None:
    with pytest.raises(kagedb.StorageNotFound):
        kagedb.connect(url=url, read_only=True)
