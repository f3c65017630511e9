"""PostgreSQL: chosen by one setting. One schema of our own in a database that others may use too.

Writers take turns by a transaction-scoped advisory lock, so that both engines answer alike. The locks that outlive a
transaction (use, owner) are session advisory locks on one connection kept for them; a write makes sure that it is
alive. Ownership is fenced: whoever becomes the owner counts an epoch up, and every write of an owner reads it inside
its turn, so that a daemon that was cut off cannot write after another has taken over.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peewee
from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase

from ..errors import (
    ImmutableError,
    ReadOnlyStorage,
    SettingsError,
    StorageBusy,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageForbidden,
    StorageFull,
    StorageInUse,
    StorageNotFound,
    StorageUnavailable,
    TransactionError,
)
from ..fields import Limits
from ..settings import Settings
from . import forks, postgres_catalogue
from .ddl import REFUSAL, PostgresDDL
from .engine import HISTORY_TABLE, STARTER_WAIT_SECONDS, USE_GRACE_SECONDS, Engine, Figures, Holder
from .transactions import RELAXED, StoreDatabase

OLDEST_VERSION = 130000
"""PostgreSQL 13, as the server counts versions: the oldest whose settings used below exist and that is tried at all."""

KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_COUNT = 30, 10, 3
USER_TIMEOUT_MS = 60_000
"""On both sides of a connection: a host that died without a word frees its locks within a minute."""

POLL_SECONDS = 0.05
"""Between tries for a session lock: PostgreSQL can wait by itself, but then not say who is in the way."""

STREAM_ROWS = 1_000
"""Rows fetched at a time by `stream`."""

OWNER_COUNTER = "owner_epoch"


class _Adapter(peewee.Psycopg2Adapter):  # type: ignore[misc]
    """How Peewee asks psycopg2 for a connection: through the engine, which knows the secret."""

    def connect(self, db: Any, **params: Any) -> Any:
        return db.new_connection()


class PostgresStoreDatabase(StoreDatabase, PooledPostgresqlDatabase):  # type: ignore[misc]
    """Peewee's pooled PostgreSQL database with turns to write, durability by transaction, and our errors.

    A thread has a connection only while it is in a transaction or statement.
    """

    psycopg2_adapter = _Adapter
    field_types = {  # noqa: RUF012
        **PooledPostgresqlDatabase.field_types,
        "ULID": 'TEXT COLLATE "C"',
        "INTEGER64": "BIGINT",
        "PLAIN_TEXT": 'TEXT COLLATE "C"',
        "JSON_TEXT": "JSON",
    }

    def __init__(self, engine: PostgresEngine, settings: Settings, *, read_only: bool) -> None:
        self.engine = engine
        self.settings = settings
        super().__init__(
            settings.url.redacted,
            max_connections=settings.pool_size,
            timeout=max(1, settings.busy_timeout_ms // 1000),
        )
        self.read_only = read_only

    # Connections.

    def new_connection(self) -> Any:
        return self.engine.new_connection()

    def connect(self, reuse_if_open: bool = False) -> bool:
        try:
            return super().connect(reuse_if_open)
        except MaxConnectionsExceeded:
            raise StorageBusy(
                f"all {self.settings.pool_size} connections to PostgreSQL stayed in use",
                "shorten the transactions that hold them, or raise postgres.pool_size",
            ) from None

    def all_connections(self) -> list[Any]:
        """Every connection of the pool, idle or in use."""
        return [entry[2] for entry in self._connections] + [used.connection for used in self._in_use.values()]

    def forget_connections(self) -> None:
        """In a forked child: start with an empty pool, without closing what was inherited."""
        self._pool_lock = threading.RLock()
        self._pool_available = threading.Condition(self._pool_lock)
        self._lock = threading.Lock()
        self._connections, self._in_use = [], {}
        self._state.reset()

    def _is_closed(self, conn: Any) -> bool:
        if conn.closed:
            return True
        # Something to read on an idle connection is its end, or a notice; only then is a round trip worth it.
        return _readable(conn) and bool(super()._is_closed(conn))

    def statement_done(self) -> None:
        state = self._state
        if not state.closed and not state.transactions and not state.ctx:
            self.close()

    # Transactions.

    def begin_write(self, durability: str) -> None:
        engine = self.engine
        engine.keep_locks()
        try:
            self._begin(durability)
        except StorageUnavailable:
            # Nothing was begun: a connection that had died unseen is worth a second try.
            self.close()
            self.connect()
            self._begin(durability)

    def _begin(self, durability: str) -> None:
        engine = self.engine
        commit_setting = "off" if durability == RELAXED else engine.full_commit
        try:
            cursor = self.raw(
                "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
                f"SET LOCAL synchronous_commit = {commit_setting};"
                f"SELECT pg_advisory_xact_lock({engine.key('writer')})" + engine.epoch_query()
            )
            engine.check_epoch(cursor)
        except BaseException:
            self.rollback_write()
            raise

    def commit_write(self, durability: str) -> None:
        try:
            self.raw("COMMIT")
        except StorageUnavailable as error:
            raise StorageUnavailable(
                "the server went away during a commit; whether the transaction was saved is not known",
                "read it back before doing it again",
            ) from error

    def rollback_write(self) -> None:
        connection = self._state.conn
        if connection is None:
            return
        if not connection.closed:
            try:
                self.raw("ROLLBACK")
                return
            except StorageUnavailable:
                pass  # The server rolls back what its lost client left.
        self.close()

    def can_roll_back_to_savepoint(self) -> bool:
        return not self._state.conn.closed

    def strengthen(self) -> None:
        self.raw(f"SET LOCAL synchronous_commit = {self.engine.full_commit}")

    def begin_snapshot(self) -> None:
        # The first query fixes the snapshot, not BEGIN.
        self.raw("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1")

    def end_snapshot(self) -> None:
        self.rollback_write()

    @contextmanager
    def alone(self) -> Iterator[None]:
        # Statements like VACUUM take their own locks; they cannot run while a transaction-scoped lock is held.
        yield

    # Words.

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        # A cursor on the server: psycopg2 would fetch everything first (50 MB for 100,000 rows).
        self._state.savepoints += 1
        name = f"kaged_cursor_{self._state.savepoints}"
        self.raw(f"DECLARE {name} NO SCROLL CURSOR FOR {self.dialect(sql)}", params)
        while rows := self.raw(f"FETCH {STREAM_ROWS} FROM {name}").fetchall():
            yield from rows
        self.raw(f"CLOSE {name}")

    def dialect(self, sql: str) -> str:
        return sql.replace("%", "%%").replace("?", "%s")

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        return super().raw(self.dialect(sql) if params and "%s" not in sql else sql, params)

    def json_text(self, field: Any, keys: tuple[str | int, ...]) -> Any:
        parts: list[Any] = [field]
        for key in keys[:-1]:
            parts += [peewee.SQL("->"), _json_key(key)]
        document = peewee.NodeList((*parts, peewee.SQL("->"), _json_key(keys[-1])))
        text = peewee.NodeList((*parts, peewee.SQL("->>"), _json_key(keys[-1])))
        return peewee.NodeList(
            (
                peewee.SQL("CASE WHEN json_typeof("),
                document,
                peewee.SQL(") IN ('string', 'number', 'boolean') THEN"),
                text,
                peewee.SQL("END"),
            )
        )

    def translate(self, error: Exception) -> Exception:
        driver = error.args[0] if error.args else error
        code = getattr(driver, "pgcode", None) or ""
        diagnostics = getattr(driver, "diag", None)
        text = (getattr(diagnostics, "message_primary", None) or str(driver)).strip()
        text = self.settings.url.scrub(text.splitlines()[0] if text else "no reason given")
        if self.closed_for_good:
            return StorageClosed("the store is closed", "open it again with kagedb.connect()")
        connection = self._state.conn
        lost = connection is not None and connection.closed
        if lost or code[:2] == "08" or code in ("57P01", "57P02", "57P03"):
            return StorageUnavailable(
                f"the connection to the PostgreSQL server was lost: {text}", "nothing of the transaction was saved; try again"
            )
        if text.startswith(REFUSAL):
            return ImmutableError(text.removeprefix(REFUSAL))
        if code in ("55P03", "40P01"):
            return StorageBusy(
                f"waited {self.settings.busy_timeout_ms} ms for another writer",
                "try again, shorten that transaction, or raise storage.busy_timeout_ms",
            )
        if code == "53100":
            return StorageFull("the disk of the PostgreSQL server is full", "free some space on the server")
        if code == "25006":
            if self._state.snapshot:
                return TransactionError("a write inside a snapshot", "write in a storage.transaction() of its own")
            return ReadOnlyStorage(f"the PostgreSQL server does not take writes: {text}", "name the primary server in the URL")
        if code == "42501":
            return StorageForbidden(f"PostgreSQL refused: {text}", "grant it to the role in the storage URL")
        if code in ("XX001", "XX002"):
            return StorageCorrupt(f"PostgreSQL reports damage: {text}", "restore a backup")
        return error


def _readable(connection: Any) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


def _json_key(key: str | int) -> Any:
    # Typed, so that "0" asks an object and 0 an array.
    return peewee.NodeList((peewee.Value(key, converter=False), peewee.SQL("::int" if isinstance(key, int) else "::text")))


class PostgresEngine(Engine):
    """A store in one schema of a PostgreSQL database."""

    name = "postgres"

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        super().__init__(settings, read_only=read_only)
        if peewee.psycopg2 is None:
            raise SettingsError(
                f"{settings.url.redacted} needs psycopg2, which is not installed",
                "install the extra: pip install 'kagedb[postgres]'",
            )
        self.schema = settings.schema
        self.full_commit = "on"
        self._url = settings.url
        self._parameters = self._connection_parameters()
        self._locks: Any = None
        self._locks_guard = threading.RLock()
        self._shares = False
        self._excludes = False
        self._epoch: int | None = None
        self._lost: str = ""
        self._description = ""
        self.database = PostgresStoreDatabase(self, settings, read_only=read_only)
        self.database.limits = Limits(settings.json_bytes, settings.json_depth, settings.text_bytes)
        self.database.slow_transaction_ms = settings.slow_transaction_ms
        self.database.ddl = PostgresDDL(self.database, self.schema)

    @property
    def place(self) -> str:
        return f"{self._url.redacted} (schema {self.schema})"

    # Connections.

    def _connection_parameters(self) -> dict[str, Any]:
        from psycopg2 import extensions

        try:
            given = extensions.parse_dsn(self._url.dsn)
        except peewee.psycopg2.Error as error:
            raise SettingsError(
                f"the storage URL {self._url.redacted} is not understood: {self._url.scrub(str(error).strip())}",
                "write postgresql://user@host/database",
            ) from None
        settings = self.settings
        server = {
            "search_path": self.schema,
            "lock_timeout": settings.busy_timeout_ms,
            "client_min_messages": "warning",
            "tcp_keepalives_idle": KEEPALIVE_IDLE_SECONDS,
            "tcp_keepalives_interval": KEEPALIVE_INTERVAL_SECONDS,
            "tcp_keepalives_count": KEEPALIVE_COUNT,
            "tcp_user_timeout": USER_TIMEOUT_MS,
        }
        if self.read_only:
            server["default_transaction_read_only"] = "on"
        options = [given["options"]] if given.get("options") else []
        options += [f"-c {name}={value}" for name, value in server.items()]
        defaults = {
            "application_name": "kaged",
            "connect_timeout": settings.connect_timeout_s,
            "keepalives_idle": KEEPALIVE_IDLE_SECONDS,
            "keepalives_interval": KEEPALIVE_INTERVAL_SECONDS,
            "keepalives_count": KEEPALIVE_COUNT,
            "tcp_user_timeout": USER_TIMEOUT_MS,
            "client_encoding": "UTF8",
        }
        chosen = {name: value for name, value in defaults.items() if name not in given}
        return {**chosen, "options": " ".join(options)}

    def new_connection(self, **more: Any) -> Any:
        """A new connection with its session settings, checked. Raises StorageUnavailable, SettingsError."""
        deadline = time.monotonic() + self.settings.busy_timeout_ms / 1000
        while True:
            try:
                connection = peewee.psycopg2.connect(self._url.dsn, **{**self._parameters, **more})
                break
            except peewee.psycopg2.OperationalError as error:
                text = self._url.scrub(str(error).strip())
            # Outside the handler: libpq's text may quote the URL, and a chained error would carry it along.
            if "starting up" in text and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                continue
            raise self._connect_error(text)
        try:
            self._check_session(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_error(self, text: str) -> StorageError | SettingsError:
        shown = " ".join(text.split())
        if "unsupported startup parameter" in shown:
            return self._pooler(shown)
        for sign in ("authentication failed", "does not exist", "no password", "no pg_hba.conf entry", "invalid"):
            if sign in shown:
                return SettingsError(
                    f"PostgreSQL at {self._url.redacted} does not let us in: {shown}",
                    "check the role, password and database in the storage URL",
                )
        return StorageUnavailable(
            f"PostgreSQL at {self._url.redacted} cannot be reached: {shown}", "start the server, or check the storage URL"
        )

    def _pooler(self, why: str) -> SettingsError:
        return SettingsError(
            f"a connection pooler stands between kaged and PostgreSQL ({why}); kaged's session locks do not survive it",
            "name the PostgreSQL server itself in the storage URL",
        )

    def _check_session(self, connection: Any) -> None:
        from psycopg2 import extras

        connection.autocommit = True
        # JSON columns come back as the text they are: the field decodes them.
        extras.register_default_json(connection, loads=lambda text: text)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_backend_pid(), current_setting('search_path'), current_setting('synchronous_commit'),"
                " current_setting('server_encoding'), current_setting('server_version_num')::int"
            )
            pid, path, commits, encoding, version = cursor.fetchone()
        if pid != connection.info.backend_pid:
            raise self._pooler("the server process behind it is not the one that answered")
        if path != self.schema:
            raise self._pooler("it dropped the session's settings")
        if encoding != "UTF8":
            raise SettingsError(
                f"the database at {self._url.redacted} has the encoding {encoding}", "make one with ENCODING 'UTF8'"
            )
        if version < OLDEST_VERSION:
            raise SettingsError(f"PostgreSQL {version // 10000} is too old", "use PostgreSQL 13 or newer")
        if commits != "off":
            # Where the operator asked for more (remote_apply), full means that.
            self.full_commit = commits

    # Opening and closing.

    def open(self, *, create: bool) -> None:
        forks.watch(self)
        if not create and not self.exists():
            raise StorageNotFound(f"there is no store at {self.place}", "make one with: kaged init")

    def exists(self) -> bool:
        found = self.database.raw("SELECT to_regclass(?) IS NOT NULL", (f'"{self.schema}".{HISTORY_TABLE}',)).fetchone()
        self.database.statement_done()
        return bool(found[0])

    def close(self) -> None:
        self.database.closed_for_good = True
        if not self.database._state.closed:
            self.database.close()
        self.database.close_all()
        if self._locks is not None:
            self._locks.close()
            self._locks = None

    # Forks.

    def before_fork(self) -> None:
        pass

    def after_fork_in_parent(self) -> None:
        pass

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
        self._excludes = False
        self._epoch, self._lost = None, ""

    # Locks.

    def key(self, lock: str) -> int:
        """The advisory lock's key: of this schema alone, since the database may hold other stores and programs."""
        digest = hashlib.sha256(f"kagedb:{self.schema}:{lock}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def _ask(self, sql: str, *params: Any) -> Any:
        """One value from the connection that holds the locks."""
        with self._locks_guard:
            if self._locks is None:
                name = f"kaged {socket.gethostname()} pid {os.getpid()} {self._description}".strip()[:63]
                self._locks = self.new_connection(application_name=name)
            try:
                with self._locks.cursor() as cursor:
                    cursor.execute(sql, params or None)
                    return cursor.fetchone()[0]
            except peewee.psycopg2.Error as error:
                raise StorageUnavailable(
                    f"the connection to the PostgreSQL server was lost: {self._url.scrub(str(error).strip())}", "try again"
                ) from None

    def _try(self, function: str, lock: str) -> bool:
        return bool(self._ask(f"SELECT pg_{function}(%s)", self.key(lock)))

    def keep_locks(self) -> None:
        """Make sure that the locks are still held; take them again after a lost connection.

        Raises StorageInUse where somebody else has taken the store meanwhile.
        """
        with self._locks_guard:
            if self._lost:
                raise StorageInUse(self._lost, "stop one of the two daemons, and start this one again")
            locks = self._locks
            if locks is not None and not locks.closed and not _readable(locks):
                return
            if locks is not None and not self.database._is_closed(locks):
                return
            if locks is None and not self._shares:
                return
            self._locks = None
            if locks is not None:
                locks.close()
            if self._shares and not self._try("try_advisory_lock_shared", "use"):
                raise StorageInUse(f"the store {self.place} is being migrated or replaced", "try again later")
            if self._epoch is not None and not self._try("try_advisory_lock", "owner"):
                self._lose()

    def _lose(self) -> None:
        holder = self.owner()
        self._lost = f"this daemon lost the store {self.place} to another: {holder or Holder(0)}"
        raise StorageInUse(self._lost, "stop one of the two daemons, and start this one again")

    def epoch_query(self) -> str:
        if self._epoch is None:
            return ""
        return f"; SELECT value FROM counter WHERE name = '{OWNER_COUNTER}'"

    def check_epoch(self, cursor: Any) -> None:
        if self._epoch is not None:
            row = cursor.fetchone()
            if row is None or row[0] != self._epoch:
                self._lose()

    def share(self) -> None:
        patience = self.settings.busy_timeout_ms / 1000
        began = time.monotonic()
        while not self._try("try_advisory_lock_shared", "use"):
            migrating = self._holder("starters") is not None
            if time.monotonic() - began > (STARTER_WAIT_SECONDS if migrating else patience):
                raise StorageInUse(f"the store {self.place} is being migrated or replaced", "try again later")
            time.sleep(POLL_SECONDS)
        self._shares = True

    def unshare(self) -> None:
        if self._shares:
            self._ask("SELECT pg_advisory_unlock_shared(%s)", self.key("use"))
            self._shares = False

    def exclude(self) -> None:
        deadline = time.monotonic() + USE_GRACE_SECONDS
        while not self._try("try_advisory_lock", "use"):
            if time.monotonic() > deadline:
                who = self.owner() or self._holder("use") or Holder(0)
                raise StorageInUse(f"the store {self.place} is open in {who}", "stop the daemon, or whatever has it open")
            time.sleep(POLL_SECONDS)
        self._excludes = True

    def readmit(self) -> None:
        if self._excludes:
            self._ask("SELECT pg_advisory_unlock(%s)", self.key("use"))
            self._excludes = False

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
            self._ask("SELECT pg_advisory_unlock(%s)", self.key("starters"))

    def own(self, description: str) -> None:
        self._description = description
        if self._locks is not None:
            name = f"kaged {socket.gethostname()} pid {os.getpid()} {description}"[:63]
            self._ask("SELECT set_config('application_name', %s, false)", name)
        if not self._try("try_advisory_lock", "owner"):
            holder = self.owner() or Holder(0)
            raise StorageInUse(f"the store {self.place} belongs to another daemon: {holder}", "stop that one first")
        with self.database.atomic():
            self.database.raw("UPDATE counter SET value = value + 1 WHERE name = ?", (OWNER_COUNTER,))
            row = self.database.raw("SELECT value FROM counter WHERE name = ?", (OWNER_COUNTER,)).fetchone()
        self._epoch = int(row[0])

    def owner(self) -> Holder | None:
        return self._holder("owner")

    def _holder(self, lock: str) -> Holder | None:
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

    # The catalogue.

    def tables(self) -> list[str]:
        found = postgres_catalogue.tables(self.database, self.schema)
        self.database.statement_done()
        return found

    def catalogue(self) -> list[str]:
        found = postgres_catalogue.catalogue(self.database, self.schema)
        self.database.statement_done()
        return found

    def change_schema(self, work: Callable[[], None]) -> None:
        with self.database.atomic():
            self._make_schema()
            work()

    def _make_schema(self) -> None:
        raw = self.database.raw
        if raw("SELECT 1 FROM pg_namespace WHERE nspname = ?", (self.schema,)).fetchone():
            return
        allowed, role, database = raw(
            "SELECT has_database_privilege(current_database(), 'CREATE'), current_user, current_database()"
        ).fetchone()
        if not allowed:
            raise StorageForbidden(
                f'the role "{role}" may not make the schema "{self.schema}" in the database "{database}"',
                f'let somebody who may run: CREATE SCHEMA "{self.schema}" AUTHORIZATION "{role}";',
            )
        raw(f'CREATE SCHEMA "{self.schema}"')

    # Whole-store words.

    def figures(self) -> Figures:
        raw = self.database.raw
        version = raw("SHOW server_version").fetchone()[0]
        tables, indexes = raw(
            "SELECT COALESCE(SUM(pg_table_size(c.oid)), 0)::bigint, COALESCE(SUM(pg_indexes_size(c.oid)), 0)::bigint"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = ? AND c.relkind = 'r'",
            (self.schema,),
        ).fetchone()
        self.database.statement_done()
        return Figures(f"PostgreSQL {version}", {"tables": tables, "indexes": indexes})

    def size_bytes(self) -> int:
        return sum(self.figures().bytes_by_part.values())

    def copy_aside(self, directory: Path) -> Path:
        """Every table as PostgreSQL's COPY text, from one snapshot, with the catalogue beside them."""
        target = directory / "kaged.copy"
        target.mkdir(mode=0o700)
        with self.database.snapshot():
            for table in self.tables():
                rows = self.database.raw(f'SELECT COUNT(*) FROM "{table}"').fetchone()[0]
                path = target / f"{table}.txt"
                with open(path, "xb", opener=_private) as file:
                    self.database.raw("SELECT 1").copy_expert(f'COPY "{table}" TO STDOUT', file)
                    os.fsync(file.fileno())
                # COPY's text has a line a row: line ends inside values are written as \n.
                with open(path, "rb") as file:
                    copied = sum(1 for _ in file)
                if copied != rows:
                    raise StorageError(f"the copy of {table} made before the migration has {copied} of {rows} rows")
            (target / "catalogue.txt").write_text("\n".join(self.catalogue()) + "\n")
        return target

    def require_space(self) -> None:
        """The server's disk is not to be seen from here; a full one undoes the migration."""

    def missing_marks(self) -> list[str]:
        return []


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

