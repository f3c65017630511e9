"""What ends a test server and removes its directory, as a program of its own, so that it outlives the test run.

`watch OWNER DIRECTORY` waits until the owner says so on stdin, closes it, or is gone, however it died.
`kill DIRECTORY` is a crash: SIGKILL to all of the server at once, its data left. Standard library only.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from ctypes import CDLL
from pathlib import Path

WATCH_SECONDS = 0.5  # between two looks at whether the owner lives; how long a server may outlive it
QUIT_SECONDS = 5  # for an immediate shutdown (0.1 s where seen), and for a killed process to be gone
POLL_SECONDS = 0.02
SHARED_MEMORY_LINE = 6  # of postmaster.pid, from 0: key and id of the System V segment that guards the data directory
IPC_RMID = 0


def become_owner(directory: Path) -> None:
    """As root, act as the server's user: only that one may look into /proc/PID/cwd where ptrace is denied to root."""
    if os.geteuid() == 0:
        owner = directory.stat()
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


def wait_for_the_owner(pid: int) -> None:
    """Returns when the owner has ended. Its end of the pipe is not enough: a child it forked may hold it open."""
    while os.getppid() == pid and not select.select([sys.stdin], [], [], WATCH_SECONDS)[0]:
        pass


def processes_in(directory: Path) -> list[int]:
    """Everything that works in `directory`: postgres and its backends, initdb, pg_ctl."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            place = Path(os.readlink(process / "cwd"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or somebody else's
        if place.is_relative_to(directory):
            found.append(int(process.name))
    return found


def end_server(directory: Path, *signals: signal.Signals) -> None:
    """Send each signal to all of the server's processes until none is left."""
    for signal_number in signals:
        deadline = time.monotonic() + QUIT_SECONDS
        while running := processes_in(directory):
            if time.monotonic() > deadline:
                break
            for pid in running:
                try:
                    os.kill(pid, signal_number)
                except ProcessLookupError:
                    continue
            time.sleep(POLL_SECONDS)
    if running := processes_in(directory):
        raise RuntimeError(f"processes {running} in {directory} could not be ended")
    forget_crash(directory)


def forget_crash(directory: Path) -> None:
    """Remove what only a clean end removes: the shared memory segment, and the lock files, which would stop the next
    start where nobody reaps the dead server and its process id therefore looks alive."""
    pid_file = directory / "data" / "postmaster.pid"
    if pid_file.exists():
        lines = pid_file.read_text().splitlines()
        if len(lines) > SHARED_MEMORY_LINE:
            CDLL(None).shmctl(int(lines[SHARED_MEMORY_LINE].split()[1]), IPC_RMID, None)
        pid_file.unlink()
    for socket_file in directory.glob(".s.PGSQL.*"):
        socket_file.unlink()


def main(command: str, *arguments: str) -> None:
    directory = Path(arguments[-1])
    if command == "watch":
        os.chdir("/")
        wait_for_the_owner(int(arguments[0]))
        become_owner(directory)
        end_server(directory, signal.SIGQUIT, signal.SIGKILL)
        shutil.rmtree(directory)
    elif command == "kill":
        become_owner(directory)
        end_server(directory, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
