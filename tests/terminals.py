"""A terminal for `kaged` as an operator has one: a program starts on it, keys are typed, what is shown is kept."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import forked
from commands import KAGED

PATIENCE_SECONDS = 30


class Terminal:
    """What a program on it shows is in `shown`, byte for byte."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.master, self.slave = os.openpty()
        self.shown = b""
        self.resize(columns, rows)
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, *arguments: str, before: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """`kaged` with these arguments, in the foreground; `before` is code that it runs first."""
        environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
        if forked.can_be(environment):
            return forked.Program(f"{before}\n{KAGED}", arguments, environment, terminal=self.slave)
        return subprocess.Popen(
            [sys.executable, "-c", f"{before}\n{KAGED}", *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environment,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def resize(self, columns: int, rows: int) -> None:
        """As a window is resized: the kernel tells the program in the foreground."""
        termios.tcsetwinsize(self.master, (rows, columns))

    @property
    def modes(self) -> list[object]:
        return termios.tcgetattr(self.slave)

    def wait_for(self, what: bytes | Callable[[bytes], bool]) -> None:
        """Until that has been shown."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (what(self.shown) if callable(what) else what in self.shown):
            assert time.monotonic() < deadline, f"{what!r} is not in {self.shown[-2000:]!r}"
            time.sleep(0.01)

    def wait(self, process: subprocess.Popen[str]) -> int:
        """The exit status of the program, once all that it showed is here."""
        status = process.wait(PATIENCE_SECONDS)
        quiet = -1
        while quiet != len(self.shown) or select.select([self.master], [], [], 0)[0]:
            quiet = len(self.shown)
            time.sleep(0.05)
        return status

    def _read(self) -> None:
        while not self._ended.is_set():
            if select.select([self.master], [], [], 0.02)[0]:
                self.shown += os.read(self.master, 65_536)

    def close(self) -> None:
        self._ended.set()
        self._reader.join()
        os.close(self.slave)
        os.close(self.master)


@contextmanager
def terminal(columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    made = Terminal(columns, rows)
    try:
        yield made
    finally:
        made.close()
