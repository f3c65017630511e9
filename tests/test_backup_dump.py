"""A dump of PostgreSQL is proved without a copy of the store: whatever is changed in it is found, whoever makes the
checksums fit, and the order in which its rows lie means nothing."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import kagedb
import stored
from kagedb.engines import open_engine
from kagedb.models import AuditEvent, AuditSeal
from kagedb.models.audit import hash_event
from kagedb.operations import audit, audit_verify, backup_set, verifying
from kagedb.operations.backup import Plan, make
from kagedb.settings import load
from postgres_server import DatabaseServer

ODD = """
CREATE TABLE kaged.one (n int8 PRIMARY KEY, note text);
CREATE TABLE kaged.two (n int8 PRIMARY KEY, note text);
INSERT INTO kaged.one VALUES (1, 'one'), (2, NULL), (3, E'three\\t\\\\');
INSERT INTO kaged.two VALUES (2, NULL), (3, 'drei'), (4, '');
CREATE TABLE kaged.keyless (note text, flag bool);
INSERT INTO kaged.keyless VALUES ('a', true), (NULL, NULL), ('a', true), ('', false);
CREATE TABLE kaged."Odd Name"
  (name text, part char(3), "Ünit" float8, flag bool, at timestamptz, PRIMARY KEY (name, part));
INSERT INTO kaged."Odd Name" SELECT n, p, 0.1, true, '2026-01-02 03:04:05+06'
  FROM unnest(ARRAY['b', 'A', 'ä', 'Z', 'a b', 'a-b', E'a\\tb', '😀', '\uffee', '']) n, unnest(ARRAY['x', 'yy']) p;
CREATE TABLE kaged."odd name" (ratio float8 PRIMARY KEY, flags bytea);
INSERT INTO kaged."odd name" VALUES (-1.5, ''), (0, NULL), (1e300, '\\x00ff'), ('Infinity', NULL);
"""
"""What tables of plugins can have, and what sorts in another order where nobody takes care."""

Rows = list[dict[str, bytes]]


class Set:
    """A set in SQL, of which changed copies are made."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._text = (directory / "kaged.sql").read_bytes()

    def changed(self, place: Path, changes: dict[str, Callable[[Rows], Any]]) -> Path:
        """A copy whose tables' rows have been changed, each by its function, with checksums that fit."""
        text = self._text
        for table, change in changes.items():
            found = re.search(rb"\nCOPY kaged\.%b \((.*)\) FROM stdin;\n((?:.*\n)*?)\\\.\n" % table.encode(), text)
            assert found, table
            columns = found[1].decode().split(", ")
            rows = [dict(zip(columns, line.split(b"\t"), strict=True)) for line in found[2].splitlines()]
            change(rows)
            lines = b"".join(b"\t".join(row.values()) + b"\n" for row in rows)
            text = text[: found.start(2)] + lines + text[found.end(2) :]
        made = place / "changed"
        shutil.copytree(self._directory, made)
        (made / "kaged.sql").write_bytes(text)
        document = json.loads((made / backup_set.MANIFEST).read_text())
        document["sha256"] = hashlib.sha256(text).hexdigest()
        (made / backup_set.MANIFEST).write_text(json.dumps(document))
        backup_set.write_sums(made, document["sha256"], "kaged.sql")
        return made


@pytest.fixture(scope="module")
def dump(
    homes: Any, postgres_server: DatabaseServer, postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Set]:
    """Of a store whose audit log is sealed, pruned and redacted, and with odd tables."""
    name = "dumped"
    postgres_server.create_database(name, postgres_template)
    url = postgres_server.url(name)
    stored.fill_fully(url)
    with kagedb.connect(url=url) as storage:
        audit.prune(storage, AuditEvent.by_id(AuditEvent.head()[0]).at + 1, seal=1, actor=stored.ACTOR)
    connection = psycopg2.connect(url)
    connection.cursor().execute(ODD)
    connection.commit()
    connection.close()
    engine = open_engine(load(url=url), read_only=True)
    engine.open(create=False)
    made = make(engine, tmp_path_factory.mktemp("sets"), Plan(form="sql"))
    engine.close()
    assert made.verified
    yield Set(Path(made.directory))
    postgres_server.drop_database(name)


def wrong(directory: Path) -> list[str]:
    """As somebody without any store verifies it."""
    one = backup_set.BackupSet(directory, 1)
    return verifying.verify(load(url="sqlite:///nowhere/at/all.db"), one).wrong


