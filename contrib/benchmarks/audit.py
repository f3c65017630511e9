"""What the audit log costs: an event a commit, beside the same rows with and without a chain, and verifying all of it,
with the memory that takes. With KAGED_BENCHMARK_POSTGRES_URL PostgreSQL is measured too, in a schema made and dropped.

SignLedger, the package nearest to it (PyPI: signledger, at least 2.0b1: 1.0.0 makes no chain on SQLite), takes part
where it can be imported: install it into a directory with pip's --target, and name that in PYTHONPATH.

Usage: python contrib/benchmarks/audit.py [--quick] [--operations N] [--rounds N] [--events N] [--rival-events N]
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import plain
from harness import (
    Case,
    Goal,
    Results,
    arguments,
    compare,
    connect_sqlite,
    describe,
    open_disk,
    open_store,
    postgres_schema,
    postgres_written,
    print_goal,
    sqlite_url,
)
from stores import CHAINED, CREATE, PLAIN, TEXT, Ready, on_postgres, on_sqlite

import kagedb
from kagedb.models.audit import SEAL_EVENTS
from kagedb.operations import audit_verify

RECORD = "AuditEvent.record"
RIVAL = "SignLedger"

GOALS = [Goal(RECORD, PLAIN, "cpu", 1.6), Goal(RECORD, PLAIN, "bytes", 1.2)]
PAGE_GOAL = Goal(RECORD, TEXT, "bytes", 0.6)
"""About pages and b-trees: PostgreSQL's log takes rows."""

VERIFY_LIMIT_US = 12.0

KIB_A_MB = 1024


# Appending.


def record(project: str, count: int) -> None:
    subjects = plain.SUBJECTS
    for number in range(count):
        subject = subjects[number % len(subjects)]
        kagedb.AuditEvent.record(plain.KIND, actor=plain.ACTOR, subject=subject, project=project, body=plain.BODY)


class ByPeewee:
    """Events by `Model.create`. `seq` is what comes before the first."""

    def __init__(self, database: Any, project: str) -> None:
        self.database = database
        self.project = project
        self.seq = 1 << 40  # on PostgreSQL beside the rows by hand, in the same table

    def create(self, count: int) -> None:
        for number in range(count):
            self.seq += 1
            with self.database.atomic():
                plain.PlainEvent.create(
                    seq=self.seq,
                    at=plain.now(),
                    kind=plain.KIND,
                    actor=plain.ACTOR,
                    subject=plain.SUBJECTS[number % len(plain.SUBJECTS)],
                    project=self.project,
                    body=plain.dump(plain.BODY),
                )


def rival_ledger(path: Path) -> Any:
    """A ledger of SignLedger as it comes: in WAL mode with pages of 4 KiB, durable, without signatures."""
    from signledger import Ledger
    from signledger.backends import SQLiteBackend

    return Ledger(SQLiteBackend(str(path)))


def rival_append(ledger: Any, project: str, count: int) -> None:
    subjects = plain.SUBJECTS
    for number in range(count):
        subject = subjects[number % len(subjects)]
        named = {"kind": plain.KIND, "actor": plain.ACTOR, "subject": subject, "project": project}
        ledger.append({**named, "body": plain.BODY})


def cases(ready: Ready) -> list[Case]:
    appender = {name: plain.Appender(driver, ready.other.project) for name, driver in ready.drivers.items()}
    return [
        Case(RECORD, partial(record, ready.rows.project)),
        Case(CHAINED, appender[CHAINED].chained),
        Case(PLAIN, appender[PLAIN].plain),
        Case(TEXT, appender[TEXT].text),
        Case(CREATE, ByPeewee(ready.peewee, ready.other.project).create),
    ]


def measure_append(
    where: str,
    given: argparse.Namespace,
    written: Callable[[], int],
    setup: AbstractContextManager[Ready],
    goals: list[Goal],
    with_rival: bool,
) -> None:
    with setup as ready:
        them = cases(ready)
        ledger = rival_ledger(ready.place / "ledger.db") if with_rival else None
        if ledger is not None:
            them.append(Case(RIVAL, partial(rival_append, ledger, ready.other.project)))
        title = f"One audit event a commit, {where}, full"
        found = compare(title, them, operations=given.operations, rounds=given.rounds, written=written)
        if ledger is not None:
            ledger.close()
    found.print([PLAIN, CHAINED, TEXT, *([RIVAL] if with_rival else [])], goals)


# Verifying. Each run has a process of its own, so that what it takes is not hidden in what another has left.


