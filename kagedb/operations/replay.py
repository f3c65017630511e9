"""Play a transcript on the operator's terminal: with its timing, to be paused and left by a key."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterable

from ..models.segment import Event, Output
from .terminal import raw_mode, write_all

KEY_BYTES = 1024
"""Read at once; terminals answer what the recorded program had asked of its own, which is not keys."""

_PAUSE, _QUIT, _INTERRUPT, _ESCAPE = b" ", b"q", b"\x03", b"\x1b"

_ALTERNATE = re.compile(rb"\x1b\[\?(?:1049|1047|47)([hl])")
_LONGEST = 8  # bytes of what _ALTERNATE finds

_LEAVE_ALTERNATE = b"\x1b[?1049l"
_USUAL_MODES = b"\x1b[!p\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?25h\x1b[0m\r\n"
"""Soft reset (DECSTR), then what it leaves alone: mouse reports and bracketed paste; the cursor shown, no colour."""


class _Left(Exception):
    """A key ended the replay."""


class Player:
    """Plays events `speed` times as fast as they happened; pauses longer than `idle_ms` are cut to that."""

    def __init__(self, *, speed: float = 1.0, idle_ms: int | None = None, stdin: int = 0, stdout: int = 1) -> None:
        self._speed = speed
        self._idle_ms = idle_ms
        self._stdin = stdin
        self._stdout = stdout
        self._keys = False

    def play(self, events: Iterable[Event], from_ms: int = 0) -> bool:
        """Play until the end, or until `q` or Ctrl-C; space pauses and goes on. Gives whether it came to the end.

        What happened before `from_ms` is shown at once. The terminal is in its usual modes afterwards.
        """
        alternate = False
        before = b""
        with raw_mode(self._stdin, discard=True) as self._keys:
            try:
                position, due = from_ms, time.monotonic()
                for event in events:
                    if event.at_ms > position:
                        pause = event.at_ms - position
                        if self._idle_ms is not None:
                            pause = min(pause, self._idle_ms)
                        due = self._wait(due + pause / 1000 / self._speed)
                        position = event.at_ms
                    if isinstance(event, Output):
                        for found in _ALTERNATE.finditer(before + event.data):
                            alternate = found[1] == b"h"
                        before = event.data[-_LONGEST:]
                        if not write_all(self._stdout, event.data):
                            return False
                return True
            except _Left:
                return False
            finally:
                if os.isatty(self._stdout):
                    write_all(self._stdout, (_LEAVE_ALTERNATE if alternate else b"") + _USUAL_MODES)

    def _wait(self, due: float) -> float:
        """Wait until then; gives when that turned out to be. Raises _Left."""
        while (left := due - time.monotonic()) > 0:
            if not self._keys:
                time.sleep(left)
            elif select.select([self._stdin], [], [], left)[0] and self._key() == _PAUSE:
                paused_at = time.monotonic()
                while self._key() != _PAUSE:
                    """Anything else is not for us."""
                due += time.monotonic() - paused_at
        return due

    def _key(self) -> bytes:
        """The next key, or nothing where the terminal said something by itself. Raises _Left."""
        said = os.read(self._stdin, KEY_BYTES)
        if said.startswith(_ESCAPE):
            return b""
        if not said or _QUIT in said or _INTERRUPT in said:
            raise _Left
        return _PAUSE if _PAUSE in said else b""
