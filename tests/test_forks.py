"""Forks: a child that exits in whatever way leaves the parent's store sound, and may use the store itself.

Each test runs a program of its own, since what is at stake is how a process ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kagedb
import programs
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from kagedb.storage import Storage

PRELUDE = """
import gc, multiprocessing, os, signal, subprocess, sys, threading, time, traceback
import kagedb
from kagedb.errors import KagedError, StorageError, TransactionError
from kagedb.models.base import Counter

def put(name):
    Counter.put(name=name, value=0)

def fork(work, *arguments):
    "Run work in a forked child that exits by os._exit: 0, or 1 with a traceback."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child

def wait(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)

def check():
    if storage.engine.name == "sqlite":
        assert storage.database.execute_sql("PRAGMA integrity_check").fetchall() == [("ok",)]
    else:
        assert storage.database.execute_sql("SELECT count(*) FROM counter").fetchone()[0] > 0

def session():
    "Which session of the server this process has; on SQLite nothing can be asked."
    if storage.engine.name == "postgres":
        return storage.database.execute_sql("SELECT pg_backend_pid()").fetchone()[0]

storage = kagedb.connect(url=sys.argv[1])
"""


def run(url: str, code: str, *arguments: str) -> str:
    done = programs.run_python(PRELUDE + code, url, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def names(url: str) -> set[str]:
    with kagedb.connect(url=url) as storage:
        if storage.engine.name == "sqlite":
            assert storage.database.execute_sql("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {row.name for row in Counter.select()} - {"owner_epoch", "transcript"}


WAYS_OUT = {
    "os._exit": "os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "an exception": "sys.stderr = open(os.devnull, 'w'); raise KeyError",
    "exec": "os.execv(sys.executable, [sys.executable, '-S', '-c', 'pass'])",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "the collector": "storage_, storage = storage, None; del storage_; gc.collect(); gc.collect(); sys.exit(0)",
    "closing": "storage.close(); storage.database.close(); gc.collect(); sys.exit(0)",
    "no reference": "storage.database._state.reset(); storage = kagedb.storage._current = None; gc.collect(); exit()",
    "the end of the program": "",
}
"""How a child ends; all of them in one program, whose store has to outlive every one."""


def test_a_child_that_never_used_the_store_leaves_it_sound(migrated_url: str) -> None:
    code = f"""
put("before")
mine = session()
for way, code in {WAYS_OUT!r}.items():
    for number in range(4):
        cursor = storage.database.execute_sql("SELECT * FROM counter")  # open in the child too
        child = os.fork()
        if child == 0:
            exec(code)
            break
        wait(child)
        put(f"after {{way}} {{number}}")
        check()
        assert session() == mine, way
    if child == 0:
        break
else:
    storage.close()
    print("closed")
"""
    assert run(migrated_url, code) == "closed\n"
    assert names(migrated_url) == {"before", *(f"after {way} {number}" for way in WAYS_OUT for number in range(4))}


def test_a_child_that_used_the_store_leaves_it_sound(migrated_url: str) -> None:
    ways = {way: WAYS_OUT[way] for way in WAYS_OUT.keys() - {"an exception", "the collector", "no reference"}}
    code = f"""
put("before")
mine = session()
for way, code in {ways!r}.items():
    for number in range(6):
        child = os.fork()
        if child == 0:
            put(f"child {{way}} {{number}}")
            assert storage.engine.name == "sqlite" or session() != mine
            exec(code)
            break
        for step in range(5):
            put(f"meanwhile {{way}} {{number}} {{step}}")
        wait(child)
        put(f"after {{way}} {{number}}")
        check()
        assert session() == mine, way
    if child == 0:
        break
else:
    assert Counter.select().where(Counter.name.startswith("child")).count() == 6 * {len(ways)}
    storage.close()
    print("closed")
"""
    assert run(migrated_url, code) == "closed\n"
    rounds = [f"{way} {number}" for way in ways for number in range(6)]
    expected = {"before"} | {f"{who} {name}" for who in ("child", "after") for name in rounds}
    assert names(migrated_url) == expected | {f"meanwhile {name} {step}" for name in rounds for step in range(5)}


def test_a_target_of_multiprocessing_may_use_the_store(migrated_url: str) -> None:
    code = """
def work(number):
    for step in range(10):
        put(f"{number} {step}")

context = multiprocessing.get_context("fork")
children = [context.Process(target=work, args=(number,)) for number in range(4)]
for child in children:
    child.start()
for step in range(10):
    put(f"parent {step}")
