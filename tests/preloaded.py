"""A Python that has the libraries and kagedb imported, and forks for each program that a test starts.

A program so started is a process like any other, with memory of its own, and costs a quarter of one that begins with
Python's start and these imports. programs.py says which are not forked here.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import signal
import socket
import sys
import termios
import time
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)
REQUEST_BYTES = 1 << 18  # more than the buffer of a socket takes in one message, 208 kB; a longer one is refused there
DESCRIPTORS = 4  # of a request: stdin, stdout and stderr of the program, and where its pid and its end are told

MODULES = (
    "ulid",
    "psycopg2.extras",
    "kagedb.storage",
    "kagedb.engines.sqlite",
    "kagedb.engines.postgres",
    "kagedb.cli",
)
"""What a daemon or a command imports when it starts, and no more: what they import later they import here too."""

_libc = ctypes.CDLL(None)


def die_with(parent: int) -> None:
    """A SIGKILL is due when `parent`, who has forked this process, dies, even by SIGKILL."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork for each request until whoever sends them is gone. Returns in each program, with what it is to run."""
    while True:
        message, ancillary, _, _ = requests.recvmsg(
            REQUEST_BYTES, socket.CMSG_SPACE(DESCRIPTORS * array.array("i").itemsize)
        )
        if not message:
            os._exit(0)
        descriptors = array.array("i", ancillary[0][2])
        here = os.getpid()
        if os.fork() == 0:
            die_with(here)
            requests.close()
            _look_after(descriptors)
            wanted: dict[str, Any] = json.loads(message)
            return wanted
        for descriptor in descriptors:
            os.close(descriptor)
        while _reap_one():
            pass


def _look_after(descriptors: array.array[int]) -> None:
    """Fork the program, which returns, and tell of its end. It is reaped when nobody means it by its pid any more."""
    *streams, told = descriptors
    life = socket.socket(fileno=told)
    here = os.getpid()
    program = os.fork()
    if program == 0:
        die_with(here)
        life.close()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        for descriptor in streams:
            os.close(descriptor)
        return
    for descriptor in streams:
        os.close(descriptor)
    for number in range(3):
        os.close(number)
    life.send(str(program).encode())
    end = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
    assert end is not None
    try:
        life.send(str(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status).encode())
        life.recv(1)
    except OSError:
        pass  # nobody waits for it any more
    os.waitpid(program, 0)
    os._exit(0)


def _reap_one() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _settle(wanted: dict[str, Any]) -> None:
    """What the start of Python would have taken from the process: its environment, streams, arguments and path."""
    os.environ.clear()
    os.environ.update(wanted["environment"])
    time.tzset()
    if wanted["leads"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(wanted["directory"])
    for number, name, mode in (0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"):
        stream = _stream(number, mode, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    script = wanted["script"]
    sys.argv = [script or "-c", *wanted["arguments"]]
    sys.path[0] = os.path.dirname(script) if script else ""


def _stream(number: int, mode: str, like: Any) -> Any:
    raw: Any = io.FileIO(number, mode, closefd=False)
    raw.name = like.name
    binary = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    by_line = not like.write_through and (number == 2 or raw.isatty())  # PYTHONUNBUFFERED writes through
    stream: Any = io.TextIOWrapper(
        binary, like.encoding, like.errors, line_buffering=by_line, write_through=like.write_through
    )
    stream.mode = mode
    return stream


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # what is shared stays shared: no collection of a program writes to it
    wanted = serve(socket.socket(fileno=int(sys.argv[2])))
    _settle(wanted)
    main = sys.modules["__main__"] = ModuleType("__main__")
    code = wanted["code"]
    if wanted["script"]:
        main.__file__ = wanted["script"]
        with open(wanted["script"], "rb") as file:
            code = file.read()
    exec(compile(code, wanted["script"] or "<string>", "exec", dont_inherit=True), vars(main))
