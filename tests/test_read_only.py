"""Reading a store without changing it: live beside a daemon, from a read-only place, or as a cold copy."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
import programs
from kagedb import AuditEvent, Project
from kagedb.errors import ReadOnlyStorage, StorageNotFound, StorageUnavailable
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from conftest import Places


def test_nothing_can_be_written_through_a_store_opened_to_be_read(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        Counter.put(name="before", value=0)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        database = storage.database
        writes: list[Callable[[], Any]] = [
            lambda: Counter.put(name="a", value=0),
            lambda: Counter.update(value=1).execute(),
            lambda: Counter.delete().execute(),
            lambda: storage.transaction().__enter__(),
            lambda: database.atomic().__enter__(),
            lambda: database.execute_sql("CREATE TABLE t (a INTEGER)"),
            lambda: database.execute_sql("VACUUM"),
            lambda: Project.add("house", actor="operator:ana"),
            lambda: AuditEvent.record("test.written", actor="operator:ana"),
            lambda: database.raw("UPDATE counter SET value = 1"),  # past the look at the text
        ]
        for write in writes:
            with pytest.raises(ReadOnlyStorage):
                write()
            assert Counter.get_by_id("before").value == 0
        with storage.snapshot():
            assert Counter.get_by_id("before").value == 0


def test_a_reader_makes_no_store(url: str, engine: str) -> None:
    with pytest.raises(StorageNotFound):
        kagedb.connect(url=url, read_only=True)
    with pytest.raises(StorageNotFound):
        kagedb.connect(url=url, migrate=False)


def test_a_reader_sees_what_the_daemon_writes(migrated_url: str) -> None:
    code = """
import sys, kagedb
from kagedb.models.base import Counter
with kagedb.connect(url=sys.argv[1], exclusive=True):
    print("ready", flush=True)
    for line in sys.stdin:
        Counter.put(name=line.strip(), value=0)
        print("wrote", flush=True)
"""
    daemon = programs.start_python(code, migrated_url)
    programs.wait_for_line(daemon, "ready")
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        for name in ("first", "second"):
            programs.tell(daemon, name)
            programs.wait_for_line(daemon, "wrote")
            assert Counter.get_by_id(name)
        with storage.snapshot():
            assert Counter.get_by_id("second")
            programs.tell(daemon, "third")
            programs.wait_for_line(daemon, "wrote")
            assert not Counter.select().where(Counter.name == "third").exists()
        assert Counter.get_by_id("third")


@pytest.mark.postgres_only
def test_a_reader_says_so_to_the_server(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        assert storage.database.execute_sql("SHOW default_transaction_read_only").fetchone() == ("on",)
        assert not issubclass(ReadOnlyStorage, StorageUnavailable)


# A place where nothing can be written. Only SQLite reads from places.


def digests(place: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.iterdir()}


@contextlib.contextmanager
def read_only_mount(place: Path) -> Iterator[None]:
    """The directory as a read-only mount of itself, which stops root too."""
    for command in (["mount", "--bind", place, place], ["mount", "-o", "remount,ro,bind", place]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount; the rules of read-only places need one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "media"
    place.mkdir()
    return place


def fill(url: str) -> None:
    with kagedb.connect(url=url):
        Project.add("house", actor="operator:ana")


@pytest.mark.sqlite_only
def test_a_closed_store_is_read_from_a_read_only_place_without_a_trace(places: Places, place: Path) -> None:
    url = places.migrated("sqlite")
    fill(url)
    source = Path(url.removeprefix("sqlite://"))
    shutil.copy(source, place / "kaged.db")
    before = digests(place)
    with read_only_mount(place):
        for _ in range(2):
            with kagedb.connect(url=f"sqlite://{place}/kaged.db", read_only=True) as storage:
                assert Project.named("house")
                assert storage.engine.owner() is None
                with storage.snapshot():
                    assert AuditEvent.select().count() == 2
                assert storage.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
        with pytest.raises(kagedb.StorageError) as refusal:
            kagedb.connect(url=f"sqlite://{place}/kaged.db")
        assert "read-only" in str(refusal.value).lower()
    assert digests(place) == before


HOT = """
import os, shutil, sys, kagedb
with kagedb.connect(url=sys.argv[1]) as storage:
    kagedb.Project.add("only in the wal", actor="operator:ana")
    for suffix in ("", "-wal"):
        shutil.copy(storage.database.database + suffix, sys.argv[2])
"""


@pytest.mark.sqlite_only
@pytest.mark.parametrize("shared_memory", [False, True])
def test_what_is_in_the_wal_of_a_copy_is_read_too(places: Places, place: Path, shared_memory: bool) -> None:
    """`immutable=1` would not see it; a copy elsewhere is read, and is gone afterwards."""
    done = programs.run_python(HOT, places.migrated("sqlite"), str(place))
    assert done.returncode == 0, done.stderr
    assert (place / "kaged.db-wal").stat().st_size > 0
    if shared_memory:
        (place / "kaged.db-shm").write_bytes(bytes(32768))
    before = digests(place)
    import tempfile

    scratch = Path(tempfile.gettempdir())
    with read_only_mount(place):
        with kagedb.connect(url=f"sqlite://{place}/kaged.db", read_only=True):
            assert Project.named("only in the wal")
            assert list(scratch.glob("kaged-read-*"))
    assert digests(place) == before
    assert not list(scratch.glob("kaged-read-*"))


@pytest.mark.sqlite_only
def test_an_empty_wal_beside_a_copy_is_no_reason_for_a_scratch_copy(places: Places, place: Path) -> None:
    url = places.migrated("sqlite")
    fill(url)
    shutil.copy(url.removeprefix("sqlite://"), place / "kaged.db")
    (place / "kaged.db-wal").touch()
    with read_only_mount(place):
        with kagedb.connect(url=f"sqlite://{place}/kaged.db", read_only=True) as storage:
            assert Project.named("house")
            assert storage.database.immutable


@pytest.mark.sqlite_only
def test_a_reader_of_a_closed_store_changes_no_byte_of_it(places: Places) -> None:
    url = places.migrated("sqlite")
    fill(url)
    path = Path(url.removeprefix("sqlite://"))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with kagedb.connect(url=url, read_only=True):
        assert Project.named("house")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
