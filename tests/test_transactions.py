"""Transactions: nesting, errors, notifications and warnings, alike on both engines."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peewee
import pytest

from kagedb.errors import InvalidValue, StorageClosed, TransactionError
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from kagedb.storage import Storage


class Undo(Exception):
    """Leaves a block."""


def names() -> list[str]:
    return [
        row.name
        for row in Counter.select().where(Counter.name.not_in(["owner_epoch", "transcript"])).order_by(Counter.name)
    ]


def put(name: str, value: int = 0) -> None:
    Counter.put(name=name, value=value)


def fail() -> None:
    """A statement that the store refuses: the key is taken."""
    Counter.insert(name="owner_epoch", value=0).execute()


def test_a_block_that_is_left_by_an_error_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(Undo), storage.transaction():
        put("a")
        with storage.transaction():
            put("b")
        raise Undo
    assert names() == []


def test_a_nested_block_is_undone_alone(storage: Storage) -> None:
    with storage.transaction():
        put("a")
        with pytest.raises(Undo), storage.transaction():
            put("b")
            with storage.transaction():
                put("c")
            raise Undo
        with storage.transaction():
            put("d")
    assert names() == ["a", "d"]


def test_a_failed_statement_inside_a_nested_block_breaks_that_block_alone(storage: Storage) -> None:
    with storage.transaction():
        put("a")
        with pytest.raises(peewee.IntegrityError), storage.transaction():
            put("b")
            fail()
        put("c")
    assert names() == ["a", "c"]


def test_an_error_caught_in_the_block_of_its_statement_breaks_the_block(storage: Storage) -> None:
    """SQLite would go on by itself, PostgreSQL would not."""
    with pytest.raises(TransactionError, match="nothing was saved"), storage.transaction():
        put("a")
        with pytest.raises(peewee.IntegrityError):
            fail()
    assert names() == []


def test_nothing_more_can_be_done_after_a_failed_statement(storage: Storage) -> None:
    attempts: list[Callable[[], Any]] = [lambda: put("b"), names, lambda: storage.transaction().__enter__()]
    for attempt in attempts:
        with pytest.raises(TransactionError, match="a statement failed earlier") as refusal, storage.transaction():
            with pytest.raises(peewee.IntegrityError):
                fail()
            attempt()
        assert isinstance(refusal.value.__cause__, peewee.IntegrityError), "the first failure is the reason"
    assert names() == []


def test_a_dropped_error_of_a_nested_block_breaks_that_block_and_the_outer_can_go_on(storage: Storage) -> None:
    with storage.transaction():
        put("a")
        with pytest.raises(TransactionError, match="nested part was rolled back"), storage.transaction():
            put("b")
            with pytest.raises(peewee.IntegrityError):
                fail()
        put("c")
    assert names() == ["a", "c"]


def test_errors_at_every_level_of_a_deep_nest_undo_what_is_below_them(storage: Storage) -> None:
    depth = 12

    def nest(level: int) -> None:
        with storage.transaction():
            put(f"{level:02}")
            if level < depth:
                try:
                    nest(level + 1)
                except Undo:
                    put(f"{level:02}x")
            if level % 3 == 0:
                raise Undo

    nest(1)
    assert names() == ["01", "02", "02x"]


def test_a_failed_value_check_is_no_failed_statement(storage: Storage) -> None:
    """The field refuses it before the store hears of it."""
    with storage.transaction():
        with pytest.raises(InvalidValue):
            put("a", 2**63)
        put("b")
    assert names() == ["b"]


def test_peewees_own_words_are_transactions_of_the_store(storage: Storage) -> None:
    database = storage.database
    with database.atomic():
        put("a")
        with pytest.raises(Undo), database.atomic():
            put("b")
            raise Undo
        with database.savepoint():
            put("c")
    with database.transaction("relaxed"):
        put("d")
    with database:
        put("e")

    @database.atomic()
    def decorated(name: str) -> None:
        put(name)

    decorated("f")
    with pytest.raises(Undo), storage.transaction():
        decorated("g")
        raise Undo
    assert names() == ["a", "c", "d", "e", "f"]


def test_transactions_are_not_ended_by_hand(storage: Storage) -> None:
    database = storage.database
    by_hand: list[Callable[[], Any]] = [
        database.begin, database.commit, database.rollback, database.manual_commit, database.session_start,
        database.session_commit, database.session_rollback, database.savepoint,
    ]  # fmt: skip
    for word in by_hand:
        with pytest.raises(TransactionError):
            word()
    with storage.transaction() as block:
        put("a")
        for ending in (block.commit, block.rollback):
            with pytest.raises(TransactionError):
                ending()
    assert names() == ["a"]


def test_an_unknown_durability_is_refused_before_anything_begins(storage: Storage) -> None:
    with pytest.raises(TransactionError, match="unknown durability 'fast'"):
        storage.transaction("fast")


def test_a_write_outside_transactions_gives_back_what_it_returned(storage: Storage) -> None:
    row = Counter.insert(name="a", value=1).returning(Counter.value, Counter.name).tuples().execute()
    assert list(row) == [(1, "a")]
    updated = (
        Counter.update(value=Counter.value + 1).where(Counter.name == "a").returning(Counter.value).tuples().execute()
    )
    assert list(updated) == [(2,)]
    assert Counter.update(value=5).where(Counter.name == "a").execute() == 1
    assert Counter.insert_many([{"name": "b", "value": 1}, {"name": "c", "value": 2}]).as_rowcount().execute() == 2
    Counter.create(name="d", value=3)
    cursor = storage.database.execute_sql("DELETE FROM counter WHERE name = 'd' RETURNING value, name")
    assert (cursor.fetchone(), cursor.fetchone(), cursor.fetchall()) == ((3, "d"), None, [])
    assert names() == ["a", "b", "c"]


def test_a_failed_write_outside_transactions_leaves_the_store_usable(storage: Storage) -> None:
    for _ in range(3):
        with pytest.raises(peewee.IntegrityError):
            fail()
        put_twice = Counter.insert_many([{"name": "x", "value": 1}, {"name": "owner_epoch", "value": 1}])
        with pytest.raises(peewee.IntegrityError):
            put_twice.execute()
    assert names() == []
    put("a")
    assert names() == ["a"]


def test_a_failed_read_leaves_the_store_usable(storage: Storage) -> None:
    for _ in range(6):  # more often than the pool has connections
        with pytest.raises(peewee.DatabaseError):
            storage.database.execute_sql("SELECT no_such_column FROM counter")
    put("a")
    assert names() == ["a"]


def test_a_subscriber_hears_once_and_after_the_outermost_commit(storage: Storage) -> None:
    heard: list[tuple[str, list[str]]] = []
    unsubscribe = storage.subscribe(lambda change: heard.append((change.kind, names())))
    with storage.transaction():
        put("a")
        storage.notify("a.made", "counter:a", None)
        with storage.transaction():
            put("b")
            storage.notify("b.made", "counter:b", None)
        assert heard == []
    assert heard == [("a.made", ["a", "b"]), ("b.made", ["a", "b"])]
    unsubscribe()
    unsubscribe()
    with storage.transaction():
        storage.notify("c.made", "counter:c", None)
    assert len(heard) == 2


def test_a_subscriber_hears_nothing_of_what_was_rolled_back(storage: Storage) -> None:
    heard: list[str] = []
    storage.subscribe(lambda change: heard.append(change.kind))
    with pytest.raises(Undo), storage.transaction():
        storage.notify("outer", "counter:a", None)
        raise Undo
    with storage.transaction():
        storage.notify("kept", "counter:a", None)
        with pytest.raises(Undo), storage.transaction():
            storage.notify("nested", "counter:a", None)
            with storage.transaction():
                storage.notify("deeper", "counter:a", None)
            raise Undo
        with pytest.raises(peewee.IntegrityError), storage.transaction():
            storage.notify("failed", "counter:a", None)
            fail()
    with pytest.raises(TransactionError), storage.transaction():
        storage.notify("dropped", "counter:a", None)
        with pytest.raises(peewee.IntegrityError):
            fail()
    assert heard == ["kept"]
    assert names() == []


def test_a_subscriber_may_write_and_may_fail(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    def write(change: Any) -> None:
        if change.kind == "first":
            with storage.transaction():
                put("from the subscriber")
                storage.notify("second", "counter:a", None)

    def break_down(change: Any) -> None:
        raise RuntimeError("a subscriber's own trouble")

    heard: list[str] = []
    storage.subscribe(break_down)
    storage.subscribe(write)
    storage.subscribe(lambda change: heard.append(change.kind))
    with storage.transaction():
        put("a")
        storage.notify("first", "counter:a", None)
    assert names() == ["a", "from the subscriber"]
    assert heard == ["second", "first"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "the commit stands" in caplog.text and "a subscriber's own trouble" in caplog.text


def test_a_slow_transaction_is_warned_of_with_the_callers_line(
    storage: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.database, "slow_transaction_ms", 5_000)
    with storage.transaction():
        put("quick")
    assert caplog.records == []
    monkeypatch.setattr(storage.database, "slow_transaction_ms", 20)
    here = inspect.currentframe()
    assert here is not None
    with storage.transaction():
        time.sleep(0.03)
        line = here.f_lineno
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert "a write transaction held the store for" in said
    file, _, at = said.rpartition(": ")[2].rpartition(":")
    assert file == __file__ and abs(int(at) - line) <= 2


def test_the_slow_transaction_of_a_verb_is_put_down_to_who_called_the_verb(
    storage: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagedb import Project

    monkeypatch.setattr(storage.database, "slow_transaction_ms", 1)
    storage.database.execute_sql("SELECT 1")
    original = Project._by_name.one
    monkeypatch.setattr(Project._by_name, "one", lambda **values: time.sleep(0.01) or original(**values))
    Project.add("house", actor="operator:ana")
    assert __file__ in caplog.records[0].getMessage()


def test_a_store_is_not_closed_inside_a_transaction(storage: Storage) -> None:
    for block in (storage.transaction(), storage.snapshot()):
        with block, pytest.raises(TransactionError, match="cannot be closed inside"):
            storage.close()
    put("a")
    assert names() == ["a"]


def test_a_closed_store_says_so(storage: Storage) -> None:
    storage.close()
    storage.close()
    for block in (storage.transaction(), storage.snapshot()):
        with pytest.raises(StorageClosed), block:
            pass
    with pytest.raises(StorageClosed):
        put("a")
    for sql in ("SELECT 1", "DELETE FROM counter"):
        with pytest.raises(StorageClosed):
            storage.database.execute_sql(sql)


def test_a_query_with_no_store_open_says_so_and_one_made_then_runs_on_the_next(
    storage: Storage, migrated_url: str
) -> None:
    import kagedb

    storage.close()
    made = Counter.select().where(Counter.name == "owner_epoch")
    for use in (
        made.execute,
        made.count,
        made.exists,
        Counter.get,
        Counter.delete().execute,
        Counter.update(value=1).execute,
        lambda: Counter.insert(name="a", value=0).execute(),
        lambda: Counter.create(name="a", value=0),
        lambda: Counter(name="a", value=0).save(force_insert=True),
        lambda: Counter.select() | made,
        Counter.table_exists,
    ):
        with pytest.raises(StorageClosed, match="no store is open"):
            list(use())
    with kagedb.connect(url=migrated_url):
        assert [row.name for row in made] == ["owner_epoch"]


def test_closing_waits_for_a_transaction_of_another_thread(storage: Storage, migrated_url: str) -> None:
    import kagedb

    inside, ended = threading.Event(), []

    def write() -> None:
        with storage.transaction():
            put("a")
            inside.set()
            time.sleep(0.3)
            put("b")
        ended.append(True)
        with pytest.raises(StorageClosed), storage.database.atomic():
            pass
        ended.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    storage.close()
    thread.join()
    assert ended == [True, True]
    with kagedb.connect(url=migrated_url):
        assert names() == ["a", "b"]
