"""`kaged salvage`: what a damaged SQLite file still has, into a fresh store on either engine; the rest is told."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import damages
import kagedb
from commands import answer_json, in_process
from contents import contents, digests_at
from damages import Anatomy
from kagedb import AuditEvent, Plugin, Project, Prompt, Session
from kagedb.errors import KagedError
from kagedb.operations import salvage
from kagedb.settings import load
from programs import kill, run_python, start_python, wait_for_line
from stored import ACTOR, fill_fully

if TYPE_CHECKING:
    from places import Places

SHORT_SEEDS, LONG_SEEDS = 6, 400
"""Random damages: a fifth of a second each."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Path:
    """A healthy file whose tables have many pages, some of them free."""
    path = tmp_path_factory.mktemp("wide") / "kaged.db"
    shutil.copy(sqlite_template, path)
    damages.fill_widely(f"sqlite://{path}")
    return path


@pytest.fixture(scope="module")
def known(wide: Path) -> Anatomy:
    return damages.anatomy(wide)


@pytest.fixture
def path(tmp_path: Path, wide: Path) -> Path:
    """A copy of it, to be damaged, alone in its directory."""
    place = tmp_path / "damaged" / "kaged.db"
    place.parent.mkdir(mode=0o700)
    shutil.copy(wide, place)
    return place


@pytest.fixture
def target(engine: str, places: Places) -> str:
    """Where what is salvaged goes: on either engine."""
    return places.empty(engine)


@pytest.fixture
def new_file(tmp_path: Path) -> str:
    """The same in a file, for what only the damaged store decides."""
    (tmp_path / "new").mkdir(mode=0o700)
    return f"sqlite://{tmp_path}/new/kaged.db"


def salvaged(path: Path, target: str) -> dict[str, Any]:
    done = in_process("--url", f"sqlite://{path}", "salvage", "--to", target, "--json")
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def refused(path: Path, target: str) -> tuple[int, str]:
    done = in_process("--url", f"sqlite://{path}", "salvage", "--to", target)
    return done.exit_code, done.output


def rows_of(url: str) -> dict[str, set[tuple[Any, ...]]]:
    with kagedb.connect(url=url, read_only=True) as storage:
        return {table: set(rows) for table, rows in contents(storage).items()}


def findings(url: str, *checks: str) -> list[str]:
    found = json.loads(in_process("--url", url, "check", "--json").stdout)["findings"]
    return [one["wrong"] for one in found if one["check"] in checks]


# A store that is whole.


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_healthy_store_arrives_as_it_was_but_for_the_event(
    tmp_path: Path, sqlite_template: Path, engine: str, places: Places, kind: str
) -> None:
    source = tmp_path / "source" / "kaged.db"
    source.parent.mkdir()
    shutil.copy(sqlite_template, source)
    fill_fully(f"sqlite://{source}")
    target = places.empty(engine) if kind == "missing" else places.migrated(engine)
    done = salvaged(source, target)
    before, after = digests_at(f"sqlite://{source}"), digests_at(target)
    assert {name for name in before if before[name] != after[name]} == {"audit_event"}
    assert after["audit_event"][0] == before["audit_event"][0] + 1
    assert (done["lost"], done["audit"], done["notes"]) == (0, "holds", [])
    assert not any(tally["ranges"] or tally["doubtful"] or tally["clashes"] for tally in done["tables"].values())
    assert findings(target, "integrity", "schema", "audit log", "stored hashes") == []


def test_the_event_says_what_came_from_where(path: Path, new_file: str) -> None:
    done = salvaged(path, new_file)
    with kagedb.connect(url=new_file, read_only=True):
        event = AuditEvent.select().order_by(AuditEvent.seq.desc()).get()
    assert (event.kind, event.actor.partition(":")[0]) == ("store.salvaged", "operator")
    body = json.loads(event.body)
    assert (body["from"], body["rows"], body["lost"]) == (str(path), done["rows"], 0)


def test_what_is_salvaged_is_a_store_like_any_other(path: Path, known: Anatomy, target: str) -> None:
    damages.zero(path, known.page_bytes, *known.of("internal", "audit_event", "run")[:2])
    salvaged(path, target)
    with kagedb.connect(url=target, exclusive=True) as storage:
        with pytest.raises(kagedb.ImmutableError):
            storage.database.execute_sql("DELETE FROM prompt_version")
        project = Project.add("garden", actor=ACTOR)
        Prompt.edit(project, "planner", "new", actor=ACTOR, message="")


# What is damaged.


