"""What "full" and "relaxed" mean: which commits are on the disk when they return, and which may come a little later."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagedb import Project, Run, Session
from kagedb.errors import StorageError
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from kagedb.storage import Storage
    from places import Places


def strength(storage: Storage) -> str:
    """What the engine says, inside a transaction, of how it will commit."""
    sql = "PRAGMA synchronous" if storage.engine.name == "sqlite" else "SHOW synchronous_commit"
    said = storage.database.execute_sql(sql).fetchone()[0]
    return {1: "relaxed", 2: "full", "off": "relaxed", "on": "full"}[said]


def test_a_transaction_is_full_unless_it_says_otherwise(storage: Storage) -> None:
    with storage.transaction():
        assert strength(storage) == "full"
    with storage.transaction("relaxed"):
        assert strength(storage) == "relaxed"
        with storage.transaction("relaxed"):
            assert strength(storage) == "relaxed"
    with storage.database.atomic():
        assert strength(storage) == "full"
    with storage.transaction("full"):
        with storage.transaction("relaxed"):
            assert strength(storage) == "full"


@pytest.mark.postgres_only
def test_postgres_is_told_inside_a_relaxed_transaction_that_it_shall_be_full(storage: Storage) -> None:
    """SQLite cannot change its mind there; what it does instead is seen by its system calls, below."""
    with storage.transaction("relaxed"):
        with storage.transaction("full"):
            pass
        assert strength(storage) == "full"
    with storage.transaction("relaxed"):
        assert strength(storage) == "relaxed"
        Project.add("house", actor="operator:ana")
        assert strength(storage) == "full"


@pytest.mark.postgres_only
def test_full_means_what_the_operator_of_the_server_asked_for(places: Places) -> None:
    import psycopg2

    import kagedb

    url = places.migrated("postgres")
    for asked, full in (("remote_apply", "remote_apply"), ("off", "on")):
        connection = psycopg2.connect(url)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f'ALTER DATABASE "{connection.info.dbname}" SET synchronous_commit = {asked}')
        connection.close()
        with kagedb.connect(url=url) as storage:
            for wish, meant in (("full", full), ("relaxed", "off")):
                with storage.transaction(wish):
                    assert storage.database.execute_sql("SHOW synchronous_commit").fetchone()[0] == meant


PROGRAM = """
import os, sys, kagedb
from kagedb.models.base import Counter
from kagedb import Project

def mark(name):
    os.write(2, f"mark {name}\\n".encode())

storage = kagedb.connect(url=sys.argv[1])
Counter.put(name="warm", value=0)  # the first commit after a checkpoint syncs the WAL's header whatever it is asked
mark("full")
with storage.transaction(): Counter.put(name="a", value=0)
mark("relaxed")
with storage.transaction("relaxed"): Counter.put(name="b", value=0)
mark("strengthened")
with storage.transaction("relaxed"):
    Counter.put(name="c", value=0)
    with storage.transaction("full"): Counter.put(name="d", value=0)
mark("verb in relaxed")
with storage.transaction("relaxed"): Project.add("house", actor="operator:ana")
mark("alone")
Counter.update(value=1).where(Counter.name == "a").execute()
mark("rolled back")
try:
    with storage.transaction("relaxed"):
        Counter.put(name="e", value=0)
        with storage.transaction("full"): Counter.put(name="f", value=0)
        raise KeyError
