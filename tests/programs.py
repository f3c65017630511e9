"""Python programs that tests start: a second daemon, a process to be killed, two starters at once.

They inherit the environment of the test, and with it the SQLite library and the home of the test. What
`start_python` started dies with the test, and with the run if that is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)
LINE_SECONDS = 30  # a Python start takes 0.1 s here, and seconds on a small board under load

_started: list[subprocess.Popen[str]] = []
_libc = ctypes.CDLL(None)


def run_python(
    code: str | Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run code (text) or a script (a path) to its end. `env` is added to the environment; `timeout` is in seconds."""
    return subprocess.run(
        _command(code, arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        preexec_fn=_die_with_the_run,
    )


def start_python(code: str | Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start code (text) or a script (a path). Its stdin and stdout are pipes; its stderr is the test's.

    It is killed at the end of the test at the latest, and when the thread that started it ends.
    """
    process = subprocess.Popen(
        _command(code, arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=_die_with_the_run,
    )
    _started.append(process)
    return process


def wait_for_line(process: subprocess.Popen[str], start: str, timeout: float = LINE_SECONDS) -> str:
    """The first line of the program's stdout that begins with `start`; AssertionError where it ends or is late.

    Reads no byte beyond that line, so that `communicate` afterwards gives the rest.
    """
    assert process.stdout
    descriptor = process.stdout.fileno()
    deadline = time.monotonic() + timeout
    said = b""
    while True:
        if not select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
            raise AssertionError(f"no line {start!r} after {timeout} s, only {said!r}")
        byte = os.read(descriptor, 1)
        if not byte:
            raise AssertionError(f"the program ended with {process.wait()} before a line {start!r}, after {said!r}")
        said += byte
        line = said.splitlines()[-1].decode(errors="replace")
        if byte == b"\n" and line.startswith(start):
            return line


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    """Give the program a line on its stdin, for which it waits in `input()`."""
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait until it is gone. Harmless where it has ended."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def kill_all() -> None:
    """End what the test has started and left."""
    while _started:
        kill(_started.pop())


def _command(code: str | Path, arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, *([str(code)] if isinstance(code, Path) else ["-c", code]), *arguments]


def _die_with_the_run() -> None:
    """In the child, before it becomes the program: a SIGKILL is due when its parent dies, even by SIGKILL."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
