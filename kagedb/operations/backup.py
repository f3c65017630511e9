"""Make a backup set: copy the store as it is at one moment, prove the copy, and only then give it its name.

Until the rename at the end nothing that was there is touched, and what is unfinished is never listed. Older sets are
removed only after a new verified one.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__, schema
from ..engines.archive import COPY, Contents, Pace
from ..engines.engine import HISTORY_TABLE, STARTER_WAIT_SECONDS, Engine
from ..engines.syncing import send
from ..errors import StorageCorrupt, StorageError, StorageForbidden, StorageFull
from ..identity import now_ms
from ..settings import make_directory, sync_directory
from . import backup_set, packing, scratch, verifying
from .backup_set import BackupSet, Manifest
from .digests import Examined, Progress, counts, digests, examine

SPARE_BYTES = 16 * 1024 * 1024
"""Free space wanted beyond the copy: a full disk is everybody's trouble on a small host."""

FLOOR_SETS = 3
"""Verified sets that `--keep-days` leaves, however old: a host that was off for a month must not lose them all."""

DAY_MS = 86_400_000

CLOCK_SLACK_MS = 60_000
"""How far the store may be before the clock: one that is set back by less is being corrected."""

_ROOMLESS = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a set is to be made. `keep` and `keep_days` say which older ones stay; None removes none."""

    form: str = COPY
    compression: str = ""
    quick: bool = False
    """Without digests and without reading it back: such a set is not a verified one until `kaged verify`."""
    bytes_per_second: int = 0
    keep: int | None = None
    keep_days: int | None = None
    before: str = ""
    progress: Callable[[str, int, int], None] | None = None
    """Called with what is being done, how much of it is done, and how much there is."""

    def tell(self, what: str) -> Progress | None:
        told = self.progress
        return None if told is None else lambda done, whole: told(what, done, whole)


@dataclass(frozen=True, slots=True)
class Made:
    """A set that was made. Times in milliseconds."""

    name: str
    directory: str
    sequence: int
    bytes: int
    rows: int
    verified: bool
    held_ms: int
    """How long the snapshot was held: what a busy daemon's write-ahead log had to grow for."""
    took_ms: int
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make(engine: Engine, directory: Path, plan: Plan) -> Made:
    """Make a set in `directory`, which is made if it is the default one's.

    Raises StorageBusy where another backup is being made, or the copy is too slow for what is being written;
    StorageFull, StorageForbidden; StorageCorrupt where the store is damaged: then the set is kept and marked suspect.
    """
    with backup_set.lock(ready(directory)):
        reap(engine, directory)
        with _making(engine, directory, plan) as making:
            part, manifest, wrong, held_ms, began = making
            final = part.with_name(part.name.removesuffix(backup_set.UNFINISHED))
            _finish(part, final)
        if wrong:
            raise StorageCorrupt(
                f"the backup set {final.name} is not a good one: {'; '.join(wrong)}",
                "it is kept and marked suspect; see how the store is with: kaged check",
            )
        removed, notes = _prune(directory, manifest, plan)
        return Made(
            final.name,
            os.fspath(final),
            manifest.sequence,
            manifest.bytes,
            manifest.rows,
            not plan.quick,
            held_ms,
            round((time.monotonic() - began) * 1000),
            removed,
            notes,
        )


def ready(directory: Path) -> Path:
    """The directory, made where it is missing."""
    make_directory(directory)
    return directory


@contextmanager
def before_migration(engine: Engine, script: str) -> Iterator[Path]:
    """A verified set of the store, which gets its name if the migration in the block succeeds. Gives its directory.

    A migration that failed has left the store as it was, and a daemon that is started again and again must not fill
    the disk with copies.
    """
    directory = Path(engine.settings.backup_directory)
    with backup_set.lock(ready(directory), STARTER_WAIT_SECONDS):
        reap(engine, directory)
        with _making(engine, directory, Plan(before=script)) as (part, _, wrong, _, _):
            if wrong:
                raise StorageCorrupt(
                    f"the store is damaged, so that it is not migrated: {'; '.join(wrong)}",
                    "the store is as it was; restore a backup",
                )
            final = part.with_name(part.name.removesuffix(backup_set.UNFINISHED))
            yield final
            _finish(part, final)


