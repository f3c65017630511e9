"""SQLite: how each connection is set up, what the files beside the store are like, and how a store is closed."""

from __future__ import annotations

import gc
import os
import stat
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peewee
import pytest

import kagedb
import programs
from kagedb import AuditEvent
from kagedb.engines import sqlite, sqlite_database
from kagedb.errors import ImmutableError, StorageCorrupt, StorageError
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from kagedb.storage import Storage

pytestmark = pytest.mark.sqlite_only


def path_of(storage: Storage) -> Path:
    return Path(storage.database.database)


def settings_of_this_connection(storage: Storage) -> dict[str, Any]:
    names = (
        "page_size auto_vacuum journal_mode synchronous foreign_keys busy_timeout cache_size mmap_size"
        " journal_size_limit wal_autocheckpoint application_id query_only encoding"
    )
    return {name: storage.database.execute_sql(f"PRAGMA {name}").fetchone()[0] for name in names.split()}


EXPECTED = {
    "page_size": 2048,
    "auto_vacuum": 2,  # INCREMENTAL
    "journal_mode": "wal",
    "synchronous": 2,  # FULL
    "foreign_keys": 1,
    "busy_timeout": 5000,
    "cache_size": -2000,
    "mmap_size": 0,
    "journal_size_limit": 16_384 * 1024,
    "wal_autocheckpoint": 2048,
    "application_id": 0x4B616765,
    "query_only": 0,
    "encoding": "UTF-8",
}


def test_every_connection_is_set_up_alike(url: str) -> None:
    with kagedb.connect(url=url) as storage:
        assert settings_of_this_connection(storage) == EXPECTED, "the connection that made the store"
        seen: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: seen.append(settings_of_this_connection(storage)))
        thread.start()
        thread.join()
        assert seen == [EXPECTED], "another thread's"
        with storage.snapshot():
            pass
        assert settings_of_this_connection(storage) == EXPECTED, "after a snapshot"
    with kagedb.connect(url=url) as storage:
        assert settings_of_this_connection(storage) == EXPECTED, "of a store that was there"


def test_the_settings_of_the_operator_reach_the_connection(url: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        "[storage]\nbusy_timeout_ms = 1234\n[sqlite]\npage_size = 4096\ncache_kib = 512\n"
        "wal_autocheckpoint_kib = 1024\njournal_size_limit_kib = 2048\n"
    )
    config.chmod(0o600)
    changed = {"page_size": 4096, "busy_timeout": 1234, "cache_size": -512, "wal_autocheckpoint": 256}
    with kagedb.connect(url=url, config=config) as storage:
        assert settings_of_this_connection(storage) == EXPECTED | changed | {"journal_size_limit": 2048 * 1024}


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_the_files_of_a_store_are_private_whatever_the_umask(url: str, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with kagedb.connect(url=url, exclusive=True):
            Counter.put(name="a", value=0)
            files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*kaged.db*")}
    finally:
        os.umask(before)
    assert files == dict.fromkeys(
        ["kaged.db", "kaged.db-wal", "kaged.db-shm", "kaged.db.lock", "kaged.db.owner"], 0o600
    )


def test_the_default_home_is_private_whatever_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        kagedb.connect().close()
    finally:
        os.umask(before)
    directory = home / ".local/share/kaged"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "kaged.db").stat().st_mode) == 0o600


def test_a_store_that_was_taken_out_of_wal_mode_is_put_back(migrated_url: str, tmp_path: Path) -> None:
    with peewee.sqlite3.connect(tmp_path / "kaged.db") as connection:
        assert connection.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    connection.close()
    with kagedb.connect(url=migrated_url) as storage:
        assert settings_of_this_connection(storage)["journal_mode"] == "wal"
        Counter.put(name="a", value=0)


def test_a_place_that_cannot_have_a_wal_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VFS without shared memory stands for such a file system: SQLite's own, with locks in files."""
    connect = peewee.sqlite3.connect

    def without_shared_memory(place: Any, **options: Any) -> Any:
        return connect(f"{place}&vfs=unix-dotfile" if "?" in str(place) else place, **options)

    monkeypatch.setattr(sqlite_database.sqlite3, "connect", without_shared_memory)
    with pytest.raises(StorageError, match="cannot be put into WAL mode") as refusal:
        kagedb.connect(url=url)
    assert "local file system" in refusal.value.hint
    assert kagedb.storage.current() is None


def test_a_sqlite_that_is_too_old_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite.sqlite3, "sqlite_version_info", (3, 37, 2))
    monkeypatch.setattr(sqlite.sqlite3, "sqlite_version", "3.37.2")
    with pytest.raises(StorageError, match=r"SQLite 3.37.2 is too old; 3.38 or newer is needed") as refusal:
        kagedb.connect(url=url)
    assert "kagedb[sqlite]" in refusal.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_the_wal_reset_bug_is_named_where_the_library_has_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], warned: bool
) -> None:
    monkeypatch.setattr(sqlite.sqlite3, "sqlite_version_info", version)
    warnings = storage.engine.figures().warnings
    assert bool(warnings) is warned
    assert not warned or "kagedb[sqlite]" in warnings[0]


def test_closing_leaves_one_file_and_its_lock(storage: Storage, tmp_path: Path) -> None:
    Counter.put(name="a", value=0)
    assert path_of(storage).with_name("kaged.db-wal").stat().st_size > 0
    storage.close()
    assert {path.name for path in tmp_path.iterdir()} == {"kaged.db", "kaged.db.lock"}


