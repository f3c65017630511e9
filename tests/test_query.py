"""`kaged query` answers alike on both engines, shows nothing that harms a terminal, and cannot change anything."""

from __future__ import annotations

import array
import csv
import fcntl
import io
import json
import signal
import subprocess
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING

import pytest

import kagedb
from commands import KAGED, answer, answer_json, in_process
from contents import contents
from kagedb import AuditEvent, Project, Prompt
from programs import kill, start_python
from stored import ACTOR, fill
from terminals import terminal

if TYPE_CHECKING:
    from places import Places

WRITES = (
    "DELETE FROM run",
    "delete from run returning id",
    "INSERT INTO counter (name, value) VALUES ('x', 1)",
    "UPDATE counter SET value = 9",
    "DROP TABLE plugin_state",
    "CREATE TABLE x (y integer)",
    "CREATE TEMPORARY TABLE x (y integer)",
    "WITH gone AS (SELECT 1) DELETE FROM run",
    "/* SELECT */ DELETE FROM run",
    "commit; begin read write; delete from run",
    "SELECT 1; commit; begin read write; delete from run; commit",
    "SELECT 1; DELETE FROM run",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT a",
    "VACUUM",
    "EXPLAIN DELETE FROM run; DELETE FROM run",
)
WRITES_OF = {
    "sqlite": (
        "PRAGMA query_only = OFF",
        "PRAGMA user_version = 7",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA writable_schema = ON",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "ATTACH '/tmp/kaged-query-must-not-make-this.db' AS other",
        "REPLACE INTO counter (name, value) VALUES ('transcript', 9)",
        "SELECT load_extension('x')",
        "EXPLAIN DELETE FROM run",
    ),
    "postgres": (
        "WITH gone AS (DELETE FROM run RETURNING id) SELECT * FROM gone",
        "SELECT set_config('transaction_read_only', 'off', true) FROM counter",
        "SELECT query_to_xml('delete from run', true, true, '')",
        "SELECT query_to_xml('commit', true, true, '')",
        "SELECT query_to_xml('set transaction read write', true, true, '')",
        "SET transaction_read_only = off",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        "EXPLAIN ANALYZE DELETE FROM run",
        "SELECT * INTO x FROM run",
        "SELECT id FROM run FOR UPDATE",
        "COPY run TO STDOUT",
        "DO $$ BEGIN DELETE FROM run; END $$",
        "TRUNCATE run",
        "$$; END $$; COMMIT; DELETE FROM run; DO $$ BEGIN",
        "'; END'; COMMIT; DELETE FROM run; --",
        "\\'; END'; COMMIT; DELETE FROM run; --",
    ),
}


def test_nothing_that_is_not_reading_gets_through(engine: str, stored_url: str) -> None:
    with kagedb.connect(url=stored_url, read_only=True) as storage:
        before = contents(storage)
        catalogue = storage.engine.catalogue()
    for text in (*WRITES, *WRITES_OF[engine]):
        result = in_process("--url", stored_url, "query", "--", text)
        assert result.exit_code in (1, 2), (text, result.output)
        assert result.stderr.startswith("kaged: "), text
        assert result.stdout == "", text
    with kagedb.connect(url=stored_url, read_only=True) as storage:
        assert contents(storage) == before
        assert storage.engine.catalogue() == catalogue


def test_a_write_is_refused_with_the_reason(stored_url: str) -> None:
    result = in_process("--url", stored_url, "query", "DELETE FROM run")
    assert result.exit_code == 1
    assert result.stderr.startswith("kaged: a query can only read: ")


def test_a_recursive_query_is_reading(stored_url: str) -> None:
    text = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3) SELECT x FROM n"
    assert answer_json(stored_url, "query", text) == [{"x": 1}, {"x": 2}, {"x": 3}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SELECT nothing FROM run", "nothing"),
        ("SELEC 1", "SELEC"),
        ("SELECT * FROM no_such_table", "no_such_table"),
        ("SELECT 1 WHERE 1 = :missing", ":missing"),
        ("SELECT 1 WHERE 1 = ?", "?"),
    ],
)
def test_a_wrong_query_is_told_in_two_lines(stored_url: str, text: str, told: str) -> None:
    result = in_process("--url", stored_url, "query", text)
    assert result.exit_code == 2
    assert told in result.stderr.splitlines()[0]
    assert len(result.stderr.splitlines()) == 2


