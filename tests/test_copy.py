"""`kaged copy` moves a whole store between engines, or leaves the target as it was."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from commands import answer_json, in_process
from contents import contents, digests_at
from kagedb import AuditEvent, AuditSeal, Project, Prompt
from kagedb.operations import audit
from kagedb.settings import load
from places import new_name, sqlite_url
from programs import kill, run_python, start_python, wait_for_line
from stored import ACTOR, fill, fill_fully
from terminals import terminal

if TYPE_CHECKING:
    from places import Places
    from postgres_server import DatabaseServer

Filled = dict[str, Path | str]
"""Stores that nobody has open, on each engine: the path of a file, and the name of a database."""

OTHER = {"sqlite": "postgres", "postgres": "sqlite"}


@pytest.fixture(scope="module")
def filled(homes: Any, postgres_server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """A store on each engine in which every table has rows."""
    path, database = tmp_path_factory.mktemp("filled") / "kaged.db", new_name()
    postgres_server.create_database(database)
    for url in (sqlite_url(path), postgres_server.url(database)):
        kagedb.connect(url=url).close()
        fill_fully(url)
    yield {"sqlite": path, "postgres": database}
    postgres_server.drop_database(database)


@pytest.fixture
def filled_url(engine: str, places: Places, filled: Filled) -> str:
    return places.copy(engine, filled[engine])


@pytest.fixture(scope="module")
def large(
    filled: Filled, postgres_server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Filled]:
    """The same with 24 MB of terminal output."""
    path, database = tmp_path_factory.mktemp("large") / "kaged.db", new_name()
    shutil.copy(filled["sqlite"], path)
    postgres_server.create_database(database, str(filled["postgres"]))
    found: Filled = {"sqlite": path, "postgres": database}
    for engine in found:
        with kagedb.connect(url=url_of(found, engine, postgres_server)) as store, store.transaction("relaxed"):
            insert = store.database.dialect(
                "INSERT INTO transcript_chunk (key, at, place, size, data) VALUES (?, ?, ?, ?, ?)"
            )
            for number in range(1500):
                store.database.execute_sql(insert, ((99 << 24) + number, 1, number, 16384, random.randbytes(16384)))
    yield found
    postgres_server.drop_database(database)


def url_of(stores: Filled, engine: str, server: DatabaseServer) -> str:
    return sqlite_url(Path(stores["sqlite"])) if engine == "sqlite" else server.url(str(stores["postgres"]))


@pytest.fixture(params=["same", "other"])
def target_engine(engine: str, request: pytest.FixtureRequest) -> str:
    return engine if request.param == "same" else OTHER[engine]


@pytest.fixture(params=["missing", "empty"])
def target_url(target_engine: str, places: Places, request: pytest.FixtureRequest) -> str:
    return places.empty(target_engine) if request.param == "missing" else places.migrated(target_engine)


def test_every_table_arrives_as_it_was(filled_url: str, target_url: str) -> None:
    done = answer_json(filled_url, "copy", "--to", target_url)
    assert done["since"] == {}
    source, target = digests_at(filled_url), digests_at(target_url)
    assert target == source
    assert done["rows"] == {table: rows for table, (rows, _) in target.items()}
    empty = {table for table, (rows, _) in target.items() if not rows}
    assert not empty, "a table without rows proves nothing"
    assert answer_json(target_url, "audit", "verify")["result"] == "holds"


def test_the_copy_is_a_store_like_any_other_and_says_where_it_is_from(
    filled_url: str, target_engine: str, places: Places
) -> None:
    target_url = places.empty(target_engine)
    done = answer_json(filled_url, "copy", "--to", target_url)
    for url in (filled_url, target_url):
        with kagedb.connect(url=url, read_only=True):
            event = AuditEvent.select().order_by(AuditEvent.seq.desc()).get()
            assert event.kind == "store.copied"
            assert json.loads(event.body)["to"] == done["target"]
    checked = answer_json(target_url, "check")
    assert not [one for one in checked["findings"] if one["check"] != "backups"]
    with kagedb.connect(url=target_url, exclusive=True) as storage:
        with pytest.raises(kagedb.ImmutableError):
            storage.database.execute_sql("DELETE FROM prompt_version")
        Project.add("garden", actor=ACTOR)
    with kagedb.connect(url=target_url, read_only=True) as storage:
        assert {project.name for project in Project.select()} == {"house", "garden"}


def test_there_and_back_is_the_same_store(filled_url: str, engine: str, places: Places) -> None:
    away, back = places.empty(OTHER[engine]), places.empty(engine)
    answer_json(filled_url, "copy", "--to", away)
    there = digests_at(away)
    assert there == digests_at(filled_url)
    answer_json(away, "copy", "--to", back)
    assert digests_at(back) == digests_at(away)
    assert {name: one for name, one in digests_at(back).items() if name != "audit_event"} == {
        name: one for name, one in there.items() if name != "audit_event"
    }


def test_a_pruned_log_arrives_as_it_was(migrated_url: str, target_engine: str, places: Places) -> None:
    target_url = places.empty(target_engine)
    fill(migrated_url, events=40)
    with kagedb.connect(url=migrated_url) as storage:
        AuditSeal.close_all()
        time.sleep(0.005)
        AuditEvent.record("policy.decision", actor="agent:planner", body={})
        audit.prune(storage, time.time_ns() // 1_000_000, actor=ACTOR)
        first = AuditEvent.select().order_by(AuditEvent.seq).get().seq
        assert first > 1
    answer_json(migrated_url, "copy", "--to", target_url)
    assert digests_at(target_url) == digests_at(migrated_url)
    verdict = answer_json(target_url, "audit", "verify")
    assert (verdict["result"], verdict["first_seq"]) == ("holds", first)


def test_a_place_with_a_store_that_was_written_to_is_refused(
    filled_url: str, target_engine: str, places: Places
) -> None:
    target = places.migrated(target_engine)
    with kagedb.connect(url=target):
        Project.add("garden", actor=ACTOR)
    before, source = digests_at(target), digests_at(filled_url)
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 1
    assert "project" in result.stderr
    assert digests_at(target) == before
    assert digests_at(filled_url) == source, "what is refused is not in the log"


def test_the_store_itself_is_no_target(filled_url: str) -> None:
    result = in_process("--url", filled_url, "copy", "--to", filled_url)
    assert result.exit_code == 2


HOLDER = """
import sys
import kagedb
with kagedb.connect(url=sys.argv[1], exclusive=True):
    print("open", flush=True)
    input()
