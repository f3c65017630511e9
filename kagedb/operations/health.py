"""How a store is: what `kaged status` tells, and what a migration of it would do. Changes nothing.

Works on a store whose schema is older than this program's, and beside a daemon that has it open.
"""

from __future__ import annotations

import ast
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from .. import schema
from ..engines.archive import COPY
from ..engines.engine import HISTORY_TABLE, Engine, Holder
from ..errors import SettingsError, StorageForbidden, StorageFull
from ..storage import Storage, newest_ms
from . import backup_set

WRITER_LOOKS, WRITER_LOOK_SECONDS = 25, 0.002
"""How often, and how far apart, it is looked whether somebody writes: for as long as a few commits take on a card."""

CLOCK_SLACK_MS = 60_000
"""How far rows may be before the clock: a clock that is set back by less is one that is being corrected."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a store is, what is in it, who has it. `bytes_by_part` and `rows` go by name."""

    place: str
    origin: str
    """What named the place: an option, a variable, the config file or a default."""
    mode: str
    engine: str
    library: str
    schema: str
    """The newest script that was applied."""
    pending: list[str]
    bytes_by_part: dict[str, int]
    free_bytes: int
    """Of those bytes, what holds nothing and `kaged compact` would give back, about."""
    writer_busy_percent: int
    """How often somebody had the turn to write, of the moments at which it was looked: 100 is a store at its limit."""
    rows: dict[str, int]
    owner: Holder | None
    """The daemon that has the store, if one does."""
    newest_at: int | None
    """When the newest row was made, in Unix milliseconds; None where there is none."""
    backup_at: int | None
    """When the newest verified backup set of the store was made; None where there is none."""
    warnings: list[str]
    """Each says what is wrong and what mends it."""


@dataclass(frozen=True, slots=True)
class PendingScript:
    """A migration script that is not applied yet; `summary` is the first line of its docstring."""

    name: str
    summary: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `kaged migrate` would do."""

    place: str
    schema: str
    pending: list[PendingScript]
    copy_directory: str
    """Where the copy of the store would be made first."""
    copy_bytes: int
    """How large the store is, and with it about the copy."""
    free_bytes: int
    """What is free where the copy would be made."""
    obstacles: list[str]
    """What would keep the migration from being done now."""


def status(storage: Storage) -> Status:
    """How the store is; best inside a snapshot, so that the figures belong together."""
    engine, settings = storage.engine, storage.settings
    standing = schema.look(engine)
    figures = engine.figures()
    tables = [table for table in engine.tables() if table != HISTORY_TABLE]
    newest = newest_ms(engine, tables) or None
    origin = settings.origin("storage.url")
    return Status(
        place=engine.place,
        origin=settings.origin("home") if origin == "default" else origin,
        mode=settings.mode,
        engine=engine.name,
        library=figures.library,
        schema=standing.version,
        pending=[script.name for script in standing.pending],
        bytes_by_part=figures.bytes_by_part,
        free_bytes=figures.free_bytes,
        writer_busy_percent=_writer_busy_percent(engine),
        rows={table: _rows(storage, table) for table in tables},
        owner=engine.owner(),
        newest_at=newest,
        backup_at=_backup_at(storage),
        warnings=[*figures.warnings, *_mark_warnings(engine.missing_marks()), *_clock_warnings(newest)],
    )


def plan(storage: Storage) -> Plan:
    """What a migration of the store would do."""
    engine = storage.engine
    standing = schema.look(engine)
    directory = Path(storage.settings.backup_directory)
    obstacles = []
    owner = engine.owner()
    if owner is not None:
        obstacles.append(f"the store is open in {owner}: stop the daemon first")
    try:
        engine.require_space()
    except StorageFull as error:
        obstacles.append(f"{error.message}: {error.hint}")
    try:
        engine.archiver().require_ready(COPY)
    except SettingsError as error:
        obstacles.append(f"{error.message}: {error.hint}")
    there = _nearest(directory)
    size, free = engine.size_bytes(), shutil.disk_usage(there).free
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        obstacles.append(f"no copy can be made in {directory}: name another place with backup.directory")
    elif free < size:
        obstacles.append(f"{directory} has {free:,} bytes free for a copy of {size:,}: free some space first")
    return Plan(
        place=engine.place,
        schema=standing.version,
        pending=[PendingScript(script.name, _summary(script)) for script in standing.pending],
        copy_directory=os.fspath(directory),
        copy_bytes=size,
        free_bytes=free,
        obstacles=obstacles if standing.pending else [],
    )


def _writer_busy_percent(engine: Engine) -> int:
    busy = 0
    for _ in range(WRITER_LOOKS):
        busy += engine.writer() is not None
        time.sleep(WRITER_LOOK_SECONDS)
    return round(100 * busy / WRITER_LOOKS)


def _backup_at(storage: Storage) -> int | None:
    directory = Path(storage.settings.backup_directory)
    try:
        found = backup_set.newest_verified(directory, storage.engine.name, backup_set.store_id(storage.engine))
    except StorageForbidden:
        # Somebody who may look at the store need not be let into its backups.
        return None
    return found.manifest.created_at if found else None


def _rows(storage: Storage, table: str) -> int:
    name = table.replace('"', '""')
    return int(storage.database.execute_sql(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0])  # noqa: S608


def _mark_warnings(missing: list[str]) -> list[str]:
    if not missing:
        return []
    return [
        f"the file has not the {', '.join(missing)} that a new store would have (reloaded from a dump?): to give"
        " them back, stop the daemon, and run: kaged compact"
    ]


def _clock_warnings(newest: int | None) -> list[str]:
    if newest is None or newest <= time.time_ns() // 1_000_000 + CLOCK_SLACK_MS:
        return []
    return [
        "the clock of this host is before the newest row of the store: set it, nothing is deleted by age until then"
    ]


def _nearest(directory: Path) -> Path:
    """The directory itself, or the lowest above it that is there and can be reached."""
    while not os.path.isdir(directory):
        directory = directory.parent
    return directory


def _summary(script: schema.Script) -> str:
    described = ast.get_docstring(ast.parse(script.path.read_text(encoding="utf-8"))) or ""
    return described.partition("\n")[0]