except KeyError: pass
mark("relaxed after")
with storage.transaction("relaxed"): Counter.put(name="g", value=0)
mark("end")
storage.close()
"""


def strace_works() -> bool:
    strace = shutil.which("strace")
    return (
        strace is not None and subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.sqlite_only
@pytest.mark.skipif(not strace_works(), reason="only strace sees what is synced; the tests beside need none")
def test_the_wal_is_synced_for_full_and_strengthened_commits_and_not_for_relaxed_ones(
    migrated_url: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-e",
            "trace=fsync,fdatasync,write",
            "-o",
            trace,
            sys.executable,
            "-c",
            PROGRAM,
            migrated_url,
        ],
        check=True,
        stderr=subprocess.PIPE,
    )
    syncs: dict[str, int] = {}
    part = ""
    for line in trace.read_text(errors="replace").splitlines():
        if found := re.search(r'write\(2<[^>]*>, "mark ([a-z ]+)', line):
            part = found[1]
            syncs[part] = 0
        elif part and re.search(r"f(?:data)?sync\(\d+<[^>]*-wal>\)", line):
            syncs[part] += 1
    del syncs["end"]
    assert {part: bool(count) for part, count in syncs.items()} == {
        "full": True,
        "relaxed": False,
        "strengthened": True,
        "verb in relaxed": True,
        "alone": True,
        "rolled back": False,
        "relaxed after": False,
    }


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The paths that this process opens by itself meanwhile; what SQLite opens, Python does not see."""
    seen: list[str] = []
    listening = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            seen.append(os.fsdecode(arguments[0]))

    sys.addaudithook(hook)  # there is no way to remove one
    yield seen
    listening = False


@pytest.mark.sqlite_only
def test_a_strengthened_commit_syncs_the_wal_and_nobody_opens_the_database_file(storage: Storage) -> None:
    """A descriptor of the database file that is closed in this process would drop the locks of SQLite."""
    path = storage.database.database
    with opened_files() as seen:
        with storage.transaction("relaxed"):
            Counter.put(name="a", value=0)
        assert path + "-wal" not in seen
        with storage.transaction("relaxed"):
            Project.add("house", actor="operator:ana")
        assert path + "-wal" in seen
        session = Session.start(Project.named("house"), title="night", actor="operator:ana")
        run = Run.dispatch(session, agent="planner", input={})
        run.finish(output={})
        with storage.snapshot():
            list(Run.select())
        storage.engine.figures()
        storage.engine.missing_marks()
        storage.engine.catalogue()
        storage.close()
    assert not {path, path + "-shm"} & set(seen)


