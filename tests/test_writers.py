"""Writers take turns: among threads and processes, alike on both engines, without a lost update or an endless wait."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import threading
import time
from collections import Counter as Tally
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import programs
from kagedb import AuditEvent
from kagedb.errors import EXIT_BUSY, StorageBusy, TransactionError
from kagedb.models.base import Counter
from kagedb.url import StorageURL

if TYPE_CHECKING:
    from kagedb.storage import Storage

SHORT_SECONDS, LONG_SECONDS = 2.0, 10.0
PROCESSES, THREADS = 4, 8
LONGEST_WAIT_SECONDS = 1.0
"""A fifth of the default `busy_timeout_ms`."""

WRITE = """
import json, sys, time, kagedb
from kagedb import AuditEvent
from kagedb.models.base import Counter

def write_until(storage, end, name):
    done, slowest = 0, 0.0
    while time.time() < end:
        asked = time.monotonic()
        with storage.transaction():
            slowest = max(slowest, time.monotonic() - asked)
            value = Counter.select(Counter.value).where(Counter.name == "shared").tuples().get()[0]
            Counter.update(value=value + 1).where(Counter.name == "shared").execute()
            AuditEvent.record("test.written", actor="daemon:" + name, body={"value": value + 1})
        done += 1
    return done, slowest
"""

WRITER = (
    WRITE
    + """
storage = kagedb.connect(url=sys.argv[1])
print("ready", flush=True)
end = float(input())
print(json.dumps(write_until(storage, end, sys.argv[2])), flush=True)
storage.close()
"""
)


def write_from_everywhere(storage: Storage, url: str, seconds: float) -> None:
    words: dict[str, Any] = {}
    exec(WRITE, words)
    Counter.put(name="shared", value=0)
    children = [programs.start_python(WRITER, url, f"process{number}") for number in range(PROCESSES)]
    for child in children:
        programs.wait_for_line(child, "ready")
    end = time.time() + seconds
    for child in children:
        programs.tell(child, str(end))
    results: dict[str, tuple[int, float]] = {}

    def write(name: str) -> None:
        results[name] = words["write_until"](storage, end, name)

    threads = [threading.Thread(target=write, args=(f"thread{number}",)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, child in enumerate(children):
        results[f"process{number}"] = json.loads(programs.wait_for_line(child, "["))
        assert child.wait() == 0
    total = sum(done for done, _ in results.values())
    assert len(results) == PROCESSES + THREADS, "a writer met an error"
    assert Counter.get_by_id("shared").value == total, "an update was lost"
    seqs = [seq for (seq,) in AuditEvent.select(AuditEvent.seq).order_by(AuditEvent.seq).tuples()]
    assert seqs == list(range(1, len(seqs) + 1))
    by_actor = Tally(
        actor for (actor,) in AuditEvent.select(AuditEvent.actor).where(AuditEvent.kind == "test.written").tuples()
    )
    assert by_actor == {f"daemon:{name}": done for name, (done, _) in results.items()}
    assert max(slowest for _, slowest in results.values()) < LONGEST_WAIT_SECONDS
    # Every process has its turns, one writing thread in it or eight.
    fair = total / (PROCESSES + 1)
    for number in range(PROCESSES):
        assert results[f"process{number}"][0] > fair / 4, results


def test_writers_in_threads_and_processes_lose_nothing_and_wait_little(storage: Storage, migrated_url: str) -> None:
    write_from_everywhere(storage, migrated_url, SHORT_SECONDS)


@pytest.mark.slow
def test_writers_in_threads_and_processes_lose_nothing_and_wait_little_for_long(
    storage: Storage, migrated_url: str
) -> None:
    write_from_everywhere(storage, migrated_url, LONG_SECONDS)


HOLDER = """
import sys, kagedb
from kagedb.models.base import Counter
storage = kagedb.connect(url=sys.argv[1])
with storage.transaction():
    Counter.put(name="held", value=0)
    print("holding", flush=True)
    input()