FAILING = {
    "no such column": "SELECT no_such_column FROM counter",
    "a constraint": "INSERT INTO counter (name, value) VALUES ('one', 1), ('one', 2)",
    "a guard": "DELETE FROM audit_event",
    "a later row": (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 100)"
        " SELECT CASE WHEN x > 90 THEN abs(-9223372036854775807 - 1) END FROM n"
    ),
}


@pytest.mark.parametrize("how", FAILING)
@pytest.mark.parametrize("in_transaction", [False, True])
def test_a_statement_that_failed_does_not_keep_the_files_of_a_closed_store_open(
    storage: Storage, how: str, in_transaction: bool
) -> None:
    AuditEvent.record("policy.decision", actor="agent:planner", body={})
    database = storage.database
    gc.disable()  # closing is not left to the collector
    try:
        with pytest.raises((peewee.PeeweeException, ImmutableError)):
            with database.atomic() if in_transaction else nullcontext():
                list(database.execute_sql(FAILING[how]))
        storage.close()
        held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert [path for path in held if path.startswith(str(path_of(storage)))] == []
    finally:
        gc.enable()


def test_a_program_that_ends_without_closing_loses_nothing_and_closes(migrated_url: str, tmp_path: Path) -> None:
    code = """
import sys, kagedb
from kagedb.models.base import Counter
storage = kagedb.connect(url=sys.argv[1])
Counter.put(name=sys.argv[2], value=0)
if sys.argv[2] == "in an exception":
    sys.stderr = None
    raise KeyError
"""
    for name in ("quietly", "in an exception"):
        programs.run_python(code, migrated_url, name)
        assert not (tmp_path / "kaged.db-wal").exists(), "the end of the program has moved it into the database"
    with kagedb.connect(url=migrated_url):
        assert Counter.select().where(Counter.name.in_(["quietly", "in an exception"])).count() == 2


def test_a_damaged_file_is_said_to_be_damaged(storage: Storage, migrated_url: str) -> None:
    path = path_of(storage)
    Counter.insert_many([{"name": f"n{number:05}", "value": number} for number in range(2000)]).execute()
    storage.close()
    data = bytearray(path.read_bytes())
    for page in range(10, len(data) // 2048):
        data[page * 2048 : page * 2048 + 512] = os.urandom(512)
    path.write_bytes(bytes(data))
    with pytest.raises(StorageCorrupt) as refusal:
        with kagedb.connect(url=migrated_url) as damaged:
            damaged.database.execute_sql("SELECT count(*), sum(length(name)) FROM counter").fetchall()
            Counter.delete().execute()
    assert refusal.value.exit_status == 3
    assert path.read_bytes()[:16] == b"SQLite format 3\0"


def test_another_program_that_keeps_the_file_is_reported_as_busy(migrated_url: str, tmp_path: Path) -> None:
    """A program that knows nothing of turns: it may not write, but it does."""
    from kagedb.errors import StorageBusy

    config = tmp_path / "config.toml"
    config.write_text("[storage]\nbusy_timeout_ms = 200\n")
    config.chmod(0o600)
    code = f"""
import sqlite3, sys
connection = sqlite3.connect({str(tmp_path / "kaged.db")!r}, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("holds", flush=True)
input()
"""
    with kagedb.connect(url=migrated_url, config=config) as storage:
        Counter.put(name="first", value=0)
        other = programs.start_python(code)
        programs.wait_for_line(other, "holds")
        with pytest.raises(StorageBusy, match="another program held"):
            Counter.put(name="lost", value=0)
        assert Counter.select().where(Counter.name == "first").exists()
        other.communicate("\n")
        Counter.put(name="second", value=0)
        assert storage.database.turn is not None


def test_the_database_file_of_an_open_store_is_opened_by_sqlite_alone(migrated_url: str, tmp_path: Path) -> None:
    """Python hears of every file that it opens itself; SQLite's own opening it does not hear of."""
    code = """
import os, sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else None)
import kagedb
from kagedb import AuditEvent, Project, Prompt, Run, Session
with kagedb.connect(url=sys.argv[1], exclusive=True) as storage:
    project = Project.add("house", actor="operator:ana")
    Prompt.edit(project, "planner", "body", actor="operator:ana")
    with storage.transaction("relaxed"):
        session = Session.start(project, title="night", actor="operator:ana")
        Run.dispatch(session, agent="planner", input={}).finish(output={})
    with storage.snapshot():
        list(AuditEvent.select())
    storage.engine.figures(), storage.engine.size_bytes(), storage.engine.missing_marks(), storage.engine.catalogue()
    storage.engine.owner()
database = sys.argv[2]
files = [os.fsdecode(path) for path in opened if isinstance(path, (str, bytes, os.PathLike))]
assert database + ".lock" in files
assert not {database, database + "-shm", database + "-journal"} & set(files), files
"""
    done = programs.run_python(code, migrated_url, str(tmp_path / "kaged.db"))
    assert done.returncode == 0, done.stderr


def test_sqlite_comes_from_where_peewee_takes_it() -> None:
    """Two copies of the library in one process would drop each other's locks."""
    assert sqlite.sqlite3 is peewee.sqlite3
    code = (
        "import sys, kagedb.engines.sqlite; print([name for name in sys.modules if name in ('_sqlite3', 'pysqlite3')])"
    )
    done = programs.run_python(code, fresh=True)
    expected = "pysqlite3" if peewee.sqlite3.__name__.startswith("pysqlite3") else "_sqlite3"
    assert expected in done.stdout
