"""In which condition a SQLite store is: its library, its marks, and who can use its files.

What is damaged in it is found by sqlite_contents.py; who has it open or owns it is told by sqlite_locks.py.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .engine import Figures
from .sqlite_database import APPLICATION_ID, sqlite3

if TYPE_CHECKING:
    from .sqlite import SqliteEngine

FIXED_VERSIONS = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
"""SQLite without the WAL-reset bug: these in their series, and everything from the first on."""


def figures(engine: SqliteEngine) -> Figures:
    version = sqlite3.sqlite_version_info
    warnings = []
    fixed = version >= FIXED_VERSIONS[0] or any(version[:2] == f[:2] and version >= f for f in FIXED_VERSIONS)
    if not fixed:
        warnings.append(
            f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug; kaged avoids it among its own programs. Let no"
            " other program write to the file, or install a newer SQLite with the extra: kagedb[sqlite]"
        )
    source = (
        "pysqlite3"
        if sqlite3.__name__.startswith("pysqlite3")
        else f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    )
    (pages,), (page_bytes,) = (
        engine.database.raw(f"PRAGMA {word}").fetchone() for word in ("freelist_count", "page_size")
    )
    return Figures(f"SQLite {sqlite3.sqlite_version} ({source})", engine.sizes(), warnings, pages * page_bytes)


def exposed(engine: SqliteEngine) -> list[str]:
    owner = engine.path.stat()
    told = []
    for suffix in ("", "-wal", "-shm", ".lock", ".owner"):
        path = engine.beside(suffix)
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_mode & 0o077:
            told.append(f"{path} can be used by others: chmod 600 {path}")
        if found.st_uid != owner.st_uid:
            told.append(f"{path} is not the store's owner's: chown {owner.st_uid} {path}")
    return told


def missing_marks(engine: SqliteEngine) -> list[str]:
    raw = engine.database.raw
    missing = []
    if raw("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        missing.append("application_id")
    if raw("PRAGMA auto_vacuum").fetchone()[0] != 2:
        missing.append("auto_vacuum")
    if raw("PRAGMA page_size").fetchone()[0] != engine.settings.page_size:
        missing.append("page_size")
    return missing
