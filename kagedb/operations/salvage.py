"""`kaged salvage`: what can be read of a damaged store, row by row, into a fresh one, and what was lost by table.

The damaged store is only read; the target is whole or as it was. How rows are found in damaged files is for the engine
(engines/salvage.py), what is put in the place of lost rows that others refer to in stand_ins.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import __version__, schema, storage
from ..engines import open_engine
from ..engines.archive import Contents, Table
from ..engines.engine import HISTORY_TABLE, Engine
from ..engines.salvage import Hole, Shape, Wreck
from ..engines.transfer import Receiver
from ..errors import SchemaDrift, SchemaTooNew, SettingsError, StorageCorrupt, StorageError
from ..identity import now_ms
from ..migrating import ScriptRunner
from ..models import AuditEvent, RunAttachment
from ..models.base import bind
from ..models.transcript import SEQUENCE_BITS
from ..settings import Settings
from . import audit_verify, transfer
from .digests import counts
from .salvage_rows import Reading, Tally
from .stand_ins import StandIns

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Salvaged:
    """What was done. `lost` is the sum over the tables, None where it cannot be told for one of them."""

    source: str
    target: str
    tables: dict[str, Tally]
    rows: int
    lost: int | None
    audit: str
    """What `kaged audit verify` says of the target: "holds", or where it is broken first, and why."""
    notes: list[str]


def salvage(settings: Settings, to: Settings, *, actor: str, progress: Progress | None = None) -> Salvaged:
    """Read what can be read of the store that `settings` name into the place that `to` names.

    That place must be missing or hold a store without rows. The event `store.salvaged` is recorded there. Raises
    StorageInUse where anybody has either open, StorageCorrupt where nothing can be read, SchemaTooNew, AlreadyExists,
    StorageFull; StateError for a store that is no file of ours. On an error the place is as it was.
    """
    if storage.current() is not None:
        raise StorageError("this process has a store open", "close it first: storage.close()")
    source, target = open_engine(settings, read_only=True), open_engine(to)
    if source.place == target.place:
        raise SettingsError(f"{source.place} is the damaged store itself", "name another place with --to")
    try:
        with source.wreck(_make) as wreck:
            receiver = target.receiver()
            receiver.hold()
            if target.exists():
                transfer.refuse_unfit(target)
            receiver.require_room(source.size_bytes() + transfer.SPARE_BYTES)
            work = _Salvaging(wreck, target, actor, progress)
            receiver.receive(lambda: _make(target), work.fill, work.check)
    finally:
        target.close()
    return work.salvaged


def _make(engine: Engine) -> None:
    """This version's tables, by its scripts."""
    ScriptRunner(engine.database, schema.scripts(), set(), __version__).up()


