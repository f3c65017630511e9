"""What lies at the place and is not a kaged store is refused by name, and nothing of it is changed or replaced.

About the SQLite engine alone: there the place is a file.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

import kagedb
from kagedb.errors import KagedError, SettingsError, StorageCorrupt, StorageNotFound

pytestmark = pytest.mark.sqlite_only

WAYS_TO_OPEN = ({}, {"migrate": False}, {"read_only": True}, {"exclusive": True})


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def text_file(path: Path) -> None:
    path.write_text("Dear diary,\n" * 500)


def other_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE photos (id INTEGER PRIMARY KEY)")
    connection.commit()
    connection.close()


def other_database_in_wal_mode(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE photos (id INTEGER PRIMARY KEY)")
    connection.commit()
    connection.close()


def database_without_tables(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1")
    connection.close()


def log_without_its_database(path: Path) -> None:
    path.with_name(path.name + "-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(60))


def journal_without_its_database(path: Path) -> None:
    path.with_name(path.name + "-journal").write_bytes(bytes(512))


IN_THE_WAY: dict[Callable[[Path], None], tuple[type[KagedError], str]] = {
    empty_file: (StorageCorrupt, "is an empty file, not a kaged store"),
    text_file: (StorageCorrupt, "not a SQLite database"),
    other_database: (StorageCorrupt, "is a SQLite database, but not a kaged store"),
    other_database_in_wal_mode: (StorageCorrupt, "is a SQLite database, but not a kaged store"),
    database_without_tables: (StorageCorrupt, "is a SQLite database, but not a kaged store"),
    log_without_its_database: (StorageCorrupt, r"is missing, but kaged\.db-wal lies beside"),
    journal_without_its_database: (StorageCorrupt, r"is missing, but kaged\.db-journal lies beside"),
    Path.mkdir: (StorageNotFound, "is a directory"),
}


def files(directory: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, but for those that SQLite and the locks may leave beside a database."""
    return {
        path.name: path.read_bytes() if path.is_file() else None
        for path in directory.iterdir()
        if not path.name.endswith((".lock", "-shm")) and not (path.name.endswith("-wal") and path.stat().st_size == 0)
    }


@pytest.mark.parametrize("make", IN_THE_WAY, ids=lambda make: make.__name__)
def test_what_is_not_a_store_is_refused_and_left_alone(
    tmp_path: Path, engine: str, make: Callable[[Path], None]
) -> None:
    kind, told = IN_THE_WAY[make]
    path = tmp_path / "kaged.db"
    make(path)
    before = files(tmp_path)
    for options in WAYS_TO_OPEN:
        with pytest.raises(kind, match=told) as caught:
            kagedb.connect(url=f"sqlite://{path}", **options)  # type: ignore[arg-type]
        assert type(caught.value) is kind
        assert str(path) in caught.value.message and caught.value.hint
        assert files(tmp_path) == before, options


def test_a_truncated_store_is_refused_and_left_alone(tmp_path: Path, migrated_url: str) -> None:
    path = tmp_path / "kaged.db"
    os.truncate(path, path.stat().st_size // 2)
    before = path.read_bytes()
    for options in WAYS_TO_OPEN:
        with pytest.raises(StorageCorrupt, match="malformed") as caught:
            kagedb.connect(url=migrated_url, **options)  # type: ignore[arg-type]
        assert "restore a backup" in caught.value.hint
        assert path.read_bytes() == before


def test_a_directory_that_is_missing_is_not_made(tmp_path: Path, engine: str) -> None:
    for options in ({}, {"exclusive": True}):
        with pytest.raises(SettingsError, match="is not there") as caught:
            kagedb.connect(url=f"sqlite://{tmp_path}/no/such/place/kaged.db", **options)  # type: ignore[arg-type]
        assert "mkdir" in caught.value.hint
    for options in ({"migrate": False}, {"read_only": True}):
        with pytest.raises(StorageNotFound):
            kagedb.connect(url=f"sqlite://{tmp_path}/no/such/place/kaged.db", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_not_there_is_made_only_where_that_is_wanted(tmp_path: Path, engine: str) -> None:
    for options in ({"migrate": False}, {"read_only": True}):
        with pytest.raises(StorageNotFound, match="there is no store at") as caught:
            kagedb.connect(url=f"sqlite://{tmp_path}/kaged.db", **options)  # type: ignore[arg-type]
        assert "kaged init" in caught.value.hint
        assert list(tmp_path.iterdir()) == []
