"""Copies of a PostgreSQL store: pg_dump on an exported snapshot, and back in one transaction.

Strategy: one connection exports its snapshot; pg_dump writes it, while the digests of the same snapshot are read. To
verify, the text that pg_restore prints is loaded into a scratch SQLite file. To restore, the same text is run inside
one transaction that has renamed the old schema aside, so that there is no moment in which the store is half of each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import peewee

from ..errors import KagedError, StorageCorrupt, StorageError, StorageForbidden
from . import postgres_tools as tools
from .archive import COPY, FIRST_OF_HISTORY, INTEGER, Archiver, Contents, Pace, Present, Reader, Table
from .places import make_private_file, sync_file
from .postgres_contents import PostgresContents, plugin_schemas, table_names
from .postgres_plugin_schemas import PluginSchemas
from .postgres_server import driver
from .sqlite_contents import CACHE_KIB, SqliteContents, quoted, sqlite3, translated
from .syncing import syncing

if TYPE_CHECKING:
    from ..settings import Settings
    from .postgres import PostgresEngine

COMPRESSION_LEVEL = 1
"""Of pg_dump's gzip: less than half the time of the default, and 4 % larger where it was measured."""

LOCK_WAIT_MS = 60_000
"""How long pg_dump waits for a table that somebody else changes the shape of."""

THROTTLED_BYTES = 64 * 1024
"""Written at a time where a rate is given: what a pipe of Linux holds."""

TIME_ZONE = "UTC"

PLAIN_TEXT = f"SET LOCAL TimeZone = '{TIME_ZONE}'; SET LOCAL DateStyle = ISO; SET LOCAL IntervalStyle = postgres"
"""How times are written by pg_dump, which sets the last two itself: wherever a set is read back, they look the same."""

LOAD_BYTES = 1 << 20
"""Handed to the server at a time: a row of terminal output takes 33 KB of text."""


