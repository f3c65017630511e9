"""The table of attacks on the audit log, cell by cell: what the chain, the seals' key and an outside anchor find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from audit_attacks import change, drop_guards, fill, forge_macs, rehash_from
from kagedb.audit_key import SealKey
from kagedb.errors import InvalidValue
from kagedb.models import AuditEvent, AuditSeal
from kagedb.operations.audit_verify import Anchor, Verdict, verify
from kagedb.storage import Storage

EVENTS, SEAL_EVERY, VICTIM = 30, 10, 14


@pytest.fixture
def key(storage: Storage) -> SealKey:
    return storage.seal_key_file().make(1, replace=False)


@pytest.fixture
def log(storage: Storage, key: SealKey) -> Storage:
    """Thirty-five events; three seals under a key; the last five not sealed."""
    fill(storage, EVENTS + 5, seal_every=SEAL_EVERY)
    return storage


@pytest.fixture
def anchor(log: Storage) -> Anchor:
    return Anchor(*AuditEvent.head())


def edit(storage: Storage) -> None:
    change(storage, "UPDATE audit_event SET body = ? WHERE seq = ?", '{"allow":true,"n":0}', VICTIM)


def delete(storage: Storage) -> None:
    change(storage, "DELETE FROM audit_event WHERE seq = ?", VICTIM)


def swap(storage: Storage) -> None:
    with storage.transaction():
        one, other = AuditEvent.by_id(VICTIM), AuditEvent.by_id(VICTIM + 1)
        names = ("kind", "actor", "subject", "project", "salt", "body", "body_hash", "at")
        for seq, source in ((VICTIM, other), (VICTIM + 1, one)):
            AuditEvent.update({name: getattr(source, name) for name in names}).where(AuditEvent.seq == seq).execute()


def change_subject(storage: Storage) -> None:
    change(storage, "UPDATE audit_event SET subject = ? WHERE seq = ?", "run:another", VICTIM)


def change_actor(storage: Storage) -> None:
    change(storage, "UPDATE audit_event SET actor = ? WHERE seq = ?", "agent:another", VICTIM)


def change_project(storage: Storage) -> None:
    change(storage, "UPDATE audit_event SET project = ? WHERE seq = ?", "01JAB3C4D5E6F7G8H9JKMNPQRS", VICTIM)


def change_time(storage: Storage) -> None:
    change(storage, "UPDATE audit_event SET at = at - 1 WHERE seq = ?", VICTIM)


def empty_body(storage: Storage) -> None:
    """A redaction that nobody recorded."""
    change(storage, "UPDATE audit_event SET body = '', salt = ? WHERE seq = ?", b"", VICTIM)


def salt_only(storage: Storage) -> None:
    change(storage, "UPDATE audit_event SET salt = ? WHERE seq = ?", b"\x00" * 16, VICTIM)


@pytest.mark.parametrize(
    "attack",
    [edit, delete, swap, change_subject, change_actor, change_project, change_time, empty_body, salt_only],
)
def test_a_change_of_one_event_is_found_by_the_chain_alone(log: Storage, attack: Callable[[Storage], None]) -> None:
    drop_guards(log)
    attack(log)
    found = verify(log)
    assert (found.result, found.seq) == ("broken", VICTIM), found.wrong


def test_an_event_put_in_between_is_found(log: Storage) -> None:
    drop_guards(log)
    with log.transaction():
        log.database.raw("UPDATE audit_event SET seq = -seq WHERE seq > ?", (VICTIM,))
        log.database.raw("UPDATE audit_event SET seq = 1 - seq WHERE seq < 0")
        inserted = AuditEvent.by_id(VICTIM)
        AuditEvent.insert({**inserted.__data__, "seq": VICTIM + 1}).execute()
    found = verify(log)
    assert (found.result, found.seq) == ("broken", VICTIM + 1)


class TestEditThenRehashEverything:
    @pytest.fixture
    def forged(self, log: Storage) -> Storage:
        drop_guards(log)
        edit(log)
        rehash_from(log, VICTIM, seals=True)
        return log

    def test_is_not_found_by_the_chain(self, anchor: Anchor, forged: Storage) -> None:
        assert verify(forged).result == "holds"

    def test_is_found_by_the_seals_where_those_were_left(self, log: Storage) -> None:
        drop_guards(log)
        edit(log)
        rehash_from(log, VICTIM)
        found = verify(log)
        assert (found.result, found.seq) == ("broken", 20)

    def test_is_found_with_the_key(self, anchor: Anchor, forged: Storage, key: SealKey) -> None:
        found = verify(forged, keys=[key])
        assert (found.result, found.seq) == ("broken", 20)

    def test_is_found_with_the_key_under_forged_macs(self, anchor: Anchor, forged: Storage, key: SealKey) -> None:
        forge_macs(forged)
        found = verify(forged, keys=[key])
        assert (found.result, found.seq) == ("broken", 10)

    def test_is_found_with_an_anchor(self, anchor: Anchor, forged: Storage) -> None:
        found = verify(forged, expect=[anchor])
        assert (found.result, found.seq) == ("broken", anchor.seq)


class TestCutTheTail:
    def cut(self, storage: Storage, after: int, *, seals: bool) -> None:
        drop_guards(storage)
        change(storage, "DELETE FROM audit_event WHERE seq > ?", after)
        if seals:
            change(storage, "DELETE FROM audit_seal WHERE last_seq > ?", after)

    def test_is_found_by_the_chain_where_the_seals_are_left(self, log: Storage) -> None:
        self.cut(log, 25, seals=False)
        found = verify(log)
        assert (found.result, found.seq) == ("broken", 26)

    def test_is_not_found_by_the_chain_without_its_seals(self, log: Storage) -> None:
        self.cut(log, 25, seals=True)
        assert verify(log).result == "holds"

    def test_is_not_found_with_the_key_without_its_seals(self, log: Storage, key: SealKey) -> None:
        self.cut(log, 25, seals=True)
        found = verify(log, keys=[key])
        assert found.result == "holds"
        assert found.sealed_to == 20

    def test_is_found_with_an_anchor(self, anchor: Anchor, log: Storage) -> None:
        self.cut(log, 25, seals=True)
        found = verify(log, expect=[anchor])
        assert (found.result, found.seq) == ("broken", 26)

    def test_a_log_cut_to_nothing_is_found_with_an_anchor(self, anchor: Anchor, log: Storage) -> None:
        self.cut(log, 0, seals=True)
        found = verify(log, expect=[anchor])
        assert (found.result, found.seq) == ("broken", 1)

    def test_a_log_cut_to_nothing_does_not_hold(self, log: Storage) -> None:
        self.cut(log, 0, seals=True)
        found = verify(log)
        assert (found.result, found.assurance) == ("cannot tell", [])

    def test_events_cut_to_nothing_under_their_seals_are_found(self, log: Storage) -> None:
        self.cut(log, 0, seals=False)
        found = verify(log)
        assert (found.result, found.seq) == ("broken", 1)


class TestUnauthorisedPruning:
    def cut_the_prefix(self, storage: Storage, *, marked: bool) -> None:
        drop_guards(storage)
        change(storage, "DELETE FROM audit_event WHERE seq <= 10")
        if marked:
            change(storage, "UPDATE audit_seal SET pruned_at = 1 WHERE n = 1")

    @pytest.mark.parametrize("knowing", ["nothing", "key", "anchor"])
    @pytest.mark.parametrize("marked", [True, False])
    def test_is_found(self, log: Storage, key: SealKey, anchor: Anchor, marked: bool, knowing: str) -> None:
        self.cut_the_prefix(log, marked=marked)
        found = verify(log, keys=[key] if knowing == "key" else None, expect=[anchor] if knowing == "anchor" else None)
        assert (found.result, found.seq) == ("broken", 1), found.wrong

    def test_of_a_range_in_the_middle_is_found(self, log: Storage) -> None:
        drop_guards(log)
        change(log, "DELETE FROM audit_event WHERE seq > 10 AND seq <= 20")
        change(log, "UPDATE audit_seal SET pruned_at = 1 WHERE n = 2")
        found = verify(log)
        assert (found.result, found.seq) == ("broken", 11)


class TestSeals:
    def test_a_removed_seal_is_found(self, log: Storage) -> None:
        drop_guards(log)
        change(log, "DELETE FROM audit_seal WHERE n = 2")
        found = verify(log)
        assert (found.result, found.seq) == ("broken", 11)

    def test_a_removed_mac_is_found_with_the_key(self, log: Storage, key: SealKey) -> None:
        drop_guards(log)
        change(log, "UPDATE audit_seal SET mac = NULL WHERE n = 2")
        assert verify(log).result == "holds"
        found = verify(log, keys=[key])
        assert (found.result, found.seq) == ("broken", 20)

    def test_a_wrong_key_always_fails(self, log: Storage) -> None:
        for _ in range(20):
            found = verify(log, keys=[SealKey(1, os.urandom(32))])
            assert (found.result, found.seq) == ("broken", 10)

    def test_a_key_of_a_later_seal_than_there_is_fails(self, log: Storage, key: SealKey) -> None:
        found = verify(log, keys=[SealKey(9, key.secret)])
        assert found.result == "broken"

    def test_the_right_key_says_how_far_it_reaches(self, log: Storage, key: SealKey, anchor: Anchor) -> None:
        found = verify(log, keys=[key], expect=[anchor])
        assert (found.result, found.assurance) == ("holds", ["chained", "sealed", "anchored"])
        assert (found.sealed_to, found.last_seq, found.anchored_at) == (30, 35, [35])

    def test_without_key_and_anchor_a_log_is_called_chained(self, log: Storage) -> None:
        found = verify(log)
        assert (found.result, found.assurance, found.events, found.seals) == ("holds", ["chained"], 35, 3)


def test_an_anchor_in_the_middle_is_checked(log: Storage) -> None:
    right = Anchor(VICTIM, AuditEvent.by_id(VICTIM).hash)
    assert verify(log, expect=[right, Anchor(*AuditEvent.head())]).anchored_at == [VICTIM, 35]
    found = verify(log, expect=[Anchor(VICTIM, bytes(32))])
    assert (found.result, found.seq) == ("broken", VICTIM)


def test_an_anchor_beyond_the_end_is_not_passed_over(log: Storage) -> None:
    found = verify(log, expect=[Anchor(36, bytes(32))])
    assert (found.result, found.seq) == ("broken", 36)


@pytest.mark.parametrize(
    "text", ["", "12", "12:", "0:" + "00" * 32, "x:" + "00" * 32, "12:" + "00" * 31, "-1:" + "00" * 32]
)
def test_a_text_that_is_no_anchor_is_refused(text: str) -> None:
    with pytest.raises(InvalidValue):
        Anchor.parse(text)


def test_an_anchor_survives_print_and_parse() -> None:
    anchor = Anchor(12, os.urandom(32))
    assert Anchor.parse(str(anchor)) == anchor


def test_verifying_reports_progress_and_keeps_its_memory(storage: Storage) -> None:
    fill(storage, 2_500)
    seen: list[tuple[int, int]] = []
    found = verify(storage, progress=lambda done, last: seen.append((done, last)))
    assert seen == [(1000, 2500), (2000, 2500)]
    assert (found.result, found.seals) == ("holds", 2)


@pytest.mark.sqlite_only
def test_verifying_a_read_only_copy_changes_no_byte_of_it(log: Storage, migrated_url: str, tmp_path: Path) -> None:
    """A file to compare byte by byte is what only SQLite has."""
    import hashlib

    import kagedb

    path = Path(log.engine.place)
    log.close()
    copy = tmp_path / "copy" / "kaged.db"
    copy.parent.mkdir(mode=0o700)
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o400)
    before = hashlib.sha256(copy.read_bytes()).hexdigest(), copy.stat().st_mtime_ns
    with kagedb.connect(url=f"sqlite:///{copy}", read_only=True) as opened:
        found: Verdict = verify(opened)
    assert found.result == "holds"
    assert (hashlib.sha256(copy.read_bytes()).hexdigest(), copy.stat().st_mtime_ns) == before


def test_the_seal_of_a_day_comes_with_the_first_event_of_the_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagedb import identity
    from kagedb.models import audit

    # Put back afterwards: events of tomorrow raise the floor of this process's clock.
    monkeypatch.setattr(identity, "_last_ms", identity._last_ms)
    fill(storage, 5)
    day = audit.DAY_MS
    tomorrow = (AuditEvent.by_id(5).at // day + 1) * day + 1
    monkeypatch.setattr(audit, "now_ms", lambda: tomorrow)
    fill(storage, 7)
    seals = list(AuditSeal.select())
    assert [(seal.n, seal.first_seq, seal.last_seq) for seal in seals] == [(1, 1, 5)]
    assert verify(storage).result == "holds"


def test_a_seal_comes_at_every_thousandth_event(storage: Storage) -> None:
    fill(storage, 999)
    assert AuditSeal.select().count() == 0
    fill(storage, 1_001)
    assert [(seal.first_seq, seal.last_seq) for seal in AuditSeal.select()] == [(1, 1000)]
