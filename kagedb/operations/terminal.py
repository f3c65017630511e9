"""A command on a pseudo-terminal between the operator and us, and the operator's terminal in raw mode meanwhile.

What is done with the output is the caller's (record.py); nothing here knows of a store. Linux: pty(7), tty_ioctl(4).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import KagedError

USUAL_SIZE = (80, 24)
"""Columns and rows where there is no terminal to ask, as ever since the VT100."""

READ_BYTES = 65_536
"""Most that is read at once; the kernel's buffer of a pseudo-terminal is smaller."""

INPUT_BYTES = 65_536
"""Keys that wait for a program that does not read them; beyond it the operator's terminal makes them wait."""

QUIET_SECONDS = 0.1
"""After the command has ended, how long nothing must come: what it wrote last may still be on its way, and a process
that it left behind keeps the terminal open."""

DRAIN_SECONDS = 2.0
"""After the command has ended, how long a process that it left behind may go on writing."""

EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127
"""As shells say it (POSIX, 2.8.2)."""

_SIGNALS = (signal.SIGWINCH, signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def size_of_terminal() -> tuple[int, int]:
    """Columns and rows of the operator's terminal, or the usual ones."""
    for descriptor in (0, 1, 2):
        try:
            columns, rows = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if columns and rows:
            return columns, rows
    return USUAL_SIZE


@contextmanager
def raw_mode(descriptor: int, *, discard: bool = False) -> Iterator[bool]:
    """The terminal gives every key at once and shows none; as it was afterwards, whatever happens.

    Gives False where the descriptor is no terminal. With `discard`, keys that nobody has read by then are forgotten.
    """
    if not os.isatty(descriptor):
        yield False
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield True
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH if discard else termios.TCSADRAIN, before)


def run(
    command: Sequence[str],
    output: Callable[[bytes], None],
    resized: Callable[[int, int], None],
    *,
    stdin: int = 0,
    stdout: int = 1,
) -> int:
    """Run a command on a terminal of its own, passing on keys, output, size and signals, until it ends.

    `output` is called with all that it writes, `resized` with columns and rows. Gives its exit status, 128 + n where
    signal n ended it. Raises KagedError, with the exit status of a shell, where it cannot be started.
    In the main thread only: it handles signals.
    """
    master, slave = os.openpty()
    try:
        with _signals() as signalled:
            try:
                termios.tcsetwinsize(slave, size_of_terminal()[::-1])
                _prepare(slave, stdin)
                process = _start(command, slave)
            finally:
                os.close(slave)
            with raw_mode(stdin):
                try:
                    _pass_on(process, master, stdin, stdout, signalled, output, resized)
                except BaseException:
                    process.send_signal(signal.SIGHUP)
                    raise
    finally:
        os.close(master)
    status = process.wait()
    return status if status >= 0 else 128 - status


def _prepare(slave: int, stdin: int) -> None:
    """The terminal of the command is set up as the operator's is; without one, keys out of a pipe are not echoed."""
    if os.isatty(stdin):
        termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(stdin))
    else:
        attributes = termios.tcgetattr(slave)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)


def _start(command: Sequence[str], slave: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_take_terminal
        )
    except OSError as error:
        reason = error.strerror or str(error)
        failure = KagedError(f"the command {command[0]!r} cannot be started: {reason}", "name one in PATH, or its path")
        failure.exit_status = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
        raise failure from error


def _take_terminal() -> None:
    """In the child: the pseudo-terminal is what Ctrl-C, /dev/tty and job control mean."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor from which each signal that came can be read as a byte; as it was afterwards."""

    def note(number: int, frame: FrameType | None) -> None:
        """The byte has been written already."""

    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before: dict[signal.Signals, Any] = {}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        for number in _SIGNALS:
            before[number] = signal.signal(number, note)
        yield reading
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        os.close(reading)
        os.close(writing)


def _pass_on(
    process: subprocess.Popen[bytes],
    master: int,
    stdin: int,
    stdout: int,
    signalled: int,
    output: Callable[[bytes], None],
    resized: Callable[[int, int], None],
) -> None:
    os.set_blocking(master, False)
    keys = b""
    typing = attached = shown = True
    ended_at: float | None = None
    while True:
        poll = select.poll()
        poll.register(signalled, select.POLLIN)
        if attached:
            poll.register(master, select.POLLIN | (select.POLLOUT if keys else 0))
        if typing and len(keys) < INPUT_BYTES:
            poll.register(stdin, select.POLLIN)
        ready = dict(poll.poll(None if ended_at is None else QUIET_SECONDS * 1000))

        if signalled in ready:
            for number in os.read(signalled, READ_BYTES):
                if number == signal.SIGWINCH:
                    columns, rows = size_of_terminal()
                    termios.tcsetwinsize(master, (rows, columns))
                    resized(columns, rows)
                elif number != signal.SIGCHLD:
                    _signal(process, number)
        if ended_at is None and process.poll() is not None:
            ended_at = time.monotonic()

        came = b""
        if ready.get(master, 0) & ~select.POLLOUT:
            came, attached = _read(master)
        if came:
            output(came)
            if shown and not write_all(stdout, came):
                # Nobody looks any more: the same to the command as a terminal that is closed.
                shown = False
                _signal(process, signal.SIGHUP)
        if ended_at is not None and (not came or time.monotonic() - ended_at > DRAIN_SECONDS):
            return

        if keys and attached and ready.get(master, 0) & select.POLLOUT:
            keys = keys[_write_some(master, keys) :]
        if stdin in ready:
            read = os.read(stdin, READ_BYTES)
            keys += read
            if not read:
                typing = False
                keys += _end_of_input(master)


def _read(master: int) -> tuple[bytes, bool]:
    """What the command wrote, and whether it still has the terminal open."""
    try:
        return os.read(master, READ_BYTES), True
    except BlockingIOError:
        return b"", True
    except OSError as error:
        if error.errno != errno.EIO:  # which says on Linux that nobody has it open
            raise
        return b"", False


def _write_some(descriptor: int, data: bytes) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return len(data)  # nobody is there to read it


def write_all(descriptor: int, data: bytes) -> bool:
    """Show the output, however long the operator's terminal takes; False where it is gone."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                raise
            return False
    return True


def _end_of_input(master: int) -> bytes:
    """What a program on a terminal takes for the end of its input; twice, for the first one may end an unended line."""
    character = termios.tcgetattr(master)[6][termios.VEOF]
    return bytes(character) * 2


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.returncode is None:
        os.killpg(process.pid, number)
