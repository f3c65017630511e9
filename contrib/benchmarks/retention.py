"""What it costs to prune half of a store and give its room back, beside a daemon that commits all the time.

The writer's waiting beside `kaged prune` and `kaged compact` against its own alone, the longest that each has held it,
what is left of the store's size, and the bytes written against one VACUUM of the pruned store, which would hold it for
all of its time. `--megabytes` is the size of the store, `--rate` what the writer commits in a second.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import peewee
from backup import Writer

import kagedb
from kagedb import Checkpoint, Project, Run, Session, Transcript
from kagedb.identity import now_ms

SCHEMA = "kaged_retention_benchmark"
"""Made and dropped."""

OLD_MS = 400 * 86_400_000
"""How long ago every second session ended: beyond every default limit."""

SESSION_MEGABYTES = 10
"""In a session, about: half of it terminal output, half states, inputs and attachments."""

HEAD = ["what", "took s", "writer: /s", "p99 ms", "x alone", "longest hold ms", "written MB", "size MB"]

COMMAND = """
import re, sys
from kagedb.cli import kaged
kaged(sys.argv[1:], standalone_mode=False)
print(re.search(r"\\nwrite_bytes: (\\d+)", open("/proc/self/io").read())[1], file=sys.stderr)
"""


def fill(megabytes: int) -> None:
    """A store of about that size, of sessions that have ended; every second of them long ago. Nothing compresses."""
    with kagedb.connect() as storage:
        project = Project.add("house", actor="operator:ana")
        sessions = max(2, megabytes // SESSION_MEGABYTES)
        share = megabytes * 2**20 // sessions // 2
        for _ in range(sessions):
            session = Session.start(project, title="long", actor="operator:ana")
            with Transcript.open(session, columns=80, rows=24) as recorder:
                for _ in range(max(1, share >> 20)):
                    recorder.write(secrets.token_bytes(min(share, 1 << 20)))
            for _ in range(max(1, share // 100_000)):
                with storage.transaction("relaxed"):
                    run = Run.dispatch(session, agent="planner", input={"text": secrets.token_hex(10_000)})
                    Checkpoint.pause(run, {"items": [secrets.token_hex(500) for _ in range(40)]})
                    run.attach("log", secrets.token_bytes(40_000))
                    run.finish()
            session.end(actor="operator:ana")
            last = session
        at = now_ms() - OLD_MS
        old = [row.id for row in Session.select().order_by(Session.id)][::2]
        old = [id for id in old if id != last.id]
        Session.update(ended_at=at).where(Session.id.in_(old)).execute()


def kaged(*arguments: str) -> tuple[dict[str, Any], float, int]:
    """What a command says in JSON, its wall time in seconds, and the bytes that it has written."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", COMMAND, "-q", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout), time.monotonic() - began, int(done.stderr.split()[-1])


def beside(rate: int, *arguments: str) -> tuple[dict[str, Any], float, int, tuple[float, float]]:
    """The same beside the writer, with what that did."""
    writer = Writer(rate)
    said, took, written = kaged(*arguments)
    return said, took, written, writer.stop()


def written_here() -> int:
    found = re.search(r"\nwrite_bytes: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0


def vacuumed(path: Path, place: Path) -> tuple[float, int, int]:
    """Seconds of a VACUUM of a copy, durable, the bytes written by it, and the size afterwards."""
    copy = place / "vacuum.sqlite3"
    source, target = peewee.sqlite3.connect(path), peewee.sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before, began = written_here(), time.monotonic()
    target.isolation_level = None
    target.execute("VACUUM")
    target.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    took = time.monotonic() - began
    target.close()
    return took, written_here() - before, copy.stat().st_size


def size() -> int:
    with kagedb.connect(read_only=True) as storage:
        return storage.engine.size_bytes()


def measure(given: Any, place: Path, path: Path | None) -> None:
    """`path` is the database file, where there is one."""
    whole = size()
    writer = Writer(given.rate)
    time.sleep(0.2 if given.quick else 10)
    alone = writer.stop()
    rows = [["alone", "-", f"{alone[0]:.0f}", f"{alone[1]:.1f}", "1.00", "-", "-", f"{whole / 2**20:.0f}"]]
    ratios = {}
    total = 0
    for name in ("prune", "compact"):
        said, took, written, (rate, p99) = beside(given.rate, name)
        ratios[name] = p99 / alone[1]
        total += written
        rows.append(
            [
                f"kaged {name}",
                f"{took:.1f}",
                f"{rate:.0f}",
                f"{p99:.1f}",
                f"{ratios[name]:.2f}",
                f"{said['longest_hold_ms']:.1f}",
                f"{written / 2**20:.0f}",
                f"{size() / 2**20:.0f}",
            ]
        )
        if name == "prune" and path is not None:
            took, rewritten, left = vacuumed(path, place)
            sizes = [f"{rewritten / 2**20:.0f}", f"{left / 2**20:.0f}"]
            rows.append(["VACUUM, alone", f"{took:.1f}", "-", "-", "-", f"{took * 1000:.0f}", *sizes])
    harness.print_table(HEAD, rows)
    for name, ratio in ratios.items():
        harness.print_goal(f"{name}: writer's p99, x alone", ratio, 2.0)
    if path is not None:
        harness.print_goal("size afterwards, x before", size() / whole, 0.6)
        print(f"- bytes written by both, x one VACUUM: {total / max(rewritten, 1):.2f}")


def main() -> None:
    given = harness.arguments(__doc__ or "", megabytes=(500, 3), rate=(100, 100))
    # No file system of its own: sizes are seen by themselves, and the store needs more than that has.
    with harness.open_disk(quick=True) as disk:
        harness.describe(disk)
        place = disk.directory
        config, path = place / "config.toml", place / "kaged.db"
        config.write_text(f'[storage]\nschema = "{SCHEMA}"\n[retention]\ncheckpoints_mib = 0\n')
        os.environ.update(KAGED_CONFIG=str(config), KAGED_DATABASE_URL=harness.sqlite_url(path))
        fill(given.megabytes)
        print(f"\n### SQLite, a store of about {given.megabytes} MB, half of it pruned\n")
        measure(given, place, path)
        if given.postgres:
            os.environ["KAGED_DATABASE_URL"] = given.postgres
            measure_server(given, place)


def measure_server(given: Any, place: Path) -> None:
    import psycopg2

    try:
        fill(given.megabytes)
        print(f"\n### PostgreSQL, a store of about {given.megabytes} MB, half of it pruned\n")
        measure(given, place, None)
    finally:
        connection = psycopg2.connect(given.postgres)
        with connection, connection.cursor() as cursor:
            cursor.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
        connection.close()


if __name__ == "__main__":
    main()
