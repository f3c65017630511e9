"""What a process pays for kagedb: importing it, opening a store for one event, and the check of its schema.

Usage: python contrib/benchmarks/imports.py [--quick] [--rounds N]
"""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import peewee
import plain
from harness import Goal, Results, arguments, connect_sqlite, describe, open_disk, open_store, print_goal, sqlite_url

import kagedb
from kagedb import schema

WITHOUT_PSYCOPG2 = "import sys; sys.modules['psycopg2'] = None; "
PEAK = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
"""Peak resident KiB since the interpreter started; what wait4 says would count the memory of its parent too."""

IMPORTS = {
    "nothing": "",
    "sqlite3": "import sqlite3",
    "peewee": WITHOUT_PSYCOPG2 + "import peewee",
    "kagedb": WITHOUT_PSYCOPG2 + "import kagedb",
    "kagedb, all of its API": WITHOUT_PSYCOPG2 + "from kagedb import *",
    "kagedb, to work on SQLite": WITHOUT_PSYCOPG2 + "from kagedb import *; import kagedb.engines.sqlite",
    "peewee with psycopg2": "import peewee",
    "kagedb with psycopg2, all of its API": "from kagedb import *",
}

# A command-line program that notes one event. No other store is open, so that both close their database for good.
APPEND = {
    "peewee": WITHOUT_PSYCOPG2
    + """
import json, sys, time
import peewee
database = peewee.SqliteDatabase(sys.argv[1], pragmas={"journal_mode": "wal", "synchronous": "full", "foreign_keys": 1})
class PlainEvent(peewee.Model):
    seq = peewee.BigIntegerField(primary_key=True)
    at = peewee.BigIntegerField()
    kind = peewee.TextField()
    actor = peewee.TextField()
    subject = peewee.TextField(null=True)
    project = peewee.TextField(null=True)
    body = peewee.TextField()
    class Meta:
        database = database
        legacy_table_names = False
with database.connection_context():
    last = PlainEvent.select(peewee.fn.MAX(PlainEvent.seq)).scalar() or 0
    at, body = time.time_ns() // 10**6, json.dumps({"a": 1})
    PlainEvent.create(seq=last + 1, at=at, kind="policy.decision", actor="agent:planner", body=body)
""",
    "kagedb": WITHOUT_PSYCOPG2
    + """
import sys
import kagedb
with kagedb.connect(url="sqlite://" + sys.argv[1], mode="user"):
    kagedb.AuditEvent.record("policy.decision", actor="agent:planner", body={"a": 1})
""",
}

CHECK = """
import sys, time
import kagedb
from kagedb import schema
def timed(*arguments, ensure=schema.ensure, **options):
    began = time.perf_counter_ns()
    try:
        return ensure(*arguments, **options)
    finally:
        print((time.perf_counter_ns() - began) / 1000)
schema.ensure = timed
kagedb.connect(url="sqlite://" + sys.argv[1], mode="user").close()
"""
"""The first check of a process, which reads the scripts to know their checksums."""

CHECK_LIMIT_US = 1000.0


def install(directory: Path) -> None:
    """Lay kagedb out in `directory` as pip does, and make the programs find it there and Peewee beside it.

    A checkout is found by a hook that costs more than what is measured; without `site` it does not run.
    """
    package = Path(kagedb.__file__).parent
    shutil.copytree(package, directory / "kagedb", ignore=shutil.ignore_patterns("__pycache__", "migrations"))
    shutil.copytree(schema.directory(), directory / "kagedb" / "migrations")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(directory), str(Path(peewee.__file__).parent)])
    for name in list(os.environ):
        if name.startswith(("KAGED_", "XDG_")) or name == "PYTHONDONTWRITEBYTECODE":
            del os.environ[name]
    compileall.compile_dir(directory, quiet=1)


def start(code: str, *arguments: str) -> tuple[float, float, str]:
    """Run `code` in an interpreter of its own. Gives wall and CPU in ms, and what it printed."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-SP", "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"a program of this benchmark ended with {process.returncode}")
    return wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000, printed.strip()


def in_turns(title: str, programs: dict[str, tuple[str, tuple[str, ...]]], rounds: int) -> Results:
    """Start the programs one after the other, so many times; the first round warms up and is not counted."""
    results = Results(title, list(programs))
    for number in range(rounds + 1):
        for name, (code, given) in programs.items():
            wall, cpu, peak = start(code + PEAK, *given)
            if number:
                results.add(name, "wall ms", wall)
                results.add(name, "CPU ms", cpu)
                results.add(name, "peak MB", int(peak) / 1024)
    return results


def main() -> None:
    given = arguments(__doc__ or "", rounds=(25, 1))
    describe()
    with open_disk(quick=True) as disk:
        install(disk.directory)
        measure_imports(given.rounds)
        measure_append(disk.directory, given.rounds)


def measure_imports(rounds: int) -> None:
    found = in_turns("Imports", {name: (code, ()) for name, code in IMPORTS.items()}, rounds)
    found.print(["peewee"], [Goal("kagedb", "peewee", "wall ms", 1.15)])
    more = found.median("kagedb", "peak MB") - found.median("peewee", "peak MB")
    print_goal("peak MB of kagedb beyond peewee", more, 2.0)


def measure_append(directory: Path, rounds: int) -> None:
    store, other = directory / "kaged.db", directory / "peewee.db"
    os.environ["HOME"] = str(directory)  # where there is no config file, as for most
    with open_store(sqlite_url(store), directory):
        pass
    made = connect_sqlite(other)
    plain.Sqlite(made).make(*plain.PLAIN_EVENT)
    made.close()
    programs = {"peewee": (APPEND["peewee"], (str(other),)), "kagedb": (APPEND["kagedb"], (str(store),))}
    found = in_turns("Open a store, append one event, close", programs, rounds)
    found.print(["peewee"], [Goal("kagedb", "peewee", "wall ms", 1.6)])
    check = check_us(store, rounds)
    print_goal("us of the check of a current schema, the first of its process", check, CHECK_LIMIT_US)


def check_us(store: Path, rounds: int) -> float:
    found = Results("", ["check"])
    for _ in range(rounds):
        found.add("check", "us", float(start(CHECK, str(store))[2]))
    return found.median("check", "us")


if __name__ == "__main__":
    main()