def fill(url: str, directory: Path, events: int, driver: Callable[[], plain.Driver], **settings: Any) -> None:
    """A log of so many events, sealed as it grows."""
    with open_store(url, directory, **settings):
        project = kagedb.Project.add("house", actor="operator:benchmark")
        appender = plain.Appender(driver(), project.id)
        first = kagedb.AuditEvent.head()[0]
        for start in range(first, events, SEAL_EVENTS):
            appender.fill(min(SEAL_EVENTS, events - start))
            kagedb.AuditSeal.close_all()


def verified(url: str, directory: Path, settings: dict[str, Any]) -> tuple[int, float, float]:
    with open_store(url, directory, **settings) as storage:
        verdict, cpu_s, more_mb = measured(lambda: audit_verify.verify(storage))
        if verdict.result != audit_verify.HOLDS:
            raise RuntimeError(f"the log of this benchmark does not hold: {verdict.wrong}")
        return verdict.events, cpu_s, more_mb


def rival_verified(path: Path) -> tuple[int, float, float]:
    with rival_ledger(path) as ledger:
        report, cpu_s, more_mb = measured(ledger.check_integrity)
        if not report.ok:
            raise RuntimeError(f"the ledger of this benchmark does not hold: {report.failures}")
        return report.entries_verified, cpu_s, more_mb


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` gave, its CPU in seconds, and by how many MB the resident memory grew at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    before, cpu = resident_kib("VmRSS"), time.process_time()
    given = work()
    cpu = time.process_time() - cpu
    return given, cpu, (resident_kib("VmHWM") - before) / KIB_A_MB


def resident_kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1])


def in_a_process(work: Callable[..., Any], *given: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def measure_verify(where: str, rounds: int, ways: Mapping[str, Callable[[], tuple[int, float, float]]]) -> None:
    counts: dict[str, int] = {}
    results = Results(f"Verifying an audit log, {where}; for each event", list(ways))
    for _ in range(rounds):
        for name, way in ways.items():
            counts[name], cpu_s, more_mb = way()
            results.add(name, "cpu", cpu_s * 1e6 / counts[name])
            results.add(name, "MB more", more_mb)
    mine, *others = ways
    results.print(others, [])
    for name, count in counts.items():
        print(f"- {name}: {count:,} events")
    print_goal("CPU us of an event", results.median(mine, "cpu"), VERIFY_LIMIT_US)


def main() -> None:
    given = arguments(
        __doc__ or "", operations=(2000, 4), rounds=(5, 1), events=(1_000_000, 1_500), rival_events=(10_000, 20)
    )
    rival = importlib.util.find_spec("signledger") is not None
    with open_disk(given.quick) as disk:
        describe(disk)
        if rival:
            import signledger

            print(f"SignLedger {signledger.__version__}.")
        else:
            print("SignLedger cannot be imported and takes no part; --help says how it can.")
        measure_append("SQLite", given, disk.written, on_sqlite(disk, "full"), [*GOALS, PAGE_GOAL], rival)
        if given.postgres:
            with postgres_schema(given.postgres) as (connection, schema):
                setup = on_postgres(given.postgres, schema, disk, "full")
                measure_append("PostgreSQL", given, postgres_written(connection), setup, GOALS, False)
    with tempfile.TemporaryDirectory(prefix="kaged-benchmark-") as place:
        verify_on_sqlite(given, Path(place), rival)
        if given.postgres:
            verify_on_postgres(given, Path(place))


def verify_on_sqlite(given: argparse.Namespace, place: Path, rival: bool) -> None:
    path = place / "kaged.db"
    url = sqlite_url(path)
    fill(url, place, given.events, lambda: plain.Sqlite(connect_sqlite(path)))
    ways = {"kagedb": partial(in_a_process, verified, url, place, {})}
    if rival:
        with rival_ledger(place / "ledger.db") as ledger:
            rival_append(ledger, "house", given.rival_events)
        ways[RIVAL] = partial(in_a_process, rival_verified, place / "ledger.db")
    measure_verify("SQLite", given.rounds, ways)


def verify_on_postgres(given: argparse.Namespace, place: Path) -> None:
    import psycopg2

    with postgres_schema(given.postgres) as (_, schema):
        options = f"-c search_path={schema}"
        settings = {"storage__schema": schema}

        def driver() -> plain.Driver:
            return plain.Postgres(psycopg2.connect(given.postgres, options=options))

        fill(given.postgres, place, given.events, driver, **settings)
        ways = {"kagedb": partial(in_a_process, verified, given.postgres, place, settings)}
        measure_verify("PostgreSQL", given.rounds, ways)


if __name__ == "__main__":
    main()