def test_values_are_given_by_name_and_by_place(stored_url: str) -> None:
    by_name = answer_json(
        stored_url,
        "query",
        "SELECT agent FROM run WHERE agent = :agent AND exit_status = :status",
        "--param",
        "agent=planner",
        "--param",
        "status=0",
    )
    by_place = answer_json(stored_url, "query", "SELECT agent FROM run WHERE agent = ? AND 1 < ?", "planner", "12")
    assert by_name == by_place == [{"agent": "planner"}]


@pytest.mark.parametrize(
    "value",
    ["a'b", 'a"b', "a\\'b", "50 %s %", ":agent ?", "-- x", "Küche 日本", "", "007", "1e5", "-0", "'; SELECT 1; --"],
)
def test_a_value_stays_a_value(stored_url: str, value: str) -> None:
    text = "SELECT ':no ?' AS quoted, x FROM (SELECT CAST(:v AS TEXT) AS x) AS one -- ? :not"
    assert answer_json(stored_url, "query", text, "--param", f"v={value}") == [{"quoted": ":no ?", "x": value}]
    by_place = answer(stored_url, "query", "--json", "--", "SELECT CAST(? AS TEXT) AS x", value)
    assert json.loads(by_place) == [{"x": value}]


def test_a_value_with_no_place_is_an_error(stored_url: str) -> None:
    for extra in (["--param", "more=1"], ["more"]):
        result = in_process("--url", stored_url, "query", "SELECT 1", *extra)
        assert result.exit_code == 2
        assert "more" in result.stderr


def test_the_engines_answer_alike(places: Places) -> None:
    asked = (
        "SELECT COUNT(*) AS n, SUM(seq) AS total, AVG(seq) AS middle FROM audit_event",
        "SELECT kind, COUNT(*) AS n FROM audit_event GROUP BY kind ORDER BY kind",
        "SELECT name, archived_at FROM project",
        "SELECT input, output FROM run",
        "SELECT SUBSTR(data, 1, 4) AS start, size FROM blob",
        "SELECT body FROM prompt_version ORDER BY version",
    )
    answers = []
    for engine in ("sqlite", "postgres"):
        url = places.migrated(engine)
        fill(url)
        answers.append([answer_json(url, "query", text) for text in asked])
    assert answers[0] == answers[1]
    assert all(answers[0])


def test_the_limit_cuts_off_and_says_so(stored_url: str) -> None:
    text = "SELECT seq FROM audit_event ORDER BY seq"
    result = in_process("--url", stored_url, "query", text, "--limit", "3", "--json")
    assert json.loads(result.stdout) == [{"seq": 1}, {"seq": 2}, {"seq": 3}]
    assert "--limit 0" in result.stderr
    with kagedb.connect(url=stored_url, read_only=True):
        seq, _ = AuditEvent.head()
    result = in_process("--url", stored_url, "query", text, "--limit", str(seq), "--json")
    assert len(json.loads(result.stdout)) == seq
    assert result.stderr == ""


def test_each_form_holds_the_same_rows(stored_url: str) -> None:
    text = "SELECT version, body, config FROM prompt_version ORDER BY version"
    rows = answer_json(stored_url, "query", text)
    assert [row["version"] for row in rows] == [1, 2]
    lines = answer(stored_url, "query", text, "--json-lines").splitlines()
    assert list(map(json.loads, lines)) == rows
    read = list(csv.DictReader(io.StringIO(answer(stored_url, "query", text, "--csv"), newline="")))
    assert read == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    table = answer(stored_url, "query", text).splitlines()
    assert table[0].split() == ["version", "body", "config"]
    assert len(table) == 3


def test_no_rows_still_have_a_heading(stored_url: str) -> None:
    text = "SELECT id, agent FROM run WHERE agent = 'nobody'"
    assert answer(stored_url, "query", text).split() == ["id", "agent"]
    assert answer(stored_url, "query", text, "--csv") == "id,agent\n"
    assert answer_json(stored_url, "query", text) == []


