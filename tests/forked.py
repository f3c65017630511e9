"""Programs that preloaded.py forks, for whoever starts them: `Program` is used as any `subprocess.Popen[str]` is.

The one Python that forks them is started with the first and ends with this process. Tests start theirs in programs.py.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import preloaded

DECIDED_AT_START = ("PYTHON", "LANG", "LC_", "LD_", "KAGED_TEST_SQLITE")
"""How the variables begin that Python and the libraries read while they start."""
ANSWER_BYTES = 20  # a pid, or an exit status


class Program(subprocess.Popen[str]):
    """Code (text) or a script (a path) as a process. Stdout is a pipe; so are stdin, unless a file is given, and
    stderr where `stderr_too`. With a `terminal` it has that for all three, and leads a session of its own on it."""

    def __init__(
        self,
        code: str | Path,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        *,
        stdin: int | None = None,
        stderr_too: bool = False,
        terminal: int | None = None,
    ) -> None:
        self.args = [sys.executable, *([str(code)] if isinstance(code, Path) else ["-c", code]), *arguments]
        self.returncode: int | None = None  # as it is with Popen until the end
        self.stdin = self.stdout = self.stderr = None
        theirs = []
        if terminal is None:
            if stdin is None:
                stdin, write = os.pipe()
                self.stdin = os.fdopen(write, "w")
                theirs.append(stdin)
            read, stdout = os.pipe()
            self.stdout = os.fdopen(read)
            theirs.append(stdout)
            streams = [stdin, stdout, 2]
            if stderr_too:
                read, streams[2] = os.pipe()
                self.stderr = os.fdopen(read)
                theirs.append(streams[2])
        else:
            streams = [terminal] * 3
        self._life, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "code": None if isinstance(code, Path) else code,
            "script": str(code) if isinstance(code, Path) else None,
            "arguments": arguments,
            "environment": dict(environment),
            "directory": os.getcwd(),
            "leads": terminal is not None,
        }
        with told:
            socket.send_fds(_requests(os.getpid()), [json.dumps(request).encode()], [*streams, told.fileno()])
        for descriptor in theirs:
            os.close(descriptor)
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._life], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._answer())
            self._life.close()
        return self.returncode

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        said = {"stdout": "", "stderr": ""}

        def read(name: str, pipe: IO[str]) -> None:
            said[name] = pipe.read()
            pipe.close()

        pipes: list[tuple[str, Any]] = [("stdout", self.stdout), ("stderr", self.stderr)]
        readers = [threading.Thread(target=read, args=(name, pipe), daemon=True) for name, pipe in pipes if pipe]
        for reader in readers:
            reader.start()
        if self.stdin:
            with suppress(BrokenPipeError):
                self.stdin.write(input or "")
                self.stdin.close()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return said["stdout"], said["stderr"]

    def _answer(self) -> bytes:
        answer = self._life.recv(ANSWER_BYTES)
        if not answer:
            raise RuntimeError("what forks the programs of the tests has ended")
        return answer


def can_be(environment: Mapping[str, str]) -> bool:
    """Whether a program with this environment may be forked: nothing in it is for the start of Python."""
    _requests(os.getpid())
    return _at_start(environment) == _started_with


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(DECIDED_AT_START)}


_started_with: dict[str, str] = {}


@functools.cache
def _requests(owner: int) -> socket.socket:
    """Where `owner`, this process, asks for programs. A forked child of it that asks has a Python of its own."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        command = [sys.executable, preloaded.__file__, str(owner), str(there.fileno())]
        forking = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()])
    _started_with.clear()
    _started_with.update(_at_start(os.environ))

    def end() -> None:
        if os.getpid() == owner:
            here.close()
            forking.wait()

    atexit.register(end)
    return here
