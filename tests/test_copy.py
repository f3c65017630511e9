"""`kaged copy` moves a whole store between engines, or leaves the target as it was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from commands import KAGED, answer_json, in_process
from contents import contents
from kagedb import AuditEvent, AuditSeal, Checkpoint, Plugin, Project, Prompt, Run, Session, Transcript
from kagedb.engines import open_engine
from kagedb.operations import audit
from kagedb.operations.digests import digests
from kagedb.settings import load
from programs import kill, run_python, start_python, wait_for_line
from stored import ACTOR, fill
from terminals import terminal

if TYPE_CHECKING:
    from places import Places

OTHER = {"sqlite": "postgres", "postgres": "sqlite"}


def everything(url: str) -> dict[str, Any]:
    """Rows and digest of each table, the history included."""
    engine = open_engine(load(url=url), read_only=True)
    engine.open(create=False)
    try:
        with engine.reading() as found:
            return {name: (facts.rows, facts.digest) for name, facts in digests(found).facts.items()}
    finally:
        engine.close()


def fill_fully(url: str) -> None:
    """Every table has rows; the audit log is sealed, pruned and redacted."""
    fill(url, events=30)
    with kagedb.connect(url=url) as storage:
        session = Session.select().get()
        run = Run.dispatch(session, agent="planner", input={"texts": ["tab\t", "back\\slash", "\n\r", "\\N"]})
        with Transcript.open(session, columns=80, rows=24) as recorder:
            recorder.write(bytes(range(256)) * 300)
        checkpoint = Checkpoint.pause(
            run, {"list": list(range(500)), "text": "x" * 5000}, label="before", reason="test"
        )
        checkpoint.rollback(actor=ACTOR)
        AuditSeal.close_all()
        with storage.transaction():
            for number in range(30):
                AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"number": number})
        AuditSeal.close_all()
        audit.redact(storage, 40, actor=ACTOR, reason="a name")


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    fill_fully(migrated_url)
    return migrated_url


@pytest.fixture(params=["same", "other"])
def target_engine(engine: str, request: pytest.FixtureRequest) -> str:
    return engine if request.param == "same" else OTHER[engine]


@pytest.fixture(params=["missing", "empty"])
def target_url(target_engine: str, places: Places, request: pytest.FixtureRequest) -> str:
    return places.empty(target_engine) if request.param == "missing" else places.migrated(target_engine)


def test_every_table_arrives_as_it_was(filled_url: str, target_url: str) -> None:
    done = answer_json(filled_url, "copy", "--to", target_url)
    assert done["since"] == {}
    source, target = everything(filled_url), everything(target_url)
    assert target == source
    assert done["rows"] == {table: rows for table, (rows, _) in target.items()}
    empty = {table for table, (rows, _) in target.items() if not rows}
    assert not empty, "a table without rows proves nothing"
    assert answer_json(target_url, "audit", "verify")["result"] == "holds"


def test_the_copy_is_a_store_like_any_other(filled_url: str, target_url: str) -> None:
    answer_json(filled_url, "copy", "--to", target_url)
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
    there = everything(away)
    assert there == everything(filled_url)
    answer_json(away, "copy", "--to", back)
    assert everything(back) == everything(away)
    assert {name: one for name, one in everything(back).items() if name != "audit_event"} == {
        name: one for name, one in there.items() if name != "audit_event"
    }


def test_both_logs_say_who_copied_it_and_where_to(filled_url: str, target_url: str) -> None:
    done = answer_json(filled_url, "copy", "--to", target_url)
    for url in (filled_url, target_url):
        with kagedb.connect(url=url, read_only=True):
            event = AuditEvent.select().order_by(AuditEvent.seq.desc()).get()
            assert event.kind == "store.copied"
            assert json.loads(event.body)["to"] == done["target"]


def test_a_pruned_log_arrives_as_it_was(migrated_url: str, target_url: str) -> None:
    fill(migrated_url, events=40)
    with kagedb.connect(url=migrated_url) as storage:
        AuditSeal.close_all()
        time.sleep(0.005)
        AuditEvent.record("policy.decision", actor="agent:planner", body={})
        audit.prune(storage, time.time_ns() // 1_000_000, actor=ACTOR)
        first = AuditEvent.select().order_by(AuditEvent.seq).get().seq
        assert first > 1
    answer_json(migrated_url, "copy", "--to", target_url)
    assert everything(target_url) == everything(migrated_url)
    verdict = answer_json(target_url, "audit", "verify")
    assert (verdict["result"], verdict["first_seq"]) == ("holds", first)


def test_a_place_with_a_store_that_was_written_to_is_refused(
    filled_url: str, target_engine: str, places: Places
) -> None:
    target = places.migrated(target_engine)
    with kagedb.connect(url=target):
        Project.add("garden", actor=ACTOR)
    before, source = everything(target), everything(filled_url)
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 1
    assert "project" in result.stderr
    assert everything(target) == before
    assert everything(filled_url) == source, "what is refused is not in the log"


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


def test_tables_of_plugins_are_refused_by_name(storage: kagedb.Storage, migrated_url: str, places: Places) -> None:
    """They have the shape that the plugin gave them, in the words of one engine."""
    project = Project.add("house", actor=ACTOR)
    Plugin.install(project, {"name": "weather", "version": "1", "permissions": []}, actor=ACTOR)
    if storage.engine.name == "sqlite":
        storage.database.raw("CREATE TABLE p_weather__readings (x INTEGER) STRICT")
    else:
        storage.database.raw("CREATE SCHEMA kaged_p_weather")
        storage.database.raw("CREATE TABLE kaged_p_weather.p_weather__readings (x INTEGER)")
        storage.database.statement_done()
    storage.close()
    result = in_process("--url", migrated_url, "copy", "--to", places.empty("sqlite"))
    assert result.exit_code == 1
    assert "p_weather__readings" in result.stderr


def test_a_dry_run_changes_nothing(filled_url: str, target_engine: str, places: Places) -> None:
    target, source = places.empty(target_engine), everything(filled_url)
    done = answer_json(filled_url, "copy", "--to", target, "--dry-run")
    assert done["rows"] == {table: rows for table, (rows, _) in source.items()}
    assert done["dry_run"]
    assert everything(filled_url) == source
    with pytest.raises(kagedb.StorageNotFound):
        everything(target)
    used = places.migrated(target_engine)
    fill(used)
    assert in_process("--url", filled_url, "copy", "--to", used, "--dry-run").exit_code == 1


def test_a_damaged_row_is_found_and_nothing_is_left(filled_url: str, target_engine: str, places: Places) -> None:
    target = places.empty(target_engine)
    with kagedb.connect(url=filled_url) as storage:
        storage.database.execute_sql(storage.database.dialect("UPDATE blob SET data = ?"), (b"no longer it",))
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 3
    assert "blob" in result.stderr
    with pytest.raises(kagedb.StorageNotFound):
        everything(target)


def test_a_broken_audit_log_is_not_carried_over(filled_url: str, target_engine: str, places: Places) -> None:
    target = places.empty(target_engine)
    with kagedb.connect(url=filled_url) as storage, storage.transaction():
        storage.database.ddl.drop_guard("audit_event", "update")
        storage.database.execute_sql("UPDATE audit_event SET actor = 'operator:eve' WHERE seq = 3")
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 3
    assert "event 3" in result.stderr
    with pytest.raises(kagedb.StorageNotFound):
        everything(target)


def test_a_row_that_arrives_changed_is_noticed(
    filled_url: str, target_engine: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagedb.engines.postgres_transfer import PostgresReceiver
    from kagedb.engines.sqlite_transfer import SqliteReceiver

    receiver = SqliteReceiver if target_engine == "sqlite" else PostgresReceiver
    load_rows = receiver.load

    def load_wrongly(self: Any, table: Any, rows: Any) -> None:
        if table.name == "prompt":
            place = table.columns.index("name")
            rows = [(*row[:place], row[place] + " ", *row[place + 1 :]) for row in rows]
        load_rows(self, table, rows)

    monkeypatch.setattr(receiver, "load", load_wrongly)
    target = places.empty(target_engine)
    result = in_process("--url", filled_url, "copy", "--to", target)
    assert result.exit_code == 3
    assert "prompt" in result.stderr
    with pytest.raises(kagedb.StorageNotFound):
        everything(target)


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


def kill_at(url: str, target: str, seconds: float) -> bool:
    """Whether the copy was killed before its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", KAGED, "--url", url, "copy", "--json", "--to", target],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    _, said = process.communicate()
    assert process.returncode in (0, -9), said
    return process.returncode == -9


