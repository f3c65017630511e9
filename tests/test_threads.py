"""Threads: each has a connection of its own, which is reclaimed when the thread is gone."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

import kagedb
from kagedb.errors import StorageBusy, StorageClosed
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from pathlib import Path

    from kagedb.storage import Storage


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def use(name: str) -> None:
    Counter.put(name=name, value=0)
    Counter.get_by_id(name)


def test_connections_of_dead_threads_are_reclaimed(storage: Storage) -> None:
    use("main")
    gc.disable()  # reclaiming is not left to the collector
    try:
        counts = []
        for number in range(30):
            thread = threading.Thread(target=use, args=(f"thread {number}",))
            thread.start()
            thread.join()
            counts.append(descriptors())
        assert max(counts[3:]) <= counts[2] + 1, counts
    finally:
        gc.enable()
    assert Counter.select().where(Counter.name.startswith("thread ")).count() == 30


def test_a_connection_of_a_dead_thread_is_closed_in_its_own_turn(storage: Storage) -> None:
    """A writer goes on while another thread reclaims what a third one left."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                Counter.put(name=f"writer {number}", value=0)
            except BaseException as error:
                errors.append(error)
                return

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(40):
        thread = threading.Thread(target=use, args=(f"thread {number}",))
        thread.start()
        thread.join()
    stop.set()
    writer.join()
    assert errors == []
    assert Counter.select().where(Counter.name.startswith("thread ")).count() == 40


def test_closing_closes_the_connections_of_idle_threads_too(storage: Storage) -> None:
    before = descriptors()
    ready, leave = threading.Barrier(5), threading.Event()
    refused = []

    def wait(number: int) -> None:
        use(f"thread {number}")
        ready.wait()
        leave.wait()
        try:
            storage.database.execute_sql("SELECT 1")
        except StorageClosed as error:
            refused.append(error)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    storage.close()
    assert descriptors() <= before
    leave.set()
    for thread in threads:
        thread.join()
    assert len(refused) == 4


def test_closing_while_others_read_and_write_ends_them_with_a_clear_error(migrated_url: str) -> None:
    kagedb.connect(url=migrated_url).close()
    before = descriptors()
    for _ in range(8):
        storage = kagedb.connect(url=migrated_url)
        seen: list[BaseException] = []
        started = threading.Barrier(7)

        def work(write: bool, started: threading.Barrier, seen: list[BaseException]) -> None:
            started.wait()
            try:
                while True:
                    if write:
                        with kagedb.models.base.bound_store().transaction("relaxed"):
                            Counter.update(value=Counter.value + 1).execute()
                    else:
                        list(Counter.select())
            except BaseException as error:
                seen.append(error)

        threads = [threading.Thread(target=work, args=(number % 2 == 0, started, seen)) for number in range(6)]
        for thread in threads:
            thread.start()
        started.wait()
        time.sleep(0.03)
        storage.close()
        for thread in threads:
            thread.join()
        assert [type(end) for end in seen] == [StorageClosed] * 6, seen
        seen.clear()  # an error holds the cursor that it happened to
        assert descriptors() <= before, "a connection was left open"
    with kagedb.connect(url=migrated_url) as storage:
        use("after")


@pytest.mark.parametrize("how", ["models", "sql", "values"])
def test_rows_that_are_being_read_end_with_a_clear_error_when_the_store_is_closed(storage: Storage, how: str) -> None:
    Counter.insert_many([{"name": f"row {number}", "value": number} for number in range(500)]).execute()
    query = Counter.select().order_by(Counter.value)
    rows = {
        "models": lambda: query.iterator(),
        "sql": lambda: iter(storage.database.execute_sql("SELECT name, value FROM counter ORDER BY value")),
        "values": lambda: iter(query.tuples()),
    }[how]()
    assert next(rows)
    closing = threading.Thread(target=storage.close)
    closing.start()
    closing.join()
    seen = 1
    with pytest.raises(StorageClosed, match="the store is closed"):
        for _ in rows:
            seen += 1
    assert seen < 500


def test_a_second_store_in_one_process_is_refused_until_the_first_is_closed(
    storage: Storage, migrated_url: str
) -> None:
    from kagedb.errors import StorageError

    with pytest.raises(StorageError, match="has a store open already") as refusal:
        kagedb.connect(url=migrated_url)
    assert "storage.close()" in refusal.value.hint
    use("still open")
    storage.close()
    kagedb.connect(url=migrated_url).close()


@pytest.mark.postgres_only
def test_a_full_pool_is_waited_for_and_then_told_of(migrated_url: str, tmp_path: Path) -> None:
    """SQLite has no pool: a thread there may always have its own connection."""
    config = tmp_path / "config.toml"
    config.write_text("[storage]\nbusy_timeout_ms = 300\n[postgres]\npool_size = 2\n")
    config.chmod(0o600)
    with kagedb.connect(url=migrated_url, config=config) as storage:
        inside, leave = threading.Barrier(3), threading.Event()

        def hold() -> None:
            with storage.snapshot():
                inside.wait()
                leave.wait()

        threads = [threading.Thread(target=hold) for _ in range(2)]
        for thread in threads:
            thread.start()
        inside.wait()
        began = time.monotonic()
        with pytest.raises(StorageBusy, match="all 2 connections") as refusal:
            list(Counter.select())
        assert 0.25 < time.monotonic() - began < 2
        assert "postgres.pool_size" in refusal.value.hint
        threading.Timer(0.1, leave.set).start()
        assert list(Counter.select())
        for thread in threads:
            thread.join()


@pytest.mark.postgres_only
def test_a_pool_may_be_larger_than_peewees_default(migrated_url: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[postgres]\npool_size = 30\n")
    config.chmod(0o600)
    with kagedb.connect(url=migrated_url, config=config) as storage:
        inside = threading.Barrier(25)

        def hold() -> None:
            with storage.snapshot():
                inside.wait(20)

        threads = [threading.Thread(target=hold) for _ in range(24)]
        for thread in threads:
            thread.start()
        inside.wait(20)
        for thread in threads:
            thread.join()