storage.close()
"""


@pytest.fixture
def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers wait 300 ms."""
    config = tmp_path / "config.toml"
    config.write_text("[storage]\nbusy_timeout_ms = 300\n")
    config.chmod(0o600)
    monkeypatch.setenv("KAGED_CONFIG", str(config))


def test_a_writer_that_waited_too_long_is_told_for_whom(hasty: None, storage: Storage, migrated_url: str) -> None:
    holder = programs.start_python(HOLDER, migrated_url)
    programs.wait_for_line(holder, "holding")
    attempts = (lambda: Counter.put(name="a", value=0), lambda: storage.transaction().__enter__())
    for attempt in attempts:
        began = time.monotonic()
        with pytest.raises(StorageBusy) as refusal:
            attempt()
        assert 0.25 < time.monotonic() - began < 3
        named = str(holder.pid) if storage.engine.name == "sqlite" else "server process"
        assert named in refusal.value.message
        assert refusal.value.exit_status == EXIT_BUSY == 75
    assert Counter.select().where(Counter.name == "held").count() == 0, "reading goes on meanwhile"
    programs.tell(holder)
    assert holder.wait() == 0
    Counter.put(name="a", value=0)


def test_a_writer_of_another_thread_is_waited_for_and_told_of(hasty: None, storage: Storage) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with storage.transaction():
            Counter.put(name="held", value=0)
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with pytest.raises(StorageBusy, match=r"another thread of this process|server process"):
        Counter.put(name="a", value=0)
    threading.Timer(0.1, leave.set).start()
    Counter.put(name="a", value=0)
    thread.join()
    assert Counter.select().where(Counter.name.in_(["a", "held"])).count() == 2


def test_the_turn_is_free_again_after_its_holder_was_killed(storage: Storage, migrated_url: str) -> None:
    holder = programs.start_python(HOLDER, migrated_url)
    programs.wait_for_line(holder, "holding")
    programs.kill(holder)
    Counter.put(name="a", value=0)
    assert Counter.select().where(Counter.name == "held").count() == 0


@pytest.mark.sqlite_only
def test_a_second_connection_of_a_writing_thread_is_refused_at_once(storage: Storage) -> None:
    """It would wait for itself. PostgreSQL's store never gives a thread a second connection."""
    from kagedb.engines.sqlite_database import SqliteStoreDatabase

    second = SqliteStoreDatabase(storage.database.database, storage.settings, read_only=False)
    second.turn = storage.database.turn
    began = time.monotonic()
    with storage.transaction():
        for attempt in (
            lambda: second.execute_sql("DELETE FROM counter"),
            lambda: second.execute_sql("PRAGMA incremental_vacuum"),
            lambda: second.atomic().__enter__(),
        ):
            with pytest.raises(TransactionError, match="already writing"):
                attempt()
    assert time.monotonic() - began < 1
    second.execute_sql("UPDATE counter SET value = 7 WHERE name = 'owner_epoch'")
    second.close()
    assert Counter.get_by_id("owner_epoch").value == 7


@pytest.mark.sqlite_only
def test_every_kind_of_write_waits_for_the_turn(hasty: None, storage: Storage, migrated_url: str) -> None:
    """What slipped past it could overlap a checkpoint, or meet "database is locked"."""
    holder = programs.start_python(HOLDER, migrated_url)
    programs.wait_for_line(holder, "holding")
    database = storage.database
    row = Counter.select().where(Counter.name == "owner_epoch").get()
    for write in (
        lambda: database.execute_sql("UPDATE counter SET value = 1"),
        lambda: database.execute_sql("WITH a AS (SELECT 1) DELETE FROM counter"),
        lambda: database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)"),
        lambda: database.execute_sql("PRAGMA incremental_vacuum(1)"),
        lambda: database.execute_sql("VACUUM"),
        lambda: database.atomic().__enter__(),
        lambda: Counter.create(name="a", value=1),
        lambda: Counter.insert_many([{"name": "a", "value": 1}]).execute(),
        lambda: Counter.update(value=1).execute(),
        lambda: Counter.delete().execute(),
        lambda: row.save(),
        lambda: row.delete_instance(),
    ):
        with pytest.raises(StorageBusy, match=f"process {holder.pid}"):
            write()


