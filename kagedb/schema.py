"""Bring a store to this version's schema: lock, plan, copy, apply, check.

The scripts are in migrations/ (installed as kagedb.migrations), with the catalogue that they are known to give on each
engine in migrations/catalogue/. All pending scripts run in one transaction, which is kept only if the catalogue is the
known one.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import peewee

from .engines.engine import HISTORY_TABLE, Engine
from .errors import KagedError, MigrationFailed, SchemaDrift, SchemaTooNew, SchemaTooOld
from .identity import new_ulid
from .models import AuditEvent

DIFFERENCES_SHOWN = 6
"""Lines of a catalogue difference in an error: enough to see what kind of thing happened."""


@dataclass(frozen=True, slots=True)
class Script:
    """A migration script: its name (`0001_initial`), file, and the SHA-256 of its text in hex."""

    name: str
    path: Path
    checksum: str


@dataclass(frozen=True, slots=True)
class Applied:
    """A script as the store's history has it; `version` is the kagedb that applied it."""

    name: str
    checksum: str
    applied_at: int
    version: str


@dataclass(frozen=True, slots=True)
class Standing:
    """How a store stands to this program's scripts."""

    applied: list[Applied]
    pending: list[Script]
    unknown: list[Applied]
    """Applied, but not among this program's scripts: a newer kagedb did that."""
    edited: list[str]
    """Applied with another text than this program's script of that name has."""

    @property
    def version(self) -> str:
        """The newest script in the store; "" where there is none."""
        return self.applied[-1].name if self.applied else ""


def directory() -> Path:
    """Where the scripts are."""
    found = importlib.util.find_spec("kagedb.migrations")
    assert found is not None and found.origin is not None, "kagedb is installed without its migrations"
    return Path(found.origin).parent


@lru_cache(maxsize=8)
def scripts(place: Path | None = None) -> tuple[Script, ...]:
    """This program's scripts in their order."""
    return tuple(
        Script(path.stem, path, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((place or directory()).glob("[0-9]*.py"))
    )


def look(engine: Engine) -> Standing:
    """How the store stands: one query."""
    applied = _history(engine)
    known = {script.name: script for script in scripts(_place)}
    done = {row.name for row in applied}
    return Standing(
        applied,
        [script for script in known.values() if script.name not in done],
        [row for row in applied if row.name not in known],
        [row.name for row in applied if row.name in known and known[row.name].checksum != row.checksum],
    )


_place: Path | None = None
"""Another directory of scripts, for tests of migrations that do not exist yet."""


def use_scripts(place: Path | None) -> None:
    """Take the scripts from `place` instead."""
    global _place
    _place = place


def _history(engine: Engine) -> list[Applied]:
    if not engine.exists():
        return []
    try:
        cursor = engine.database.execute_sql(
            f"SELECT name, checksum, applied_at, version FROM {HISTORY_TABLE} ORDER BY name"  # noqa: S608
        )
    except peewee.DatabaseError:
        if HISTORY_TABLE in engine.tables():
            raise
        return []
    return [Applied(*row) for row in cursor.fetchall()]


def refuse_misfit(engine: Engine, standing: Standing) -> None:
    """Raises SchemaTooNew or SchemaDrift where this program must not touch the store."""
    if standing.unknown:
        newest = standing.unknown[-1]
        raise SchemaTooNew(
            f"the store {engine.place} has the schema {newest.name}, made by kagedb {newest.version}; this is {_version()}",
            f"install kagedb {newest.version} or newer",
        )
    if standing.edited:
        raise SchemaDrift(
            f"the migration {standing.edited[0]} was applied to {engine.place} with another text than it has now",
            "install the kagedb that made the store; a script is never edited after a release",
        )


def too_old(engine: Engine, standing: Standing) -> SchemaTooOld:
    return SchemaTooOld(
        f"the store {engine.place} has the schema {standing.version}; {len(standing.pending)} migrations are pending",
        "start the daemon, or run: kaged migrate",
    )


def ensure(engine: Engine, *, migrate: bool, copy: Callable[[Standing], Path], actor: str) -> tuple[Standing, Path | None]:
    """Share the store with its schema current: as it is, or migrated with `migrate`.

    `copy` makes the copy of a store that is about to be migrated. Gives the standing found at first and the copy.
    Raises SchemaTooOld without `migrate`, StorageInUse where the store is open elsewhere and must be migrated,
    SchemaTooNew, SchemaDrift, MigrationFailed. On an error the store is as it was.
    """
    engine.share()
    standing = look(engine)
    refuse_misfit(engine, standing)
    if not standing.pending:
        return standing, None
    if not migrate:
        raise too_old(engine, standing)
    # Somebody else may be at it. Wait with nothing held, then look again.
    engine.unshare()
    with engine.starters_line():
        engine.share()
        standing = look(engine)
        refuse_misfit(engine, standing)
        if not standing.pending:
            return standing, None
        engine.exclude()
        try:
            kept = None
            if standing.applied:
                engine.require_space()
                kept = copy(standing)
            _apply(engine, standing, actor, kept)
        finally:
            engine.readmit()
    return standing, kept


def _apply(engine: Engine, standing: Standing, actor: str, kept: Path | None) -> None:
    from .migrating import ScriptRunner

    runner = ScriptRunner(engine.database, list(scripts(_place)), {row.name for row in standing.applied}, _version())

    def work() -> None:
        runner.up()
        differences = drift(engine)
        if differences:
            shown = "; ".join(differences[:DIFFERENCES_SHOWN])
            raise SchemaDrift(
                f"the migrations would leave {engine.place} with another schema than they should: {shown}",
                "undo by hand what was changed by hand, or restore a backup, and migrate again",
            )
        body: dict[str, Any] = {"from": standing.version, "to": scripts(_place)[-1].name, "kagedb": _version()}
        if not standing.applied:
            # Two stores never have the same chain.
            body["store"] = new_ulid()
        AuditEvent.record("store.migrated" if standing.applied else "store.created", actor=actor, body=body)

    try:
        engine.change_schema(work)
    except KagedError:
        raise
    except Exception as error:
        left = f"; the copy made before is {kept}" if kept else ""
        raise MigrationFailed(
            f"the migration of {engine.place} failed and was undone: {error}", f"report it; the store is as it was{left}"
        ) from error


def known_catalogue(engine: Engine, name: str) -> list[str]:
    """The lines that the scripts up to `name` are known to give on this engine."""
    path = (_place or directory()) / "catalogue" / f"{name}.{engine.name}.txt"
    return path.read_text().splitlines()


def drift(engine: Engine, name: str = "") -> list[str]:
    """How the catalogue differs from the known one of the script `name` (the newest): empty where it does not."""
    found = engine.catalogue()
    known = known_catalogue(engine, name or scripts(_place)[-1].name)
    missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    return [f"missing: {line}" for line in missing] + [f"unknown: {line}" for line in extra]


def fingerprint(lines: list[str]) -> str:
    """One SHA-256, in hex, for a catalogue."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _version() -> str:
    from . import __version__

    return __version__


