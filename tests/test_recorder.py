"""Recording: when output reaches the store, what happens when it cannot, and threads, forks and the end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
import programs
from kagedb import KagedError, NotFound, Session, StateError, StorageError, StorageUnavailable, Transcript
from kagedb.errors import InvalidValue, LimitExceeded, TransactionError
from kagedb.models import TranscriptChunk, backlog, flusher, stream
from kagedb.models.segment import Gap, Mark, Output
from postgres_server import PostgresServer
from recordings import new_session, output

if TYPE_CHECKING:
    from kagedb.storage import Storage


@pytest.fixture
def session(storage: Storage) -> Session:
    return new_session()


def raw(transcript: Transcript) -> bytes:
    return b"".join(transcript.raw())


def wait_until(true: Callable[[], Any], seconds: float = 10) -> float:
    """How long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not come to that"
        time.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def held_store(storage: Storage) -> Iterator[None]:
    """Another thread is in a write transaction meanwhile."""
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with storage.transaction():
            begun.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        end.set()
        thread.join()


# When output reaches the store.


def test_output_is_in_the_store_after_two_seconds_without_another_write(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        recorder.write(b"prompt $ ")
        assert raw(recorder.transcript) == b""
        assert 1.8 < wait_until(lambda: raw(recorder.transcript) == b"prompt $ ") < 4


def test_a_full_chunk_is_in_the_store_at_once(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        recorder.write(b"x" * 20_000)
        assert wait_until(lambda: raw(recorder.transcript)) < 1.5
        assert raw(recorder.transcript) == b"x" * 16_384


def test_a_resize_brings_what_came_before_it_into_the_store_soon(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        recorder.write(b"wide")
        for columns in range(81, 120):
            recorder.resize(columns, 24)
        assert wait_until(lambda: raw(recorder.transcript)) < 1
        assert recorder.transcript.usage().chunks == 1


def test_flush_and_close_bring_everything_into_the_store(session: Session) -> None:
    recorder = Transcript.open(session, 80, 24)
    recorder.write(b"one ")
    recorder.flush()
    assert raw(recorder.transcript) == b"one "
    recorder.flush()
    assert recorder.transcript.usage().chunks == 1
    recorder.write(b"two")
    recorder.close()
    assert raw(recorder.transcript) == b"one two"
    assert Transcript.by_id(recorder.transcript.id).closed_at
    recorder.close()
    for late in (lambda: recorder.write(b"x"), lambda: recorder.resize(1, 1), lambda: recorder.mark("late")):
        with pytest.raises(StateError, match="is closed"):
            late()


def test_a_recorder_in_a_with_block_is_closed_also_by_an_error(session: Session) -> None:
    with pytest.raises(ZeroDivisionError), Transcript.open(session, 80, 24) as recorder:
        recorder.write(b"until here")
        _ = 1 / 0
    assert raw(recorder.transcript) == b"until here" and Transcript.by_id(recorder.transcript.id).closed_at


def commits(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The durability of each commit from now on."""
    done: list[str] = []
    plain = storage.database.commit_write
    monkeypatch.setattr(
        storage.database, "commit_write", lambda durability: (plain(durability), done.append(durability))[0]
    )
    return done


def test_detaching_brings_a_session_onto_the_disk(session: Session, storage: Storage, monkeypatch: Any) -> None:
    with Transcript.open(session, 80, 24) as recorder, Transcript.open(new_session("other"), 80, 24) as other:
        recorder.write(b"seen")
        done = commits(storage, monkeypatch)
        session.detach()
        assert wait_until(lambda: raw(recorder.transcript) == b"seen") < 1
        assert done == ["full", "full"]
        other.write(b"not detached")
        recorder.transcript.session.attach()
        session.detach()
        time.sleep(0.2)
        assert raw(other.transcript) == b""


def test_many_terminals_share_a_commit(session: Session, storage: Storage, monkeypatch: Any) -> None:
    recorders = [Transcript.open(session, 80, 24) for _ in range(10)]
    done = commits(storage, monkeypatch)
    for recorder in recorders:
        recorder.write(b"a little")
        time.sleep(0.05)
    wait_until(lambda: all(raw(recorder.transcript) for recorder in recorders))
    assert done == ["relaxed"]
    for recorder in recorders:
        recorder.close()


def test_a_fast_program_is_written_in_full_chunks_and_not_by_the_clock(session: Session) -> None:
    """The time that a chunk has begins with its first byte, not with that of the one before."""
    with Transcript.open(session, 80, 24) as recorder:
        for _ in range(25):  # two seconds are over in the middle of the second chunk
            recorder.write(b"x" * 1365)
            time.sleep(0.1)
        recorder.flush()
        sizes = [row.size for row in TranscriptChunk.select().order_by(TranscriptChunk.key)]
    assert sizes == [16_384, 16_384, 25 * 1365 - 2 * 16_384]


def test_write_does_not_wait_for_the_store(session: Session, storage: Storage) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        slowest = 0.0
        with held_store(storage):
            for piece in output(1, 500_000):
                began = time.monotonic()
                recorder.write(piece)
                slowest = max(slowest, time.monotonic() - began)
        assert slowest < 2  # on a machine that does other things too; who waited for the transaction would wait 5 s
        recorder.flush()
    assert raw(recorder.transcript) == b"".join(output(1, 500_000))


def test_many_threads_write_into_one_recorder(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:

        def work(name: int) -> None:
            for number in range(500):
                recorder.write(f"<{name}:{number}>".encode())
                if number % 100 == 0:
                    recorder.flush()
                    recorder.mark(f"{name}")

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = raw(recorder.transcript)
    for name in range(8):
        pieces = [f"<{name}:{number}>".encode() for number in range(500)]
        places = [found.index(piece) for piece in pieces]
        assert places == sorted(places)
    assert len(found) == sum(len(f"<{name}:{number}>") for name in range(8) for number in range(500))
    assert sum(isinstance(event, Mark) for event in recorder.transcript.events()) == 40


def test_marks_are_checked(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        recorder.mark("x" * 1000)
        with pytest.raises(LimitExceeded, match="a mark of 1,001 characters"):
            recorder.mark("x" * 1001)
        for wrong in ("\x00", "\ud800", 5):
            with pytest.raises(InvalidValue):
                recorder.mark(wrong)  # type: ignore[arg-type]
    assert list(recorder.transcript.events()) == [Mark(0, "x" * 1000)]


# Transactions.


def test_a_recorder_is_not_flushed_inside_a_transaction_that_may_be_undone(session: Session, storage: Storage) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        with pytest.raises(ZeroDivisionError), storage.transaction():
            recorder.write(b"written in a transaction that was undone")
            for wrong in (recorder.flush, recorder.close):
                with pytest.raises(TransactionError, match="flushed inside a transaction"):
                    wrong()
            _ = 1 / 0
        recorder.write(b", and after it")
    assert raw(recorder.transcript) == b"written in a transaction that was undone, and after it"


def test_a_recorder_whose_opening_was_undone_says_so_and_disturbs_no_other(session: Session, storage: Storage) -> None:
    told: list[KagedError] = []
    with pytest.raises(ZeroDivisionError), storage.transaction():
        lost = Transcript.open(session, 80, 24, on_error=told.append)
        lost.write(b"into nothing")
        _ = 1 / 0
    with Transcript.open(session, 80, 24) as other:
        assert other.transcript.number == lost.transcript.number
        other.write(b"kept")
        wait_until(lambda: told)
        wait_until(lambda: raw(other.transcript) == b"kept")
        assert isinstance(told[0], NotFound) and len(told) == 1
        with pytest.raises(StateError, match="was rolled back"):
            lost.write(b"more")
        lost.close()
    assert raw(other.transcript) == b"kept" and Transcript.of(session) == [other.transcript]


def test_flushing_a_recorder_whose_opening_was_undone_raises(session: Session, storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), storage.transaction():
        lost = Transcript.open(session, 80, 24, on_error=lambda error: None)
        _ = 1 / 0
    lost.write(b"x")
    with pytest.raises(NotFound, match="was rolled back"):
        lost.flush()


# When it cannot be written.


@contextmanager
def failing_store(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can be inserted meanwhile, as on a full disk or where a server is away; the real ones are below."""

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(TranscriptChunk._insert, "run", refuse)
        yield


def test_what_cannot_be_written_is_told_once_kept_and_written_later(
    session: Session, storage: Storage, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flusher, "RETRY_SECONDS", 0.05)
    told: list[KagedError] = []
    pieces = output(6, 400_000)
    with Transcript.open(session, 80, 24, on_error=told.append) as recorder:
        recorder.write(b"".join(pieces[:100]))
        recorder.flush()
        for _ in range(2):
            told.clear()
            with failing_store(storage, monkeypatch):
                recorder.write(b"".join(pieces[100:]))
                wait_until(lambda: told)
                time.sleep(0.3)
                assert [str(error) for error in told] == ["the disk is full"]
                with pytest.raises(StorageError, match="the disk is full"):
                    recorder.flush()
            wait_until(lambda: recorder._stream.backlog.batch == [] and not recorder._stream.backlog.has_more())
    assert raw(recorder.transcript) == b"".join(pieces) + b"".join(pieces[100:])
    assert not any(isinstance(event, Gap) for event in recorder.transcript.events())


def test_beyond_the_bound_the_oldest_is_dropped_and_the_gap_says_how_much(
    session: Session, storage: Storage, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flusher, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(backlog, "BACKLOG_BYTES", 400_000)
    monkeypatch.setattr(backlog, "BATCH_BYTES", 50_000)
    told: list[KagedError] = []
    whole = os.urandom(3_000_000)
    with Transcript.open(session, 80, 24, on_error=told.append) as recorder:
        recorder.write(whole[:100_000])
        recorder.flush()
        with failing_store(storage, monkeypatch):
            for at in range(100_000, 2_900_000, 10_000):
                recorder.write(whole[at : at + 10_000])
                recorder._stream.backlog.next_batch()
            wait_until(lambda: told)
            assert recorder._stream.backlog.waiting_bytes <= 400_000 + 16_384
        recorder.write(whole[2_900_000:])
        recorder.flush()
    assert "the disk is full" in str(told[0]) and any("were dropped" in str(error) for error in told)
    events = list(recorder.transcript.events())
    (gap,) = (event for event in events if isinstance(event, Gap))
    before = b"".join(event.data for event in events[: events.index(gap)] if isinstance(event, Output))
    after = b"".join(event.data for event in events[events.index(gap) :] if isinstance(event, Output))
    assert whole.startswith(before) and whole.endswith(after)
    assert len(before) + gap.lost_bytes + len(after) == len(whole)
    assert 150_000 < len(after) < 800_000
    assert raw(recorder.transcript) == before + after


def test_a_hook_that_fails_or_flushes_does_no_harm(session: Session, storage: Storage, monkeypatch: Any) -> None:
    monkeypatch.setattr(flusher, "RETRY_SECONDS", 0.05)
    calls: list[KagedError] = []

    def hook(error: KagedError) -> None:
        calls.append(error)
        recorder.flush()

    with Transcript.open(session, 80, 24, on_error=hook) as recorder:
        with failing_store(storage, monkeypatch):
            recorder.write(b"x" * 20_000)
            wait_until(lambda: calls)
        wait_until(lambda: raw(recorder.transcript))
    assert raw(recorder.transcript) == b"x" * 20_000


def test_without_a_hook_it_is_logged(session: Session, storage: Storage, monkeypatch: Any, caplog: Any) -> None:
    with Transcript.open(session, 80, 24) as recorder, caplog.at_level(logging.WARNING, "kagedb"):
        with failing_store(storage, monkeypatch):
            recorder.write(b"x" * 20_000)
            wait_until(lambda: caplog.records)
    assert "the disk is full" in caplog.text


def test_closing_what_cannot_be_written_can_be_tried_again(
    session: Session, storage: Storage, monkeypatch: Any
) -> None:
    recorder = Transcript.open(session, 80, 24, on_error=lambda error: None)
    recorder.write(b"kept")
    with failing_store(storage, monkeypatch), pytest.raises(StorageError):
        recorder.close()
    with pytest.raises(StateError, match="is being closed"):
        recorder.write(b"too late")
    recorder.close()
    assert raw(recorder.transcript) == b"kept" and Transcript.by_id(recorder.transcript.id).closed_at


def test_a_commit_whose_answer_was_lost_is_not_written_twice(
    session: Session, storage: Storage, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flusher, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(stream, "SEQUENCES", 260)  # so that some of those commits begin a continuation
    plain = storage.database.commit_write
    unlucky = iter([False, True] * 1000)

    def commit(durability: str) -> None:
        plain(durability)
        if threading.current_thread().name == "kaged-transcripts" and next(unlucky):
            raise StorageUnavailable("the server went away during a commit")

    monkeypatch.setattr(storage.database, "commit_write", commit)
    monkeypatch.setattr(storage.database, "rollback_write", lambda: None)
    pieces = output(7, 1_500_000)
    told: list[KagedError] = []
    with Transcript.open(session, 80, 24, on_error=told.append) as recorder:
        for piece in pieces:
            recorder.write(piece)
        wait_until(lambda: not recorder._stream.backlog.batch and not recorder._stream.backlog.has_more(), 30)
    assert told and len(recorder.transcript.parts()) > 1
    assert raw(recorder.transcript) == b"".join(pieces)


FULL_DISK = """
import resource, signal, sys, time, kagedb
from kagedb import Session, Transcript
sys.path.insert(0, sys.argv[2])
from recordings import new_session, output
from kagedb.models import flusher
flusher.RETRY_SECONDS = 0.1
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
pieces = output(8, 3_000_000)
told = []
with kagedb.connect(url=sys.argv[1]) as storage:
    recorder = Transcript.open(new_session(), 80, 24, on_error=told.append)
    recorder.write(b"".join(pieces[:1000]))
    recorder.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
    for piece in pieces[1000:]:
        recorder.write(piece)
    while not told: time.sleep(0.01)
    time.sleep(0.3)
    print(len(told), type(told[0]).__name__, told[0].message)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    while recorder._stream.backlog.batch or recorder._stream.backlog.has_more(): time.sleep(0.01)
    recorder.close()
    assert b"".join(recorder.transcript.raw()) == b"".join(pieces)
    assert storage.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
print("whole")
"""


@pytest.mark.sqlite_only
def test_a_full_disk_costs_nothing_when_it_has_room_again(migrated_url: str) -> None:
    """A limit on file sizes is to SQLite what a full disk is."""
    done = programs.run_python(FULL_DISK, migrated_url, os.path.dirname(__file__))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("1 StorageFull the disk of ")
    assert done.stdout.splitlines()[1] == "whole"


@pytest.mark.postgres_only
def test_a_server_that_is_away_costs_nothing_when_it_is_back(
    own_postgres_server: PostgresServer, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flusher, "RETRY_SECONDS", 0.1)
    told: list[KagedError] = []
    own_postgres_server.create_database("recorded")
    with kagedb.connect(url=own_postgres_server.url("recorded")):
        with Transcript.open(new_session(), 80, 24, on_error=told.append) as recorder:
            recorder.write(b"before " * 3000)
            recorder.flush()
            own_postgres_server.stop()
            recorder.write(b"meanwhile " * 3000)
            wait_until(lambda: told)
            own_postgres_server.start()
            recorder.write(b"after")
            wait_until(lambda: not recorder._stream.backlog.batch)
        assert raw(recorder.transcript) == b"before " * 3000 + b"meanwhile " * 3000 + b"after"
        assert isinstance(told[0], StorageUnavailable)
    own_postgres_server.drop_database("recorded")


# The end.


def test_closing_the_store_writes_what_its_recorders_hold(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        session = new_session()
        recorders = [Transcript.open(session, 80, 24) for _ in range(3)]
        for number, recorder in enumerate(recorders):
            recorder.write(f"of {number}".encode())
    with pytest.raises(StateError, match="is closed"):
        recorders[0].write(b"late")
    for recorder in recorders:
        recorder.close()
    with kagedb.connect(url=migrated_url):
        for number, found in enumerate(Transcript.of(session)):
            assert raw(found) == f"of {number}".encode() and found.closed_at
        with Transcript.open(session, 80, 24) as another:
            another.write(b"in the next store of this process")
        assert raw(another.transcript) == b"in the next store of this process"


def test_closing_a_store_that_cannot_be_written_says_what_is_lost(
    migrated_url: str, monkeypatch: Any, caplog: Any
) -> None:
    told: list[KagedError] = []
    with kagedb.connect(url=migrated_url) as storage:
        recorder = Transcript.open(new_session(), 80, 24, on_error=told.append)
        recorder.write(b"lost")
        with failing_store(storage, monkeypatch):
            storage.close()
    assert "the disk is full" in str(told[0]) and "without the last of what was recorded" in caplog.text


EXIT = """
import sys, kagedb
from kagedb import Transcript
sys.path.insert(0, sys.argv[2])
from recordings import new_session
storage = kagedb.connect(url=sys.argv[1])
recorder = Transcript.open(new_session(), 80, 24)
recorder.write(b"at the end of the program")
print(recorder.transcript.id)
"""


def test_a_program_that_just_ends_loses_nothing(migrated_url: str) -> None:
    done = programs.run_python(EXIT, migrated_url, os.path.dirname(__file__))
    assert done.returncode == 0 and not done.stderr, done.stderr
    with kagedb.connect(url=migrated_url):
        assert raw(Transcript.by_id(done.stdout.strip())) == b"at the end of the program"


FORK = """
import os, sys, threading, time, kagedb
from kagedb import Transcript, StateError
sys.path.insert(0, sys.argv[2])
from recordings import new_session
storage = kagedb.connect(url=sys.argv[1])
session = new_session()
recorder = Transcript.open(session, 80, 24)
stop = threading.Event()
written = [0]
def work():
    while not stop.is_set():
        recorder.write(b"x" * 100)
        written[0] += 100
thread = threading.Thread(target=work)
thread.start()
for number in range(10):
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        try:
            recorder.write(b"from a child")
        except StateError as error:
            assert "belongs to the process that opened it" in str(error)
        else:
            os._exit(1)
        recorder.close()
        with Transcript.open(session, 80, 24) as own:
            own.write(f"child {number}".encode())
        storage.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
recorder.close()
assert b"".join(recorder.transcript.raw()) == b"x" * written[0]
found = [b"".join(one.raw()) for one in Transcript.of(session)[1:]]
assert found == [f"child {number}".encode() for number in range(10)], found
storage.close()
print("ok")
"""


def test_a_forked_child_leaves_the_recorder_to_its_parent_and_may_open_its_own(migrated_url: str) -> None:
    done = programs.run_python(FORK, migrated_url, os.path.dirname(__file__))
    assert done.stdout == "ok\n", done.stderr


def test_an_idle_recorder_writes_nothing_and_a_store_without_one_has_no_thread(
    storage: Storage, monkeypatch: Any
) -> None:
    session = new_session()
    recorder = Transcript.open(session, 80, 24)
    assert "kaged-transcripts" not in {thread.name for thread in threading.enumerate()}
    done = commits(storage, monkeypatch)
    time.sleep(0.3)
    assert done == []
    recorder.close()


def test_the_thread_ends_with_the_store(migrated_url: str) -> None:
    def mine() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "kaged-transcripts"]

    before = mine()
    with kagedb.connect(url=migrated_url):
        with Transcript.open(new_session(), 80, 24) as recorder:
            recorder.write(b"x")
        assert len(mine()) == len(before) + 1
    wait_until(lambda: mine() == before)