def test_the_schema_shows_every_table_and_column(stored_url: str) -> None:
    found = {(row["table"], row["column"]) for row in answer_json(stored_url, "query", "--schema")}
    with kagedb.connect(url=stored_url, read_only=True):
        wanted = {
            (model._meta.table_name, field.column_name)
            for model in kagedb.models.Model.all()
            for field in model._meta.sorted_fields
        }
    assert wanted <= found


def test_control_characters_do_not_reach_a_terminal(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        project = Project.add("house", actor=ACTOR)
        Prompt.edit(project, "planner", "red \x1b[31m\x9b8m \r\b\x07end", actor=ACTOR, message="")
    for form in ([], ["--json"], ["--json-lines"], ["--csv"]):
        with terminal() as screen:
            process = screen.start("--url", migrated_url, "query", "SELECT body FROM prompt_version", *form)
            assert screen.wait(process) == 0
            shown = screen.shown.replace(b"\r\n", b"\n").decode()
            assert "end" in shown
            assert not set(shown) & set("\x1b\x9b\r\b\x07"), form


SLOW = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n",
    "postgres": "SELECT COUNT(*) FROM generate_series(1, 100000000000) AS n",
}


def test_ctrl_c_ends_the_query_at_once(engine: str, stored_url: str) -> None:
    process = start_python(KAGED, "--url", stored_url, "query", SLOW[engine])
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(10) == 130
    assert time.monotonic() - began < 3
    if engine == "postgres":
        running = (
            "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'kaged query' AND state = 'active'"
            " AND datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert answer_json(stored_url, "query", running) == [{"count": 0}]


def test_a_reader_that_stops_does_not_keep_the_read_open(engine: str, stored_url: str) -> None:
    """More than a pipe holds, and nobody reads: the store's read must be over all the same."""
    text = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 60000)"
        " SELECT x, 'a rather long text in each of the rows' AS text FROM n"
    )
    process = start_python(KAGED, "--url", stored_url, "query", text, "--limit", "0", "--csv")
    try:
        deadline = time.monotonic() + 20
        held = True
        while held and time.monotonic() < deadline:
            time.sleep(0.1)
            # Nobody has the store open any more, so that everybody can be kept out, and the answer is being shown.
            excluding = subprocess.run([sys.executable, "-c", _EXCLUDE, stored_url], check=False, capture_output=True)
            held = excluding.returncode != 0 or not _waiting_bytes(process)
        assert not held
        assert process.poll() is None
    finally:
        kill(process)


_EXCLUDE = """
import sys
from kagedb.engines import open_engine
from kagedb.settings import load
engine = open_engine(load(url=sys.argv[1]))
engine.open(create=False)
engine.share()
engine.exclude()
engine.close()
"""


def _waiting_bytes(process: subprocess.Popen[str]) -> int:
    """What is in the pipe, unread."""
    assert process.stdout
    waiting = array.array("i", [0])
    fcntl.ioctl(process.stdout.fileno(), termios.FIONREAD, waiting)
    return waiting[0]


def test_a_query_runs_beside_a_daemon_that_writes(stored_url: str) -> None:
    text, stop = "SELECT COUNT(*) AS n, MAX(seq) AS top FROM audit_event", threading.Event()
    with kagedb.connect(url=stored_url, exclusive=True):

        def write() -> None:
            while not stop.is_set():
                AuditEvent.record("policy.decision", actor="agent:planner", body={})

        writer = threading.Thread(target=write)
        writer.start()
        try:
            done = subprocess.run(
                [sys.executable, "-c", KAGED, "--url", stored_url, "query", "--json", text],
                capture_output=True,
                check=True,
                timeout=60,
            )
        finally:
            stop.set()
            writer.join()
    (row,) = json.loads(done.stdout)
    assert row["n"] == row["top"] > 20


def test_a_large_answer_takes_little_memory(engine: str, stored_url: str) -> None:
    text = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 50000)"
        f" SELECT x, '{'a text in each of the rows with which they would take forty megabytes ' * 11}' AS text FROM n"
    )
    program = (
        "import sys\nfrom kagedb.cli import kaged\n"
        "kaged.main(sys.argv[1:], standalone_mode=False)\n"
        # Not ru_maxrss: that begins with what the parent had when it forked.
        "hwm = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(hwm, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--url", stored_url, "query", text, "--limit", "0", "--csv"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    assert int(done.stderr.split()[-1]) < 60 * 1024
