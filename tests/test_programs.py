"""The programs that tests start have the environment of the test and do not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
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


def test_a_program_is_as_it_would_be_if_python_had_been_started_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sees of itself, in the directory and environment of the test at this moment."""
    seen = tmp_path / "seen.py"
    seen.write_text(
        "import os, signal, sys, threading, __main__\n"
        "print(sys.argv, sys.path, os.getcwd(), os.environ['TZ'], __name__, __main__.os is os, 'wanted' in vars())\n"
        "for stream in (sys.stdin, sys.stdout, sys.stderr):\n"
        "    print(stream.name, stream.mode, stream.encoding, stream.errors, stream.isatty())\n"
        "    print(stream.line_buffering, stream.write_through)\n"
        "print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD)])\n"
        "print(threading.active_count(), sorted(os.listdir('/proc/self/fd')), sys.stdin.read())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    for code in (seen, seen.read_text()):
        forked, fresh = (run_python(code, "ä", "", fresh=fresh) for fresh in (False, True))
        assert (forked.returncode, forked.stderr) == (0, "")
        assert forked.stdout.splitlines() == fresh.stdout.splitlines()


@pytest.mark.parametrize(
    "end",
    [
        "raise SystemExit('in two words')",
        "1 / 0",
        "import os; os.kill(os.getpid(), 15)",
        "raise KeyboardInterrupt",
        "import atexit; atexit.register(print, 'last'); print('first', end=' ')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        "import sys; sys.stdout = None; print('nothing')",
        "import os; os._exit(3)",
        "(",
    ],
)
def test_a_program_ends_as_it_would(end: str) -> None:
    forked, fresh = (run_python(end, fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_nothing_of_a_program_is_in_the_next_one() -> None:
    run_python("import kagedb, os; kagedb.planted = True; os.environ['PLANTED'] = '1'; os.chdir('/')")
    said = run_python(
        "import kagedb, os; print(hasattr(kagedb, 'planted'), 'PLANTED' in os.environ, os.getcwd())"
    ).stdout
    assert said == f"False False {os.getcwd()}\n"


def test_what_python_reads_when_it_starts_is_read(tmp_path: Path) -> None:
    assert run_python("import sys; print(sys.flags.dev_mode)", env={"PYTHONDEVMODE": "1"}).stdout == "True\n"
    (tmp_path / "planted.py").write_text("print('here')")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    assert run_python("import planted", env={"PYTHONPATH": path}).stdout == "here\n"


def test_programs_read_and_write_at_the_same_time_in_many_threads() -> None:
    text = "x" * 300_000
    echo = "import sys; sys.stderr.write(sys.argv[1] * 300_000); sys.stdout.write(sys.argv[1] * 300_000)"
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda number: run_python(echo, str(number)), range(6)))
    for number, one in enumerate(done):
        assert one.stdout == one.stderr == text.replace("x", str(number))


def test_a_program_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("import time; time.sleep(60)", timeout=0.2)


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
