"""Copies of a PostgreSQL store: pg_dump on an exported snapshot, and back in one transaction.

Strategy: one connection exports its snapshot; pg_dump writes it, and then the digests of the same snapshot are read:
one after the other, with rests, since at once they would take every processor of a small host. How a set is read back
is in postgres_reading.py. To restore, the text that is read there is run inside one transaction that has renamed the
old schema aside, so that there is no moment in which the store is half of each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import peewee

from ..errors import KagedError, StorageCorrupt, StorageError, StorageForbidden
from . import postgres_tools as tools
from .archive import COPY, FIRST_OF_HISTORY, Archiver, Contents, Pace, Present
from .places import make_private_file
from .postgres_contents import PostgresContents, plugin_schemas
from .postgres_plugin_schemas import PluginSchemas
from .postgres_reading import dump_text
from .postgres_server import driver
from .resting import Rests
from .sqlite_contents import quoted
from .syncing import Sending

if TYPE_CHECKING:
    from .postgres import PostgresEngine

COMPRESSION_LEVEL = 1
"""Of pg_dump's gzip: less than half the time of the default, and 4 % larger where it was measured."""

LOCK_WAIT_MS = 60_000
"""How long pg_dump waits for a table that somebody else changes the shape of."""

REST_BYTES = 16 * 1024
"""Taken from pg_dump between two rests: what it makes of so much takes it less than a millisecond."""

TIME_ZONE = "UTC"

PLAIN_TEXT = f"SET LOCAL TimeZone = '{TIME_ZONE}'; SET LOCAL DateStyle = ISO; SET LOCAL IntervalStyle = postgres"
"""How times are written by pg_dump, which sets the last two itself: wherever a set is read back, they look the same."""

LOAD_BYTES = 1 << 20
"""Handed to the server at a time: a row of terminal output takes 33 KB of text."""


class PostgresArchiver(Archiver):
    def __init__(self, engine: PostgresEngine) -> None:
        self.settings = engine.settings
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
        with self._errors(), self._snapshot() as (connection, snapshot):
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
                *(
                    ["--format=custom", f"--compress={0 if packed else COMPRESSION_LEVEL}"]
                    if form == COPY
                    else ["--format=plain", "--no-owner"]
                ),
            ]
            with tools.running(
                command, environment, self.settings.url.scrub, stdout=-1, pipesize=tools.NARROW_BYTES
            ) as child:
                _save(child.stdout, target, pace, self.engine.size_bytes())
            contents.rests = Rests()
            yield contents

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
            with dump_text(self.settings, data, form) as text:
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


def _save(dump: IO[bytes], target: Path, pace: Pace, size: int) -> None:
    """What pg_dump says into a file, no faster than the pace wants, and with rests: it waits while nobody reads.

    `size` is the store's, of which a dump is smaller.
    """
    began, done, rested, rests = time.monotonic(), 0, 0, Rests()
    with open(target, "r+b", buffering=0) as file, Sending(target) as sending:
        while data := os.read(dump.fileno(), REST_BYTES):
            file.write(data)
            done += len(data)
            if done - rested < REST_BYTES:
                continue
            rested = done
            sending.written(done)
            if pace.progress is not None:
                pace.progress(min(done, size), size)
            if pace.bytes_per_second:
                time.sleep(max(0.0, began + done / pace.bytes_per_second - time.monotonic()))
            rests.rest()
    if pace.progress is not None:
        pace.progress(size, size)


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