def killed_at_random(url: str, target_engine: str, places: Places, times: int) -> None:
    began = time.monotonic()
    assert not kill_at(url, places.empty(target_engine), 100)
    whole = time.monotonic() - began
    killed = 0
    for number in range(times * 4):
        if number >= times and killed > times // 3:
            break
        target = places.empty(target_engine) if number % 2 else places.migrated(target_engine)
        was_there = number % 2 == 0
        before = everything(target) if was_there else None
        killed += kill_at(url, target, random.uniform(0.1, 1.0) * whole)
        try:
            now = everything(target)
        except kagedb.StorageNotFound:
            assert not was_there
            continue
        if now != before:
            source = everything(url)
            assert {name: one for name, one in now.items() if name != "audit_event"} == {
                name: one for name, one in source.items() if name != "audit_event"
            }
            assert answer_json(target, "audit", "verify")["result"] == "holds"
        else:
            # Whatever was left in the way of the next try is not in its way.
            assert in_process("--url", url, "copy", "--to", target).exit_code == 0
    assert killed > times // 3, "the moments were not those of the copy"


def test_killed_at_any_moment_the_target_is_as_it_was_or_whole(
    filled_url: str, target_engine: str, places: Places
) -> None:
    killed_at_random(filled_url, target_engine, places, 2)


@pytest.mark.slow
def test_killed_at_twenty_moments_the_target_is_as_it_was_or_whole(
    filled_url: str, target_engine: str, places: Places
) -> None:
    with kagedb.connect(url=filled_url) as storage, storage.transaction():
        for number in range(5000):
            AuditEvent.record("policy.decision", actor="agent:planner", body={"number": number, "text": "x" * 200})
    killed_at_random(filled_url, target_engine, places, 20)


MEASURED = r"""
import re, sys
from kagedb.cli import kaged
kaged.main(sys.argv[1:], standalone_mode=False)
# Not ru_maxrss: that begins with what the parent had when it forked.
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def test_memory_does_not_grow_with_the_store(filled_url: str, target_engine: str, places: Places) -> None:
    """40 MB of chunks and blobs, beside some 40 MB that the program itself takes."""
    with kagedb.connect(url=filled_url) as storage, storage.transaction("relaxed"):
        database = storage.database
        insert = database.dialect("INSERT INTO transcript_chunk (key, at, place, size, data) VALUES (?, ?, ?, ?, ?)")
        for number in range(2600):
            key = (99 << 24) + number
            database.execute_sql(insert, (key, 1, number, 16384, random.randbytes(16384)))
    done = run_python(MEASURED, "--url", filled_url, "-q", "copy", "--to", places.empty(target_engine), timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 60 * 1024


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