for child in children:
    child.join()
    assert child.exitcode == 0
check()
storage.close()
"""
    run(migrated_url, code)
    assert len(names(migrated_url)) == 50


def test_what_a_child_commits_after_the_parent_closed_is_kept(migrated_url: str) -> None:
    """The child opened its own connection before the parent closed. Once, five commits of such a child were gone."""
    code = """
def work():
    for step in range(5):
        put(f"early {step}")
    os.write(ready, b"1")
    while os.getppid() == parent:
        time.sleep(0.01)
    time.sleep(0.05)
    for step in range(5):
        put(f"late {step}")
    storage.close()

parent = os.getpid()
there, ready = os.pipe()
put("before")
child = fork(work)
os.read(there, 1)
put("between")
storage.close()
print(child)
"""
    child = int(run(migrated_url, code))
    wait_for_the_end_of(child)
    assert names(migrated_url) == {
        "before",
        "between",
        *(f"{when} {step}" for when in ("early", "late") for step in range(5)),
    }


def wait_for_the_end_of(pid: int) -> None:
    import time

    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child did not end")


def test_a_child_whose_parent_closed_first_saves_what_it_writes_or_is_told(migrated_url: str) -> None:
    """The parent closed the store before the child opened a connection of its own: on SQLite, what the child has
    inherited belongs to files that are gone. What it was told to be saved is saved; what not, was refused."""
    code = """
def work():
    time.sleep(0.1)  # the parent closes
    kept = 0
    for step in range(5):
        try:
            put(f"child {step}")
            kept += 1
        except StorageError as error:
            assert "fresh interpreter" in error.hint, error
    os.write(out, bytes([kept]))

for round in range(5):
    back, out = os.pipe()
    put(f"before {round}")
    child = fork(work)
    storage.close()
    assert wait(child) == 0
    kept = os.read(back, 1)[0]
    storage = kagedb.connect(url=sys.argv[1])
    assert Counter.select().where(Counter.name.startswith("child")).count() == kept, kept
    assert kept == (0 if storage.engine.name == "sqlite" else 5), kept
    Counter.delete().where(Counter.name.startswith("child")).execute()
    check()
storage.close()
"""
    run(migrated_url, code)
    assert len(names(migrated_url)) == 5


def test_the_parent_closes_and_opens_again_while_a_child_goes_on(migrated_url: str) -> None:
    """The regression test for the locks that the inherited SQLite believes in (engines/sqlite_forks.py)."""
    code = """
def work(number):
    for step in range(30):
        put(f"child {number} {step}")
        time.sleep(0.002)

for number in range(6):
    go, ready = os.pipe()
    def child_work():
        put(f"first {number}")
        os.write(ready, b"1")
        work(number)
    child = fork(child_work)
    os.read(go, 1)
    for step in range(5):
        put(f"parent {number} {step}")
    storage.close()
    storage = kagedb.connect(url=sys.argv[1])
    put(f"again {number}")
    storage.close()
    storage = kagedb.connect(url=sys.argv[1])
    assert wait(child) == 0
    check()
    count = Counter.select().where(Counter.name.startswith(f"child {number} ")).count()
    assert count == 30, f"{30 - count} commits of the child are gone"
storage.close()
"""
    run(migrated_url, code)
    assert len(names(migrated_url)) == 6 * (30 + 1 + 5 + 1)


def test_a_fork_inside_a_transaction_leaves_it_to_the_parent(migrated_url: str) -> None:
    code = """
def work():
    if storage.engine.name == "postgres":
        assert not Counter.select().where(Counter.name == "first").exists()  # a session of its own
        return
    for attempt in (lambda: put("child"), lambda: list(Counter.select()), lambda: storage.transaction().__enter__()):
        try:
            attempt()
        except StorageError as error:
            assert "inside a transaction" in error.message, error
        else:
            raise AssertionError("the child went on in its parent's transaction")

with storage.transaction():
    put("first")
    assert wait(fork(work)) == 0
    put("second")
try:
    with storage.transaction():
        put("undone")
        assert wait(fork(os._exit, 1)) == 1
        raise KeyError
except KeyError:
    pass
with storage.snapshot():
    assert Counter.get_by_id("first")
    assert wait(fork(gc.collect)) == 0
    assert Counter.get_by_id("second")
check()
storage.close()
"""
    run(migrated_url, code)
    assert names(migrated_url) - {"child"} == {"first", "second"}


@pytest.mark.sqlite_only
def test_a_fork_inside_a_transaction_that_outgrew_the_cache_loses_nothing_of_it(migrated_url: str) -> None:
    """Pages of it are in the WAL already. A child that let go of the connection would take them out of the index that
    all processes share."""
    code = """