@pytest.mark.sqlite_only
def test_a_disk_that_does_not_confirm_a_strengthened_commit_is_reported(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no disk at hand that fails when it is told to, so the sync itself is made to."""
    from kagedb.engines import sqlite_database

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sqlite_database, "sync_file", fail)
    with pytest.raises(StorageError, match="did not confirm it"):
        with storage.transaction("relaxed"):
            with storage.transaction("full"):
                Counter.put(name="a", value=0)
    monkeypatch.undo()
    with storage.transaction():
        Counter.put(name="b", value=0)


KILLED = """
import os, sys, kagedb
from kagedb.models.base import Counter

storage = kagedb.connect(url=sys.argv[1])
for number in range(10_000):
    with storage.transaction("full" if number % 3 else "relaxed"):
        Counter.put(name=f"n{number:05}", value=number)
    if number % 3:
        print(number, flush=True)
"""


def test_what_was_acknowledged_as_full_survives_sigkill(migrated_url: str) -> None:
    """And with it every relaxed commit before it."""
    import kagedb
    import programs

    for line in ("40", "100"):
        victim = programs.start_python(KILLED, migrated_url)
        programs.wait_for_line(victim, line)
        assert victim.stdout
        victim.kill()
        victim.wait()
        acknowledged = int((line + "\n" + victim.stdout.read()).split()[-1])
        with kagedb.connect(url=migrated_url) as storage:
            rows = Counter.select(Counter.value).where(Counter.name.startswith("n")).order_by(Counter.value).tuples()
            found = [value for (value,) in rows]
            assert found[: acknowledged + 1] == list(range(acknowledged + 1))
            assert found == list(range(len(found))) and len(found) - acknowledged <= 3
            with storage.transaction():
                Counter.delete().where(Counter.name.startswith("n")).execute()


@pytest.mark.sqlite_only
def test_a_full_disk_undoes_the_transaction_and_leaves_a_store_that_can_be_read(storage: Storage) -> None:
    """`max_page_count` makes SQLite meet the same SQLITE_FULL that a disk gives it."""
    from kagedb.errors import StorageFull, TransactionError

    Counter.put(name="before", value=0)
    database = storage.database
    pages = database.execute_sql("PRAGMA page_count").fetchone()[0]
    database.execute_sql(f"PRAGMA max_page_count = {pages + 8}")
    with pytest.raises(StorageFull, match="is full; the transaction was undone"):
        fill(storage)
    with pytest.raises(StorageFull), storage.transaction():
        Counter.put(name="outer", value=0)
        with storage.transaction():
            fill(storage)
    with pytest.raises(TransactionError, match="failed earlier"), storage.transaction():
        with pytest.raises(StorageFull), storage.transaction():
            fill(storage)
        Counter.put(name="after", value=0)  # SQLite has ended the transaction: this would be saved without the rest
    assert everything(storage) == ["before"]
    database.execute_sql("PRAGMA max_page_count = 1000000")
    fill(storage)
    assert len(everything(storage)) == 2001
    assert database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)


def fill(storage: Storage) -> None:
    with storage.transaction():
        for number in range(2000):
            Counter.put(name=f"fill {number} {'x' * 80}", value=number)


def everything(storage: Storage) -> list[str]:
    query = "SELECT name FROM counter WHERE name NOT IN ('owner_epoch', 'transcript') ORDER BY 1"
    return [name for (name,) in storage.database.execute_sql(query)]


FULL_DISK = """
import os, sys, kagedb
from kagedb.errors import StorageFull
from kagedb.models.base import Counter

storage = kagedb.connect(url=sys.argv[1])
done = 0
try:
    while True:
        with storage.transaction():
            Counter.put(name=f"a{done} {'x' * 80}", value=done)
            Counter.put(name=f"b{done} {'x' * 80}", value=done)
        done += 1
except StorageFull as error:
    print(error.message)
names = [row[0] for row in Counter.select(Counter.name).where(Counter.name.startswith("a")).tuples()]
others = [row[0] for row in Counter.select(Counter.name).where(Counter.name.startswith("b")).tuples()]
assert len(names) == len(others) == done, (len(names), len(others), done)
assert storage.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
for _ in range(3):
    try:
        with storage.transaction():
            for number in range(500):
                Counter.put(name=f"c{number} {'x' * 80}", value=0)
    except StorageFull: pass
    else: raise AssertionError("there was room")
os.unlink(sys.argv[2])
with storage.transaction():
    Counter.put(name="room again", value=0)
storage.close()
print("ok", done)
"""


@pytest.mark.sqlite_only
def test_a_file_system_that_fills_up_gives_storage_full_and_goes_on_when_it_has_room(
    sqlite_template: Path, tmp_path: Path
) -> None:
    import programs

    with small_file_system(tmp_path / "small", megabytes=2) as place:
        shutil.copy(sqlite_template, place / "kaged.db")
        ballast = place / "ballast"
        ballast.write_bytes(bytes(1 << 19))
        done = programs.run_python(FULL_DISK, f"sqlite://{place}/kaged.db", str(ballast))
        assert done.returncode == 0, done.stderr
        assert "is full; the transaction was undone" in done.stdout and int(done.stdout.split()[-1]) > 50


@contextmanager
def small_file_system(place: Path, megabytes: int) -> Iterator[Path]:
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "kaged-test", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small file system; max_page_count stands for it in the test before")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


FILE_LIMIT = """
import resource, signal, sys, kagedb
from kagedb.errors import KagedError, StorageFull
from kagedb.models.base import Counter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
storage = kagedb.connect(url=sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
done = 0
try:
    with storage.transaction():
        for number in range(100_000):
            Counter.put(name=f"{number} {'x' * 180}", value=0)
except StorageFull as error:
    print(error.message)
assert Counter.select().where(Counter.value == 0, Counter.name.endswith("x")).count() == 0
assert storage.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
Counter.put(name="room again", value=0)
storage.close()
print("ok")
"""


@pytest.mark.sqlite_only
def test_a_limit_on_file_sizes_is_a_full_disk_too(migrated_url: str) -> None:
    """systemd's LimitFSIZE=; the kernel says EFBIG there, and EDQUOT for a quota, never ENOSPC."""
    import programs

    done = programs.run_python(FILE_LIMIT, migrated_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")
    assert "is full; the transaction was undone" in done.stdout
