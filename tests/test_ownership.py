"""Ownership: one daemon owns a store; a second is told who, and whoever lost the store cannot write to it."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest

import kagedb
import programs
from kagedb.errors import EXIT_BUSY, ReadOnlyStorage, SettingsError, StorageInUse, StorageUnavailable
from kagedb.models.base import Counter
from postgres_proxy import Proxy

if TYPE_CHECKING:
    from kagedb.storage import Storage

DAEMON = """
import os, sys, time, kagedb
from kagedb.errors import KagedError
from kagedb.models.base import Counter
sys.argv[0] = "/usr/bin/kaged-daemon"
storage = kagedb.connect(url=sys.argv[1], exclusive=True)
Counter.put(name=f"daemon {os.getpid()}", value=0)
if len(sys.argv) > 2:
    child = os.fork()
    if child == 0:
        if sys.argv[2] == "uses the store":
            Counter.put(name="child", value=0)
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print("child", child, flush=True)
print("owns", flush=True)
for line in sys.stdin:
    try:
        Counter.put(name=line.strip(), value=0)
        print("wrote", flush=True)
    except KagedError as error:
        print(type(error).__name__, error, flush=True)
"""


@contextlib.contextmanager
def owned(url: str) -> Iterator[Storage]:
    with kagedb.connect(url=url, exclusive=True) as storage:
        yield storage


def test_a_second_daemon_is_told_who_holds_the_store(migrated_url: str) -> None:
    daemon = programs.start_python(DAEMON, migrated_url)
    programs.wait_for_line(daemon, "owns")
    with pytest.raises(StorageInUse) as refusal, owned(migrated_url):
        pass
    assert f"{daemon.pid}" in refusal.value.message and "kaged-daemon since 20" in refusal.value.message
    assert refusal.value.hint == "stop that one first"
    assert refusal.value.exit_status == EXIT_BUSY == 75
    assert kagedb.storage.current() is None, "nothing of the refused store is left open"
    with kagedb.connect(url=migrated_url) as storage:
        Counter.put(name="beside", value=0)
        assert str(daemon.pid) in str(storage.engine.owner())
    daemon.communicate("", timeout=10)
    with owned(migrated_url) as storage:
        assert storage.engine.owner() is None, "oneself is not somebody else"


def test_the_store_is_free_again_when_its_daemon_ends_in_order(migrated_url: str) -> None:
    for _ in range(3):
        with owned(migrated_url) as storage:
            Counter.update(value=1).where(Counter.name == "transcript").execute()
            assert storage.engine.owner() is None


@pytest.mark.parametrize("child", ["only exists", "uses the store"])
def test_the_store_is_free_at_once_after_sigkill_though_a_forked_child_lives(migrated_url: str, child: str) -> None:
    daemon = programs.start_python(DAEMON, migrated_url, child)
    pid = int(programs.wait_for_line(daemon, "child").split()[1])
    programs.wait_for_line(daemon, "owns")
    if child == "uses the store":
        time.sleep(0.3)
    try:
        daemon.kill()
        daemon.wait()
        began = time.monotonic()
        while True:
            try:
                with owned(migrated_url):
                    Counter.put(name="second", value=0)
                break
            except StorageInUse:
                # The server hears of the end of its client in its own time.
                assert time.monotonic() - began < 2
                time.sleep(0.02)
        assert Path(f"/proc/{pid}").exists()
    finally:
        os.kill(pid, 9)


def test_a_reader_cannot_own(migrated_url: str) -> None:
    with pytest.raises(SettingsError, match="both read_only and exclusive"):
        kagedb.connect(url=migrated_url, read_only=True, exclusive=True)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        with pytest.raises(ReadOnlyStorage):
            storage.engine.own("a reader")


@pytest.mark.sqlite_only
def test_the_lock_files_are_private_and_never_unlinked(migrated_url: str, tmp_path: Path) -> None:
    """A lock file that is made anew has another inode: two daemons would hold one lock each."""
    lock = tmp_path / "kaged.db.lock"
    before = None
    old = os.umask(0)
    try:
        for _ in range(3):
            with owned(migrated_url):
                assert stat.S_IMODE(lock.stat().st_mode) == 0o600
                assert stat.S_IMODE((tmp_path / "kaged.db.owner").stat().st_mode) == 0o600
                assert before in (None, lock.stat().st_ino)
                before = lock.stat().st_ino
            assert lock.exists()
            assert not (tmp_path / "kaged.db.owner").exists()
    finally:
        os.umask(old)


@pytest.mark.sqlite_only
def test_the_note_of_a_daemon_that_was_killed_is_not_believed(migrated_url: str, tmp_path: Path) -> None:
    daemon = programs.start_python(DAEMON, migrated_url)
    programs.wait_for_line(daemon, "owns")
    programs.kill(daemon)
    assert str(daemon.pid) in (tmp_path / "kaged.db.owner").read_text()
    with kagedb.connect(url=migrated_url) as storage:
        assert storage.engine.owner() is None


# A daemon on PostgreSQL that is cut off from its server. SQLite has no line to cut.


def cut_lock_connection(url: str) -> None:
    """End the session that holds the locks, as the server does to a client that it has lost."""
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
        )
        assert cursor.fetchall() == [(1,)]


def own_from_another_process(url: str) -> Any:
    second = programs.start_python(DAEMON, url)
    programs.wait_for_line(second, "owns")
    return second


@pytest.mark.postgres_only
def test_an_owner_that_was_cut_off_takes_its_ownership_again(migrated_url: str) -> None:
    with owned(migrated_url):
        for number in range(3):
            cut_lock_connection(migrated_url)
            time.sleep(0.05)
            Counter.put(name=f"after {number}", value=0)
            second = programs.run_python(DAEMON, migrated_url)
            assert "StorageInUse" in second.stderr and str(os.getpid()) in second.stderr


@pytest.mark.postgres_only
def test_an_owner_that_was_cut_off_and_replaced_cannot_write_any_more(migrated_url: str) -> None:
    with owned(migrated_url) as storage:
        Counter.put(name="first", value=0)
        cut_lock_connection(migrated_url)
        second = own_from_another_process(migrated_url)
        for write in (
            lambda: Counter.put(name="lost", value=0),
            lambda: storage.transaction().__enter__(),
            lambda: storage.database.execute_sql("DELETE FROM counter"),
        ):
            with pytest.raises(StorageInUse, match=f"lost the store .* pid {second.pid}"):
                write()
        assert Counter.select().count() == 4, "reading is harmless"
        programs.kill(second)
        with pytest.raises(StorageInUse):
            Counter.put(name="lost", value=0)


@pytest.mark.postgres_only
def test_a_replaced_owner_is_fenced_though_its_connections_live(migrated_url: str, tmp_path: Path) -> None:
    """The worst case: nobody told it that its locks are gone, and its pool still works."""
    with owned(migrated_url) as storage:
        Counter.put(name="first", value=0)  # the pool has a live connection
        # As if the connection for locks had been lost on the server's side alone: it is replaced by a live one
        # without locks, which is what a line looks like that has not noticed yet.
        engine: Any = storage.engine
        cut_lock_connection(migrated_url)
        engine._locks.close()
        engine._locks = engine.server.connect()
        assert engine._holds
        second = own_from_another_process(migrated_url)
        with pytest.raises(StorageInUse, match="lost the store"):
            Counter.put(name="lost", value=0)
        programs.tell(second, "second")
        programs.wait_for_line(second, "wrote")
        assert {row.name for row in Counter.select()} >= {"first", "second"}
        assert not Counter.select().where(Counter.name == "lost").exists()


@pytest.mark.postgres_only
def test_an_owner_that_was_replaced_by_one_that_is_gone_again_is_fenced_too(migrated_url: str) -> None:
    with owned(migrated_url):
        Counter.put(name="first", value=0)
        cut_lock_connection(migrated_url)
        second = own_from_another_process(migrated_url)
        programs.kill(second)
        time.sleep(0.2)
        with pytest.raises(StorageInUse, match="lost the store"):
            Counter.put(name="lost", value=0)


@pytest.mark.postgres_only
def test_an_owner_behind_a_line_that_is_cut_and_mended_goes_on(migrated_url: str, tmp_path: Path) -> None:
    place = tmp_path / "p"
    place.mkdir()
    with Proxy(place, migrated_url) as proxy, owned(proxy.url):
        Counter.put(name="first", value=0)
        proxy.refusing = True
        proxy.cut()
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                Counter.put(name="lost", value=0)
        proxy.refusing = False
        time.sleep(0.1)
        Counter.put(name="second", value=0)
        proxy.cut()
        time.sleep(0.1)
        Counter.put(name="third", value=0)
        with contextlib.closing(psycopg2.connect(migrated_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")
            assert cursor.fetchone() == (2,), "the use lock and the owner lock"


@pytest.mark.postgres_only
def test_a_lost_use_lock_is_taken_again_or_the_write_is_refused(migrated_url: str) -> None:
    """A store that is not owned shares the use lock: whoever migrates must be able to rely on it."""
    with kagedb.connect(url=migrated_url) as storage:
        cut_lock_connection(migrated_url)
        time.sleep(0.05)
        engine: Any = storage.engine
        with contextlib.closing(psycopg2.connect(migrated_url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_try_advisory_lock(%s)", (engine.key("use"),))
                assert cursor.fetchone() == (True,)
                for _ in range(3):
                    with pytest.raises(StorageInUse, match="being migrated or replaced"):
                        Counter.put(name="lost", value=0)
                    assert engine.owner() is None  # asks on the same connection, and must not heal it by half
        time.sleep(0.1)
        Counter.put(name="kept", value=0)
        with contextlib.closing(psycopg2.connect(migrated_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s)", (engine.key("use"),))
            assert cursor.fetchone() == (False,)