def fill(part):
    rows = [{"name": f"{part} {number:06} {'x' * 180}", "value": number} for number in range(10_000)]
    Counter.insert_many(rows).execute()

with storage.transaction():
    for part in range(4):
        fill(part)
        assert wait(fork(gc.collect)) == 0
        assert Counter.select().count() == 2 + 10_000 * (part + 1)
check()
assert Counter.select().count() == 40_002
storage.close()
"""
    run(migrated_url, code)
    assert len(names(migrated_url)) == 40_000


@pytest.mark.sqlite_only
def test_an_inherited_connection_is_never_closed_in_a_child(migrated_url: str) -> None:
    """Closing it rolls back in memory and indexes that the parent shares; that damaged stores."""
    code = """
def inherited():
    files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return {suffix: files.count(storage.database.database + suffix) for suffix in ("", "-wal", "-shm")}

def work():
    before = inherited()
    assert before[""] == 2 and before["-wal"] == 2, before  # of two threads
    storage.database.close()
    storage.database.dispose()
    storage.close()
    gc.collect()
    assert inherited() == before

def in_a_thread():
    put("thread")
    assert wait(fork(work)) == 0

put("main")
thread = threading.Thread(target=in_a_thread)
thread.start()
thread.join()
check()
storage.close()
"""
    run(migrated_url, code)
    assert names(migrated_url) == {"main", "thread"}


FORKS_WHILE_WRITING = """
stop = threading.Event()
done = []

def write(name):
    number = 0
    while not stop.is_set():
        with storage.transaction("relaxed"):
            put(f"{name} {number}a")
            put(f"{name} {number}b")
        number += 1
    done.append(number)

def read():
    while not stop.is_set():
        list(Counter.select().limit(20))

def work(number):
    assert Counter.get_by_id("owner_epoch")
    put(f"child {number}")

threads = [threading.Thread(target=write, args=(f"thread{number}",)) for number in range(3)]
threads.append(threading.Thread(target=read))
threading.excepthook = lambda arguments: (traceback.print_exception(arguments.exc_value), os._exit(1))
for thread in threads:
    thread.start()
forks = int(sys.argv[2])
for number in range(forks):
    child = fork(work, number)
    status = wait(child)
    if status:
        os._exit(3)
stop.set()
for thread in threads:
    thread.join()
check()
assert len(done) == 3
total = Counter.select().where(Counter.name.startswith("thread")).count()
assert total == 2 * sum(done), (total, done)
assert Counter.select().where(Counter.name.startswith("child")).count() == forks
storage.close()
"""


def test_forks_while_other_threads_write(migrated_url: str) -> None:
    run(migrated_url, FORKS_WHILE_WRITING, "20")


@pytest.mark.slow
def test_many_forks_while_other_threads_write(migrated_url: str) -> None:
    run(migrated_url, FORKS_WHILE_WRITING, "300")


def test_a_child_of_a_child_may_use_the_store(migrated_url: str) -> None:
    code = """
def grandchild():
    put("grandchild")

def work():
    put("child")
    assert wait(fork(grandchild)) == 0
    put("child again")

def silent():
    assert wait(fork(grandchild2)) == 0

def grandchild2():
    put("of a silent child")

put("parent")
assert wait(fork(work)) == 0
assert wait(fork(silent)) == 0
put("parent again")
check()
storage.close()
"""
    run(migrated_url, code)
    assert names(migrated_url) == {"parent", "child", "child again", "grandchild", "of a silent child", "parent again"}


def test_a_child_may_close_the_store_and_open_one_of_its_own(migrated_url: str) -> None:
    code = """
def work():
    storage.close()
    with kagedb.connect(url=sys.argv[1]):
        put("child")

put("parent")
assert wait(fork(work)) == 0
put("parent again")
check()
storage.close()
"""
    run(migrated_url, code)
    assert names(migrated_url) == {"parent", "child", "parent again"}


def test_subprocesses_do_not_inherit_the_store(storage: Storage) -> None:
    """Neither the files of SQLite nor the sockets of PostgreSQL."""
    done = programs.run_python(
        "import os\nfor name in os.listdir('/proc/self/fd'):\n  print(os.path.realpath(f'/proc/self/fd/{name}'))"
    )
    assert "kaged" not in done.stdout
    assert "socket:" not in done.stdout