def reap(engine: Engine, directory: Path) -> None:
    """See to what was cut off; only with the lock.

    A set of before a migration that was committed is kept. One of another store is for that to judge; everything else
    that has no name yet is removed.
    """
    scratch.reap(directory)
    for rest in backup_set.removed_in(directory):
        shutil.rmtree(rest)
    for part in backup_set.unfinished_in(directory):
        try:
            manifest = BackupSet(part, 0).manifest
        except StorageError:
            shutil.rmtree(part)
            continue
        if (manifest.store, manifest.place) != (backup_set.store_id(engine), engine.place):
            continue
        if manifest.before in {applied.name for applied in schema.look(engine).applied}:
            _finish(part, part.with_name(part.name.removesuffix(backup_set.UNFINISHED)))
        else:
            shutil.rmtree(part)


@contextmanager
def _making(engine: Engine, directory: Path, plan: Plan) -> Iterator[tuple[Path, Manifest, list[str], int, float]]:
    """A set that is complete but for its name; removed where the block is left by an error."""
    began = time.monotonic()
    archiver = engine.archiver()
    archiver.require_ready(plan.form)
    packing.require_program(plan.compression)
    _require_room(engine, directory, plan)
    at = now_ms()
    sequence = backup_set.next_sequence(directory)
    part = directory / (backup_set.name_of(sequence, at) + backup_set.UNFINISHED)
    try:
        try:
            part.mkdir(mode=0o700)
            manifest, wrong, held_ms = _fill(engine, part, sequence, at, plan)
        except OSError as error:
            raise write_error(error, directory) from error
        yield part, manifest, wrong, held_ms, began
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _fill(engine: Engine, part: Path, sequence: int, at: int, plan: Plan) -> tuple[Manifest, list[str], int]:
    data = part / engine.archiver().file_name(plan.form)
    pace = Pace(engine.settings.backup_wal_limit_mib * 1024 * 1024, plan.bytes_per_second, plan.tell("copying"))
    figures = engine.figures()
    held_from = time.monotonic()
    with engine.archiver().copy(data, plan.form, pace, packed=bool(plan.compression)) as contents:
        held_ms = round((time.monotonic() - held_from) * 1000)
        early = contents.finished and not plan.compression
        data_sum, unlike = _keep(data, plan) if early else ("", [])
        found = _look(contents, plan)
        history, newest_at = _history(contents) if found.facts else ([], 0)
    if not contents.finished:
        held_ms = round((time.monotonic() - held_from) * 1000)
    if plan.compression:
        data = packing.compress(data, plan.compression)
    if not early:
        data_sum, unlike = _keep(data, plan)
    manifest = Manifest(
        sequence=sequence,
        created_at=at,
        engine=engine.name,
        library=figures.library,
        kagedb=__version__,
        form=plan.form,
        compression=plan.compression,
        file=data.name,
        bytes=data.stat().st_size,
        sha256=data_sum,
        store=backup_set.id_of(*history[0]) if history else "",
        place=engine.place,
        schema=history[-1][0] if history else "",
        before=plan.before,
        newest_at=newest_at,
        head=found.head,
        facts=found.facts,
    )
    backup_set.write_synced(part / backup_set.MANIFEST, manifest.text())
    backup_set.write_sums(part, manifest.sha256, manifest.file)
    wrong = unlike + found.wrong
    if not plan.quick and not plan.before:
        wrong += _missing(engine)
    if not plan.quick and not wrong and (plan.compression or not contents.finished):
        wrong = verifying.wrong_contents(engine.settings, part, manifest, plan.tell("verifying"))
    if wrong:
        backup_set.mark_suspect(part, wrong)
    elif not plan.quick:
        backup_set.mark_verified(part)
    sync_directory(part)
    return manifest, wrong, held_ms


