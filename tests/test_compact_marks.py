"""`kaged compact` gives a store that was reloaded from a dump its marks back, by rewriting it once, or not at all.

SQLite alone: PostgreSQL's databases have no such marks.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peewee import sqlite3  # the library that kagedb uses: the locks of another one would not count here

import kagedb
from commands import answer, answer_json, in_process, run_kaged
from loose import COMPACT, all_rows, fill, path_of, wholeness
from programs import kill, start_python, tell, wait_for_line


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    fill(migrated_url)
    return migrated_url


def reloaded(url: str, page_size: int = 2048, auto_vacuum: int = 0, application_id: int = 0) -> None:
    """Give the store the marks of one that the sqlite3 shell has loaded from a dump."""
    path = path_of(url)
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "PRAGMA journal_mode = DELETE",
        f"PRAGMA page_size = {page_size}",
        f"PRAGMA auto_vacuum = {auto_vacuum}",
        f"PRAGMA application_id = {application_id}",
        "VACUUM",
        "DELETE FROM run WHERE id IN (SELECT id FROM run ORDER BY id LIMIT 50)",
    ):
        connection.execute(statement)
    connection.close()


@pytest.mark.sqlite_only
def test_a_store_reloaded_from_a_dump_gets_its_marks_and_its_space_back(filled_url: str) -> None:
    reloaded(filled_url, page_size=4096)
    before = all_rows(filled_url)
    assert any("application_id, auto_vacuum, page_size" in wrong for wrong in wholeness(filled_url))
    size = path_of(filled_url).stat().st_size
    answer(filled_url, "compact")
    with kagedb.connect(url=filled_url) as storage:
        assert storage.engine.missing_marks() == []
        assert storage.database.raw("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert path_of(filled_url).stat().st_size < size
    assert path_of(filled_url).stat().st_mode & 0o777 == 0o600
    assert all_rows(filled_url) == before
    assert wholeness(filled_url) == []


@pytest.mark.sqlite_only
def test_a_store_that_must_be_rewritten_is_not_while_a_daemon_has_it(filled_url: str) -> None:
    reloaded(filled_url)
    daemon = start_python(
        "import sys, kagedb\nwith kagedb.connect(url=sys.argv[1], exclusive=True): print('up', flush=True); input()",
        filled_url,
    )
    wait_for_line(daemon, "up")
    result = in_process("--url", filled_url, "compact")
    assert result.exit_code == 75
    assert "stop the daemon" in result.stderr and "auto_vacuum" in result.stderr
    tell(daemon)
    daemon.wait()
    with kagedb.connect(url=filled_url) as storage:
        assert storage.engine.missing_marks() == ["auto_vacuum"], "the mark that needs no rewriting is back already"


@pytest.mark.sqlite_only
def test_another_page_size_alone_is_told_and_the_rest_done_beside_a_daemon(filled_url: str) -> None:
    reloaded(filled_url, page_size=4096, auto_vacuum=2, application_id=0x4B616765)
    daemon = start_python(
        "import sys, kagedb\nwith kagedb.connect(url=sys.argv[1], exclusive=True): print('up', flush=True); input()",
        filled_url,
    )
    wait_for_line(daemon, "up")
    done = answer_json(filled_url, "compact")
    assert done["given_back"] > 0
    assert "page_size" in done["notes"][0] and "stop the daemon" in done["notes"][0]
    tell(daemon)
    daemon.wait()
    assert answer_json(filled_url, "compact")["notes"] == []


@pytest.mark.sqlite_only
def test_another_program_that_has_the_file_open_keeps_the_page_size(filled_url: str) -> None:
    """It takes no lock of ours: SQLite itself says so."""
    reloaded(filled_url, page_size=4096)
    kagedb.connect(url=filled_url).close()
    other = sqlite3.connect(path_of(filled_url), isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT COUNT(*) FROM run").fetchone()
    result = run_kaged("--url", filled_url, "compact")
    assert result.returncode == 75
    assert "another program has" in result.stderr
    other.close()
    answer(filled_url, "compact")


@pytest.mark.sqlite_only
def test_without_room_for_a_rewriting_nothing_is_begun(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reloaded(filled_url)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = in_process("--url", filled_url, "compact")
    assert result.exit_code == 1
    assert "has 1,000 bytes free; rewriting this store may need" in result.stderr


@pytest.mark.sqlite_only
@pytest.mark.parametrize("page_size", [2048, 4096], ids=["in the log", "with a journal"])
def test_killed_while_it_is_rewritten_the_store_is_as_it_was(filled_url: str, page_size: int) -> None:
    reloaded(filled_url, page_size=page_size)
    before = all_rows(filled_url)
    for _ in range(2):
        one = start_python(COMPACT, filled_url)
        wait_for_line(one, "ready")
        tell(one)
        time.sleep(random.uniform(0, 0.03))
        kill(one)
        assert all_rows(filled_url) == before
    answer(filled_url, "compact")
    assert wholeness(filled_url) == []


def killed_at_sync(url: str, number: int) -> int:
    """Compact, and SIGKILL at so many calls that sync a file; its exit status."""
    calls = "fsync,fdatasync"
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:signal=KILL:when={number}", sys.executable, "-c", COMPACT, url]
    return subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60).returncode


def strace_works() -> bool:
    return (
        shutil.which("strace") is not None
        and not subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode
    )


@pytest.mark.sqlite_only
@pytest.mark.skipif(not strace_works(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_what_a_rewriting_that_was_killed_has_begun_is_undone_by_whoever_opens_the_store_to_read(
    filled_url: str, every: int, tmp_path: Path
) -> None:
    """A journal that must be rolled back is something that SQLite refuses to a connection that only reads."""
    reloaded(filled_url, page_size=4096)
    path, journal = path_of(filled_url), path_of(filled_url).with_name("kaged.db-journal")
    before = all_rows(filled_url)
    kept = shutil.copy(path, tmp_path / "kept.db")
    number, undone = 2, 0
    while True:
        status = killed_at_sync(filled_url, number)
        hot = journal.exists()
        assert all_rows(filled_url) == before
        undone += hot and not journal.exists()
        if status == 0:
            break
        for part in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + part).unlink(missing_ok=True)
        shutil.copy(kept, path)
        number += every
    assert undone
