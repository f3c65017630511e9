"""The half of the PostgreSQL engine that shares, excludes and owns: session advisory locks on a connection for them.

A write first makes sure that the connection is alive, and takes the locks again where it was lost. Ownership is fenced:
whoever becomes the owner counts an epoch up, and every write of an owner reads it inside its turn, so that a daemon
that was cut off cannot write after another has taken over.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ReadOnlyStorage, StorageInUse, StorageUnavailable
from .engine import STARTER_WAIT_SECONDS, USE_GRACE_SECONDS, Engine, Holder
from .postgres_server import PostgresServer, alive, driver, lost

if TYPE_CHECKING:
    from ..settings import Settings

POLL_SECONDS = 0.05
"""Between tries for a session lock: PostgreSQL can wait by itself, but then not say who is in the way."""

OWNER_COUNTER = "owner_epoch"
"""The row of `counter` that each new owner counts up."""

NAME_BYTES = 63
"""What PostgreSQL keeps of an application_name (NAMEDATALEN - 1)."""


class PostgresLocks(Engine):
    """The locks of a store in a PostgreSQL schema; the rest of the engine is PostgresEngine."""

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        super().__init__(settings, read_only=read_only)
        self.server = PostgresServer(settings, read_only=read_only)
        self._locks: Any = None
        self._locks_guard = threading.RLock()
        self._shares = False
        self._excludes = False
        self._holds = False
        """Whether the connection has every lock that this process should have."""
        self._epoch: int | None = None
        self._lost = ""
        self._description = ""

    def key(self, lock: str) -> int:
        """The advisory lock's key: of this schema alone, since the database may hold other stores and programs."""
        digest = hashlib.sha256(f"kagedb:{self.server.schema}:{lock}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def keep_locks(self) -> None:
        """Make sure that the locks are still held; take them again after a lost connection.

        Raises StorageInUse where somebody else has taken the store meanwhile.
        """
        with self._locks_guard:
            if self._lost:
                raise StorageInUse(self._lost, "stop one of the two daemons, and start this one again")
            if self._holds and self._locks is not None and alive(self._locks):
                return
            if self._excludes:
                raise StorageUnavailable(
                    "the connection that keeps others out of the store was lost during the migration", "migrate again"
                )
            self._forget_lock_connection()
            if self._shares and not self._try("try_advisory_lock_shared", "use"):
                raise StorageInUse(f"the store {self.place} is being migrated or replaced", "try again later")
            if self._epoch is not None and not self._try("try_advisory_lock", "owner"):
                self._lose()
            self._holds = True

    def _forget_lock_connection(self) -> None:
        self._holds = False
        locks, self._locks = self._locks, None
        if locks is not None:
            locks.close()

    def _lose(self) -> None:
        holder = self.owner()
        self._lost = f"this daemon lost the store {self.place} to another: {holder or Holder(0)}"
        raise StorageInUse(self._lost, "stop one of the two daemons, and start this one again")

    def epoch_query(self) -> str:
        """What an owner asks inside its turn; "" for everybody else."""
        if self._epoch is None:
            return ""
        return f"; SELECT value FROM counter WHERE name = '{OWNER_COUNTER}'"  # noqa: S608

    def check_epoch(self, cursor: Any) -> None:
        """Raises StorageInUse where the answer says that somebody has become the owner since."""
        if self._epoch is not None:
            row = cursor.fetchone()
            if row is None or row[0] != self._epoch:
                self._lose()

    def share(self) -> None:
        patience = self.settings.busy_timeout_ms / 1000
        # Patience counts anew when a migration ends, which it may do between a try and the look at who migrates.
        began = last_migrating = time.monotonic()
        while not self._try("try_advisory_lock_shared", "use"):
            now = time.monotonic()
            if self.holder("starters") is not None:
                last_migrating = now
            if now - began > STARTER_WAIT_SECONDS or now - last_migrating > patience:
                raise StorageInUse(f"the store {self.place} is being migrated or replaced", "try again later")
            time.sleep(POLL_SECONDS)
        self._shares = self._holds = True

    def unshare(self) -> None:
        if self._shares:
            self._ask("SELECT pg_advisory_unlock_shared(%s)", self.key("use"))
            self._shares = False

    def exclude(self) -> None:
        deadline = time.monotonic() + USE_GRACE_SECONDS
        while not self._try("try_advisory_lock", "use"):
            if time.monotonic() > deadline:
                who = self.owner() or self.holder("use") or Holder(0)
                raise StorageInUse(
                    f"the store {self.place} is open in {who}", "stop the daemon, or whatever has it open"
                )
            time.sleep(POLL_SECONDS)
        self._excludes = True

    def readmit(self) -> None:
        if self._excludes:
            self._excludes = False
            if self._locks is not None and not lost(self._locks):
                self._ask("SELECT pg_advisory_unlock(%s)", self.key("use"))

    @contextmanager
    def starters_line(self) -> Iterator[None]:
        deadline = time.monotonic() + STARTER_WAIT_SECONDS
        while not self._try("try_advisory_lock", "starters"):
            if time.monotonic() > deadline:
                raise StorageInUse(f"the store {self.place} is still being migrated", "try again later")
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            if self._locks is not None and not lost(self._locks):
                self._ask("SELECT pg_advisory_unlock(%s)", self.key("starters"))

    def own(self, description: str) -> None:
        if self.read_only:
            raise ReadOnlyStorage("a store opened to be read has no owner", "open it without read_only=True")
        self._description = description
        if self._locks is not None:
            self._ask("SELECT set_config('application_name', %s, false)", self._lock_name())
        if not self._try("try_advisory_lock", "owner"):
            holder = self.owner() or Holder(0)
            raise StorageInUse(f"the store {self.place} belongs to another daemon: {holder}", "stop that one first")
        with self.database.atomic():
            self.database.raw("UPDATE counter SET value = value + 1 WHERE name = ?", (OWNER_COUNTER,))
            row = self.database.raw("SELECT value FROM counter WHERE name = ?", (OWNER_COUNTER,)).fetchone()
        self._epoch = int(row[0])

    def owner(self) -> Holder | None:
        return self.holder("owner")

    def writer(self) -> Holder | None:
        return self.holder("writer")

    def holder(self, lock: str) -> Holder | None:
        """Who holds the lock, other than this process's connection for locks."""
        key = self.key(lock) & 0xFFFFFFFFFFFFFFFF
        row = self._ask(
            "SELECT (SELECT a.pid || ' ' || a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE"
            " datname = current_database()) AND l.classid = %s AND l.objid = %s AND l.objsubid = 1"
            " AND l.pid <> pg_backend_pid() LIMIT 1)",
            key >> 32,
            key & 0xFFFFFFFF,
        )
        if row is None:
            return None
        pid, _, name = str(row).partition(" ")
        return Holder(0, f"{name}, server process {pid}")

    def _try(self, function: str, lock: str) -> bool:
        return bool(self._ask(f"SELECT pg_{function}(%s)", self.key(lock)))

    def _ask(self, sql: str, *params: Any) -> Any:
        """One value from the connection for locks, which is opened where there is none."""
        with self._locks_guard:
            if self._locks is not None and lost(self._locks):
                self._forget_lock_connection()
            if self._locks is None:
                self._holds = False
                self._locks = self.server.connect(application_name=self._lock_name())
            try:
                with self._locks.cursor() as cursor:
                    cursor.execute(sql, params or None)
                    return cursor.fetchone()[0]
            except driver.Error as error:
                text = self.server.url.scrub(str(error).strip())
        raise StorageUnavailable(f"the connection to the PostgreSQL server was lost: {text}", "try again")

    def _lock_name(self) -> str:
        name = f"kaged {socket.gethostname()} pid {os.getpid()} {self._description}"
        return name.encode()[:NAME_BYTES].decode(errors="ignore").strip()