class _Salvaging:
    """The parts of one salvage, which the receiver calls in the order in which they are here."""

    def __init__(self, wreck: Wreck, target: Engine, actor: str, progress: Progress | None) -> None:
        self._wreck = wreck
        self._target = target
        self._actor = actor
        self._progress = progress
        self._notes = list(wreck.survey.notes)
        self._tallies: dict[str, Tally] = {}
        self._own_rows: dict[str, int] = {}
        self.salvaged = Salvaged(wreck.place, target.place, self._tallies, 0, 0, "", self._notes)

    def fill(self, receiver: Receiver) -> None:
        tables = {table.name: table for table in receiver.contents().tables()}
        shapes = self._wreck.survey.shapes
        indexes: list[str] = []
        self._history(receiver, tables)
        for number, shape in enumerate(sorted(shapes, key=lambda shape: shape.name)):
            if self._progress is not None:
                self._progress("salvaging", number, len(shapes))
            if shape.name == HISTORY_TABLE:
                continue
            if shape.name in tables:
                self._table(receiver, shape, tables[shape.name])
            elif shape.engine == self._target.name:
                self._target.database.raw(shape.statements[0])
                indexes += shape.statements[1:]
                self._plugin_table(receiver, shape)
            else:
                self._notes.append(f"the table {shape.name} of a plugin is left behind: its words are {shape.engine}'s")
        if not any(tally.rows for tally in self._tallies.values()):
            raise StorageCorrupt(
                f"nothing of a kaged store can be read in {self._wreck.place}",
                "check the path in the storage URL; or restore a backup: kaged restore --latest",
            )
        self._join(receiver, shapes)
        for statement in indexes:
            self._target.database.raw(statement)
        self._counters(receiver, tables)
        self._sum()
        if any(one.before is None for one in self._tallies["audit_event"].ranges):
            self._notes.append("of the audit log the newest events may be lost, and their numbers are given again")
        self._record()
        if self._progress is not None:
            self._progress("salvaging", len(shapes), len(shapes))

    def check(self, contents: Contents) -> None:
        if differences := schema.drift(self._target)[: schema.DIFFERENCES_SHOWN]:
            raise SchemaDrift(
                f"the schema of {self._target.place} is not as it should be: {'; '.join(differences)}",
                "name an empty place that nobody has changed by hand",
            )
        found = counts(contents).facts
        wrong = [
            name
            for name, tally in self._tallies.items()
            if found[name].rows != tally.rows + tally.stand_ins + self._own_rows.get(name, 0)
        ]
        if wrong:
            raise StorageCorrupt(
                f"what has arrived in {self._target.place} is not what was read: {', '.join(wrong)}; it is as it was",
                "try again; if it happens again, report it",
            )
        verdict = audit_verify.verify_in(contents)
        self.salvaged.audit = verdict.result
        if verdict.result == audit_verify.BROKEN:
            self.salvaged.audit += f" at event {verdict.seq}: {verdict.wrong}"
        self._wreck.require_unchanged()

    # Rows.

    def _history(self, receiver: Receiver, tables: dict[str, Table]) -> None:
        """What the old store says of who made it, and when, as far as it is believable; the rest is this one's own."""
        table = tables[HISTORY_TABLE]
        scripts = {script.name: script for script in schema.scripts()}
        tally = self._tallies[HISTORY_TABLE] = Tally()
        kept: dict[str, tuple[Any, ...]] = {}
        for shape in self._wreck.survey.shapes:
            if shape.name != HISTORY_TABLE:
                continue
            for item in self._wreck.rows(shape):
                if isinstance(item, Hole):
                    tally.lost = None
                    continue
                row = dict(zip(shape.columns, item.values, strict=True))
                kept[row["name"]] = tuple(row[column] for column in table.columns)
        unknown = kept.keys() - scripts.keys()
        if unknown and kept.keys() > scripts.keys():
            newest = dict(zip(table.columns, kept[max(unknown)], strict=True))
            raise SchemaTooNew(
                f"{self._wreck.place} has the schema {newest['name']}, made by kagedb {newest['version']}; this is"
                f" {__version__}",
                f"install kagedb {newest['version']} or newer",
            )
        for name in unknown:
            # Where one that should be there is not, this is that one, damaged.
            del kept[name]
            tally.lost = None
        tally.rows = len(kept)
        for name, script in scripts.items():
            own = {"name": name, "checksum": script.checksum, "applied_at": now_ms(), "version": __version__}
            if name not in kept:
                tally.stand_ins += 1
            row = dict(zip(table.columns, kept.get(name, ()), strict=False)) or own
            receiver.load(table, [tuple((row | {"checksum": script.checksum})[column] for column in table.columns)])

    def _table(self, receiver: Receiver, shape: Shape, table: Table) -> None:
        reading = Reading(self._wreck, shape, table)
        try:
            receiver.load(table, reading.rows())
            self._tallies[shape.name] = reading.tally
            reading.settle(receiver.contents())
        finally:
            reading.close()

    def _plugin_table(self, receiver: Receiver, shape: Shape) -> None:
        """Row by row: what such a table checks is known to its engine alone."""
        table = Table(shape.name, shape.columns, shape.kinds, shape.key)
        reading = Reading(self._wreck, shape, table)
        try:
            for row in reading.rows():
                try:
                    with receiver.errors():
                        receiver.load(table, [row])
                except StorageError as error:
                    if type(error) is not StorageError:
                        raise
                    reading.tally.rows -= 1
                    reading.leave_out(row)
            self._tallies[shape.name] = reading.tally
            reading.settle(receiver.contents())
        finally:
            reading.close()

    # What the rows need of each other.

    def _join(self, receiver: Receiver, shapes: list[Shape]) -> None:
        stand_ins = StandIns(receiver.contents(), receiver.load)
        stand_ins.make()
        for name, made in stand_ins.made.items():
            self._tallies[name].stand_ins += made
        removed = stand_ins.removed
        for shape in shapes:
            if shape.engine and shape.name in self._tallies:
                removed |= self._unjoined(receiver.contents(), shape)
        for name, rows in removed.items():
            tally = self._tallies[name]
            tally.rows -= rows
            tally.lost = None if tally.lost is None else tally.lost + rows
        lost_blobs = self._tallies["blob"].lost
        if lost_blobs or lost_blobs is None:
            self._note_missing_blobs(receiver.contents())

    def _unjoined(self, contents: Contents, shape: Shape) -> dict[str, int]:
        """Remove the rows of a plugin's table that refer to lost ones: what could stand in for these nobody knows."""
        removed = 0
        for column, target, key in shape.references:
            key = key or next((one.key[0] for one in self._wreck.survey.shapes if one.name == target), "rowid")
            cursor = contents.raw(
                f'DELETE FROM "{shape.name}" WHERE "{column}" IS NOT NULL AND NOT EXISTS'  # noqa: S608
                f' (SELECT 1 FROM "{target}" p WHERE p."{key}" = "{shape.name}"."{column}")'
            )
            removed += cursor.rowcount
        return {shape.name: removed} if removed else {}

    def _note_missing_blobs(self, contents: Contents) -> None:
        for what, sql in (
            (
                "attachments of runs",
                f'SELECT COUNT(*) FROM "{RunAttachment._meta.table_name}" r WHERE NOT EXISTS'  # noqa: S608
                " (SELECT 1 FROM blob b WHERE b.digest = r.blob)",
            ),
            (
                "checkpoints",
                "SELECT COUNT(*) FROM checkpoint r WHERE NOT EXISTS (SELECT 1 FROM blob b WHERE b.digest = r.root)",
            ),
        ):
            (rows,) = contents.raw(sql).fetchone()
            if rows:
                self._notes.append(f"{rows} {what} have lost what is in them")

    def _counters(self, receiver: Receiver, tables: dict[str, Table]) -> None:
        """Numbers that must not be given twice go on above whatever the rows have."""
        contents, table = receiver.contents(), tables["counter"]
        known = dict(contents.raw("SELECT name, value FROM counter").fetchall())
        (number,) = contents.raw("SELECT MAX(number) FROM transcript").fetchone()
        (key,) = contents.raw("SELECT MAX(key) FROM transcript_chunk").fetchone()
        least = {"owner_epoch": 0, "transcript": max(number or 0, (key or 0) >> SEQUENCE_BITS)}
        for name, value in least.items():
            if name not in known:
                receiver.load(table, [tuple({"name": name, "value": value}[column] for column in table.columns)])
                self._tallies["counter"].stand_ins += 1
            elif known[name] < value:
                contents.raw("UPDATE counter SET value = ? WHERE name = ?", (value, name))

    def _sum(self) -> None:
        lost = [tally.lost for tally in self._tallies.values()]
        self.salvaged.rows = sum(tally.rows for tally in self._tallies.values())
        self.salvaged.lost = None if None in lost else sum(one for one in lost if one is not None)

    def _record(self) -> None:
        tables = {name: tally.lost for name, tally in self._tallies.items() if tally.lost != 0}
        body = {
            "from": self._wreck.place,
            "to": self._target.place,
            "rows": self.salvaged.rows,
            "lost": self.salvaged.lost,
            "lost_by_table": tables,
            "kagedb": __version__,
        }
        bind(storage.Storage(self._target, self._target.settings))
        try:
            AuditEvent.append("store.salvaged", actor=self._actor, body=body)
        finally:
            bind(None)
        self._own_rows = {"audit_event": 1}
