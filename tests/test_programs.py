"""The programs that tests start have the environment of the test and do not outlive it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import peewee
import pytest

import programs
from programs import run_python, start_python, tell, wait_for_line


def test_a_program_has_the_sqlite_library_and_the_home_of_the_test(home: Path) -> None:
    said = run_python("import os, peewee; print(peewee.sqlite3.__name__, os.environ['HOME'])").stdout
    assert said.split() == [peewee.sqlite3.__name__, str(home)]


def test_nothing_of_whoever_runs_the_tests_is_in_the_environment(home: Path) -> None:
    assert not [name for name in os.environ if name.startswith(("PG", "XDG_"))]
    assert [name for name in os.environ if name.startswith("KAGED_") and "TEST" not in name] == ["KAGED_MODE"]
    assert Path.home() == home
    assert not any(home.iterdir())


def test_a_program_is_given_arguments_and_variables(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ['EXTRA']); sys.exit(7)")
    done = run_python(script, "a b", env={"EXTRA": "x"})
    assert (done.returncode, done.stdout) == (7, "['a b'] x\n")


def test_a_line_is_waited_for_and_the_rest_is_kept() -> None:
    program = start_python("print('first'); print('ready 5'); print('answer', input())")
    assert wait_for_line(program, "ready") == "ready 5"
    tell(program, "yes")
    assert program.communicate(timeout=30)[0] == "answer yes\n"


def test_a_line_that_does_not_come_is_an_error_that_shows_what_did() -> None:
    with pytest.raises(AssertionError, match="ended with 3 before a line 'ready', after b'almost"):
        wait_for_line(start_python("print('almost'); raise SystemExit(3)"), "ready")
    with pytest.raises(AssertionError, match=r"no line 'ready' after 0\.2 s"):
        wait_for_line(start_python("input()"), "ready", timeout=0.2)


def test_what_a_test_left_running_is_killed() -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); input()"
    program = start_python(stubborn)
    wait_for_line(program, "ready")
    programs.kill_all()
    assert program.returncode == -signal.SIGKILL


def test_a_program_dies_with_a_run_that_is_killed() -> None:
    run = start_python(
        f"import sys, time; sys.path.insert(0, {str(Path(programs.__file__).parent)!r}); import programs\n"
        "child = programs.start_python('import time; time.sleep(600)'); print('child', child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    child = int(wait_for_line(run, "child").split()[1])
    run.kill()
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether it is more than a name in the process table that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
