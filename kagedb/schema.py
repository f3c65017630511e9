"""Bring a store to this version's schema: lock, plan, copy, apply, check.

The scripts are in migrations/ (installed as kagedb.migrations), with the catalogue that they are known to give on each
engine in migrations/catalogue/. All pending scripts run in one transaction, which is kept only if the catalogue is the
known one. How a script is run is in migrating.py, what it may do in engines/ddl.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import peewee

from . import __version__
from .engines.engine import HISTORY_TABLE, Engine
from .errors import (
    KagedError,
    MigrationFailed,
    SchemaDrift,
    SchemaTooNew,
    SchemaTooOld,
    StorageError,
    TransactionError,
)
from .identity import new_ulid
from .models import AuditEvent

DIFFERENCES_SHOWN = 6
"""Lines of a catalogue difference in an error: enough to see what kind of thing happened."""


DIFFERENCE_CHARACTERS = 500
"""Of one of them: most conditions of triggers are shorter, and what a view says is longer than anybody reads."""


class Script(NamedTuple):
    """A migration script: its name (`0001_initial`), file, and the SHA-256 of its text in hex."""

    name: str
    path: Path
    checksum: str


class Applied(NamedTuple):
    """A script as the store's history has it; `version` is the kagedb that applied it."""

    name: str
    checksum: str
    applied_at: int
    version: str


class Standing(NamedTuple):
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


_kept: list[Script] | None = None


def scripts() -> list[Script]:
    """This program's scripts in their order."""
    if _kept is not None:
        return _kept
    return [
        Script(path.stem, path, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory().glob("[0-9]*.py"))
    ]


def keep_scripts() -> None:
    """Read the list now, for a process that is about to become a user who may not be able to."""
    global _kept
    _kept = scripts()


def look(engine: Engine) -> Standing:
    """How the store stands: one query."""
    applied = _history(engine)
    done = {row.name for row in applied}
    known = {script.name: script for script in scripts()}
    return Standing(
        applied,
        [script for script in known.values() if script.name not in done],
        [row for row in applied if row.name not in known],
        [row.name for row in applied if row.name in known and known[row.name].checksum != row.checksum],
    )


def _history(engine: Engine) -> list[Applied]:
    query = f"SELECT name, checksum, applied_at, version FROM {HISTORY_TABLE} ORDER BY name"  # noqa: S608
    try:
        rows = engine.database.execute_sql(query).fetchall()
    except (peewee.DatabaseError, StorageError):
        # Asked only now: the rule is a store that is there, and that costs one query.
        if engine.exists():
            raise
        return []
    return [Applied(*row) for row in rows]


def refuse_misfit(engine: Engine, standing: Standing) -> None:
    """Raises SchemaTooNew or SchemaDrift where this program must not touch the store."""
    if standing.unknown:
        newest = standing.unknown[-1]
        raise SchemaTooNew(
            f"the store {engine.place} has the schema {newest.name}, made by kagedb {newest.version};"
            f" this is {__version__}",
            f"install kagedb {newest.version} or newer",
        )
    if standing.edited:
        raise SchemaDrift(
            f"the migration {standing.edited[0]} was applied to {engine.place} with another text than it has now",
            "install the kagedb that made the store; a script is never edited after a release",
        )
    if standing.pending and standing.pending[0].name < standing.version:
        raise SchemaDrift(
            f"the store {engine.place} has the migration {standing.version}, but not {standing.pending[0].name}",
            "install the kagedb that made the store; a release adds scripts only after the last one",
        )


def too_old(engine: Engine, standing: Standing) -> SchemaTooOld:
    pending = ", ".join(script.name for script in standing.pending)
    return SchemaTooOld(
        f"the store {engine.place} has the schema {standing.version}; pending: {pending}",
        "start the daemon, or run: kaged migrate",
    )


def ensure(
    engine: Engine, *, migrate: bool, actor: str, backup: Callable[[Engine, str], AbstractContextManager[Path]]
) -> tuple[Standing, Path | None]:
    """Share the store with its schema current: as it is, or migrated with `migrate`.

    `backup` makes a verified copy before the script of that name and keeps it if its block is left well. Gives the
    standing found at first, and the directory of the copy made before a migration. Raises SchemaTooOld
    without `migrate`, StorageInUse where the store is open elsewhere and must be migrated, SchemaTooNew, SchemaDrift,
    MigrationFailed, StorageFull. On an error the store is as it was.
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
        # Nobody can change the schema between this look and here: that needs what this process shares.
        engine.exclude()
        try:
            if not standing.applied:
                _apply(engine, standing, actor)
                return standing, None
            engine.require_space()
            with backup(engine, standing.pending[0].name) as copy:
                _apply(engine, standing, actor)
            return standing, copy
        finally:
            engine.readmit()


def _apply(engine: Engine, standing: Standing, actor: str) -> None:
    from .migrating import ScriptRunner

    known = scripts()
    runner = ScriptRunner(engine.database, known, {row.name for row in standing.applied}, __version__)

    def work() -> None:
        runner.up()
        differences = drift(engine)
        if differences:
            raise SchemaDrift(
                f"the migrations would leave {engine.place} with another schema than they should:"
                f" {'; '.join(differences[:DIFFERENCES_SHOWN])}",
                "undo by hand what was changed by hand, or restore a backup, and migrate again",
            )
        body: dict[str, Any] = {"from": standing.version, "to": known[-1].name, "kagedb": __version__}
        if not standing.applied:
            # Two stores never have the same chain.
            body["store"] = new_ulid()
        AuditEvent.append("store.migrated" if standing.applied else "store.created", actor=actor, body=body)

    try:
        engine.change_schema(work)
    except Exception as error:
        # What is the store's trouble (full, busy, away) stays what it is; all else is the script's.
        if isinstance(error, StorageError) and not isinstance(error, MigrationFailed | TransactionError):
            raise
        why = error.message if isinstance(error, KagedError) else f"{type(error).__name__}: {error}"
        raise MigrationFailed(
            f"the migration of {engine.place} failed and was undone: {why}", "report it; the store is as it was"
        ) from error


def known_catalogue(engine: Engine, name: str) -> list[str]:
    """The lines that the scripts up to `name` are known to give on this engine."""
    return catalogue_path(engine.name, name).read_text().splitlines()


def catalogue_path(engine_name: str, name: str) -> Path:
    return directory() / "catalogue" / f"{name}.{engine_name}.txt"


def drift(engine: Engine, name: str = "") -> list[str]:
    """How the catalogue differs from the known one of the script `name` (the newest): empty where it does not."""
    found = engine.catalogue()
    known = known_catalogue(engine, name or scripts()[-1].name)
    missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    told = [f"missing: {line}" for line in missing] + [f"unknown: {line}" for line in extra]
    return [line if len(line) <= DIFFERENCE_CHARACTERS else f"{line[:DIFFERENCE_CHARACTERS]} ..." for line in told]


def fingerprint(lines: list[str]) -> str:
    """One SHA-256, in hex, for a catalogue."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
