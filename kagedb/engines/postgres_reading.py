"""PostgreSQL's sets read back: the text that pg_restore prints of a dump, without a server and without a second copy.

Strategy: a dump has its rows as they lie in the store's files, and a digest wants them by key. The rows go by once,
line after line, and of each its key and its hash go into a scratch file, with what somebody wants to have remembered;
then the hashes are read in the order of the keys. How sets are made and restored is in postgres_archive.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import StorageCorrupt, StorageError
from . import postgres_tools as tools
from .archive import BOOLEAN, COPY, INTEGER, REAL, TEXT, Looking, Looks, Reader, RowHashes, Table
from .copy_text import row_hashes
from .places import make_private_file
from .postgres_contents import table_names
from .resting import Rests
from .sqlite_contents import CACHE_KIB, quoted, translated

if TYPE_CHECKING:
    from ..settings import Settings

BATCH_BYTES = 1 << 15
"""Of lines taken at a time: fifty audit events."""

ROWS_AT_ONCE = 250
"""Read from the scratch file at a time: some 50 KB of audit events."""

HASH = quoted("hash of the row")
"""The column of the scratch file; no column of a store's own is called that."""

HINT = "use another set: kaged backups"


@contextmanager
def dump_text(settings: Settings, data: Path, form: str, *, hurry: bool = True) -> Iterator[IO[bytes]]:
    """The SQL of a data file; when the block has been left well, all of it was read and whole.

    Without `hurry` pg_restore waits whenever nobody reads.

    Raises StorageCorrupt where it cannot be read to its end, SettingsError where pg_restore is missing or too old.
    """
    if form != COPY:
        with open(data, "rb") as file:
            yield file
        return
    command = [tools.find(settings, "pg_restore"), "--no-owner", "--file=-", str(data)]
    try:
        size = -1 if hurry else tools.NARROW_BYTES
        with tools.running(command, tools.plain_environment(), str, stdout=-1, pipesize=size) as child:
            yield child.stdout
    except StorageError as error:
        if type(error) is not StorageError:
            raise
        raise StorageCorrupt(f"{data} cannot be read: {error.message}", HINT) from error


class PostgresReader(Reader):
    def __init__(self, settings: Settings, looks: Looks) -> None:
        self._settings = settings
        self._looks = looks

    @contextmanager
    def reading(self, data: Path, form: str, tables: list[Table], scratch: Path) -> Iterator[RowHashes]:
        path = scratch / "hashes.sqlite3"
        make_private_file(path)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            hashes = _DumpHashes(connection, path)
            try:
                with dump_text(self._settings, data, form, hurry=False) as text:
                    _read(text, {table.name: table for table in tables}, self._looks, hashes)
            except sqlite3.Error as error:
                raise translated(error, path) from error
            yield hashes
        finally:
            connection.close()


class _DumpHashes(RowHashes):
    """A scratch file with a table for each of the dump's."""

    def __init__(self, connection: Any, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._rows: dict[Table, int] = {}
        self._rests = Rests()
        self._sorted: dict[str, str] = {}
        """For each table the query for its hashes."""

    def add(self, table: Table, looking: Looking | None, batches: Iterator[list[tuple[Any, ...]]]) -> None:
        """The rows of a table: the values of its key, the hash, and what is remembered. Raises sqlite3.Error."""
        run = self._connection.execute
        remembered = looking.remembered if looking is not None else ()
        # Names that differ in case alone are one to SQLite: only what is asked for by name has its own.
        name = quoted(table.name if remembered else f"table {len(self._rows)}")
        key = [quoted(column if remembered else f"key {n}") for n, column in enumerate(table.key)]
        self._sorted[table.name] = f"SELECT {HASH} FROM {name}" + (f" ORDER BY {', '.join(key)}" if key else "")  # noqa: S608
        columns = [*key, HASH, *map(quoted, remembered)]
        if not key:
            run(f"CREATE TABLE {name} ({', '.join(columns)})")
        elif len(key) == 1 and table.kinds[table.columns.index(table.key[0])] == INTEGER:
            run(f"CREATE TABLE {name} ({columns[0]} INTEGER PRIMARY KEY, {', '.join(columns[1:])})")
        else:
            run(f"CREATE TABLE {name} ({', '.join(columns)}, PRIMARY KEY ({', '.join(key)})) WITHOUT ROWID")
        if looking is not None and looking.indexed:
            by = quoted(looking.indexed)
            run(f"CREATE INDEX {quoted(f'rows of {table.name}')} ON {name} ({by}) WHERE {by} IS NOT NULL")
        insert = f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})"  # noqa: S608
        rows = 0
        try:
            run("BEGIN")
            for batch in batches:
                self._connection.executemany(insert, batch)
                rows += len(batch)
                self._rests.rest()
            run("COMMIT")
        except sqlite3.IntegrityError as error:
            raise StorageCorrupt(f"the dump has a row of {table.name} twice", HINT) from error
        self._rows[table] = rows

    def tables(self) -> list[Table]:
        return list(self._rows)

    def count(self, table: Table) -> int:
        return self._rows[table]

    def hashes(self, table: Table) -> Iterator[list[bytes]]:
        for rows in self._batches(self._sorted[table.name], ()):
            yield [hash for (hash,) in rows]

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        try:
            return self._connection.execute(sql, params)
        except sqlite3.Error as error:
            raise translated(error, self._path) from error

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for rows in self._batches(sql, params):
            yield from rows

    def _batches(self, sql: str, params: tuple[Any, ...]) -> Iterator[list[tuple[Any, ...]]]:
        cursor = self.raw(sql, params)
        try:
            while rows := cursor.fetchmany(ROWS_AT_ONCE):
                yield rows
                self._rests.rest()
        except sqlite3.Error as error:
            raise translated(error, self._path) from error


