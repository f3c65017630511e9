"""The stores that append.py and audit.py write to: kagedb's own, and the same tables for raw drivers and plain Peewee;
and the large one of copying.py.

Nothing is measured here.
"""

from __future__ import annotations

import json
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
from kagedb.identity import new_ulid, now_ms
from kagedb.models.audit import SEAL_EVENTS, hash_body, hash_event
from kagedb.storage import Storage

CHAINED = "by hand"
"""The same rows in the same tables, chain, triggers and all."""
PLAIN = "no chain"
"""Audit events in the same table without chain and triggers."""
TEXT = "TEXT key"
"""The same with a ULID as the key, two indexes, and SQLite's usual pages of 4 KiB."""
CREATE = "Model.create"
"""By plain Peewee, in the table without chain and triggers."""


KIND, ACTOR = "policy.decision", "agent:planner"
INSERT_EVENT = (
    "INSERT INTO audit_event (seq, at, kind, actor, subject, project, salt, body, body_hash, hash)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
INSERT_RUN = (
    "INSERT INTO run (id, created_at, session_id, agent, input, output, state, exit_status, started_at, finished_at)"
    """ VALUES (?, ?, ?, 'planner', ?, '{"quiet": true, "steps": ["look", "listen", "note"]}', 'finished', 0, ?, ?)"""
)
"""Of the large store."""

TRANSCRIPT_MEGABYTES = 10
"""In one of its transcripts: below what a session may keep."""


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


def large_store(storage: Storage, events: int, megabytes: int) -> None:
    """So many audit events, a tenth as many finished runs, and so much terminal output, in a store in a SQLite file.

    Events and runs are written as their verbs write them, but many at once: by verbs a million takes a quarter of an
    hour on a busy machine.
    """
    session = rows_of("large").session
    (seq, head), at = kagedb.AuditEvent.head(), now_ms()
    database: Any = storage.database
    for first in range(0, events, SEAL_EVENTS):
        rows, runs = [], []
        for number in range(first, min(first + SEAL_EVENTS, events)):
            if number % 10 == 0:
                run = new_ulid()
                goal = json.dumps({"goal": "all quiet in the house", "n": number})
                runs.append((run, at, session.id, goal, at, at))
            body = json.dumps({"allowed": True, "arguments": ["ls", f"/srv/{number}"], "tool": "shell"})
            salt, seq, subject = secrets.token_bytes(16), seq + 1, f"run:{run}"
            body_hash = hash_body(salt, body)
            head = hash_event(head, seq, at, KIND, ACTOR, subject, session.project_id, body_hash)
            rows.append((seq, at, KIND, ACTOR, subject, session.project_id, salt, body, body_hash, head))
        with storage.transaction("relaxed"):
            connection = database.connection()
            connection.executemany(INSERT_RUN, runs)
            connection.executemany(INSERT_EVENT, rows)
        kagedb.AuditSeal.close_all()
    for first in range(0, megabytes, TRANSCRIPT_MEGABYTES):
        recorder = kagedb.Transcript.open(
            kagedb.Session.start(session.project, title="long", actor="operator:benchmark"), columns=80, rows=24
        )
        for _ in range(min(megabytes - first, TRANSCRIPT_MEGABYTES)):
            recorder.write(secrets.token_bytes(1 << 20))
        recorder.close()
