"""`kaged check`: everything that can be found wrong with a store, each finding with what mends it. Changes nothing."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import peewee

from .. import schema
from ..engines.compacting import TimeIsUp
from ..errors import (
    EXIT_DAMAGED,
    EXIT_FAILED,
    EXIT_UNKNOWN,
    InvalidValue,
    KagedError,
    SchemaError,
    SchemaTooOld,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageNotFound,
)
from ..settings import Settings
from ..storage import Storage, newest_ms
from . import audit_verify, backup_set, checkpoints, digests, overdue
from .backup_set import BackupSet
from .health import CLOCK_SLACK_MS

HOUR_MS = 3_600_000

WAL_FACTOR = 4
"""The write-ahead log is too large at this many times what it is cut back to: a reader holds it for hours."""

FREE_SHARE, FREE_BYTES = 0.25, 64 * 1024 * 1024
"""Space that holds nothing is told from both on: less of it is used again by the next weeks' work."""

BLOBS_SHOWN = 5

OPENING = "opening"
"""The check that a store which cannot be opened does not pass."""

DAMAGE_MEND = (
    "keep the store as it is, and restore a backup: kaged restore --latest; where there is none, save what can be read:"
    " kaged salvage --to URL"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong: which check found it, what it is, and what mends it."""

    check: str
    wrong: str
    mend: str
    damage: bool = False
    """Whether what is stored is not what was stored."""


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A check that was not made, or not to its end, and why."""

    check: str
    why: str


@dataclass(slots=True)
class Report:
    """What was checked, and what was found."""

    place: str
    checked: list[str] = field(default_factory=list)
    left_out: list[Unchecked] = field(default_factory=list)
    """What was not asked for."""
    unfinished: list[Unchecked] = field(default_factory=list)
    """What was asked for and cannot be told."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and no fault of the store: the library's age, and the like."""

    @property
    def exit_status(self) -> int:
        """What `kaged check` ends with: 3 damage, 1 something else, 4 nothing found but not all looked at, 0 good."""
        if self.findings:
            return EXIT_DAMAGED if any(finding.damage for finding in self.findings) else EXIT_FAILED
        return EXIT_UNKNOWN if self.unfinished else 0


@dataclass(frozen=True, slots=True)
class Watch:
    """What a check looks at, and until when."""

    storage: Storage
    ends_at: float

    def tick(self) -> None:
        """Called between the parts of a long check. Raises TimeIsUp."""
        if time.monotonic() >= self.ends_at:
            raise TimeIsUp


Told = Iterator[tuple[str, str]]
"""What is wrong and what mends it, of each thing that a check finds."""


class Check(NamedTuple):
    look: Callable[[Watch], Told]
    whole: bool = False
    """Whether it reads all of the store or of a large part: left out by `quick`, and ended at the deadline."""
    damage: bool = False
    """Whether what it finds is damage."""


def check(
    storage: Storage,
    *,
    quick: bool = False,
    deadline_seconds: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Look at everything, each check in a snapshot of its own, so that none holds the log for the others' time.

    `quick` leaves out what reads the whole store. At `deadline_seconds` what is still at work is ended. `progress` is
    called with what is being done, and how many checks of how many are made.
    """
    report = Report(storage.engine.place)
    watch = Watch(storage, math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds)
    for number, (name, one) in enumerate(_CHECKS.items()):
        if progress is not None:
            progress("checking", number, len(_CHECKS))
        if one.whole and quick:
            report.left_out.append(Unchecked(name, "it reads the whole store"))
        else:
            _look(watch, name, one, report)
    if progress is not None:
        progress("checking", len(_CHECKS), len(_CHECKS))
    return report


def _look(watch: Watch, name: str, one: Check, report: Report) -> None:
    storage, found = watch.storage, report.findings
    try:
        with storage.snapshot():
            if one.whole:
                watch.tick()
                with storage.engine.until(watch.ends_at):
                    found += [Finding(name, wrong, mend, one.damage) for wrong, mend in one.look(watch)]
            else:
                if not report.checked:
                    report.notes += storage.engine.figures().warnings
                found += [Finding(name, wrong, mend, one.damage) for wrong, mend in one.look(watch)]
        report.checked.append(name)
    except TimeIsUp:
        report.unfinished.append(Unchecked(name, "the time was up"))
    except StorageCorrupt as error:
        report.checked.append(name)
        found.append(Finding(name, error.message, DAMAGE_MEND, damage=True))
    except SchemaTooOld:
        report.unfinished.append(Unchecked(name, "the schema is of an older version"))
    except (peewee.DatabaseError, InvalidValue) as error:
        # A table or column is missing, which the check of the schema tells.
        report.unfinished.append(Unchecked(name, storage.settings.url.scrub(" ".join(str(error).split()))))


def unopened(settings: Settings, error: StorageError) -> Report:
    """The report on a store that cannot be opened. Raises `error` where that says nothing of the store."""
    told = isinstance(error, StorageCorrupt | SchemaError | StorageNotFound) or type(error) is StorageError
    if not told:
        raise error
    finding = Finding(OPENING, error.message, error.hint, isinstance(error, StorageCorrupt))
    rest = [Unchecked(name, "the store does not open") for name in _CHECKS]
    return Report(settings.url.path or settings.url.redacted, [OPENING], unfinished=rest, findings=[finding])


def _integrity(watch: Watch) -> Told:
    for wrong in watch.storage.engine.damage():
        yield wrong, DAMAGE_MEND


def _hashes(watch: Watch) -> Told:
    with watch.storage.engine.reading() as contents:
        for wrong in digests.disproved(contents, watch.tick):
            yield wrong, DAMAGE_MEND


def _blobs(watch: Watch) -> Told:
    missing = checkpoints.missing(watch.storage, watch.tick)
    for digest in missing[:BLOBS_SHOWN]:
        yield f"the blob {digest}, which a checkpoint or an attachment needs, is not there", DAMAGE_MEND
    if len(missing) > BLOBS_SHOWN:
        yield f"{len(missing) - BLOBS_SHOWN} more blobs are not there", DAMAGE_MEND


def _schema(watch: Watch) -> Told:
    engine = watch.storage.engine
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


def _retention(watch: Watch) -> Told:
    for told in overdue.overdue(watch.storage):
        yield told, "remove it: kaged prune; and every week: kaged systemd install"


def _audit(watch: Watch) -> Told:
    one = _comparable(watch.storage)
    head = one.manifest.head if one is not None else None
    anchors = [audit_verify.Anchor(head[0], bytes.fromhex(head[1]))] if head is not None else []
    verdict = audit_verify.verify(watch.storage, expect=anchors, progress=lambda done, last: watch.tick())
    if verdict.result == audit_verify.BROKEN:
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


def _permissions(watch: Watch) -> Told:
    for told in watch.storage.engine.exposed():
        wrong, _, mend = told.partition(": ")
        yield wrong, mend
    settings = watch.storage.settings
    for directory in {Path(settings.home), Path(settings.backup_directory)}:
        if directory.is_dir() and directory.stat().st_mode & 0o077:
            yield f"{directory} can be used by others", f"chmod 700 {directory}"


def _log(watch: Watch) -> Told:
    settings = watch.storage.settings
    wal = watch.storage.engine.figures().bytes_by_part.get("wal", 0)
    limit = WAL_FACTOR * 1024 * max(settings.journal_size_limit_kib, settings.wal_autocheckpoint_kib)
    if wal > limit:
        yield (
            f"the write-ahead log has {wal:,} bytes: something has been reading the store for long",
            "end what reads it, and cut the log back: kaged compact",
        )


def _space(watch: Watch) -> Told:
    engine, directory = watch.storage.engine, Path(watch.storage.settings.backup_directory)
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


def _unused(watch: Watch) -> Told:
    figures = watch.storage.engine.figures()
    whole = sum(figures.bytes_by_part.values())
    if figures.free_bytes >= max(FREE_BYTES, FREE_SHARE * whole):
        yield f"{figures.free_bytes:,} bytes of the store's {whole:,} hold nothing", "give them back: kaged compact"


def _marks(watch: Watch) -> Told:
    missing = watch.storage.engine.missing_marks()
    if missing:
        yield (
            f"the store has not the {', '.join(missing)} that a new one would have (reloaded from a dump?)",
            "stop the daemon, and give them back: kaged compact",
        )


def _clock(watch: Watch) -> Told:
    newest = newest_ms(watch.storage.engine, watch.storage.engine.tables())
    if newest > _now() + CLOCK_SLACK_MS:
        yield (
            "the clock of this host is before the newest row of the store; nothing is deleted by age until it is set",
            "set the clock: timedatectl",
        )


def _backups(watch: Watch) -> Told:
    storage = watch.storage
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


_CHECKS: dict[str, Check] = {
    "schema": Check(_schema),
    "marks": Check(_marks),
    "permissions": Check(_permissions),
    "write-ahead log": Check(_log),
    "free space": Check(_space),
    "unused space": Check(_unused),
    "clock": Check(_clock),
    "backups": Check(_backups),
    "retention": Check(_retention, whole=True),
    "integrity": Check(_integrity, whole=True, damage=True),
    "stored hashes": Check(_hashes, whole=True, damage=True),
    "blobs": Check(_blobs, whole=True, damage=True),
    "audit log": Check(_audit, whole=True, damage=True),
}
"""In the order in which they are made: what takes long comes last, so that a deadline leaves the rest."""
