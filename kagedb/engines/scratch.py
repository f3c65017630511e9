"""A place for what a long piece of work has to remember, so that its memory does not grow with the store.

A database of SQLite's own, whatever the engine of the store; it is no part of any store.
"""

from __future__ import annotations

import sqlite3

MEMORY_KIB = 2_000
"""What is kept in memory: some 40,000 digests."""


class ScratchSet:
    """A set of byte strings, empty at first, of which what is beyond its memory is in a temporary file."""

    def __init__(self) -> None:
        # The empty name is a database of its own in a temporary file, which is made when memory is used up.
        self._connection = sqlite3.connect("", isolation_level=None)
        run = self._connection.execute
        for sql in (
            "PRAGMA journal_mode = OFF",
            f"PRAGMA cache_size = -{MEMORY_KIB}",
            "CREATE TABLE kept (item BLOB NOT NULL PRIMARY KEY) WITHOUT ROWID",
            "BEGIN",
        ):
            run(sql)
        self._run = run

    def add(self, item: bytes) -> bool:
        """Whether it was not in the set before."""
        return self._run("INSERT OR IGNORE INTO kept VALUES (?)", (item,)).rowcount == 1

    def __contains__(self, item: bytes) -> bool:
        return self._run("SELECT 1 FROM kept WHERE item = ?", (item,)).fetchone() is not None

    def close(self) -> None:
        """Give back memory and file."""
        self._connection.close()