"""


def test_a_target_that_is_open_is_refused(filled_url: str, target_engine: str, places: Places) -> None:
    target = places.migrated(target_engine)
    holder = start_python(HOLDER, target)
    wait_for_line(holder, "open")
    assert in_process("--url", filled_url, "copy", "--to", target).exit_code == 75


@pytest.mark.sqlite_only
def test_a_file_that_is_no_store_is_refused_and_stays(filled_url: str, tmp_path: Path) -> None:
    for name, data in (("empty.db", b""), ("text.db", b"dear diary\n" * 500)):
        (tmp_path / name).write_bytes(data)
        result = in_process("--url", filled_url, "copy", "--to", f"sqlite://{tmp_path / name}")
        assert result.exit_code == 3, result.output
        assert (tmp_path / name).read_bytes() == data


def test_a_dry_run_changes_nothing_and_says_what_is_at_the_place(
    filled_url: str, target_engine: str, places: Places
) -> None:
    target, source = places.empty(target_engine), digests_at(filled_url)
    done = answer_json(filled_url, "copy", "--to", target, "--dry-run")
    assert done["rows"] == {table: rows for table, (rows, _) in source.items()}
    assert done["bytes"] > 10_000
    assert (done["dry_run"], done["place"]) == (True, "missing")
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)
    empty = places.migrated(target_engine)
    before = digests_at(empty)
    assert answer_json(filled_url, "copy", "--to", empty, "--dry-run")["place"] == "empty"
    assert digests_at(empty) == before
    assert digests_at(filled_url) == source


def test_a_dry_run_refuses_a_place_that_is_not_fit(filled_url: str, target_engine: str, places: Places) -> None:
    used = places.migrated(target_engine)
    with kagedb.connect(url=used):
        Project.add("garden", actor=ACTOR)
    refused = in_process("--url", filled_url, "copy", "--to", used, "--dry-run")
    assert (refused.exit_code, "project" in refused.stderr) == (1, True)


def refused_dry_run(source: str, target: str) -> str:
    before = digests_at(source)
    said = [in_process("--url", source, "copy", "--to", target, *how) for how in (("--dry-run",), ())]
    assert said[0].exit_code == said[1].exit_code != 0, said[0].output
    assert said[0].stderr == said[1].stderr, "the dry run says the same"
    assert digests_at(source) == before
    return said[0].stderr


@pytest.mark.sqlite_only
def test_a_directory_that_is_missing_full_or_not_to_be_written_is_not_fit(
    filled_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "mkdir" in refused_dry_run(filled_url, sqlite_url(tmp_path / "nowhere" / "kaged.db"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "1,000 bytes free" in refused_dry_run(filled_url, sqlite_url(tmp_path / "other.db"))
    # Root may write everywhere: what the kernel says to others is made up.
    monkeypatch.setattr("kagedb.engines.sqlite_transfer.writable", lambda _: False)
    assert "nothing can be made" in refused_dry_run(filled_url, sqlite_url(tmp_path / "other.db"))


@pytest.mark.postgres_only
def test_a_database_in_which_no_schema_may_be_made_is_not_fit(
    filled_url: str, places: Places, postgres_server: DatabaseServer
) -> None:
    target = places.empty("postgres")
    database = target.partition("?")[0].rpartition("/")[2]
    admin = postgres_server.admin_url(database)
    postgres_server.execute(f'ALTER DATABASE "{database}" OWNER TO CURRENT_USER', url=admin)
    assert "CREATE SCHEMA" in refused_dry_run(filled_url, target)


def test_a_damaged_row_is_found_and_nothing_is_left(filled_url: str, target_engine: str, places: Places) -> None:
    target = places.empty(target_engine)
    with kagedb.connect(url=filled_url) as storage:
        storage.database.execute_sql(storage.database.dialect("UPDATE blob SET data = ?"), (b"no longer it",))
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 3
    assert "blob" in result.stderr
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)


def test_a_broken_audit_log_is_not_carried_over(filled_url: str, target_engine: str, places: Places) -> None:
    target = places.empty(target_engine)
    with kagedb.connect(url=filled_url) as storage, storage.transaction():
        storage.database.ddl.drop_guard("audit_event", "update")
        storage.database.execute_sql("UPDATE audit_event SET actor = 'operator:eve' WHERE seq = 3")
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 3
    assert "event 3" in result.stderr
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)


def test_a_row_that_arrives_changed_is_noticed(
    filled_url: str, target_engine: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagedb.engines.postgres_transfer import PostgresReceiver
    from kagedb.engines.sqlite_transfer import SqliteReceiver

    load_rows, load_lines = SqliteReceiver.load, PostgresReceiver.load_lines

    def load_wrong_rows(self: Any, table: Any, rows: Any) -> None:
        if table.name == "prompt":
            place = table.columns.index("name")
            rows = [(*row[:place], row[place] + " ", *row[place + 1 :]) for row in rows]
        load_rows(self, table, rows)

    def load_wrong_lines(self: Any, table: Any, pieces: Any) -> None:
        if table.name == "prompt":
            pieces = [piece.replace(b"planner", b"planner ") for piece in pieces]
        load_lines(self, table, pieces)

    monkeypatch.setattr(SqliteReceiver, "load", load_wrong_rows)
    monkeypatch.setattr(PostgresReceiver, "load_lines", load_wrong_lines)
    target = places.empty(target_engine)
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 3
    assert "prompt" in result.stderr
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)


WRITER = """
import sys
import time
import kagedb
from kagedb import AuditEvent
with kagedb.connect(url=sys.argv[1], exclusive=True):
    print("open", flush=True)
    while True:
        AuditEvent.record("policy.decision", actor="agent:planner", body={})
        time.sleep(0.001)