def _keep(data: Path, plan: Plan) -> tuple[str, list[str]]:
    """Make the finished data file durable. Gives its checksum, and what is wrong with what the disk gives back.

    Whatever is read of it afterwards is then in the kernel's memory, as far as that reaches, and came from the disk: to
    read a database from there in the order of its trees takes ten times as long.
    """
    written = send(data, plan.tell("writing"))
    if plan.quick or backup_set.file_sum(data) == written:
        return written, []
    return written, [f"the disk gives back another {data.name} than was written to it"]


def _look(contents: Contents, plan: Plan) -> Examined:
    if plan.quick:
        return counts(contents)
    if contents.finished:
        return examine(contents, plan.tell("verifying"))
    damage = contents.damage()
    found = digests(contents, plan.tell("reading"))
    found.wrong[:0] = damage
    return found


def _missing(engine: Engine) -> list[str]:
    """What the schema of the store has lost: the guards of the audit log, for one. A migration looks by itself."""
    standing = schema.look(engine)
    if standing.unknown or not standing.applied:
        return []
    return [line for line in schema.drift(engine, standing.version) if line.startswith("missing: ")][
        : schema.DIFFERENCES_SHOWN
    ]


def _history(contents: Contents) -> tuple[list[tuple[str, int]], int]:
    """The migrations that the store has, with when they were applied, and when its newest audit event was."""
    tables = {table.name for table in contents.tables()}
    if not {HISTORY_TABLE, "audit_event"} <= tables:
        return [], 0
    applied = contents.raw(f"SELECT name, applied_at FROM {HISTORY_TABLE} ORDER BY name").fetchall()  # noqa: S608
    newest = contents.raw("SELECT at FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
    return applied, newest[0] if newest else 0


def _finish(part: Path, final: Path) -> None:
    try:
        os.rename(part, final)
        sync_directory(final.parent)
    except OSError as error:
        raise write_error(error, final.parent) from error


def _prune(directory: Path, manifest: Manifest, plan: Plan) -> tuple[list[str], list[str]]:
    """Remove the sets that neither rule keeps; gives their names, and what there is to say. Suspect ones stay."""
    if plan.keep is None and plan.keep_days is None:
        return [], []
    if plan.quick:
        return [], ["no older set is removed, since the new one is not verified"]
    mine = [one for one in backup_set.sets_in(directory) if _is_good_set_of(one, manifest.store)]
    verified = [one for one in mine if one.state == backup_set.VERIFIED_STATE]
    kept = verified[-plan.keep :] if plan.keep is not None else []
    if plan.keep_days is not None:
        now = time.time_ns() // 1_000_000
        if now < manifest.newest_at - CLOCK_SLACK_MS:
            return [], ["no older set is removed: the clock of this host is before the newest event of the store"]
        young = [one for one in mine if one.manifest.created_at > now - plan.keep_days * DAY_MS]
        kept = [*kept, *young, *verified[-FLOOR_SETS:]]
    first = min(one.sequence for one in kept)
    removed = []
    for one in mine:
        if one.sequence < first:
            rest = one.directory.with_name(one.name + backup_set.REMOVED)
            os.rename(one.directory, rest)
            sync_directory(directory)
            shutil.rmtree(rest)
            removed.append(one.name)
    return removed, []


def _is_good_set_of(one: BackupSet, store: str) -> bool:
    try:
        return one.state != backup_set.SUSPECT_STATE and one.manifest.store == store
    except StorageError:
        return False


def _require_room(engine: Engine, directory: Path, plan: Plan) -> None:
    # A plain copy takes the store's size; another form is made beside one, and so are compressed ones.
    factor = 1 if plan.form == COPY and not plan.compression else 2
    wanted = factor * engine.size_bytes() + SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise StorageFull(
            f"{directory} has {free:,} bytes free; a backup of this store may need {wanted:,}",
            "free some space, or name another place: backup.directory, --output",
        )


def write_error(error: OSError, directory: Path) -> StorageError:
    if error.errno in _ROOMLESS:
        return StorageFull(f"the disk of {directory} is full", "free some space, or name another place")
    kind = StorageForbidden if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StorageError
    return kind(
        f"no backup can be written in {directory}: {os.strerror(error.errno or 0)}",
        "mend that, or name another place: backup.directory, --output",
    )