OVERLAP = """
import sys, time, kagedb
from kagedb.engines.locks import WriterTurn
from kagedb.models.base import Counter

if sys.argv[2] == "without the turn":
    WriterTurn.acquire = WriterTurn.release = lambda self, seconds=None: None
    WriterTurn.held_by_this_thread = lambda self: True
end = time.time() + float(sys.argv[3])
number = 0
while time.time() < end:
    with kagedb.connect(url=sys.argv[1]) as storage:
        storage.database.execute_sql("PRAGMA wal_autocheckpoint = 8")
        for _ in range(30):
            number += 1
            with storage.transaction("relaxed"):
                Counter.insert(name=f"{sys.argv[4]} {number}", value=0).execute()
"""

WRITE_LOCK, CHECKPOINT_LOCK = 120, 121
"""Where SQLite locks the -shm file while it commits and while it checkpoints (sqlite.org/walformat.html, 2.3)."""

SAMPLE_SECONDS = 20e-6
"""A look that took longer may have seen two things that happened one after the other."""

_FLOCK = struct.Struct("hhqqi4x")


def watch_for_overlaps(path: Path, children: list[subprocess.Popen[str]]) -> tuple[int, int, int]:
    """How often a commit, a checkpoint, and a checkpoint of one process during a commit of another were seen.

    The children are ended soon after the first of the last.
    """
    commits = checkpoints = overlaps = 0
    shared = path.with_name(path.name + "-shm")

    def holder(byte: int) -> int:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else int(pid)

    while any(child.poll() is None for child in children):
        try:
            descriptor = os.open(shared, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            for _ in range(20_000):
                began = time.perf_counter()
                writer = holder(WRITE_LOCK)
                checkpointer = holder(CHECKPOINT_LOCK)
                still = holder(WRITE_LOCK)
                if time.perf_counter() - began < SAMPLE_SECONDS:
                    commits += bool(writer)
                    checkpoints += bool(checkpointer)
                    overlaps += bool(writer and checkpointer and writer == still and writer != checkpointer)
        finally:
            os.close(descriptor)
        if overlaps:
            for child in children:
                programs.kill(child)
    return commits, checkpoints, overlaps


def hammer(url: str, how: str, seconds: float) -> tuple[int, int, int]:
    path = StorageURL.parse(url, "the test").path
    assert path is not None
    children = [programs.start_python(OVERLAP, url, how, str(seconds), str(number)) for number in range(3)]
    seen = watch_for_overlaps(Path(path), children)
    assert seen[2] or [child.wait() for child in children] == [0, 0, 0]
    return seen


@pytest.mark.sqlite_only
def test_no_checkpoint_overlaps_a_commit(migrated_url: str) -> None:
    """Where they overlap, SQLite up to 3.51.2 can lose what was committed."""
    commits, checkpoints, overlaps = hammer(migrated_url, "with the turn", 2)
    assert commits > 100 and checkpoints > 100, "the look was too rare to see anything"
    assert overlaps == 0


@pytest.mark.sqlite_only
def test_the_look_for_overlaps_would_see_one(migrated_url: str) -> None:
    """The same programs without the turn to write."""
    assert hammer(migrated_url, "without the turn", 2)[2] > 0


def test_whoever_has_just_left_does_not_overtake_those_who_wait() -> None:
    from kagedb.engines.turns import FairSemaphore

    places = FairSemaphore(1)
    assert places.enter(0)
    order: list[int] = []
    threads = []
    for number in range(4):
        thread = threading.Thread(target=lambda number=number: (places.enter(10), order.append(number)))
        thread.start()
        threads.append(thread)
        while len(places._waiting) <= number:
            time.sleep(0.001)
    for _ in threads:
        places.leave()
        assert not places.enter(0), "the place belongs to whoever waits longest"
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]
    places.leave()
    assert places.enter(0)
    assert not places.enter(0.01)
    places.leave()
    assert places.enter(0), "who gave up waiting is not waited for"
