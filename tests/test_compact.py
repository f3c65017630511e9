"""`kaged compact` gives space back, beside whoever reads and writes, and leaves what is stored as it is."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from peewee import sqlite3  # the library that kagedb uses: the locks of another one would not count here

import kagedb
from commands import answer, answer_json, in_process
from kagedb import AuditEvent
from kagedb.engines import sqlite_compact
from kagedb.operations import compacting
from loose import COMPACT, RUN_BYTES, RUNS, all_rows, fill, path_of, wholeness
from programs import kill, start_python, tell, wait_for_line

if TYPE_CHECKING:
    from postgres_server import DatabaseServer


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    fill(migrated_url)
    return migrated_url


# Giving back.


def test_what_removed_rows_have_taken_is_given_back_and_nothing_else_changes(filled_url: str) -> None:
    before = all_rows(filled_url)
    with kagedb.connect(url=filled_url) as storage:
        size = storage.engine.size_bytes()
        done = compacting.compact(storage)
        assert done.given_back >= RUNS // 2 * RUN_BYTES * 0.9
        assert storage.engine.size_bytes() == sum(done.after.values()) == size - done.given_back
        assert (done.finished, done.free_bytes, done.notes) == (True, 0, [])
        again = compacting.compact(storage)
        assert (again.given_back, again.finished, again.notes) == (0, True, [])
    assert all_rows(filled_url) == before
    assert wholeness(filled_url) == []


def test_what_is_free_is_told_by_status_before_and_not_after(filled_url: str) -> None:
    if filled_url.startswith("postgresql"):
        time.sleep(1.1)  # the server counts dead rows a second late
    assert answer_json(filled_url, "status")["free_bytes"] > 500_000
    answer(filled_url, "compact")
    assert answer_json(filled_url, "status")["free_bytes"] == 0


def test_the_command_says_what_was_done(filled_url: str) -> None:
    said = answer(filled_url, "compact")
    for label in ("store", "before", "after", "given back", "still free inside", "took", "finished"):
        assert f"\n{label}  " in f"\n{said}".replace("     ", "  ").replace("   ", "  "), said
    assert set(answer_json(filled_url, "compact")) == {
        *("place", "before", "after", "given_back", "free_bytes", "longest_hold_ms", "took_ms", "finished", "notes")
    }


def test_at_the_deadline_it_ends_and_the_next_run_goes_on(filled_url: str) -> None:
    first = answer_json(filled_url, "compact", "--deadline", "0")
    assert (first["finished"], first["given_back"]) == (False, 0)
    assert "no, the next run goes on" in answer(filled_url, "compact", "--deadline", "0")
    assert answer_json(filled_url, "compact")["given_back"] > 0


def test_afterwards_the_same_connection_writes_as_before(filled_url: str) -> None:
    with kagedb.connect(url=filled_url) as storage:
        raw = storage.database.raw

        def state() -> list[Any]:
            if storage.engine.name != "sqlite":
                return [raw("SHOW statement_timeout").fetchone(), raw("SHOW vacuum_cost_delay").fetchone()]
            words = ("synchronous", "wal_autocheckpoint", "busy_timeout", "journal_mode", "foreign_keys")
            return [raw(f"PRAGMA {word}").fetchone() for word in words]

        before = state()
        compacting.compact(storage)
        assert state() == before
        AuditEvent.record("policy.decision", actor="agent:a", body={})


# Beside others.


def test_a_writer_beside_it_is_kept_waiting_for_a_moment_only(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine turns of ten end within the bound; what is longer on a busy machine is the machine's doing."""
    writer = start_python(
        "import sys, time, kagedb\n"
        "with kagedb.connect(url=sys.argv[1], exclusive=True):\n"
        "    print('writing', flush=True)\n"
        "    count = 0\n"
        "    while not __import__('select').select([sys.stdin], [], [], 0.005)[0]:\n"
        "        kagedb.AuditEvent.record('policy.decision', actor='agent:busy', body={'number': count})\n"
        "        count += 1\n"
        "    print('wrote', count, flush=True)\n",
        filled_url,
    )
    wait_for_line(writer, "writing")
    monkeypatch.setattr(sqlite_compact, "MOST_PAGES", 32)
    turns: list[float] = []
    real = sqlite_compact._turn
    monkeypatch.setattr(sqlite_compact, "_turn", lambda *a: turns.append(real(*a)) or turns[-1])
    with kagedb.connect(url=filled_url) as storage:
        begun = AuditEvent.head()[0]
        done = compacting.compact(storage)
        written = AuditEvent.head()[0] - begun
    tell(writer)
    wait_for_line(writer, "wrote")
    assert done.finished
    assert written > 0
    if storage.engine.name == "sqlite":
        assert len(turns) > 10
        assert sorted(turns)[len(turns) * 9 // 10] < 0.025
    assert wholeness(filled_url) == []


def test_a_reader_beside_it_sees_what_it_saw(filled_url: str, engine: str) -> None:
    """Of which the SQLite one keeps the log; the next test is about that. PostgreSQL waits for whoever reads a table
    that could be cut, for five seconds."""
    table = {"sqlite": "run", "postgres": "audit_event"}[engine]
    reader = start_python(
        "import sys, kagedb\n"
        "with kagedb.connect(url=sys.argv[1], read_only=True) as storage, storage.snapshot():\n"
        f"    count = lambda: storage.database.execute_sql('SELECT COUNT(*) FROM {table}').fetchone()\n"
        "    before = count()\n"
        "    print('reading', flush=True)\n"
        "    input()\n"
        "    print('same', count() == before, flush=True)\n",
        filled_url,
    )
    wait_for_line(reader, "reading")
    before = all_rows(filled_url)
    with kagedb.connect(url=filled_url) as storage:
        compacting.compact(storage)
    tell(reader)
    assert wait_for_line(reader, "same") == "same True"
    assert all_rows(filled_url) == before


@pytest.mark.sqlite_only
@pytest.mark.parametrize("limit_kib", [256, 16_384])
def test_a_reader_that_keeps_the_log_is_told_and_the_rest_done_when_it_has_ended(
    filled_url: str, limit_kib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit of the log it ends early, below it the log alone cannot be cut."""
    monkeypatch.setattr(sqlite_compact, "READER_PATIENCE_SECONDS", 0.1)
    config = tmp_path / "config.toml"
    config.write_text(f"[sqlite]\njournal_size_limit_kib = 0\nwal_autocheckpoint_kib = {limit_kib}\n")
    with kagedb.connect(url=filled_url) as storage:
        storage.database.raw("PRAGMA wal_checkpoint(TRUNCATE)")
    reader = sqlite3.connect(f"file:{path_of(filled_url)}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    rows = reader.execute("SELECT COUNT(*) FROM run").fetchone()
    options = ("--url", filled_url, "--config", str(config), "compact", "--json")
    first = in_process(*options)
    assert first.exit_code == 0
    assert "a reader of" in first.stderr
    assert '"finished": false' in first.stdout if limit_kib == 256 else '"finished": true' in first.stdout
    assert path_of(filled_url).with_name("kaged.db-wal").stat().st_size < 8 * 1024 * 1024
    assert reader.execute("SELECT COUNT(*) FROM run").fetchone() == rows
    reader.close()
    second = answer_json(filled_url, "compact")
    assert (second["finished"], second["free_bytes"], second["after"]["wal"], second["notes"]) == (True, 0, 0, [])


def test_two_at_once_do_no_harm(filled_url: str) -> None:
    before = all_rows(filled_url)
    both = [start_python(COMPACT, filled_url) for _ in range(2)]
    for one in both:
        wait_for_line(one, "ready")
    for one in both:
        tell(one)
    for one in both:
        assert wait_for_line(one, "done").startswith("done True")
        assert one.wait() == 0
    assert all_rows(filled_url) == before
    assert answer_json(filled_url, "compact")["given_back"] == 0
    assert wholeness(filled_url) == []


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_store_is_whole(filled_url: str, times: int) -> None:
    before = all_rows(filled_url)
    for _ in range(times):
        one = start_python(COMPACT, filled_url)
        wait_for_line(one, "ready")
        tell(one)
        time.sleep(random.uniform(0, 0.15))
        kill(one)
        assert all_rows(filled_url) == before
    assert wholeness(filled_url) == []
    assert answer_json(filled_url, "compact")["finished"]
    assert answer_json(filled_url, "status")["free_bytes"] == 0


def test_told_to_end_it_ends_and_the_connection_is_as_it_was(filled_url: str, tmp_path: Path) -> None:
    one = start_python(
        "import sys, kagedb.engines.sqlite_compact as c\n"
        "from kagedb.engines import compacting\n"
        "real = compacting.Compaction.tell\n"
        "compacting.Compaction.tell = lambda *a: (print('step', flush=True), input(), real(*a))\n"
        "sys.argv[1:] = ['--url', sys.argv[1], 'compact']\n"
        "from kagedb.cli import main; main()\n",
        filled_url,
    )
    wait_for_line(one, "step")
    one.send_signal(signal.SIGTERM)
    assert one.wait(timeout=10) == 130
    assert wholeness(filled_url) == []


# PostgreSQL: only plain VACUUM, table by table.


@pytest.mark.postgres_only
def test_no_table_is_rewritten(filled_url: str, engine: str) -> None:
    with kagedb.connect(url=filled_url) as storage:

        def files() -> list[Any]:
            return list(
                storage.database.execute_sql(
                    "SELECT relname, relfilenode FROM pg_class WHERE relnamespace = 'kaged'::regnamespace ORDER BY 1"
                ).fetchall()
            )

        before = files()
        compacting.compact(storage)
        assert files() == before


@pytest.mark.postgres_only
def test_a_table_that_somebody_else_has_locked_is_left_out_and_told(filled_url: str) -> None:
    import psycopg2

    other = psycopg2.connect(filled_url)
    other.cursor().execute("LOCK TABLE kaged.run IN SHARE UPDATE EXCLUSIVE MODE")
    with kagedb.connect(url=filled_url) as storage:
        done = compacting.compact(storage)
    other.close()
    assert [note.partition(":")[0] for note in done.notes] == ['"kaged"."run"']


@pytest.mark.postgres_only
def test_a_table_of_another_role_is_left_out_and_told_with_what_its_owner_may_do(
    filled_url: str, postgres_server: DatabaseServer
) -> None:
    name = filled_url.partition("?")[0].rpartition("/")[2]
    for statement in (
        "ALTER TABLE kaged.plugin_state OWNER TO postgres",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON kaged.plugin_state TO kaged",
        f"ALTER DATABASE {name} OWNER TO postgres",  # whoever owns the database may clean what is in it
    ):
        postgres_server.execute(statement, url=postgres_server.admin_url(name))
    with kagedb.connect(url=filled_url) as storage:
        done = compacting.compact(storage)
    assert len(done.notes) == 1
    assert "as postgres, VACUUM (ANALYZE)" in done.notes[0]
