"""`kaged` killed at a chosen point: at a call to the system, by strace, SQLite's own writes too; or at a step of its
own, which is a call of Python's `os` that touches a file.

A program that has kagedb loaded forks for each run, so that a point costs a fraction of a second.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from programs import start_python, tell, wait_for_line

CALLS = ("fsync", "fdatasync", "sync_file_range", "rename", "pwrite64", "write", "unlink", "ftruncate", "link")
"""What changes or syncs a file; `open` and `mkdir` make what is empty."""

FORKING = """
import collections, json, os, re, signal, subprocess, sys, tempfile, time
from kagedb.cli import kaged
import kagedb.cli.backup, kagedb.operations.backup, kagedb.operations.restore, kagedb.engines.sqlite_archive
import kagedb.engines.sqlite, kagedb.operations.packing, kagedb.operations.scratch

def run_to_step(arguments, limit):
    count = 0
    ready, said = os.pipe()
    child = os.fork()
    if child:
        os.close(said)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return [status, int(os.read(ready, 20) or 0)]

    def around(name):
        real = getattr(os, name)
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        setattr(os, name, wrapped)

    status, write = 1, os.write
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for name in ("rename", "fsync", "fdatasync", "unlink", "mkdir", "open", "write", "rmdir"):
            around(name)
        kaged(arguments, standalone_mode=False)
        status = 0
    finally:
        write(said, str(count).encode())
        os._exit(status)

def run(arguments, options):
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready, 1)
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            kaged(arguments, standalone_mode=False)
            sys.stdout.flush()
            status = 0
        finally:
            os._exit(status)
    os.close(ready)
    log = tempfile.NamedTemporaryFile("r")
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", log.name, *options, "-p", str(child)])
    while "TracerPid:\\t0\\n" in open(f"/proc/{child}/status").read():
        if tracer.poll() is not None:
            raise SystemExit("strace has ended")
        time.sleep(0.001)
    os.write(go, b"x")
    os.close(go)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait()
    return status, log.read()

print("ready", flush=True)
for line in sys.stdin:
    arguments, call, number = json.loads(line)
    if call == "step":
        print("ended", json.dumps(run_to_step(arguments, number)), flush=True)
    elif call:
        status, _ = run(arguments, ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"])
        print("ended", json.dumps(status), flush=True)
    else:
        status, said = run(arguments, ["-e", "trace=" + ",".join(number)])
        threads = collections.Counter(re.findall(r"^(\\d+) +(\\w+)\\(", said, re.M))
        most = collections.Counter()
        for (_, name), count in threads.items():
            most[name] = max(most[name], count)
        print("ended", json.dumps([status, most]), flush=True)
"""
"""Reads a run a line; strace counts each kind of call, and each thread's by itself."""


def can_trace() -> bool:
    program = shutil.which("strace")
    return program is not None and subprocess.run([program, "-qq", "true"], capture_output=True).returncode == 0


class Killer:
    def __init__(self) -> None:
        self._program = start_python(FORKING)
        wait_for_line(self._program, "ready")

    def calls(self, *arguments: str) -> dict[str, int]:
        """How many calls of each kind a run makes that is left alone."""
        status, found = self._run(arguments, "", CALLS)
        assert status == 0
        return dict(found)

    def run(self, *arguments: str, call: str, number: int) -> bool:
        """Run `kaged` and kill it at the call of that kind and number; False where it ended before."""
        status = self._run(arguments, call, number)
        assert status in (0, -9), f"{call} {number}: {status}"
        return bool(status)

    def run_to_step(self, limit: int, *arguments: str) -> int:
        """How many steps a run of `kaged` took; 0 where it was killed at that many."""
        status, steps = self._run(arguments, "step", limit)
        assert status in (0, -9), status
        return 0 if status else int(steps)

    def _run(self, arguments: tuple[str, ...], call: str, number: Any) -> Any:
        tell(self._program, json.dumps([arguments, call, number]))
        return json.loads(wait_for_line(self._program, "ended", timeout=60).removeprefix("ended "))


def spread(count: int, points: int) -> list[int]:
    """So many numbers from 1 to `count`, evenly, the last among them: what exchanges names comes at the end."""
    return sorted({max(1, round(count * (place + 1) / points)) for place in range(points)})
