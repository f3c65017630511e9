"""Bring a backup set back as the store of a place: verify, exchange, and say so in the audit log.

The store is the old one or the new one whenever somebody looks, and the old one is kept under a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import __version__, schema, storage
from ..engines import open_engine
from ..engines.archive import Contents
from ..engines.engine import Engine
from ..errors import NotFound, SchemaTooNew, SettingsError, StorageCorrupt, StorageError
from ..models import AuditEvent
from ..models.base import bind
from ..settings import Settings
from . import backup_set, verifying
from .backup_set import BackupSet, Manifest
from .digests import examine
from .scratch import scratch


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done. `kept` is where the old store is now: a file, or a schema; "" where there was none."""

    place: str
    name: str
    sequence: int
    schema: str
    rows: int
    replaced: tuple[int, str] | None
    """The audit head that the old store had: number and hash."""
    kept: str


def restore(
    settings: Settings,
    one: BackupSet | None,
    *,
    sets: Path,
    actor: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Restored:
    """Make a set the store that `settings` name; None stands for the newest verified one in the directory `sets`.

    Raises StorageInUse where anybody has the store open, SchemaTooNew for the set of a newer kagedb, SettingsError for
    that of another engine, StorageCorrupt for a damaged one, NotFound. On an error the store is as it was.
    """
    if storage.current() is not None:
        raise StorageError("this process has a store open", "close it first: storage.close()")
    engine = open_engine(settings)
    archiver = engine.archiver()
    try:
        archiver.hold()
        present = archiver.present()
        if one is None:
            store = backup_set.id_of(*present.first) if present.first else ""
            one = backup_set.newest_verified(sets, engine.name, store)
            if one is None:
                raise NotFound(f"there is no verified backup set in {sets}", "see what there is with: kaged backups")
        manifest = one.manifest
        _refuse_misfit(engine, one, manifest)

        def check(contents: Contents) -> None:
            tell = None if progress is None else lambda done, whole: progress("verifying", done, whole)
            found = examine(contents, tell)
            _refuse_wrong(one, found.wrong or verifying.compare(manifest, found))

        def record(kept: str) -> None:
            body = {
                "set": one.name,
                "sequence": manifest.sequence,
                "made_at": manifest.created_at,
                "newest_sequence": backup_set.next_sequence(sets) - 1,
                "replaced": {"seq": present.head[0], "hash": present.head[1]} if present.head else None,
                "kept": kept,
                "kagedb": __version__,
            }
            # Past the check of the schema: an older one is migrated by whoever opens the store next.
            bind(storage.Storage(engine, settings))
            try:
                AuditEvent.append("store.restored", actor=actor, body=body)
            finally:
                bind(None)

        with scratch(one.directory.parent) as place, verifying.data_file(one.directory, manifest, place) as data:
            kept = archiver.put(data, manifest.form, check, record)
    finally:
        engine.close()
    return Restored(engine.place, one.name, manifest.sequence, manifest.schema, manifest.rows, present.head, kept)


def _refuse_misfit(engine: Engine, one: BackupSet, manifest: Manifest) -> None:
    if manifest.engine != engine.name:
        raise SettingsError(
            f"the set {one.name} is of a store on {manifest.engine}, and {engine.place} is on {engine.name}",
            "name a store on that engine with --to",
        )
    if manifest.schema not in {script.name for script in schema.scripts()}:
        raise SchemaTooNew(
            f"the set {one.name} has the schema {manifest.schema}, made by kagedb {manifest.kagedb}; this is"
            f" {__version__}",
            f"install kagedb {manifest.kagedb} or newer",
        )
    _refuse_wrong(one, verifying.wrong_sums(one.directory, manifest))


def _refuse_wrong(one: BackupSet, wrong: list[str]) -> None:
    if wrong:
        raise StorageCorrupt(
            f"the set {one.name} is damaged, so that nothing was changed: {'; '.join(wrong)}",
            "restore another: kaged backups",
        )
