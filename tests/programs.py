"""Python programs that tests start: a second daemon, a process to be killed, two starters at once.

They inherit the environment of the test, and with it the SQLite library and the home of the test. What
`start_python` started dies with the test, and with the run if that is killed. A program is forked by preloaded.py,
which has done its imports, unless it is `fresh` or its environment changes what Python decides when it starts.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import forked
import preloaded

LINE_SECONDS = 30  # a Python start takes 0.1 s here, and seconds on a small board under load

_started: list[subprocess.Popen[str]] = []


def run_python(
    code: str | Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run code (text) or a script (a path) to its end. `env` is added to the environment; `timeout` is in seconds.

    `fresh` starts Python itself: for claims about what is imported, and when.
    """
    environment = {**os.environ, **(env or {})}
    command = _command(code, arguments)
    if fresh or not forked.can_be(environment):
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            preexec_fn=_dying_with_the_run(),
        )
    with open(os.devnull) as nothing:
        program = forked.Program(code, arguments, environment, stdin=nothing.fileno(), stderr_too=True)
    with program:
        try:
            out, err = program.communicate(timeout=timeout)
        except BaseException:
            program.kill()
            raise
    return subprocess.CompletedProcess(command, program.wait(), out, err)


def start_python(
    code: str | Path, *arguments: str, env: Mapping[str, str] | None = None, fresh: bool = False
) -> subprocess.Popen[str]:
    """Start code (text) or a script (a path). Its stdin and stdout are pipes; its stderr is the test's.

    It is killed at the end of the test at the latest.
    """
    environment = {**os.environ, **(env or {})}
    process: subprocess.Popen[str]
    if fresh or not forked.can_be(environment):
        process = subprocess.Popen(
            _command(code, arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=_dying_with_the_run(),
        )
    else:
        process = forked.Program(code, arguments, environment)
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


def _dying_with_the_run() -> Callable[[], None]:
    here = os.getpid()
    return lambda: preloaded.die_with(here)