def damage_and_compare(healthy: Path, known: Anatomy, place: Path, seed: int) -> None:
    """Damage some pages somehow: every row elsewhere is back, and no row is there that was not."""
    chance = random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    path = place / "kaged.db"
    shutil.copy(healthy, path)
    kind = chance.choice(["any", "any", "internal", "leaf", "overflow", "free", "first"])
    among = {"any": list(known.pages), "first": [1, 2, 3, 4, 5]}.get(kind) or known.of(kind)
    damaged = set(chance.sample(among, min(chance.choice([1, 1, 2, 5, 20]), len(among))))
    for number in damaged:
        damages.strike(path, known.page_bytes, number, chance)
    before = path.read_bytes()
    try:
        salvage.salvage(load(url=f"sqlite://{path}"), load(url=f"sqlite://{place}/new.db"), actor=ACTOR)
    except KagedError as error:
        pytest.fail(f"seed {seed}: {error}")
    assert path.read_bytes() == before
    found = damages.stored_rows(place / "new.db")
    for table, rows in known.rows.items():
        if table in ("schema_migration", "counter"):
            continue  # the new store has its own, and counters are raised
        where = f"seed {seed}: {table}, pages {sorted(damaged)}"
        untouched = known.untouched(table, damaged)
        assert not untouched - found[table], where
        invented = {row for row in found[table] - rows.keys() if not damages.is_stand_in(row)}
        if table == "audit_event":
            invented = {row for row in invented if row[2] != "store.salvaged"}
        if table == "transcript":
            continue  # what stands in for one has no mark of its own
        assert len(invented) <= len(rows) - len(untouched), where


@pytest.mark.sqlite_only
@pytest.mark.parametrize("seed", range(SHORT_SEEDS))
def test_every_row_beside_the_damage_is_back_and_none_is_invented(
    wide: Path, known: Anatomy, tmp_path: Path, engine: str, seed: int
) -> None:
    damage_and_compare(wide, known, tmp_path / "place", seed)


@pytest.mark.slow
@pytest.mark.sqlite_only
def test_every_row_beside_many_damages_is_back_and_none_is_invented(
    wide: Path, known: Anatomy, tmp_path: Path, engine: str
) -> None:
    for seed in range(SHORT_SEEDS, LONG_SEEDS):
        damage_and_compare(wide, known, tmp_path / "place", seed)


def test_a_row_that_is_lost_is_told_by_its_keys(path: Path, known: Anatomy, new_file: str) -> None:
    """Of a table by ids from its index, of the log by the numbers that are missing."""
    sessions, events = known.of("leaf", "session")[1], known.of("leaf", "audit_event")[5]
    damages.zero(path, known.page_bytes, sessions, events)
    done = salvaged(path, new_file)["tables"]
    lost = sorted(row[0] for row, pages in known.rows["session"].items() if sessions in pages)
    everyone = sorted(row[0] for row in known.rows["session"])
    first, last = everyone.index(lost[0]), everyone.index(lost[-1])
    assert done["session"]["lost"] == len(lost)
    assert done["session"]["ranges"] == [
        {"after": [everyone[first - 1]], "before": [everyone[last + 1]], "rows": len(lost)}
    ]
    numbers = sorted(row[0] for row, pages in known.rows["audit_event"].items() if events in pages)
    assert done["audit_event"]["ranges"] == [
        {"after": [numbers[0] - 1], "before": [numbers[-1] + 1], "rows": len(numbers)}
    ]


def test_without_an_index_the_range_is_told_and_not_the_count(path: Path, known: Anatomy, new_file: str) -> None:
    chunks = known.of("leaf", "transcript_chunk")
    damages.zero(path, known.page_bytes, chunks[2])
    tally = salvaged(path, new_file)["tables"]["transcript_chunk"]
    keys = sorted(row[0] for row in known.rows["transcript_chunk"])
    lost = sorted(row[0] for row, pages in known.rows["transcript_chunk"].items() if chunks[2] in pages)
    assert tally["lost"] is None
    assert tally["ranges"] == [
        {"after": [keys[keys.index(lost[0]) - 1]], "before": [keys[keys.index(lost[-1]) + 1]], "rows": None}
    ]


def test_what_was_deleted_does_not_come_back(path: Path, known: Anatomy, new_file: str) -> None:
    """Its bytes are on free pages still, and every page that tells which are free is damaged but one."""
    assert b"gone gone" in path.read_bytes()
    damages.zero(path, known.page_bytes, 1, *known.of("internal", "plugin_state"))
    salvaged(path, new_file)
    assert not any("gone gone" in str(row) for row in rows_of(new_file)["plugin_state"])
    assert len(rows_of(new_file)["plugin_state"]) == len(known.rows["plugin_state"])