class PostgresReader(Reader):
    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @contextmanager
    def reading(self, data: Path, form: str, tables: list[Table], scratch: Path) -> Iterator[Contents]:
        loaded = scratch / "loaded.sqlite3"
        make_private_file(loaded)
        connection = sqlite3.connect(loaded, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            with self._text(data, form) as text:
                _load(connection, text, {table.name: table for table in tables})
        except sqlite3.Error as error:
            raise translated(error, loaded) from error
        finally:
            connection.close()
        contents = SqliteContents.open(loaded, tables)
        try:
            yield contents
        finally:
            contents.close()

    @contextmanager
    def _text(self, data: Path, form: str) -> Iterator[IO[bytes]]:
        """The SQL of a data file; when the block has been left well, all of it was read and whole."""
        if form != COPY:
            with open(data, "rb") as file:
                yield file
            return
        command = [tools.find(self.settings, "pg_restore"), "--no-owner", "--file=-", str(data)]
        try:
            with tools.running(command, tools.plain_environment(), str, stdout=-1) as child:
                yield child.stdout
        except StorageError as error:
            if type(error) is not StorageError:
                raise
            raise StorageCorrupt(f"{data} cannot be read: {error.message}", "use another set: kaged backups") from error


class PostgresArchiver(PostgresReader, Archiver):
    def __init__(self, engine: PostgresEngine) -> None:
        super().__init__(engine.settings)
        self.engine: PostgresEngine = engine

    def file_name(self, form: str) -> str:
        return "kaged.pgdump" if form == COPY else "kaged.sql"

    def require_ready(self, form: str) -> None:
        connection = self.engine.server.connect()
        version = connection.info.server_version
        connection.close()
        tools.require_version(self.settings, "pg_dump", version)
        if form == COPY:
            tools.find(self.settings, "pg_restore")

    # Out.

    @contextmanager
    def copy(self, target: Path, form: str, pace: Pace, *, packed: bool) -> Iterator[Contents]:
        make_private_file(target)
        with self._errors(), syncing(target), self._snapshot() as (connection, snapshot):
            contents = PostgresContents(connection, self.engine.schema, self.plugin_schemas(connection))
            where, environment = tools.arguments_for(connection, self.settings.url.dsn or "")
            # Of a plugin's own columns; as the digests of the same snapshot read them.
            environment["PGTZ"] = TIME_ZONE
            command = [
                tools.find(self.settings, "pg_dump"),
                f"--dbname={where}",
                *(f"--schema={quoted(schema)}" for schema in contents.schemas),
                f"--snapshot={snapshot}",
                f"--lock-wait-timeout={LOCK_WAIT_MS}",
                "--no-password",
                *([] if pace.bytes_per_second else [f"--file={target}"]),
                *(
                    ["--format=custom", f"--compress={0 if packed else COMPRESSION_LEVEL}"]
                    if form == COPY
                    else ["--format=plain", "--no-owner"]
                ),
            ]
            scrub = self.settings.url.scrub
            if pace.bytes_per_second:
                with tools.running(command, environment, scrub, stdout=-1) as child, open(target, "wb") as file:
                    with _Throttle(child.stdout, file, pace.bytes_per_second):
                        yield contents
            else:
                with tools.running(command, environment, scrub):
                    yield contents
            sync_file(target)
            if pace.progress is not None:
                size = target.stat().st_size
                pace.progress(size, size)

    def plugin_schemas(self, connection: Any) -> list[str]:
        """Those that have something, as the snapshot of `connection` has them. Raises StorageForbidden."""
        contents = PostgresContents(connection, self.engine.schema)
        found = [name for name, used in plugin_schemas(contents.raw, self.engine.schema).items() if used]
        for name in found:
            readable, role = contents.raw("SELECT has_schema_privilege(?, 'USAGE'), current_user", (name,)).fetchone()
            if not readable:
                raise StorageForbidden(
                    f'the role "{role}" may not read the schema "{name}" of a plugin',
                    f'let somebody who may run: GRANT "{name}" TO "{role}";',
                )
        return found

    @contextmanager
    def _snapshot(self) -> Iterator[tuple[Any, str]]:
        connection = self.engine.server.connect(application_name="kaged backup")
        try:
            with connection.cursor() as cursor:
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                cursor.execute(PLAIN_TEXT)
                cursor.execute("SELECT pg_export_snapshot()")
                yield connection, cursor.fetchone()[0]
        finally:
            connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A driver's error on a connection of our own becomes one of errors.py."""
        try:
            yield
        except (driver.Error, peewee.PeeweeException) as error:
            translated = self.engine.database.translate(error)
            if isinstance(translated, KagedError):
                raise translated from error
            text = self.settings.url.scrub(str(error).strip())
            raise StorageError(f"PostgreSQL refused: {' '.join(text.split())}", "see the server's log") from error

    # The way back.

    def hold(self) -> None:
        self.engine.share()
        self.engine.exclude()

    def present(self) -> Present:
        if not self.engine.exists():
            return Present()
        raw = self.engine.database.raw
        try:
            first = raw(FIRST_OF_HISTORY).fetchone()
            head = raw("SELECT seq, hash FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
        except (KagedError, peewee.PeeweeException):
            return Present()
        finally:
            self.engine.database.statement_done()
        return Present(first, (head[0], bytes(head[1]).hex()) if head else None)

    def put(self, data: Path, form: str, check: Callable[[Contents], None], record: Callable[[str], None]) -> str:
        engine, database = self.engine, self.engine.database
        schema = engine.schema
        with self._errors(), database.atomic():
            plugins = PluginSchemas(database.raw, schema)
            kept = self._kept_name()
            there = self._move_aside(kept)
            plugins.move_aside(kept)
            with self._text(data, form) as text:
                self._run(text, plugins)
            # The dump's own text has emptied the path.
            database.raw(f'SET search_path = "{schema}"')
            database.raw(PLAIN_TEXT)
            if database.raw("SELECT to_regnamespace(?) IS NULL", (quoted(schema),)).fetchone()[0]:
                raise StorageCorrupt(
                    f"the set has no schema {schema}", "set storage.schema to that of the store it was made of"
                )
            check(PostgresContents(database.connection(), schema, plugins.brought))
            plugins.give_back()
            record(kept if there else "")
        return kept if there else ""

    def _kept_name(self) -> str:
        stamp = time.strftime("%Y%m%dt%H%M%Sz", time.gmtime())
        suffixes = ("", *(f"_{number}" for number in range(2, 100)))
        names = (f"{self.engine.schema[:27]}_before_restore_{stamp}{suffix}" for suffix in suffixes)
        raw = self.engine.database.raw
        return next(name for name in names if raw("SELECT to_regnamespace(?) IS NULL", (quoted(name),)).fetchone()[0])

    def _move_aside(self, kept: str) -> bool:
        """Rename the schema that is there to `kept`; whether there was one."""
        raw, schema = self.engine.database.raw, self.engine.schema
        exists, owner, may_create, role, database = raw(
            "SELECT n.oid IS NOT NULL, COALESCE(pg_has_role(n.nspowner, 'USAGE'), TRUE),"
            " has_database_privilege(current_database(), 'CREATE'), current_user, current_database()"
            " FROM (SELECT 1) one LEFT JOIN pg_namespace n ON n.nspname = ?",
            (schema,),
        ).fetchone()
        if not may_create or not owner:
            sql = (
                f'GRANT CREATE ON DATABASE "{database}" TO "{role}"'
                if not may_create
                else f'ALTER SCHEMA "{schema}" OWNER TO "{role}"'
            )
            raise StorageForbidden(
                f'the role "{role}" may not exchange the schema "{schema}" of the database "{database}"',
                f"let somebody who may run: {sql};",
            )
        if exists:
            raw(f'ALTER SCHEMA "{schema}" RENAME TO "{kept}"')
        return bool(exists)

    def _run(self, text: IO[bytes], plugins: PluginSchemas) -> None:
        cursor = self.engine.database.connection().cursor()
        for piece in tools.pieces(text):
            if isinstance(piece, tools.Script):
                plugins.require_roles(piece.sql)
                cursor.execute(piece.sql)
            else:
                cursor.copy_expert(piece.copy, _Lines(piece.lines), LOAD_BYTES)


class _Throttle:
    """Writes what a child says into a file, no faster than so many bytes a second, beside the block."""

    def __init__(self, source: IO[bytes], target: IO[bytes], bytes_per_second: int) -> None:
        self._source, self._target, self._rate = source, target, bytes_per_second
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def _pump(self) -> None:
        began, done = time.monotonic(), 0
        try:
            while data := self._source.read(THROTTLED_BYTES):
                self._target.write(data)
                done += len(data)
                time.sleep(max(0.0, began + done / self._rate - time.monotonic()))
        except (OSError, ValueError) as error:
            # ValueError: the file was closed under it, since the block was left by an error.
            self._error = error if isinstance(error, OSError) else None
            self._source.close()


class _Lines:
    """Lines as the file that psycopg2's COPY reads."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        parts, length = [self._left], len(self._left)
        for line in self._lines:
            parts.append(line)
            length += len(line)
            if 0 <= size <= length:
                break
        data = b"".join(parts)
        if size < 0:
            self._left = b""
            return data
        self._left = data[size:]
        return data[:size]


def _load(connection: Any, text: IO[bytes], tables: dict[str, Table]) -> None:
    """The rows of a dump into tables of that name; what else is in the dump is not looked at."""
    for table in tables.values():
        columns = ", ".join(map(quoted, table.columns))
        if len(table.key) == 1 and table.kinds[table.columns.index(table.key[0])] == INTEGER:
            # The rows are then in the order of their key, without an index.
            columns = columns.replace(quoted(table.key[0]), f"{quoted(table.key[0])} INTEGER PRIMARY KEY")
        connection.execute(f"CREATE TABLE {quoted(table.name)} ({columns})")
    for piece in tools.pieces(text):
        if isinstance(piece, tools.Rows):
            known = next((tables[name] for name in table_names(piece.schema, piece.table) if name in tables), None)
            if known is None or set(piece.columns) != set(known.columns):
                raise StorageCorrupt(
                    f"the dump has a table {piece.table} that the manifest does not describe",
                    "use another set: kaged backups",
                )
            _load_rows(connection, piece, known)
    for table in tables.values():
        if table.key:
            columns = ", ".join(map(quoted, table.key))
            connection.execute(f"CREATE INDEX {quoted(f'key of {table.name}')} ON {quoted(table.name)} ({columns})")


def _load_rows(connection: Any, piece: tools.Rows, table: Table) -> None:
    kinds = [table.kinds[table.columns.index(column)] for column in piece.columns]
    columns, places = ", ".join(map(quoted, piece.columns)), ", ".join("?" * len(kinds))
    insert = f"INSERT INTO {quoted(table.name)} ({columns}) VALUES ({places})"  # noqa: S608
    connection.execute("BEGIN")
    try:
        connection.executemany(insert, (tools.values(line, kinds) for line in piece.lines))
    except ValueError as error:
        raise StorageCorrupt(
            f"the rows of {table.name} in the dump cannot be read: {error}", "use another set: kaged backups"
        ) from error
    connection.execute("COMMIT")