"""


def test_a_store_in_use_is_copied_as_it_was_at_one_moment(filled_url: str, target_engine: str, places: Places) -> None:
    target = places.empty(target_engine)
    writer = start_python(WRITER, filled_url)
    wait_for_line(writer, "open")
    done = answer_json(filled_url, "copy", "--to", target)
    kill(writer)
    assert done["since"]["audit_event"] > 0
    assert answer_json(target, "audit", "verify")["last_seq"] == done["head"][0]


def test_rows_and_rate_are_shown_on_a_terminal_and_the_config_line_at_the_end(
    filled_url: str, target_engine: str, places: Places
) -> None:
    target = places.empty(target_engine)
    with terminal(160) as screen:
        process = screen.start("--url", filled_url, "copy", "--to", target)
        assert screen.wait(process) == 0
        shown = screen.shown.decode()
    assert "rows/s" in shown
    assert "[storage]" in shown
    assert f'url = "{load(url=target).url.redacted}"' in shown


MEASURED = """
import re, sys
import kagedb
from kagedb.operations import transfer
from kagedb.settings import load

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

with kagedb.connect(url=sys.argv[1]) as storage:
    # The peak from now on. Not ru_maxrss: that begins with what the parent had when it forked.
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    transfer.copy(storage, load(url=sys.argv[2]), actor="operator:ana")
    print(memory("VmHWM"), memory("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_store(
    engine: str, target_engine: str, large: Filled, places: Places, postgres_server: DatabaseServer
) -> None:
    """24 MB of chunks. What a copy itself takes is batches, and the modules and connections of the target."""
    source = url_of(large, engine, postgres_server)
    done = run_python(MEASURED, source, places.empty(target_engine))
    assert done.returncode == 0, done.stderr
    peak_kb, more_kb = map(int, done.stdout.split())
    assert peak_kb < 60 * 1024
    assert more_kb < 16 * 1024


@pytest.mark.sqlite_only
def test_a_copy_that_is_too_slow_for_the_writers_gives_up(
    engine: str,
    target_engine: str,
    filled_url: str,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its snapshot keeps the write-ahead log from being reused, which would fill the disk."""
    from kagedb.operations.digests import Digesting

    passes = Digesting._passes
    written = 0

    def passes_while_others_write(self: Any, batch: Any) -> bytes:
        nonlocal written
        for _ in range(60):
            AuditEvent.record("policy.decision", actor="agent:busy", body={"filler": "x" * 100_000})
            written += 1
        return passes(self, batch)

    with kagedb.connect(url=filled_url) as storage, storage.transaction():
        for number in range(1000):
            AuditEvent.record("policy.decision", actor="agent:planner", body={"number": number})
    monkeypatch.setattr(Digesting, "_passes", passes_while_others_write)
    config = tmp_path / "config.toml"
    config.write_text("[backup]\nwal_limit_mib = 8\n")
    target = places.empty(target_engine)
    result = in_process("--config", str(config), "--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 75, result.output
    assert "backup.wal_limit_mib" in result.stderr
    assert written < 400, "it went on after the log had grown"
    with pytest.raises(kagedb.StorageNotFound):
        digests_at(target)
    assert answer_json(filled_url, "audit", "verify")["result"] == "holds"


def test_the_key_of_the_seals_is_not_forgotten(filled_url: str, tmp_path: Path) -> None:
    with kagedb.connect(url=filled_url) as storage:
        place = Path(storage.seal_key_place)
    assert in_process("--url", filled_url, "audit", "key", "--new").exit_code == 0
    other = tmp_path / "other" / "kaged.db"
    other.parent.mkdir(mode=0o700)
    result = in_process("--url", filled_url, "copy", "--to", f"sqlite://{other}")
    assert result.exit_code == 0, result.output
    assert f"mv {place} {other.with_name('audit.key')}" in result.stderr


def test_a_text_of_every_kind_arrives(migrated_url: str, target_engine: str, places: Places) -> None:
    bodies = ["\\", "\\N", "\\.", "\t", "\n", "\r\n", "\\t", "\x01\x7f\x85\u2028", "日本語 😀", '"', "'", "\\x41", " "]
    with kagedb.connect(url=migrated_url):
        project = Project.add("house", actor=ACTOR)
        for body in bodies:
            Prompt.edit(project, "planner", body, actor=ACTOR, message="")
    target = places.empty(target_engine)
    answer_json(migrated_url, "copy", "--to", target)
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        before = contents(storage)
    with kagedb.connect(url=target, read_only=True) as storage:
        assert contents(storage) == before
        assert {row[0] for row in storage.database.execute_sql("SELECT body FROM prompt_version").fetchall()} == {
            *bodies
        }
