"""The half of the SQLite engine that shares, excludes and owns: the locks of locks.py with their waits and words.

Who holds a lock the kernel says; what the owner says of itself is in a note beside the database.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ReadOnlyStorage, StorageInUse
from .engine import STARTER_WAIT_SECONDS, USE_GRACE_SECONDS, Engine, Holder
from .locks import MIGRATION, OWNER, USE, WRITER, LockFile
from .places import make_private_file

SHARE_POLL_SECONDS = 0.05
"""Between looks at who keeps the store from being shared: migrations take seconds, a busy starter an instant."""

RESTORE_NOTE = ".restore"
"""Ends the name of a file beside the database that is there while a restore is at work, or where one was cut off."""

RESTORE_DRAFT = ".restore.new"
"""Ends the name of a note that is being written; one that was cut off says nothing."""


class SqliteLocks(Engine):
    """The locks of a store in a file; the rest of the engine is SqliteEngine."""

    path: Path
    _locks: LockFile | None = None
    _shares = False
    _owns = False

    def beside(self, suffix: str) -> Path:
        """The path of a file that belongs to the database file."""
        return self.path.with_name(self.path.name + suffix)

    def share(self) -> None:
        if self._locks is None or self._shares:
            return
        patience = self.settings.busy_timeout_ms / 1000
        # Patience counts anew when a migration ends, which it may do between a try and the look at who migrates.
        began = last_migrating = time.monotonic()
        while not self._locks.lock(USE, SHARE_POLL_SECONDS, shared=True):
            now = time.monotonic()
            if self._locks.holder(MIGRATION) is not None:
                last_migrating = now
                if now - began > STARTER_WAIT_SECONDS:
                    raise StorageInUse(f"the store {self.path} is still being migrated", "try again later")
            elif now - last_migrating > patience:
                who = Holder(self._locks.holder(USE) or 0)
                raise StorageInUse(f"{who} is replacing or changing the store {self.path}", "try again later")
        self._shares = True

    def unshare(self) -> None:
        if self._locks is not None and self._shares:
            # A connection must not outlast it: a restore may put another file in place.
            self.database.close()
            self._locks.unlock(USE)
            self._shares = False

    def exclude(self) -> None:
        if self._locks is None:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True")
        if not self._locks.lock(USE, USE_GRACE_SECONDS):
            owner = self.owner()
            who = owner if owner is not None else Holder(self._locks.holder(USE) or 0)
            raise StorageInUse(f"the store {self.path} is open in {who}", "stop the daemon, or whatever has it open")
        self._shares = True

    def readmit(self) -> None:
        if self._locks is not None:
            self._locks.try_lock(USE, shared=True)

    @contextmanager
    def starters_line(self) -> Iterator[None]:
        if self._locks is None:
            raise ReadOnlyStorage("the store was opened to be read", "open it without read_only=True")
        if not self._locks.lock(MIGRATION, STARTER_WAIT_SECONDS):
            raise StorageInUse(f"the store {self.path} is still being migrated", "try again later")
        try:
            yield
        finally:
            self._locks.unlock(MIGRATION)

    def own(self, description: str) -> None:
        if self._locks is None or self.read_only:
            raise ReadOnlyStorage("a store opened to be read has no owner", "open it without read_only=True")
        if not self._locks.try_lock(OWNER):
            holder = self.owner() or Holder(0)
            raise StorageInUse(f"the store {self.path} belongs to another daemon: {holder}", "stop that one first")
        self._owns = True
        make_private_file(self.beside(".owner"))
        self.beside(".owner").write_text(json.dumps({"pid": os.getpid(), "description": description}))

    def owner(self) -> Holder | None:
        if self._locks is None:
            return None
        pid = self._locks.holder(OWNER)
        if pid is None:
            return None
        try:
            said = json.loads(self.beside(".owner").read_text())
        except (OSError, ValueError):
            return Holder(pid)
        # The note of a daemon before this one may still be there.
        return Holder(pid, str(said.get("description", "")) if pid in (0, said.get("pid")) else "")

    def writer(self) -> Holder | None:
        pid = self._locks.holder(WRITER) if self._locks is not None else None
        return None if pid is None else Holder(pid)

    def release(self) -> None:
        """Give every lock back."""
        if self._owns:
            with suppress(FileNotFoundError):
                self.beside(".owner").unlink()
        if self._locks is not None:
            self._locks.close()
        self._locks, self._shares, self._owns = None, False, False