def test_rows_in_another_order_are_the_same_rows(dump: Set, tmp_path: Path) -> None:
    tables = (
        "audit_event",
        "audit_seal",
        "transcript_chunk",
        "run",
        "blob",
        "one",
        "keyless",
        '"Odd Name"',
        '"odd name"',
    )
    shuffle = random.Random(7).shuffle
    assert wrong(dump.changed(tmp_path / "shuffled", dict.fromkeys(tables, shuffle))) == []
    assert wrong(dump.changed(tmp_path / "reversed", dict.fromkeys(tables, list.reverse))) == []


def test_a_digest_can_be_made_of_a_dump_with_nothing_but_sha256(dump: Set, tmp_path: Path) -> None:
    """As docs/backup.md says; in the same bytes in every version that writes `kaged.table.3`."""
    facts = backup_set.BackupSet(dump.changed(tmp_path, {}), 1).manifest.facts
    sha256 = hashlib.sha256
    one = [sha256(line).digest() for line in (b"1\tone", b"2\t\\N", b"3\tthree\\t\\\\")]
    assert facts["one"].digest == sha256(b"kaged.table.3 one n,note\n" + b"".join(one)).hexdigest()
    keyless = [sha256(line).digest() for line in (b"0\t", b"1\ta", b"1\ta", b"\\N\t\\N")]
    total = sum(int.from_bytes(each, "big") for each in keyless) % 2**256
    whole = b"kaged.table.3 keyless flag,note\n" + total.to_bytes(32, "big")
    assert facts["keyless"].digest == sha256(whole).hexdigest()


def change_a_row(rows: Rows) -> None:
    rows[-1]["note"] = b"vier"


def take_a_row(rows: Rows) -> None:
    del rows[1]


def double_a_row(rows: Rows) -> None:
    rows.insert(0, rows[-1])


def replace_a_row(rows: Rows) -> None:
    rows[0] = rows[-1]


