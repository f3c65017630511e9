"""Snapshots: one state of the store across several queries, while others write; and nothing is written inside one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from kagedb import AuditEvent, Project
from kagedb.errors import TransactionError
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from kagedb.storage import Storage


def value() -> int:
    return int(Counter.select(Counter.value).where(Counter.name == "owner_epoch").tuples().get()[0])


def count_up() -> None:
    Counter.update(value=Counter.value + 1).where(Counter.name == "owner_epoch").execute()


def in_a_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_snapshot_sees_one_state_while_others_write(storage: Storage) -> None:
    before = value()
    with storage.snapshot():
        in_a_thread(count_up)  # after it began, before it was read from
        for _ in range(3):
            assert value() == before
            in_a_thread(count_up)
        with storage.snapshot():
            assert value() == before, "a snapshot inside joins it"
    assert value() == before + 4


def test_a_snapshot_sees_whole_transactions_alone(storage: Storage) -> None:
    """Two counters that are always written together are never seen apart."""
    for name in ("a", "b"):
        Counter.put(name=name, value=0)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with storage.transaction("relaxed"):
                for name in ("a", "b"):
                    Counter.update(value=Counter.value + 1).where(Counter.name == name).execute()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        with storage.snapshot():
            first, second = (Counter.get_by_id(name).value for name in ("a", "b"))
        assert first == second
        seen.add(first)
    stop.set()
    thread.join()
    assert len(seen) > 3, "nothing was written meanwhile"


def test_nothing_is_written_inside_a_snapshot(storage: Storage) -> None:
    database = storage.database
    row = Counter.get_by_id("owner_epoch")
    writes: list[Callable[[], Any]] = [
        count_up,
        lambda: Counter.put(name="a", value=0),
        lambda: Counter.create(name="a", value=0),
        lambda: row.save(),
        lambda: Counter.delete().execute(),
        lambda: database.execute_sql("WITH a AS (SELECT 1) DELETE FROM counter"),
        lambda: database.execute_sql("CREATE TABLE t (a INTEGER)"),
        lambda: database.execute_sql("VACUUM"),
        lambda: storage.transaction().__enter__(),
        lambda: database.atomic().__enter__(),
        lambda: Project.add("house", actor="operator:ana"),
        lambda: AuditEvent.record("test.written", actor="operator:ana"),
    ]
    for write in writes:
        with storage.snapshot():
            with pytest.raises(TransactionError, match="snapshot"):
                write()
            assert value() == row.value, "the refusal does not break the snapshot"
    assert AuditEvent.select().count() == 1
    count_up()
    assert value() == row.value + 1


def test_what_the_store_did_not_take_for_a_write_is_refused_by_the_engine(storage: Storage) -> None:
    """Past the look at the text of a statement, the engine itself is told to read only."""
    with pytest.raises(TransactionError, match="a write inside a snapshot"), storage.snapshot():
        storage.database.raw("UPDATE counter SET value = 99")
    assert value() != 99
    count_up()


def test_a_snapshot_is_not_begun_inside_a_transaction(storage: Storage) -> None:
    with storage.transaction():
        with pytest.raises(TransactionError, match="read in the transaction itself"), storage.snapshot():
            pass
        count_up()


def test_a_failed_query_ends_the_snapshot_on_both_engines(storage: Storage) -> None:
    with pytest.raises(TransactionError, match="failed earlier"), storage.snapshot():
        with pytest.raises(Exception, match="no_such"):
            storage.database.execute_sql("SELECT no_such FROM counter")
        value()
    count_up()


def test_an_error_that_leaves_a_snapshot_is_the_callers_own(storage: Storage) -> None:
    with pytest.raises(KeyError), storage.snapshot():
        raise KeyError
    count_up()


def test_a_snapshot_does_not_keep_writers_waiting(storage: Storage) -> None:
    with storage.snapshot():
        began = time.monotonic()
        in_a_thread(lambda: [count_up() for _ in range(20)])
        assert time.monotonic() - began < 2
    assert value() >= 20


def test_a_long_snapshot_is_warned_of(
    storage: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.database, "slow_transaction_ms", 2)  # twenty times that for a snapshot
    with storage.snapshot():
        time.sleep(0.01)
    assert caplog.records == []
    with storage.snapshot():
        time.sleep(0.06)
    assert "a snapshot held back cleaning for" in caplog.text and __file__ in caplog.text


def test_a_long_read_streams_in_constant_memory(storage: Storage) -> None:
    Counter.insert_many([{"name": f"n{number:05}", "value": number} for number in range(2500)]).execute()
    sql = "SELECT value FROM counter WHERE name LIKE ? ORDER BY name"
    with storage.snapshot():
        first = storage.database.stream(sql, ("n%",))
        second = storage.database.stream(sql, ("n0000%",))
        assert next(first) == (0,)
        in_a_thread(lambda: Counter.delete().execute())
        assert [row[0] for row in second] == list(range(10))
        assert [row[0] for row in first] == list(range(1, 2500))