def _read(text: IO[bytes], tables: dict[str, Table], looks: Looks, hashes: _DumpHashes) -> None:
    """The rows of a dump; what else is in it is not looked at."""
    for piece in tools.pieces(text):
        if not isinstance(piece, tools.Rows):
            continue
        # Taken out: a table comes once.
        known = next((tables.pop(name) for name in table_names(piece.schema, piece.table) if name in tables), None)
        if known is None or set(piece.columns) != set(known.columns):
            raise StorageCorrupt(f"the dump has a table {piece.table} that the manifest does not describe", HINT)
        looking = looks(known)
        try:
            hashes.add(known, looking, map(_rows(piece, known, looking), _line_batches(piece.lines)))
        except (ValueError, TypeError) as error:
            raise StorageCorrupt(f"the rows of {known.name} in the dump cannot be read: {error}", HINT) from error


def _line_batches(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lines, some at a time: what takes about a millisecond, since nobody rests inside."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _rows(piece: tools.Rows, table: Table, looking: Looking | None) -> Callable[[list[bytes]], list[tuple[Any, ...]]]:
    """What makes of lines what the scratch file takes of their rows."""
    arranged = _arranging([piece.columns.index(column) for column in table.columns])
    # The server writes these in another way than copy_text.py; everything else it writes alike.
    rewritten = [(place, _REWRITTEN[kind]) for place, kind in enumerate(table.kinds) if kind in _REWRITTEN]
    key = _Values(piece, table, table.key)
    seen = _Values(piece, table, looking.columns) if looking is not None else None

    def made(lines: list[bytes]) -> list[tuple[Any, ...]]:
        rows = [line[:-1].split(b"\t") for line in lines]
        if any(len(row) != len(piece.columns) for row in rows):
            raise ValueError("a row has more or fewer values than there are columns")
        whole = map(arranged, rows)
        hashes = row_hashes(map(b"\t".join, map(rewrite, whole) if rewritten else whole))
        if looking is None or seen is None:
            return [(*key.of(row), hash) for row, hash in zip(rows, hashes, strict=True)]
        look = looking.look
        return [(*key.of(row), hash, *look(*seen.of(row))) for row, hash in zip(rows, hashes, strict=True)]

    def rewrite(fields: tuple[bytes, ...]) -> list[bytes]:
        changed = list(fields)
        for place, again in rewritten:
            if changed[place] != tools.NULL:
                changed[place] = again(changed[place])
        return changed

    return made


def _real(field: bytes) -> bytes:
    return repr(float(field)).encode()


_REWRITTEN: dict[str, Callable[[bytes], bytes]] = {BOOLEAN: tools.boolean, REAL: _real}


class _Values:
    """Some columns of a row, as values."""

    def __init__(self, piece: tools.Rows, table: Table, columns: tuple[str, ...]) -> None:
        kinds = [table.kinds[table.columns.index(column)] for column in columns]
        self._makers = [tools.VALUES.get(kind, tools.VALUES[TEXT]) for kind in kinds]
        self._arranged = _arranging([piece.columns.index(column) for column in columns])

    def of(self, fields: list[bytes]) -> list[Any]:
        pairs = zip(self._makers, self._arranged(fields), strict=True)
        return [None if field == tools.NULL else made(field) for made, field in pairs]


def _arranging(places: list[int]) -> Callable[[list[bytes]], tuple[bytes, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    # Of one place it gives the value itself, of none it is an error.
    return lambda fields: tuple(fields[place] for place in places)
