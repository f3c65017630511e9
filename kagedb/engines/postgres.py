"""PostgreSQL: chosen by one setting. One schema of our own in a database that others may use too.

Writers take turns by a transaction-scoped advisory lock (postgres_database.py), so that both engines answer alike; the
locks that outlive a transaction are in postgres_locks.py. Here are opening, forks, and whole-store work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StateError, StorageForbidden, StorageNotFound
from ..fields import Limits
from ..settings import Settings
from . import forks, postgres_catalogue
from .ddl import PostgresDDL
from .engine import HISTORY_TABLE, Figures
from .postgres_database import PostgresStoreDatabase
from .postgres_locks import PostgresLocks
from .postgres_server import QUERY_CANCELED, timeout_ms

if TYPE_CHECKING:
    from .archive import Archiver, Contents
    from .compacting import Compaction
    from .engine import Engine
    from .query import Answer
    from .salvage import Wreck
    from .transfer import Receiver


class PostgresEngine(PostgresLocks):
    """A store in one schema of a PostgreSQL database."""

    name = "postgres"
    database: PostgresStoreDatabase

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        super().__init__(settings, read_only=read_only)
        self.schema = settings.schema
        self.database = PostgresStoreDatabase(self)
        self.database.limits = Limits.of(settings)
        self.database.slow_transaction_ms = settings.slow_transaction_ms
        self.database.ddl = PostgresDDL(self.database, self.schema)

    @property
    def place(self) -> str:
        return f"{self.server.url.redacted} (schema {self.schema})"

    @property
    def audit_key_path(self) -> Path:
        return Path(self.settings.home) / "audit.key"

    # Opening and closing.

    def open(self, *, create: bool) -> None:
        forks.watch(self)
        if not create and not self.exists():
            raise StorageNotFound(f"there is no store at {self.place}", "make one with: kaged init")

    def exists(self) -> bool:
        # By the catalogue, which may be read without any right to the schema.
        found = self.database.raw(
            "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = ? AND c.relname = ?",
            (self.schema, HISTORY_TABLE),
        ).fetchone()
        self.database.statement_done()
        return found is not None

    def close(self) -> None:
        self.database.close_for_good(self.settings.busy_timeout_ms / 1000)
        self.database.close_all()
        self._forget_lock_connection()

    # Forks.

    def before_fork(self) -> None:
        # A connection that another thread is opening is in no list yet, and the child could not let go of it.
        self._locks_guard.acquire()
        self.database._pool_lock.acquire()

    def after_fork_in_parent(self) -> None:
        self.database._pool_lock.release()
        self._locks_guard.release()

    def after_fork_in_child(self) -> None:
        database = self.database
        inherited = database.all_connections()
        if self._locks is not None:
            inherited.append(self._locks)
        # The parent's session must end with the parent, not with the last copy of its socket; and whatever is still
        # sent on the copy must not reach the server.
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for connection in inherited:
            if not connection.closed:
                os.dup2(nowhere, connection.fileno(), inheritable=False)
        os.close(nowhere)
        forks.keep_for_ever(inherited)
        database.forget_connections()
        self._locks, self._locks_guard = None, threading.RLock()
        self._holds = self._excludes = False
        self._epoch, self._lost = None, ""

    # The catalogue.

    def tables(self) -> list[str]:
        found = postgres_catalogue.tables(self.database, self.schema)
        self.database.statement_done()
        return found

    def views(self) -> dict[str, tuple[str, ...]]:
        found = postgres_catalogue.views(self.database, self.schema)
        self.database.statement_done()
        return found

    def catalogue(self) -> list[str]:
        found = postgres_catalogue.catalogue(self.database, self.schema)
        self.database.statement_done()
        return found

    def change_schema(self, work: Callable[[], None]) -> None:
        with self.database.atomic():
            if not self.require_schema():
                self.database.raw(f'CREATE SCHEMA "{self.schema}"')
            work()

    def require_schema(self) -> bool:
        """Whether the schema is there. Raises StorageForbidden where this role may not make it, or a table in it."""
        raw = self.database.raw
        exists, usable, allowed, role, database = raw(
            "SELECT n.oid IS NOT NULL, COALESCE(has_schema_privilege(n.oid, 'USAGE, CREATE'), FALSE),"
            " has_database_privilege(current_database(), 'CREATE'), current_user, current_database()"
            " FROM (SELECT 1) one LEFT JOIN pg_namespace n ON n.nspname = ?",
            (self.schema,),
        ).fetchone()
        if exists and not usable:
            raise StorageForbidden(
                f'the role "{role}" may not make tables in the schema "{self.schema}" of the database "{database}"',
                f'let its owner run: GRANT USAGE, CREATE ON SCHEMA "{self.schema}" TO "{role}";',
            )
        if not exists and not allowed:
            raise StorageForbidden(
                f'the role "{role}" may not make the schema "{self.schema}" in the database "{database}"',
                f'let somebody who may run: CREATE SCHEMA "{self.schema}" AUTHORIZATION "{role}";',
            )
        return bool(exists)

    # Whole-store words.

    def figures(self) -> Figures:
        raw = self.database.raw
        version = raw("SHOW server_version").fetchone()[0]
        tables, indexes, dead = raw(
            "SELECT COALESCE(SUM(pg_table_size(c.oid)), 0)::bigint, COALESCE(SUM(pg_indexes_size(c.oid)), 0)::bigint,"
            " COALESCE(SUM(pg_table_size(c.oid) * s.n_dead_tup / NULLIF(s.n_live_tup + s.n_dead_tup, 0)), 0)::bigint"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid"
            " WHERE (n.nspname = ? OR starts_with(n.nspname, ? || '_p_')) AND c.relkind = 'r'",
            (self.schema, self.schema),
        ).fetchone()
        self.database.statement_done()
        return Figures(f"PostgreSQL {version}", {"tables": tables, "indexes": indexes}, (), dead)

    def size_bytes(self) -> int:
        return sum(self.figures().bytes_by_part.values())

    def archiver(self) -> Archiver:
        from .postgres_archive import PostgresArchiver

        return PostgresArchiver(self)

    def receiver(self) -> Receiver:
        from .postgres_transfer import PostgresReceiver

        return PostgresReceiver(self)

    def wreck(self, make: Callable[[Engine], None]) -> AbstractContextManager[Wreck]:
        raise StateError(
            f"{self.place} is in the files of a server, which only the server's own tools can read past damage",
            "restore a backup: kaged restore --latest; without one, save what pg_dump still gives, table by table",
        )

    def reading(self) -> AbstractContextManager[Contents]:
        from . import postgres_query

        return postgres_query.reading(self)

    def query(self, sql: str, named: Mapping[str, str], positional: Sequence[str]) -> AbstractContextManager[Answer]:
        from . import postgres_query

        return postgres_query.answer(self, sql, named, positional)

    def require_space(self) -> None:
        """The server's disk is not to be seen from here; a full one undoes the migration."""

    def erase_traces(self, table: str) -> None:
        # Plain VACUUM leaves the bytes of dead rows in their pages until something is written over them.
        self.database.execute_sql(f'VACUUM FULL "{table}"')

    def compact(self, run: Compaction) -> None:
        from . import postgres_compact

        postgres_compact.compact(self, run)

    @contextmanager
    def until(self, moment: float) -> Iterator[None]:
        from .compacting import TimeIsUp

        raw = self.database.raw
        # A statement that is ended breaks its transaction, and with it the snapshot that the block is a part of.
        raw("SAVEPOINT bounded")
        raw(f"SET LOCAL statement_timeout = {timeout_ms(moment)}")
        try:
            yield
        except Exception as error:
            if getattr(getattr(error, "orig", error), "pgcode", "") != QUERY_CANCELED:
                raise
            raw("ROLLBACK TO SAVEPOINT bounded")
            raise TimeIsUp() from error
        else:
            raw("ROLLBACK TO SAVEPOINT bounded")

    def damage(self) -> list[str]:
        """References and indexes, and every row read to its end, which finds pages that are damaged."""
        from . import postgres_contents

        found = postgres_contents.damage_of(self.database.raw, self.schema)
        self.database.statement_done()
        return found

    def exposed(self) -> list[str]:
        return []

    def missing_marks(self) -> list[str]:
        return []
