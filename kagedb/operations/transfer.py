"""`kaged copy`: a whole store into an empty place on either engine, out of one snapshot, compared table by table.

The target is whole or as it was. Plain SQL and the tables' own columns, never models: those are bound to the source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__, schema
from ..engines import open_engine
from ..engines.archive import BLOB, TEXT, Contents, Table
from ..engines.engine import HISTORY_TABLE, Engine
from ..engines.transfer import Receiver
from ..errors import AlreadyExists, SchemaDrift, SettingsError, StateError, StorageCorrupt
from ..migrating import ScriptRunner
from ..models import AuditEvent
from ..settings import Settings
from ..storage import Storage
from . import audit
from .digests import Examined, Facts, counts, digests

BATCH_ROWS = 500
"""Rows loaded at a time: more do not make either engine faster."""

BATCH_BYTES = 1 << 19
"""Of text and bytes in them, about: a row of terminal output has 16 KB, a blob may have a megabyte."""

PROGRESS_ROWS = 500

SPARE_BYTES = 16 * 1024 * 1024
"""Free space wanted beyond the source's size: the journal of the file system, and the next hours' work."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, rows done, and rows in all."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What was moved, or with `dry_run` would be. `since` is what the source got after the snapshot: table to rows."""

    source: str
    target: str
    rows: dict[str, int]
    bytes: int
    """Size of the source; the target's differs."""
    head: tuple[int, str] | None
    """The newest audit event that was copied: number and hash."""
    dry_run: bool = False
    since: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def copy(
    storage: Storage, to: Settings, *, actor: str, dry_run: bool = False, progress: Progress | None = None
) -> Copied:
    """Copy the open store to the place that `to` names, which must be missing or hold a store without rows.

    The event `store.copied` is recorded before the snapshot, so that it is in both. Raises AlreadyExists, StorageInUse,
    SchemaTooNew, StorageFull, StorageCorrupt where the source is damaged; StateError for tables of plugins' own.
    """
    source = storage.engine
    target = open_engine(to, read_only=dry_run)
    if target.place == source.place:
        raise SettingsError(f"{source.place} is the store itself", "name another place with --to")
    _refuse_plugin_tables(storage)
    try:
        if dry_run:
            if target.exists():
                target.open(create=False)
                _refuse_unfit(target)
            with source.reading() as contents:
                found = counts(contents)
            return Copied(source.place, target.place, _rows(found.facts), source.size_bytes(), found.head, dry_run=True)
        receiver = target.receiver()
        receiver.hold()
        if target.exists():
            _refuse_unfit(target)
        receiver.require_room(source.size_bytes() + SPARE_BYTES)
        AuditEvent.append(
            "store.copied", actor=actor, body={"from": source.place, "to": target.place, "kagedb": __version__}
        )
        with source.reading() as contents:
            copied = _Copying(contents, target, progress)
            receiver.receive(copied.make, copied.fill, copied.check)
    finally:
        target.close()
    with source.reading() as contents:
        now = _rows(counts(contents).facts)
    rows = _rows(copied.examined.facts)
    since = {table: now[table] - rows[table] for table in rows if now[table] != rows[table]}
    notes = _notes(source, target)
    return Copied(source.place, target.place, rows, source.size_bytes(), copied.examined.head, False, since, notes)


class _Copying:
    """The parts of one copy, which the receiver calls in the order in which they are here."""

    def __init__(self, source: Contents, target: Engine, progress: Progress | None) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._whole = sum(facts.rows for facts in counts(source).facts.values()) if progress else 0
        self.examined = Examined({})

    def make(self) -> None:
        """This version's tables, by its scripts; who made the store, and when, comes with the rows."""
        ScriptRunner(self._target.database, schema.scripts(), set(), __version__).up()

    def fill(self, receiver: Receiver) -> None:
        mine = {table.name: table for table in receiver.contents().tables()}
        theirs = {table.name: table.columns for table in self._source.tables()}
        if theirs != {name: table.columns for name, table in mine.items()}:
            raise SchemaDrift(
                f"the store has other tables or columns than this version's: {sorted(theirs.keys() ^ mine.keys())}",
                "see what differs: kaged check",
            )
        self.examined = digests(_Passing(self._source, receiver, mine, self._counting("copying")))
        if self.examined.wrong:
            raise StorageCorrupt(
                f"the store is damaged, so that it is not copied: {'; '.join(self.examined.wrong)}",
                "see how it is: kaged check",
            )

    def check(self, contents: Contents) -> None:
        target = self._target
        if differences := schema.drift(target)[: schema.DIFFERENCES_SHOWN]:
            raise SchemaDrift(
                f"the schema of {target.place} is not as it should be: {'; '.join(differences)}",
                "name an empty place that nobody has changed by hand",
            )
        found = digests(_Counted(contents, self._counting("verifying"))).facts
        wrong = [name for name, facts in self.examined.facts.items() if _sum(found.get(name)) != _sum(facts)]
        if wrong:
            raise StorageCorrupt(
                f"what has arrived in {target.place} is not what was sent: {', '.join(wrong)}; it is as it was",
                "try again; if it happens again, report it",
            )
        verdict = audit.verify_in(contents)
        if verdict.result == audit.BROKEN:
            raise StorageCorrupt(
                f"the audit log is broken at event {verdict.seq}, so that it is not copied: {verdict.wrong}",
                "keep the store as it is, and compare it with a backup: kaged audit verify",
            )

    def _counting(self, what: str) -> Callable[[int], None]:
        done = 0

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            if self._progress is not None:
                self._progress(what, done, self._whole)

        return count