CHANGES: dict[str, tuple[str, Callable[[Rows], None], str]] = {
    "a row changed": ("one", change_a_row, "one has other contents than the manifest says"),
    "a row gone": ("one", take_a_row, "one has 2 rows, the manifest says 3"),
    "a row twice": ("one", double_a_row, "the dump has a row of one twice"),
    "a row with a longer key twice": ("plugin_state", double_a_row, "the dump has a row of plugin_state twice"),
    "a row without a key changed": ("keyless", change_a_row, "keyless has other contents than the manifest says"),
    "a row without a key twice": ("keyless", double_a_row, "keyless has 5 rows, the manifest says 4"),
    "a row without a key in another's place": ("keyless", replace_a_row, "keyless has other contents than the"),
    "a row with a value too many": ("one", lambda rows: rows[0].update(more=b""), "the rows of one in the dump cannot"),
    "a row with a value too few": ("one", lambda rows: rows[0].pop("n"), "the rows of one in the dump cannot be read"),
    "a number that is none": ("one", lambda rows: rows[0].update(n=b"x"), "the rows of one in the dump cannot be read"),
    "a boolean that is none": ("keyless", lambda rows: rows[0].update(flag=b"x"), "the rows of keyless in the dump"),
    "a float changed": ('"odd name"', lambda rows: rows[0].update(ratio=b"-1.25"), "odd name has other contents than"),
    "bytes changed": (
        '"odd name"',
        lambda rows: rows[2].update(flags=b"\\\\x01ff"),
        "odd name has other contents than",
    ),
    "NULL for nothing": ("two", lambda rows: rows[2].update(note=b"\\N"), "two has other contents than the manifest"),
    "a prompt changed": ("prompt_version", lambda rows: rows[0].update(body=b"a horse"), "is not what its digest says"),
    "a blob changed": ("blob", lambda rows: rows[0].update(data=b"\\\\x00"), "is not what its digest says"),
    "no rows at all": ("audit_event", list.clear, "the audit log is broken at event 1: there are no events"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_rows_that_were_changed_are_found(dump: Set, tmp_path: Path, what: str) -> None:
    table, change, told = CHANGES[what]
    assert told in "; ".join(wrong(dump.changed(tmp_path, {table: change})))


def test_rows_that_changed_places_between_tables_are_found(dump: Set, tmp_path: Path) -> None:
    """Rows that are alike in every column, in tables that are alike too."""
    taken: list[dict[str, bytes]] = []

    def put(rows: Rows) -> None:
        taken.append(rows[-1])
        rows[-1] = {**taken[0], "n": rows[-1]["n"]} if len(taken) > 1 else {**rows[-1], "note": b""}

    assert wrong(dump.changed(tmp_path, {"one": put, "two": put})) == [
        "one has other contents than the manifest says",
        "two has other contents than the manifest says",
    ]


def test_a_table_that_is_missing_is_told(dump: Set, tmp_path: Path) -> None:
    made = dump.changed(tmp_path, {})
    document = json.loads((made / backup_set.MANIFEST).read_text())
    document["facts"]["three"] = document["facts"]["one"] | {"rows": 0}
    (made / backup_set.MANIFEST).write_text(json.dumps(document))
    backup_set.write_sums(made, document["sha256"], "kaged.sql")
    assert wrong(made) == ["the table three is missing"]


# The audit log.


def event(rows: Rows, seq: int) -> dict[str, bytes]:
    return next(row for row in rows if int(row["seq"]) == seq)


def change_the_body(rows: Rows) -> None:
    event(rows, 50)["body"] = b'{"number":0}'


def change_the_body_and_its_hash(rows: Rows) -> None:
    one = event(rows, 50)
    change_the_body(rows)
    salt = bytes.fromhex(one["salt"][3:].decode())
    one["body_hash"] = b"\\\\x" + hashlib.sha256(salt + one["body"]).hexdigest().encode()


def take_an_event(rows: Rows) -> None:
    rows.remove(event(rows, 50))


def change_the_actor(rows: Rows) -> None:
    event(rows, 50)["actor"] = b"agent:other"


def empty_the_body(rows: Rows) -> None:
    event(rows, 50).update(body=b"", salt=b"\\\\x")


def forget_the_redaction(rows: Rows) -> None:
    next(row for row in rows if row["kind"] == b"audit.redacted")["subject"] = b"audit_event:39"


def change_the_hash(rows: Rows) -> None:
    event(rows, 50)["hash"] = event(rows, 49)["hash"]


def take_the_time(rows: Rows) -> None:
    event(rows, 50)["at"] = b"\\N"


EVENTS: dict[str, tuple[Callable[[Rows], None], str]] = {
    "its body": (change_the_body, "the audit log is broken at event 50: the body of event 50 was changed"),
    "its body and the hash of that": (change_the_body_and_its_hash, "at event 50: event 50 was changed, or does not"),
    "all of it": (take_an_event, "the audit log is broken at event 50: event 50 is missing"),
    "who did it": (change_the_actor, "at event 50: event 50 was changed, or does not follow the event before it"),
    "its hash": (change_the_hash, "at event 50: event 50 was changed, or does not follow the event before it"),
    "no body left": (empty_the_body, "the body of event 50 is gone, and no event says that it was redacted"),
    "what was redacted": (forget_the_redaction, "event 40 is gone, and no event says that it was redacted"),
    "no time": (take_the_time, "the rows of audit_event in the dump cannot be read: event 50 has no time"),
}


@pytest.mark.parametrize("order", ["as it was", "shuffled"])
@pytest.mark.parametrize("what", EVENTS)
def test_an_event_that_was_changed_is_named(dump: Set, tmp_path: Path, what: str, order: str) -> None:
    change, told = EVENTS[what]

    def both(rows: Rows) -> None:
        change(rows)
        if order == "shuffled":
            random.Random(3).shuffle(rows)

    assert told in "; ".join(wrong(dump.changed(tmp_path, {"audit_event": both})))


class Log:
    """An audit log in memory."""

    def __init__(self, events: list[list[Any]], seals: list[list[Any]]) -> None:
        self._connection = sqlite3.connect(":memory:")
        run = self._connection.execute
        run(f"CREATE TABLE audit_event ({', '.join(audit_verify.COLUMNS)})")
        run("CREATE TABLE audit_seal (n, first_seq, last_seq, head, at, mac, pruned_at)")
        self._connection.executemany("INSERT INTO audit_event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", events)
        self._connection.executemany("INSERT INTO audit_seal VALUES (?, ?, ?, ?, ?, ?, ?)", seals)

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        return self._connection.execute(sql, params)

    stream = raw


def kept_of(events: list[list[Any]]) -> list[list[Any]]:
    """What is kept of events that come in this order."""
    beforehand = audit_verify.Beforehand()
    return [[one[0], *beforehand.look(*one)] for one in events]


@pytest.fixture
def log(migrated_url: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """The events and seals of a log that is sealed, pruned and redacted, and holds."""
    stored.fill_fully(migrated_url)
    with kagedb.connect(url=migrated_url) as storage:
        audit.prune(storage, AuditEvent.by_id(AuditEvent.head()[0]).at + 1, seal=1, actor=stored.ACTOR)
        columns = [getattr(AuditEvent, name) for name in audit_verify.COLUMNS]
        events = [plain(row) for row in AuditEvent.select(*columns).order_by(AuditEvent.seq).tuples()]
        seals = [plain(row) for row in AuditSeal.select().order_by(AuditSeal.n).tuples()]
    return events, seals


def plain(row: tuple[Any, ...]) -> list[Any]:
    return [bytes(value) if isinstance(value, memoryview) else value for value in row]


def rehash(events: list[list[Any]], place: int, previous: bytes) -> None:
    """Make the events from there on a chain that hangs on `previous`."""
    for one in events[place:]:
        seq, at, kind, actor, subject, project, _, _, body_hash, _ = one
        previous = one[-1] = hash_event(previous, seq, at, kind, actor, subject, project, body_hash)


def tamper(events: list[list[Any]], seals: list[list[Any]], chance: random.Random) -> None:
    """One thing that somebody could do, or that could happen, to the log."""
    one, other = chance.choice(events), chance.choice(events)
    place = chance.randrange(1, len(one))
    match chance.randrange(6):
        case 0:
            one[place] = other[place]
        case 1:
            events.remove(one)
        case 2:
            one[1:], other[1:] = other[1:], one[1:]
        case 3:
            one[6], one[7] = b"", ""
        case 4:
            one[place] = one[place] + one[place] if isinstance(one[place], str | bytes) else 7
        case _:
            seal, another = chance.choice(seals), chance.choice(seals)
            place = chance.randrange(1, len(seal))
            seal[place] = another[place]


def test_what_is_kept_of_a_log_is_as_good_as_the_log(log: tuple[list[list[Any]], list[list[Any]]]) -> None:
    """Whatever is changed, and in whatever order the events come: the same verdict, in the same words."""
    known, known_seals = log
    assert sum(one[1] is not None for one in kept_of(known)) < len(known) // 5, "of most events little is kept"
    chance = random.Random(11)
    verdicts = []
    for number in range(400):
        events, seals = [list(row) for row in known], [list(row) for row in known_seals]
        if number:
            tamper(events, seals, chance)
        whole = audit_verify.verify_in(Log(events, seals))
        # Some out of place, as in a table whose room was used again.
        for _ in range(chance.randrange(4)):
            events.insert(chance.randrange(len(events)), events.pop(chance.randrange(len(events))))
        assert audit_verify.verify_beforehand(Log(kept_of(events), seals)) == whole
        verdicts.append(whole.result)
    assert verdicts[0] == "holds"
    assert verdicts.count("broken") > 200


def test_a_chain_that_hangs_on_something_else_is_found_in_what_is_kept(
    log: tuple[list[list[Any]], list[list[Any]]],
) -> None:
    events, seals = log
    first = events[0]

    def broken_at(seq: int, order: list[list[Any]]) -> bool:
        whole = audit_verify.verify_in(Log(events, seals))
        kept = audit_verify.verify_beforehand(Log(kept_of(order), seals))
        return whole == kept and (kept.result, kept.seq) == ("broken", seq)

    first[6:9] = b"salt", "{}", hashlib.sha256(b"salt{}").digest()
    # On an event left over by a pruning, which is not the one whose hash its seal has.
    events.insert(0, [first[0] - 1, *first[1:-1], bytes(32)])
    rehash(events, 1, bytes(32))
    assert broken_at(first[0], events)
    del events[0]
    # On an event further back, which comes just before it.
    rehash(events, 0, bytes(seals[0][3]))
    rehash(events, 5, events[3][-1])
    assert broken_at(events[5][0], [*events[:4], *events[5:], events[4]])
    # An event without a body, of which its hash says that it never had one.
    rehash(events, 5, events[4][-1])
    events[5][6:9] = b"", "", hashlib.sha256().digest()
    rehash(events, 5, events[4][-1])
    assert broken_at(events[5][0], events)
