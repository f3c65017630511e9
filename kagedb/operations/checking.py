"""`kaged check`: everything that can be found wrong with a store, each finding with what mends it. Changes nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import schema
from ..errors import KagedError, StorageError, StorageFull
from ..storage import Storage, newest_ms
from . import audit, backup_set
from .backup_set import BackupSet
from .health import CLOCK_SLACK_MS

HOUR_MS = 3_600_000

WAL_FACTOR = 4
"""The write-ahead log is too large at this many times what it is cut back to: a reader holds it for hours."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong: which check found it, what it is, and what mends it."""

    check: str
    wrong: str
    mend: str


@dataclass(slots=True)
class Report:
    """What was checked, and what was found."""

    place: str
    checked: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and no fault of the store: the library's age, and the like."""


def check(storage: Storage, progress: Callable[[str, int, int], None] | None = None) -> Report:
    """Look at everything; best inside a snapshot."""
    report = Report(storage.engine.place, notes=list(storage.engine.figures().warnings))
    for number, (name, look) in enumerate(_CHECKS.items()):
        if progress is not None:
            progress("checking", number, len(_CHECKS))
        report.checked.append(name)
        report.findings += [Finding(name, wrong, mend) for wrong, mend in look(storage)]
    if progress is not None:
        progress("checking", len(_CHECKS), len(_CHECKS))
    return report


def _integrity(storage: Storage) -> Iterator[tuple[str, str]]:
    for wrong in storage.engine.damage():
        yield wrong, "keep the store as it is, and restore a backup: kaged restore --latest"


def _schema(storage: Storage) -> Iterator[tuple[str, str]]:
    engine = storage.engine
    standing = schema.look(engine)
    try:
        schema.refuse_misfit(engine, standing)
    except StorageError as error:
        yield error.message, error.hint
        return
    if standing.pending:
        yield f"{len(standing.pending)} migrations are pending", "stop the daemon, and run: kaged migrate"
    for difference in schema.drift(engine, standing.version)[: schema.DIFFERENCES_SHOWN]:
        yield difference, "undo by hand what was changed by hand, or restore a backup: kaged restore --latest"


def _audit(storage: Storage) -> Iterator[tuple[str, str]]:
    one = _comparable(storage)
    head = one.manifest.head if one is not None else None
    anchors = [audit.Anchor(head[0], bytes.fromhex(head[1]))] if head is not None else []
    verdict = audit.verify(storage, expect=anchors)
    if verdict.result == audit.BROKEN:
        told = f", as the backup {one.name} has it" if one is not None and anchors else ""
        yield (
            f"the audit log is broken at event {verdict.seq}{told}: {verdict.wrong}",
            "keep the store as it is, and compare it with a backup: kaged audit export",
        )


def _comparable(storage: Storage) -> BackupSet | None:
    """The newest verified set whose audit head must still be in the log.

    After a restore, sets that were made of what was replaced are of another branch.
    """
    sets = [one for one in _sets(storage) if one.state == backup_set.VERIFIED_STATE]
    row = storage.database.raw(
        "SELECT body FROM audit_event WHERE kind = ? ORDER BY seq DESC LIMIT 1", ("store.restored",)
    ).fetchone()
    if row is not None:
        body = json.loads(row[0])
        sets = [one for one in sets if one.sequence > body["newest_sequence"] or one.name == body["set"]]
    return sets[-1] if sets else None


def _permissions(storage: Storage) -> Iterator[tuple[str, str]]:
    for told in storage.engine.exposed():
        wrong, _, mend = told.partition(": ")
        yield wrong, mend
    settings = storage.settings
    for directory in {Path(settings.home), Path(settings.backup_directory)}:
        if directory.is_dir() and directory.stat().st_mode & 0o077:
            yield f"{directory} can be used by others", f"chmod 700 {directory}"


def _log(storage: Storage) -> Iterator[tuple[str, str]]:
    wal = storage.engine.figures().bytes_by_part.get("wal", 0)
    limit = WAL_FACTOR * 1024 * max(storage.settings.journal_size_limit_kib, storage.settings.wal_autocheckpoint_kib)
    if wal > limit:
        yield (
            f"the write-ahead log has {wal:,} bytes: something has been reading the store for long",
            "end what reads it; the daemon's next writes then cut the log back",
        )


def _space(storage: Storage) -> Iterator[tuple[str, str]]:
    engine, directory = storage.engine, Path(storage.settings.backup_directory)
    try:
        engine.require_space()
    except StorageFull as error:
        yield error.message, error.hint
    if directory.is_dir():
        size, free = engine.size_bytes(), shutil.disk_usage(directory).free
        if free < size:
            yield (
                f"{directory} has {free:,} bytes free, too few for the next backup of {size:,}",
                "free some space, or remove older sets: kaged backup --keep 7",
            )


def _clock(storage: Storage) -> Iterator[tuple[str, str]]:
    newest = newest_ms(storage.engine, storage.engine.tables())
    if newest > _now() + CLOCK_SLACK_MS:
        yield (
            "the clock of this host is before the newest row of the store; nothing is deleted by age until it is set",
            "set the clock: timedatectl",
        )


def _backups(storage: Storage) -> Iterator[tuple[str, str]]:
    sets = _sets(storage)
    for one in sets:
        if one.state == backup_set.SUSPECT_STATE:
            yield f"the backup set {one.name} is suspect", f"prove it once more: kaged verify {one.name}"
    hours = storage.settings.backup_max_age_hours
    if not hours:
        return
    good = [one for one in sets if one.state == backup_set.VERIFIED_STATE]
    directory = storage.settings.backup_directory
    if not good:
        history = schema.look(storage.engine).applied
        if history and history[0].applied_at < _now() - hours * HOUR_MS:
            yield f"there is no verified backup of the store in {directory}", "make one: kaged backup"
        return
    age = (_now() - good[-1].manifest.created_at) // HOUR_MS
    if age >= hours:
        yield (
            f"the newest verified backup, {good[-1].name}, is {age} hours old; backup.max_age_hours is {hours}",
            "make one: kaged backup; and every night: kaged systemd install",
        )


def _sets(storage: Storage) -> list[BackupSet]:
    """The sets of this store whose manifest can be read, and those of which it cannot be told."""
    store, found = backup_set.store_id(storage.engine), []
    for one in backup_set.sets_in(Path(storage.settings.backup_directory)):
        try:
            mine = one.manifest.store == store
        except KagedError:
            mine = one.state == backup_set.SUSPECT_STATE
        if mine:
            found.append(one)
    return found


def _now() -> int:
    return time.time_ns() // 1_000_000


_CHECKS: dict[str, Callable[[Storage], Iterator[tuple[str, str]]]] = {
    "integrity": _integrity,
    "schema": _schema,
    "audit log": _audit,
    "permissions": _permissions,
    "write-ahead log": _log,
    "free space": _space,
    "clock": _clock,
    "backups": _backups,
}