def test_a_row_whose_hash_does_not_fit_is_kept_and_named(path: Path, new_file: str) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"You look after house 2") + 4] ^= 1
    path.write_bytes(data)
    tally = salvaged(path, new_file)["tables"]["prompt_version"]
    assert (tally["lost"], tally["doubtful"], len(tally["doubted"])) == (0, 1, 1)
    assert len(findings(new_file, "stored hashes")) == 1


def test_a_row_with_an_impossible_value_is_lost_and_no_other(path: Path, target: str) -> None:
    """JSON that is none, an id that is none, text that is not UTF-8: PostgreSQL would take none of them."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute("PRAGMA foreign_keys = OFF")
    values = {"metadata": "'{'", "id": "'01'", "state": "CAST(x'ff' AS TEXT)"}
    for number, (column, value) in enumerate(values.items()):
        connection.execute(f"UPDATE session SET {column} = {value} WHERE title = 'night {number}'")
    connection.commit()
    connection.close()
    done = salvaged(path, target)["tables"]["session"]
    assert (done["rows"], done["lost"]) == (57, 3)
    assert findings(target, "integrity") == []


def test_a_lost_audit_event_breaks_the_log_for_good_and_that_is_said(path: Path, known: Anatomy, new_file: str) -> None:
    leaf = known.of("leaf", "audit_event")[4]
    first = min(row[0] for row, pages in known.rows["audit_event"].items() if leaf in pages)
    damages.zero(path, known.page_bytes, leaf)
    done = salvaged(path, new_file)
    assert done["audit"] == f"broken at event {first}: event {first} is missing"
    verdict = in_process("--url", new_file, "audit", "verify")
    assert verdict.exit_code == 1 and str(first) in verdict.output


# Rows that others refer to.


def lose_a_table(path: Path, known: Anatomy, target: str, lost: str) -> None:
    """Every page of a table is gone: of all other tables every row is there, with stand-ins that say what they are."""
    damages.zero(path, known.page_bytes, *known.of("leaf", lost))
    before = known.rows
    done = salvaged(path, target)
    found = rows_of(target)
    for table, rows in before.items():
        if table not in (lost, "schema_migration"):
            assert len(found[table]) >= len(rows), table
    assert done["tables"][lost]["rows"] == 0
    assert done["tables"][lost]["lost"] == len(before[lost])
    assert done["tables"][lost]["stand_ins"] == len(found[lost]) > 0
    assert all(damages.is_stand_in(row) for row in found[lost])
    assert findings(target, "integrity", "schema") == []


@pytest.mark.parametrize("lost", ["project", "prompt", "prompt_version", "prompt_label", "plugin", "run"])
def test_no_row_is_lost_with_the_one_it_refers_to(path: Path, known: Anatomy, new_file: str, lost: str) -> None:
    lose_a_table(path, known, new_file, lost)


def test_on_either_engine_no_row_is_lost_with_the_one_it_refers_to(path: Path, known: Anatomy, target: str) -> None:
    lose_a_table(path, known, target, "session")


def test_a_chunk_without_its_transcript_can_still_be_read(path: Path, known: Anatomy, target: str) -> None:
    damages.zero(path, known.page_bytes, *known.of("leaf", "transcript"))
    salvaged(path, target)
    listed = answer_json(target, "transcript", "list", "--limit", "0")
    assert len(listed) == len(known.rows["transcript"])
    assert {len(answer_json(target, "transcript", "show", one["id"])) > 0 for one in listed} == {True}


def test_numbers_that_are_never_given_twice_are_not(path: Path, known: Anatomy, target: str) -> None:
    damages.zero(path, known.page_bytes, *known.of("leaf", "counter"))
    salvaged(path, target)
    with kagedb.connect(url=target):
        taken = {transcript.number for transcript in kagedb.Transcript.select()}
        with kagedb.Transcript.open(Session.select().get(), columns=80, rows=24) as recorder:
            recorder.write(b"hello")
        assert {one.number for one in kagedb.Transcript.select()} - taken == {max(taken) + 1}


# The write-ahead log.


@pytest.fixture
def logged(tmp_path: Path, path: Path) -> Path:
    """A copy of a store in use, whose last transactions are in the log alone."""
    program = (
        "import sys, kagedb, os, shutil\n"
        "from kagedb import AuditEvent\n"
        "with kagedb.connect(sys.argv[1]) as storage:\n"
        "    for number in range(20):\n"
        "        AuditEvent.record('policy.decision', actor='agent:log', body={'logged': number})\n"
        "    for part in ('', '-wal'):\n"
        "        shutil.copy(sys.argv[2] + part, sys.argv[3] + part)\n"
    )
    copy = tmp_path / "logged" / "kaged.db"
    copy.parent.mkdir()
    done = run_python(program, f"sqlite://{path}", str(path), str(copy))
    assert done.returncode == 0, done.stderr
    return copy


def logged_events(url: str) -> list[int]:
    with kagedb.connect(url=url, read_only=True):
        events = AuditEvent.select().where(AuditEvent.actor == "agent:log").order_by(AuditEvent.seq)
        return [json.loads(event.body)["logged"] for event in events]


def test_what_is_committed_in_the_log_counts(logged: Path, new_file: str) -> None:
    assert logged.with_name("kaged.db-wal").stat().st_size > 0
    assert salvaged(logged, new_file)["audit"] == "holds"
    assert logged_events(new_file) == list(range(20))


def test_of_a_damaged_log_everything_before_the_damage_counts(logged: Path, new_file: str) -> None:
    log = logged.with_name("kaged.db-wal")
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    done = salvaged(logged, new_file)
    found = logged_events(new_file)
    assert 0 < len(found) < 20 and found == list(range(len(found)))
    assert done["audit"] == "holds"
    assert any("log is damaged" in note for note in done["notes"])


def test_a_transaction_that_the_log_has_half_of_does_not_count(logged: Path, new_file: str) -> None:
    log = logged.with_name("kaged.db-wal")
    page = int.from_bytes(log.read_bytes()[8:12], "big")
    os.truncate(log, log.stat().st_size - page - 24)
    assert salvaged(logged, new_file)["audit"] == "holds"
    assert logged_events(new_file) == list(range(19))


# Plugins' own tables.


def fill_plugin_tables(url: str) -> None:
    with kagedb.connect(url=url):
        plugin = Plugin.install(
            Project.add("annex", actor=ACTOR), {"name": "notes", "version": "1", "permissions": []}, actor=ACTOR
        )
        plugin.migrate(
            {
                "0001_pages": """
                    CREATE TABLE p_notes__page (id {integer} PRIMARY KEY, title {text} UNIQUE, size {real});
                    CREATE TABLE p_notes__line (page {integer} REFERENCES p_notes__page (id), text {text}, n {integer});
                    CREATE INDEX p_notes__line_page ON p_notes__line (page);
                """
            }
        )
        database = plugin.database()
        with database.transaction():
            for number in range(60):
                database.execute("INSERT INTO p_notes__page VALUES (?, ?, ?)", (number, f"page {number} " * 20, 1.5))
                for line in range(3):
                    database.execute("INSERT INTO p_notes__line VALUES (?, ?, ?)", (number, "text " * 50, line))


def plugin_rows(path: Path) -> dict[str, set[tuple[Any, ...]]]:
    return {table: rows for table, rows in damages.stored_rows(path).items() if table.startswith("p_notes__")}


@pytest.mark.sqlite_only
def test_tables_of_plugins_come_along_as_far_as_they_can(path: Path, tmp_path: Path, engine: str) -> None:
    """Rows that refer to a lost one do not: what could stand in for that only the plugin knows."""
    fill_plugin_tables(f"sqlite://{path}")
    known = damages.anatomy(path)
    before = plugin_rows(path)
    leaf = known.of("leaf", "p_notes__page")[1]
    damages.zero(path, known.page_bytes, leaf)
    target = tmp_path / "target" / "kaged.db"
    target.parent.mkdir(mode=0o700)
    done = salvaged(path, f"sqlite://{target}")["tables"]
    found = plugin_rows(target)
    lost = {row for row, pages in known.rows["p_notes__page"].items() if leaf in pages}
    assert lost and found["p_notes__page"] == before["p_notes__page"] - lost
    numbers = {row[0] for row in lost}
    assert found["p_notes__line"] == {row for row in before["p_notes__line"] if row[0] not in numbers}
    assert done["p_notes__line"]["lost"] == 3 * len(lost)
    assert findings(f"sqlite://{target}", "integrity", "schema") == []
    with kagedb.connect(url=f"sqlite://{target}"):
        plugin = Plugin.select().where(Plugin.name == "notes").get()
        assert plugin.database().execute("SELECT COUNT(*) FROM p_notes__page").rows == [(60 - len(lost),)]


@pytest.mark.postgres_only
def test_tables_of_plugins_are_left_behind_where_their_words_are_not_spoken(path: Path, target: str) -> None:
    fill_plugin_tables(f"sqlite://{path}")
    done = salvaged(path, target)
    assert {"p_notes__page", "p_notes__line"} <= {word for note in done["notes"] for word in note.split()}
    assert "p_notes__page" not in done["tables"]


# What is refused, and what is never touched.


def test_a_place_that_was_written_to_is_refused_and_stays_as_it_is(path: Path, migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        Project.add("house", actor=ACTOR)
    before = digests_at(migrated_url)
    status, told = refused(path, migrated_url)
    assert status == 1 and "was written to" in told
    assert digests_at(migrated_url) == before


@pytest.mark.sqlite_only
def test_the_damaged_store_itself_is_no_place_for_it(path: Path, engine: str) -> None:
    before = path.read_bytes()
    assert refused(path, f"sqlite://{path}")[0] == 2
    assert path.read_bytes() == before


def test_nothing_is_written_beside_the_damaged_file(path: Path, known: Anatomy, new_file: str) -> None:
    damages.zero(path, known.page_bytes, 1)
    before = {one.name: (one.read_bytes(), one.stat().st_mtime_ns) for one in path.parent.iterdir()}
    path.parent.chmod(0o500)
    try:
        salvaged(path, new_file)
    finally:
        path.parent.chmod(0o700)
    assert {one.name: (one.read_bytes(), one.stat().st_mtime_ns) for one in path.parent.iterdir()} == before


HOLDERS = {
    "a daemon": "import kagedb\nstore = kagedb.connect('sqlite://' + sys.argv[1], exclusive=True)",
    "another program": (
        "import sqlite3\nstore = sqlite3.connect(sys.argv[1])\nstore.execute('SELECT * FROM sqlite_master').fetchone()"
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_store_that_somebody_has_open_is_refused(path: Path, new_file: str, holder: str) -> None:
    process = start_python(f"import sys\n{HOLDERS[holder]}\nprint('open', flush=True)\nsys.stdin.read()", str(path))
    wait_for_line(process, "open")
    status, told = refused(path, new_file)
    assert status == 75 and f"process {process.pid}" in told
    process.communicate("")
    assert salvaged(path, new_file)["audit"] == "holds"


@pytest.mark.sqlite_only
def test_another_database_is_no_store_to_salvage(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "photos.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE photos (id INTEGER PRIMARY KEY, name TEXT, taken INTEGER)")
    connection.executemany("INSERT INTO photos (name, taken) VALUES (?, ?)", [("x" * 50, n) for n in range(500)])
    connection.commit()
    connection.close()
    status, told = refused(path, f"sqlite://{tmp_path}/new.db")
    assert status == 3 and "nothing of a kaged store" in told
    assert not (tmp_path / "new.db").exists()


@pytest.mark.postgres_only
def test_of_a_server_s_store_the_operator_is_told_what_to_do_instead(migrated_url: str, tmp_path: Path) -> None:
    done = in_process("--url", migrated_url, "salvage", "--to", f"sqlite://{tmp_path}/new.db")
    assert done.exit_code == 1
    assert "pg_dump" in done.output and "kaged restore" in done.output


SALVAGING = """
import sys
from kagedb.operations import salvage
from kagedb.settings import load
def tell(what, done, whole):
    print(done, whole, flush=True)
salvage.salvage(load(url=sys.argv[1]), load(url=sys.argv[2]), actor="operator:ana", progress=tell)
"""


def killed_midway(path: Path, target: str, step: int) -> None:
    before = path.read_bytes()
    process = start_python(SALVAGING, f"sqlite://{path}", target)
    wait_for_line(process, f"{step} ")
    kill(process)
    assert path.read_bytes() == before
    with pytest.raises((kagedb.StorageNotFound, kagedb.SchemaTooOld)):
        kagedb.connect(url=target, migrate=False)


def test_killed_midway_the_place_is_as_it_was(path: Path, target: str) -> None:
    killed_midway(path, target, 12)
    assert salvaged(path, target)["audit"] == "holds"


@pytest.mark.slow
def test_killed_at_any_table_the_place_is_as_it_was(path: Path, target: str) -> None:
    for step in range(20):
        killed_midway(path, target, step)
    assert salvaged(path, target)["audit"] == "holds"
