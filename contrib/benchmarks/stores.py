"""The stores that append.py and audit.py write to: kagedb's own, and the same tables for raw drivers and plain Peewee.

Nothing is measured here.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peewee
import plain
from harness import Disk, connect_sqlite, open_store, sqlite_pragmas, sqlite_url

import kagedb
from kagedb.storage import Storage

CHAINED = "by hand"
"""The same rows in the same tables, chain, triggers and all."""
PLAIN = "no chain"
"""Audit events in the same table without chain and triggers."""
TEXT = "TEXT key"
"""The same with a ULID as the key, two indexes, and SQLite's usual pages of 4 KiB."""
CREATE = "Model.create"
"""By plain Peewee, in the table without chain and triggers."""


@dataclass
class Rows:
    """What new events and runs refer to."""

    project: str
    session: Any


@dataclass
class Ready:
    """The open store with its rows, a driver for each of CHAINED, PLAIN and TEXT, and what rows by hand refer to.

    Plain Peewee's models are bound beside the PLAIN tables. `place` is an empty directory on the same disk.
    """

    storage: Storage
    rows: Rows
    drivers: dict[str, plain.Driver]
    other: Rows
    peewee: Any
    place: Path


def rows_of(name: str) -> Rows:
    project = kagedb.Project.add(name, actor="operator:benchmark")
    return Rows(project.id, kagedb.Session.start(project, title="night", actor="operator:benchmark"))


@contextmanager
def on_sqlite(disk: Disk, durability: str) -> Iterator[Ready]:
    """Each case has a file of its own on `disk`, with the same pragmas, and the TEXT key its usual 4 KiB pages."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=disk.directory)))
        with open_store(sqlite_url(place / "by-hand.db"), place):
            other = rows_of("by hand")
        (place / "peewee.db").write_bytes((place / "by-hand.db").read_bytes())
        drivers: dict[str, plain.Driver] = {}
        for name, file, page_size in (
            (CHAINED, "by-hand.db", 2048),
            (PLAIN, "plain.db", 2048),
            (TEXT, "text.db", 4096),
        ):
            connection = connect_sqlite(place / file, page_size=page_size, durability=durability)
            stack.callback(connection.close)
            drivers[name] = plain.Sqlite(connection)
        drivers[PLAIN].make(*plain.PLAIN_EVENT)
        drivers[TEXT].make(*plain.TEXT_EVENT)
        pragmas = [pragma.removeprefix("PRAGMA ").split(" = ") for pragma in sqlite_pragmas(2048, durability)]
        database = peewee.SqliteDatabase(place / "peewee.db", pragmas=pragmas)
        with database.bind_ctx(plain.PLAIN_MODELS), database.connection_context():
            plain.Sqlite(database.connection()).make(*plain.PLAIN_EVENT)
            storage = stack.enter_context(open_store(sqlite_url(place / "kaged.db"), place))
            yield Ready(storage, rows_of("kaged"), drivers, other, database, place)


@contextmanager
def on_postgres(url: str, schema: str, disk: Disk, durability: str) -> Iterator[Ready]:
    """All in one schema: the audit events of kagedb and those by hand make one chain there, which changes nothing."""
    import psycopg2

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=disk.directory)))
        storage = stack.enter_context(open_store(url, place, storage__schema=schema))
        rows = rows_of(secrets.token_hex(4))
        options = f"-c search_path={schema}"
        drivers: dict[str, plain.Driver] = {}
        for name in (CHAINED, PLAIN, TEXT):
            connection = psycopg2.connect(url, options=options)
            stack.callback(connection.close)
            drivers[name] = plain.Postgres(connection, durability)
        drivers[PLAIN].make("DROP TABLE IF EXISTS plain_event", *plain.PLAIN_EVENT)
        drivers[TEXT].make("DROP TABLE IF EXISTS text_event", *plain.TEXT_EVENT)
        commit = "on" if durability == "full" else "off"
        database = peewee.PostgresqlDatabase(url, options=f"{options} -c synchronous_commit={commit}")
        with database.bind_ctx(plain.PLAIN_MODELS), database.connection_context():
            yield Ready(storage, rows, drivers, rows, database, place)
