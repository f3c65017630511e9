"""`kaged copy`: a whole store into an empty place on either engine, out of one snapshot, compared table by table.

The target is whole or as it was. Plain SQL and the tables' own columns, never models: those are bound to the source.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__, schema
from ..engines import open_engine
from ..engines.archive import Contents
from ..engines.engine import HISTORY_TABLE, Engine
from ..engines.transfer import Receiver
from ..errors import AlreadyExists, SchemaDrift, SettingsError, StorageCorrupt, StorageError, StorageInUse
from ..migrating import ScriptRunner
from ..models import AuditEvent
from ..settings import Settings
from ..storage import Storage
from . import audit_verify, plugin_carrying
from .digests import Digesting, Examined, Facts, counts, head
from .plugin_carrying import Scripts, kept_scripts, require_granted

SPARE_BYTES = 16 * 1024 * 1024
"""Free space wanted beyond the source's size: the journal of the file system, and the next hours' work."""

MISSING, EMPTY = "missing", "empty"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, rows done, and rows in all."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What was moved, or with `dry_run` would be. `since` is what the source got after the snapshot: table to rows."""

    source: str
    target: str
    place: str
    """What was there: MISSING, or EMPTY for a store without rows."""
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
    SchemaTooNew, StorageFull, StorageForbidden, StorageCorrupt where the source is damaged; StateError for a plugin's
    table that none of its scripts made; StorageBusy where a writer's log grows too far meanwhile.
    """
    source = storage.engine
    target = open_engine(to, read_only=dry_run)
    if target.place == source.place:
        raise SettingsError(f"{source.place} is the store itself", "name another place with --to")
    receiver = target.receiver()
    wanted = source.size_bytes() + SPARE_BYTES
    try:
        with source.reading() as contents:
            scripts = kept_scripts(contents, set(source.tables()))
            found = counts(contents) if dry_run else None
        receiver.require_place()
        require_granted(target, scripts)
        if found is not None:
            place = _look_at(target)
            receiver.require_room(wanted)
            rows = _rows(found.facts)
            return Copied(source.place, target.place, place, rows, source.size_bytes(), found.head, dry_run=True)
        receiver.hold()
        place = EMPTY if target.exists() else MISSING
        if place == EMPTY:
            refuse_unfit(target)
        receiver.require_room(wanted)
        AuditEvent.append(
            "store.copied", actor=actor, body={"from": source.place, "to": target.place, "kagedb": __version__}
        )
        with _Copying(source, target, scripts, progress) as copied:
            receiver.receive(copied.make, copied.fill, copied.check, more=copied.make_more)
    finally:
        target.close()
    with source.reading() as contents:
        now = _rows(counts(contents).facts)
    rows = _rows(copied.examined.facts)
    since = {table: now[table] - rows[table] for table in rows if now.get(table, 0) != rows[table]}
    notes = _notes(source, target)
    return Copied(
        source.place, target.place, place, rows, source.size_bytes(), copied.examined.head, False, since, notes
    )


def _look_at(target: Engine) -> str:
    """What is at the place, without changing it; it must be fit."""
    if not target.exists():
        return MISSING
    target.open(create=False)
    if owner := target.owner():
        raise StorageInUse(f"{target.place} is open: {owner}", "stop that first, or name another place")
    refuse_unfit(target)
    return EMPTY


class _Copying:
    """The parts of one copy, which the receiver calls in the order in which they are here."""

    def __init__(self, source: Engine, target: Engine, scripts: Scripts, progress: Progress | None) -> None:
        self._reading = ExitStack()
        self._source = self._reading.enter_context(source.reading())
        self._source.give_up_beyond(source.settings.backup_wal_limit_mib * 1024 * 1024)
        self._target = target
        self._scripts = scripts
        self._progress = progress
        self._whole = sum(facts.rows for facts in counts(self._source).facts.values()) if progress else 0
        self.examined = Examined({})
        # While the place makes indexes and guards this process has nothing else to do.
        self._beside = ThreadPoolExecutor(1, "kaged copy")
        self._verdict: Future[audit_verify.Verdict] | None = None
        self._stop = False

    def __enter__(self) -> _Copying:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop = True
        self._beside.shutdown()
        # With the error: it may be the source's, in its driver's words.
        self._reading.__exit__(*error)

    def _let_go(self) -> None:
        """Of the source's state: as long as it is held, a writer's log grows or dead rows stay."""
        self._reading.close()

    def make(self) -> None:
        """This version's tables, by its scripts; who made the store, and when, comes with the rows."""
        ScriptRunner(self._target.database, schema.scripts(), set(), __version__).up()

    def make_more(self) -> None:
        """The tables of plugins."""
        plugin_carrying.make(self._target, self._scripts)

    def fill(self, receiver: Receiver) -> None:
        mine = {table.name: table for table in receiver.contents().tables()}
        theirs = {table.name: table.columns for table in self._source.tables()}
        if theirs != {name: table.columns for name, table in mine.items()}:
            differing = [
                name for name in sorted({*theirs, *mine}) if name not in mine or theirs.get(name) != mine[name].columns
            ]
            raise SchemaDrift(
                f"the store has other tables or columns than its scripts make: {', '.join(differing)}",
                "see what differs: kaged check",
            )
        examined, count = self.examined, self._counting("copying")
        for table in self._source.tables():
            passing = Digesting(table, self._source, examined.wrong, count=count)
            if receiver.takes_lines:
                receiver.load_lines(mine[table.name], passing.lines())
            else:
                receiver.load(mine[table.name], passing.rows())
            examined.facts[table.name] = passing.facts()
        examined.head = head(self._source)
        if examined.wrong:
            raise StorageCorrupt(
                f"the store is damaged, so that it is not copied: {'; '.join(examined.wrong)}",
                "see how it is: kaged check",
            )
        self._verdict = self._beside.submit(self._verify)

    def _verify(self) -> audit_verify.Verdict:
        """The source's audit log; the target has the same, as their digests show."""

        def go_on(*_: int) -> None:
            if self._stop:
                raise StorageError("the copy was given up", "try again")

        return audit_verify.verify_in(self._source, progress=go_on)

    def check(self, contents: Contents) -> None:
        count = self._counting("verifying")
        count(0)
        assert self._verdict is not None
        verdict = self._verdict.result()
        if verdict.result == audit_verify.BROKEN:
            raise StorageCorrupt(
                f"the audit log is broken at event {verdict.seq}, so that it is not copied: {verdict.wrong}",
                "keep the store as it is, and compare it with a backup: kaged audit verify",
            )
        self._let_go()
        target = self._target
        if differences := schema.drift(target)[: schema.DIFFERENCES_SHOWN]:
            raise SchemaDrift(
                f"the schema of {target.place} is not as it should be: {'; '.join(differences)}",
                "name an empty place that nobody has changed by hand",
            )
        found = {}
        for table in contents.tables():
            passing = Digesting(table, contents, count=count)
            for _ in passing.lines():
                pass
            found[table.name] = passing.facts()
        wrong = [name for name, facts in self.examined.facts.items() if _sum(found.get(name)) != _sum(facts)]
        if wrong:
            raise StorageCorrupt(
                f"what has arrived in {target.place} is not what was sent: {', '.join(wrong)}; it is as it was",
                "try again; if it happens again, report it",
            )

    def _counting(self, what: str) -> Callable[[int], None]:
        done = 0

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            if self._progress is not None:
                self._progress(what, done, self._whole)

        return count


def refuse_unfit(target: Engine) -> None:
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