class _Counted(Contents):
    """Contents whose rows are counted as they are read."""

    def __init__(self, contents: Contents, count: Callable[[int], None]) -> None:
        self._contents = contents
        self._count = count

    def tables(self) -> list[Table]:
        return self._contents.tables()

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        number = 0
        for row in self._contents.rows(table):
            yield row
            number += 1
            if number == PROGRESS_ROWS:
                self._count(number)
                number = 0
        self._count(number)

    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        return self._contents.raw(sql, params)

    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        return self._contents.stream(sql, params)

    def damage(self) -> list[str]:
        return self._contents.damage()


class _Passing(_Counted):
    """Contents whose rows are loaded into the target on their way to whoever reads them: one pass over the source."""

    def __init__(
        self, contents: Contents, receiver: Receiver, tables: dict[str, Table], count: Callable[[int], None]
    ) -> None:
        super().__init__(contents, count)
        self._receiver = receiver
        self._tables = tables

    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        # The target's own: it knows which of its columns are booleans.
        target = self._tables[table.name]
        large = [place for place, kind in enumerate(target.kinds) if kind in (TEXT, BLOB)]
        batch: list[tuple[Any, ...]] = []
        size = 0
        for row in super().rows(table):
            batch.append(row)
            for place in large:
                size += len(row[place] or ())
            if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
                self._receiver.load(target, batch)
                yield from batch
                batch, size = [], 0
        if batch:
            self._receiver.load(target, batch)
            yield from batch


def _refuse_unfit(target: Engine) -> None:
    """The place may have a store that nothing was written to, of this version's schema."""
    standing = schema.look(target)
    schema.refuse_misfit(target, standing)
    if standing.pending:
        raise schema.too_old(target, standing)
    with target.reading() as contents:
        facts = counts(contents).facts
        events = contents.raw("SELECT kind FROM audit_event ORDER BY seq LIMIT 2").fetchall()
        used = {name for name, one in facts.items() if one.rows} - {HISTORY_TABLE, "counter", "audit_event"}
        if used or [tuple(row) for row in events] not in ([], [("store.created",)]):
            raise AlreadyExists(
                f"{target.place} has a store that was written to: {', '.join(sorted(used)) or 'audit_event'}",
                "name a place where nothing is, or an empty store",
            )


def _refuse_plugin_tables(storage: Storage) -> None:
    """Their shape is the plugins' own, in the words of one engine."""
    names = storage.database.execute_sql("SELECT DISTINCT name FROM plugin ORDER BY name").fetchall()
    for (name,) in names:
        tables = storage.database.plugins.tables(name)
        storage.database.statement_done()
        if tables:
            raise StateError(
                f"the plugin {name!r} has tables of its own, which are not carried over: {', '.join(tables)}",
                "let the plugin export them, uninstall it, copy, and install it again",
            )


def _notes(source: Engine, target: Engine) -> list[str]:
    mine, theirs = source.audit_key_path, target.audit_key_path
    if mine != theirs and Path(mine).exists():
        return [
            f"the key of the audit seals is not in the store; move it when the daemon has moved: mv {mine} {theirs}"
        ]
    return []


def _rows(facts: dict[str, Facts]) -> dict[str, int]:
    return {name: one.rows for name, one in facts.items()}


def _sum(facts: Facts | None) -> tuple[int, str] | None:
    return (facts.rows, facts.digest) if facts is not None else None


def config_line(to: Settings) -> str:
    """What the config file of the daemon must say for it to use the new store; without secrets."""
    return f"[storage]\nurl = {json.dumps(to.url.redacted, ensure_ascii=False)}"
