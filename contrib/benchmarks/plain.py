"""The same rows without kagedb: statements written by hand for both drivers, and plain Peewee models.

The tables `session`, `run` and `audit_event` are those of a store that kagedb made; `plain_event` and `text_event` are
made here, to compare with. Nothing is measured here.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any

import peewee

from kagedb.identity import new_ulid
from kagedb.models.audit import GENESIS, hash_event

ACTOR = "agent:planner"
KIND = "policy.decision"
BODY = {"tool": "shell", "allow": True, "rule": "read-only commands", "command": "git log --oneline -n 20 " + "-" * 200}
"""With its names and brackets 300 bytes, a usual policy decision."""

INPUT = {"task": "summarise the open questions of the night", "limits": {"tokens": 20_000, "seconds": 600}, "depth": 1}
OUTPUT = {"summary": "three questions are open", "tokens": 12_345, "files": ["notes.md", "plan.md"]}

SUBJECTS = [f"run:{new_ulid()}" for _ in range(200)]

PLAIN_EVENT = (
    "CREATE TABLE plain_event (seq BIGINT NOT NULL PRIMARY KEY, at BIGINT NOT NULL, kind TEXT NOT NULL,"
    " actor TEXT NOT NULL, subject TEXT, project TEXT, body TEXT NOT NULL)",
    "CREATE INDEX plain_event_subject ON plain_event (subject)",
)
"""What remains of `audit_event` without chain and triggers; `seq BIGINT` is `INTEGER` on SQLite, and so the rowid."""

TEXT_EVENT = (
    "CREATE TABLE text_event (id TEXT NOT NULL PRIMARY KEY, at BIGINT NOT NULL, kind TEXT NOT NULL,"
    " actor TEXT NOT NULL, subject TEXT, project TEXT, body TEXT NOT NULL)",
    "CREATE INDEX text_event_subject ON text_event (subject)",
    "CREATE INDEX text_event_at ON text_event (at)",
)
"""What is usually made for the purpose: a ULID as the key, and an index for each question."""


class Sqlite:
    """A raw connection, with the words that both drivers are used by: `run` gives a cursor, `end` commits."""

    begin = "BEGIN IMMEDIATE"

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.run = connection.execute

    def make(self, *statements: str) -> None:
        for statement in statements:
            self.run(statement.replace("BIGINT", "INTEGER"))

    def end(self) -> None:
        self.run("COMMIT")

    def end_read(self) -> None:
        """Nothing to do: a read outside a transaction ends by itself."""

    def insert_many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        """In one transaction."""
        self.run(self.begin)
        self.connection.executemany(sql, rows)
        self.end()


class Postgres:
    """The same of psycopg2, which begins a transaction by itself."""

    begin = ""

    def __init__(self, connection: Any, durability: str = "full") -> None:
        self.connection = connection
        self.cursor = connection.cursor()
        self.cursor.execute(f"SET synchronous_commit = {'on' if durability == 'full' else 'off'}")
        self.end = self.end_read = connection.commit
        self.end()

    def run(self, sql: str, parameters: Any = ()) -> Any:
        self.cursor.execute(sql.replace("?", "%s"), parameters)
        return self.cursor

    def make(self, *statements: str) -> None:
        for statement in statements:
            self.run(statement)
        self.end()

    def insert_many(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        """In one transaction."""
        from psycopg2.extras import execute_values

        execute_values(self.cursor, f"{sql.partition('VALUES')[0]}VALUES %s", rows, page_size=1000)
        self.end()


Driver = Sqlite | Postgres


def now() -> int:
    return time.time_ns() // 1_000_000


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Appender:
    """Appends events in one of the three tables, by hand, each in a transaction of its own."""

    def __init__(self, driver: Driver, project: str) -> None:
        self.driver = driver
        self.project = project
        self.seq = 0

    def plain(self, count: int) -> None:
        run, end, begin = self.driver.run, self.driver.end, self.driver.begin
        sql = "INSERT INTO plain_event (seq, at, kind, actor, subject, project, body) VALUES (?, ?, ?, ?, ?, ?, ?)"
        for number in range(count):
            self.seq += 1
            if begin:
                run(begin)
            subject = SUBJECTS[number % len(SUBJECTS)]
            run(sql, (self.seq, now(), KIND, ACTOR, subject, self.project, dump(BODY)))
            end()

    def text(self, count: int) -> None:
        run, end, begin = self.driver.run, self.driver.end, self.driver.begin
        sql = "INSERT INTO text_event (id, at, kind, actor, subject, project, body) VALUES (?, ?, ?, ?, ?, ?, ?)"
        for number in range(count):
            if begin:
                run(begin)
            subject = SUBJECTS[number % len(SUBJECTS)]
            run(sql, (new_ulid(), now(), KIND, ACTOR, subject, self.project, dump(BODY)))
            end()

    def chained(self, count: int) -> None:
        """Into `audit_event` itself, triggers and all, with the chain that its triggers and a verifier expect."""
        run, end, begin = self.driver.run, self.driver.end, self.driver.begin
        for number in range(count):
            if begin:
                run(begin)
            run(INSERT_EVENT, self._chained_row(number, *self._head()))
            end()

    def fill(self, count: int) -> None:
        """The same in one transaction and one statement, to have a long log."""
        rows: list[tuple[Any, ...]] = []
        seq, previous = self._head()
        for number in range(count):
            rows.append(self._chained_row(number, seq, previous))
            seq, previous = seq + 1, rows[-1][-1]
        self.driver.insert_many(INSERT_EVENT, rows)

    def _head(self) -> tuple[int, bytes]:
        last = self.driver.run("SELECT seq, hash FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
        return (last[0], bytes(last[1])) if last else (0, GENESIS)

    def _chained_row(self, number: int, before: int, previous: bytes) -> tuple[Any, ...]:
        at, salt, body = now(), os.urandom(16), json.dumps(BODY, sort_keys=True, separators=(",", ":"))
        subject = SUBJECTS[number % len(SUBJECTS)]
        named = (before + 1, at, KIND, ACTOR, subject, self.project)
        digest = hashlib.sha256(salt + body.encode()).digest()
        return (*named, salt, body, digest, hash_event(previous, *named, digest))


INSERT_EVENT = (
    "INSERT INTO audit_event (seq, at, kind, actor, subject, project, salt, body, body_hash, hash)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)

SELECT_RUN = "SELECT * FROM run WHERE id = ?"
SELECT_SESSION = "SELECT * FROM session WHERE id = ?"
SELECT_RUNS = "SELECT * FROM run WHERE session_id = ? ORDER BY id"
SELECT_LAST = "SELECT * FROM audit_event WHERE subject = ? ORDER BY seq DESC LIMIT 100"
SELECT_EVENTS = "SELECT * FROM audit_event"

INSERT_RUN = (
    "INSERT INTO run (id, created_at, session_id, agent, input, state, started_at) VALUES (?, ?, ?, ?, ?, 'running', ?)"
)
FINISH_RUN = (
    "UPDATE run SET state = 'finished', exit_status = ?, output = ?, error = NULL, finished_at = ?"
    " WHERE id = ? AND finished_at IS NULL"
)


def dispatch_and_finish(driver: Driver, session: str, count: int) -> None:
    """Two statements a run, by hand, each in a transaction of its own."""
    run, end, begin = driver.run, driver.end, driver.begin
    for _ in range(count):
        key, at = new_ulid(), now()
        if begin:
            run(begin)
        run(INSERT_RUN, (key, at, session, "planner", dump(INPUT), at))
        end()
        if begin:
            run(begin)
        run(FINISH_RUN, (0, dump(OUTPUT), now(), key))
        end()


def put(driver: Driver, count: int) -> None:
    run, end, begin = driver.run, driver.end, driver.begin
    for _ in range(count):
        if begin:
            run(begin)
        run("INSERT INTO counter (name, value) VALUES (?, ?)", (new_ulid(), 1))
        end()


class PlainModel(peewee.Model):
    class Meta:
        legacy_table_names = False


class PlainCounter(PlainModel):
    name = peewee.TextField(primary_key=True)
    value = peewee.BigIntegerField()

    class Meta:
        table_name = "counter"


class PlainEvent(PlainModel):
    seq = peewee.BigIntegerField(primary_key=True)
    at = peewee.BigIntegerField()
    kind = peewee.TextField()
    actor = peewee.TextField()
    subject = peewee.TextField(null=True)
    project = peewee.TextField(null=True)
    body = peewee.TextField()


class PlainAuditEvent(PlainModel):
    seq = peewee.BigIntegerField(primary_key=True)
    at = peewee.BigIntegerField()
    kind = peewee.TextField()
    actor = peewee.TextField()
    subject = peewee.TextField(null=True)
    project = peewee.TextField(null=True)
    salt = peewee.BlobField()
    body = peewee.TextField()
    body_hash = peewee.BlobField()
    hash = peewee.BlobField()

    class Meta:
        table_name = "audit_event"


class PlainSession(PlainModel):
    id = peewee.TextField(primary_key=True)
    created_at = peewee.BigIntegerField()
    project = peewee.TextField(column_name="project_id")
    title = peewee.TextField()
    state = peewee.TextField()
    attached_at = peewee.BigIntegerField(null=True)
    detached_at = peewee.BigIntegerField(null=True)
    ended_at = peewee.BigIntegerField(null=True)
    metadata = peewee.TextField()

    class Meta:
        table_name = "session"


class PlainRun(PlainModel):
    id = peewee.TextField(primary_key=True)
    created_at = peewee.BigIntegerField()
    session = peewee.ForeignKeyField(PlainSession)
    parent = peewee.ForeignKeyField("self", null=True)
    agent = peewee.TextField()
    prompt_version = peewee.TextField(null=True, column_name="prompt_version_id")
    input = peewee.TextField()
    output = peewee.TextField(null=True)
    state = peewee.TextField()
    exit_status = peewee.BigIntegerField(null=True)
    error = peewee.TextField(null=True)
    started_at = peewee.BigIntegerField()
    finished_at = peewee.BigIntegerField(null=True)

    class Meta:
        table_name = "run"


PLAIN_MODELS = [PlainCounter, PlainEvent, PlainAuditEvent, PlainSession, PlainRun]
