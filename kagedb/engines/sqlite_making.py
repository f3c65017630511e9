"""How the schema of a SQLite store is changed in one transaction, and how a new store comes into its place.

What a script may do to the schema is ddl.py; when one is run, and over which store, is decided above the engines.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import MigrationFailed, StorageError
from ..settings import sync_directory
from .places import make_private_file, sync_file

if TYPE_CHECKING:
    from .sqlite import SqliteEngine
    from .sqlite_database import SqliteStoreDatabase


def in_one_transaction(database: SqliteStoreDatabase, work: Callable[[], None]) -> None:
    """Raises MigrationFailed where `work` leaves a dangling reference."""
    # Does nothing inside a transaction; with it on, rebuilding a table deletes the rows that refer to it.
    database.raw("PRAGMA foreign_keys = OFF")
    try:
        with database.atomic():
            work()
            dangling = database.raw("PRAGMA foreign_key_check").fetchmany(5)
            if dangling:
                places = ", ".join(f"{table} row {row} -> {target}" for table, row, target, _ in dangling)
                raise MigrationFailed(f"the migration would leave dangling references: {places}")
    finally:
        database.raw("PRAGMA foreign_keys = ON")


def make(engine: SqliteEngine, work: Callable[[], None]) -> None:
    """Make the store aside and rename it into place, so that it is whole or not there."""
    database, path = engine.database, engine.path
    for leftover in path.parent.glob(f".{path.name}.new*"):
        leftover.unlink()
    aside = path.with_name(f".{path.name}.new")
    database.close()
    make_private_file(aside)
    database.database = str(aside)
    database.creating = True
    try:
        try:
            in_one_transaction(database, work)
            if database.raw("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise StorageError(
                    f"{path} cannot be put into WAL mode",
                    "keep the store on a local file system that supports shared memory",
                )
        finally:
            database.close()
        sync_file(aside)
        os.rename(aside, path)
        sync_directory(path.parent)
    except BaseException:
        for leftover in path.parent.glob(f"{aside.name}*"):
            leftover.unlink()
        raise
    finally:
        database.creating = False
        database.database = str(path)
