"""What is kept how long: what the limits of `[retention]` would remove, and removing it.

Which rows may go at all is in retention_rules.py, their removal in retention_removal.py. Room in the file itself is
given back by compacting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from ..errors import InvalidValue, StateError
from ..identity import clock_is_behind, now_ms
from ..models import AuditEvent, Checkpoint, plugin_state
from ..models.base import bound_store, check_actor
from ..settings import Settings
from ..storage import Storage
from . import audit, checkpoints
from .pace import Pace, Stopped
from .retention_removal import Going, Removal
from .retention_rules import (
    ATTACHED_BYTES,
    CHUNK_BYTES,
    CHUNKS,
    EVERYTHING,
    IN_SESSION,
    TRANSCRIPT_END,
    Bound,
    Condition,
    Rules,
)

DAY_MS = 86_400_000
MIB = 1024 * 1024

CLASSES = ("sessions", "transcripts", "runs", "checkpoints", "audit", "plugin_state", "blobs")
"""What is removed, in this order: what goes with a session is not counted, or looked at, a second time."""

ROOTS_PAGE = 100
"""Checkpoints whose states are measured between two reads."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`[retention]`: days and MiB by class, 0 for no limit; and how many checkpoints of each session always stay."""

    sessions_days: int = 0
    sessions_mib: int = 0
    transcripts_days: int = 0
    transcripts_mib: int = 0
    runs_days: int = 0
    runs_mib: int = 0
    checkpoints_days: int = 0
    checkpoints_mib: int = 0
    checkpoints_keep: int = 0
    audit_days: int = 0
    audit_mib: int = 0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InvalidValue(f"{one.name} cannot be {value!r}", "give a whole number, 0 for no limit")

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those of the config."""
        return cls(**{one.name: getattr(settings, f"retention_{one.name}") for one in fields(cls)})


@dataclass(frozen=True, slots=True)
class Plan:
    """What would go, by class; made by `plan`, for `prune`."""

    limits: Limits
    rules: Rules
    classes: dict[str, Going]
    audit_before: int = 0
    audit_seal: int = 0
    """No audit event from that time on (Unix milliseconds) goes, and none that a later seal closed."""

    def empty(self) -> bool:
        """Whether nothing would go."""
        return not any(going.count() for going in self.classes.values())


@dataclass(slots=True)
class Done:
    """What `prune` removed, by class; `stopped` where it was asked to end before that was all."""

    classes: dict[str, Going] = field(default_factory=dict)
    stopped: bool = False
    longest_hold_ms: float = 0.0
    """The longest that a batch has held the writer."""


def plan(storage: Storage, limits: Limits | None = None) -> Plan:
    """What the limits, by default those of the settings, would remove now. Changes nothing, holds nothing for long.

    Raises StateError while the clock is before the newest row: what is old cannot be told then.
    """
    bound_store()
    if clock_is_behind():
        raise StateError("the clock is before the newest row of the store", "set the clock, then prune")
    return _Planning(storage, limits or Limits.of(storage.settings)).plan()


def prune(
    storage: Storage,
    found: Plan | None = None,
    *,
    actor: str,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Done:
    """Remove what `plan` found, by default by the limits of the settings; the event `store.pruned` says so first.

    In batches that hold the writer for a few milliseconds. `stop` is asked between them: once it says True, this ends
    there. Cut off or killed, it leaves the rest to the next. `progress` is called with class, rows done, rows in all.
    Raises StateError while the clock is before the newest row.
    """
    check_actor(actor)
    found = found or plan(storage)
    if clock_is_behind():
        raise StateError("the clock is before the newest row of the store", "set the clock, then prune")
    if found.empty():
        return Done({name: Going() for name in found.classes})
    body = {"limits": asdict(found.limits), "classes": {name: asdict(going) for name, going in found.classes.items()}}
    AuditEvent.append("store.pruned", actor=actor, body=body)

    whole = {name: going.count() for name, going in found.classes.items()}
    whole["blobs"] = _one(storage, "SELECT COUNT(*) FROM blob")

    def tell(name: str, rows: int) -> None:
        if progress is not None:
            progress(name, rows, whole[name])

    stopped = False
    with storage.engine.gently() as settle:
        pace = Pace(stop, settle)
        removal = Removal(storage, found.rules, pace, tell)
        try:
            for name in CLASSES:
                if not found.classes[name].count():
                    continue
                if name == "audit":
                    removal.audit(found.audit_before, found.audit_seal, found.classes["audit"], actor)
                else:
                    getattr(removal, name)()
        except Stopped:
            stopped = True
    return Done({name: removal.done[name] for name in CLASSES}, stopped, pace.longest_seconds * 1000)


def _one(storage: Storage, sql: str, *params: Any) -> int:
    """The number that a query gives; 0 for NULL."""
    row = storage.database.execute_sql(storage.database.dialect(sql), params).fetchone()
    return int(row[0] or 0)


class _Planning:
    """The bounds that limits mean now, class by class, and what lies within them."""

    def __init__(self, storage: Storage, limits: Limits) -> None:
        self.storage = storage
        self.limits = limits
        self.now = now_ms()
        text = storage.database.text_bytes
        self.run_bytes = f"COALESCE({text('run.input')}, 0) + COALESCE({text('run.output')}, 0)"
        self.body_bytes = text("body")
        self.rules = Rules(
            now=self.now,
            sessions_bound=self._age(limits.sessions_days),
            transcripts_bound=self._age(limits.transcripts_days),
            runs_bound=self._age(limits.runs_days),
            checkpoints_bound=self._age(limits.checkpoints_days),
            keep=limits.checkpoints_keep,
        )
        self.stays: Condition
        """That a row does not go with its session."""

    def plan(self) -> Plan:
        limits, classes = self.limits, dict[str, Going]()
        with self.storage.snapshot():
            self._bound_sessions()
            classes["sessions"] = self._sessions()
            self.stays = self.rules.not_with_sessions() if classes["sessions"].count() else Condition("1 = 1", ())
            self._bound("transcripts", limits.transcripts_mib, TRANSCRIPT_END, "transcript.id", CHUNK_BYTES)
            size = f"{self.run_bytes} + {ATTACHED_BYTES}"
            self._bound("runs", limits.runs_mib, "run.finished_at", "run.id", size)
        # Walking states may take long, and a snapshot would hold back cleaning for as long.
        self._bound_checkpoints()
        with self.storage.snapshot():
            classes["transcripts"] = self._transcripts()
            classes["runs"] = self._runs()
            classes["checkpoints"] = self._checkpoints()
            classes["audit"], before, seal = self._audit()
            classes["plugin_state"] = self._plugin_state()
        roots = any(classes[name].count() for name in ("sessions", "runs", "checkpoints"))
        unneeded = checkpoints.unneeded(self.storage, self._going if roots else None)
        classes["blobs"] = Going({"blob": unneeded.blobs}, unneeded.bytes)
        for going in classes.values():
            going.rows = {table: rows for table, rows in going.rows.items() if rows}
        return Plan(limits, self.rules, classes, before, seal)

    def _age(self, days: int) -> Bound:
        return Bound(max(0, self.now - days * DAY_MS)) if days else Bound()

    def _numbers(self, sql: str, *params: Any) -> list[int]:
        row = self.storage.database.execute_sql(self.storage.database.dialect(sql), params).fetchone()
        return [int(value or 0) for value in row]

    # Bounds by bytes: oldest first until what is left is within the limit.

    def _bound_sessions(self) -> None:
        runs = (
            f"(SELECT COALESCE(SUM({self.run_bytes} + {ATTACHED_BYTES}), 0) FROM run WHERE run.session_id = session.id)"  # noqa: S608
        )
        transcripts = (
            f"(SELECT COALESCE(SUM({CHUNK_BYTES}), 0) FROM transcript WHERE transcript.session_id = session.id)"  # noqa: S608
        )
        self.stays = Condition("1 = 1", ())
        limit = self.limits.sessions_mib
        self._bound("sessions", limit, "session.ended_at", "session.id", f"{runs} + {transcripts}")

    def _bound(self, name: str, limit_mib: int, end: str, id: str, size: str) -> None:
        if not limit_mib:
            return
        source = IN_SESSION.get(name, name.removesuffix("s"))
        left = _one(
            self.storage,
            f"SELECT SUM({size}) FROM {source} WHERE {self.stays.sql}",  # noqa: S608
            *self.stays.params,
        )
        if left <= limit_mib * MIB:
            return
        rules = replace(self.rules, **{f"{name}_bound": EVERYTHING})  # type: ignore[arg-type]
        may: Condition = getattr(rules, name)()
        bound: Bound = getattr(self.rules, f"{name}_bound")
        for at, key, bytes_ in self.storage.database.stream(
            f"SELECT {end}, {id}, {size} FROM {source} WHERE {may.sql} AND {self.stays.sql} ORDER BY {end}, {id}",  # noqa: S608
            (*may.params, *self.stays.params),
        ):
            left -= int(bytes_)
            bound = replace(bound, at=at, id=key)
            if left <= limit_mib * MIB:
                break
        self.rules = replace(self.rules, **{f"{name}_bound": bound})  # type: ignore[arg-type]

    def _bound_checkpoints(self) -> None:
        """By what the states take that stay: those that do in any case, and the others from the newest on."""
        limit = self.limits.checkpoints_mib * MIB
        if not limit:
            return
        with checkpoints.Collection(self.storage) as collection:
            if sum(size for rows in collection.pages() for _, size in rows) <= limit:
                return
            may = replace(self.rules, checkpoints_bound=EVERYTHING).checkpoints()
            aged = self.rules.checkpoints()
            # NULL, of a session with fewer than it keeps, is no.
            chosen = f"CASE WHEN {may.sql} THEN 1 ELSE 0 END"
            used = 0
            for _, _, root in self._roots(f"{chosen} = 0", may.params):
                used += collection.measure(root)
            gone = f"CASE WHEN {aged.sql} THEN 1 ELSE 0 END"
            for at, id, root in self._roots(f"{chosen} = 1 AND {gone} = 0", (*may.params, *aged.params)):
                used += collection.measure(root)
                if used > limit:
                    bound = replace(self.rules.checkpoints_bound, at=at, id=id)
                    self.rules = replace(self.rules, checkpoints_bound=bound)
                    return

    def _roots(self, where: str, params: tuple[Any, ...]) -> Any:
        """Time, id and root of checkpoints that do not go with their session, newest first."""
        last = checkpoints.AFTER_EVERY_ULID
        sql = self.storage.database.dialect(
            f"SELECT checkpoint.created_at, checkpoint.id, checkpoint.root FROM {IN_SESSION['checkpoints']}"  # noqa: S608
            f" WHERE checkpoint.id < ? AND {where} AND {self.stays.sql} ORDER BY checkpoint.id DESC LIMIT {ROOTS_PAGE}"
        )
        while True:
            rows = self.storage.database.execute_sql(sql, (last, *params, *self.stays.params)).fetchall()
            for at, id, root in rows:
                yield at, id, bytes(root)
                last = id
            if len(rows) < ROOTS_PAGE:
                return

    # What lies within the bounds.

    def _sessions(self) -> Going:
        whole = self.rules.sessions()
        sessions = _one(self.storage, f"SELECT COUNT(*) FROM session WHERE {whole.sql}", *whole.params)  # noqa: S608
        if not sessions:
            return Going()
        of = f"WHERE session_id IN (SELECT session.id FROM session WHERE {whole.sql})"  # noqa: S608
        runs, texts, attached = self._numbers(
            f"SELECT COUNT(*), SUM({self.run_bytes}), SUM((SELECT COUNT(*) FROM run_attachment"  # noqa: S608
            f" WHERE run_id = run.id)) FROM run {of}",
            *whole.params,
        )
        transcripts, chunks, output = self._numbers(
            f"SELECT COUNT(*), SUM({CHUNKS}), SUM({CHUNK_BYTES}) FROM transcript {of}",  # noqa: S608
            *whole.params,
        )
        rows = {
            "session": sessions,
            "run": runs,
            "run_attachment": attached,
            "transcript": transcripts,
            "transcript_chunk": chunks,
            "checkpoint": _one(self.storage, f"SELECT COUNT(*) FROM checkpoint {of}", *whole.params),  # noqa: S608
            "checkpoint_head": _one(self.storage, f"SELECT COUNT(*) FROM checkpoint_head {of}", *whole.params),  # noqa: S608
        }
        return Going(rows, texts + output)

    def _counted(self, name: str, columns: str) -> list[int]:
        doomed: Condition = getattr(self.rules, name)()
        return self._numbers(
            f"SELECT {columns} FROM {IN_SESSION[name]} WHERE {doomed.sql} AND {self.stays.sql}",  # noqa: S608
            *doomed.params,
            *self.stays.params,
        )

    def _transcripts(self) -> Going:
        transcripts, chunks, size = self._counted("transcripts", f"COUNT(*), SUM({CHUNKS}), SUM({CHUNK_BYTES})")
        return Going({"transcript": transcripts, "transcript_chunk": chunks}, size)

    def _runs(self) -> Going:
        attached = "SUM((SELECT COUNT(*) FROM run_attachment WHERE run_id = run.id))"
        runs, size, attachments = self._counted("runs", f"COUNT(*), SUM({self.run_bytes}), {attached}")
        return Going({"run": runs, "run_attachment": attachments}, size)

    def _checkpoints(self) -> Going:
        heads = "SUM((SELECT COUNT(*) FROM checkpoint_head WHERE checkpoint_id = checkpoint.id))"
        rows, heads_gone = self._counted("checkpoints", f"COUNT(*), {heads}")
        return Going({"checkpoint": rows, "checkpoint_head": heads_gone})

    def _plugin_state(self) -> Going:
        rows, size = self._numbers(
            "SELECT COUNT(*), SUM(size) FROM plugin_state WHERE expires_at < ?", self.now - plugin_state.GRACE_MS
        )
        return Going({"plugin_state": rows}, size)

    def _audit(self) -> tuple[Going, int, int]:
        before = self._age(self.limits.audit_days).before
        if self.limits.audit_mib:
            before = max(before, self._audit_by_bytes())
        if not self.limits.audit_days and not self.limits.audit_mib:
            return Going({"audit_event": 0}), 0, 0
        found = audit.prune(self.storage, before, actor="system:kagedb", dry_run=True)
        seals = "SELECT MAX(n), MAX(last_seq) FROM audit_seal WHERE pruned_at IS NOT NULL"
        seal, last = (found.seal, found.last_seq) if found is not None else self._numbers(seals)
        events, size = self._numbers(
            f"SELECT COUNT(*), SUM({self.body_bytes}) FROM audit_event WHERE seq <= ?",  # noqa: S608
            last,
        )
        return Going({"audit_event": events}, size), before, seal

    def _audit_by_bytes(self) -> int:
        """The time up to which sealed ranges go, so that the bodies of the others are within the limit."""
        limit = self.limits.audit_mib * MIB
        left = _one(self.storage, f"SELECT SUM({self.body_bytes}) FROM audit_event")  # noqa: S608
        cut = 0
        if left > limit:
            for seq, size in self.storage.database.stream(
                f"SELECT seq, {self.body_bytes} FROM audit_event ORDER BY seq"  # noqa: S608
            ):
                cut, left = seq, left - int(size)
                if left <= limit:
                    break
        # The range that has that event goes as a whole.
        last = _one(self.storage, "SELECT MIN(last_seq) FROM audit_seal WHERE last_seq >= ?", cut) if cut else 0
        last = last or _one(self.storage, "SELECT MAX(last_seq) FROM audit_seal WHERE last_seq <= ?", cut)
        return _one(self.storage, "SELECT at + 1 FROM audit_event WHERE seq = ? UNION ALL SELECT 0", last)

    def _going(self, model: Any, ids: list[str]) -> set[str]:
        """Those of the ids, of checkpoints or of attachments, that go."""
        whole = self.rules.sessions()
        if model is Checkpoint:
            source, doomed = IN_SESSION["checkpoints"], self.rules.checkpoints()
        else:
            source = (
                "run_attachment JOIN run ON run.id = run_attachment.run_id JOIN session ON session.id = run.session_id"
            )
            doomed = self.rules.runs()
        id = f"{model._meta.table_name}.id"
        places = ", ".join("?" * len(ids))
        sql = (
            f"SELECT {id} FROM {source} WHERE {id} IN ({places}) AND (({doomed.sql})"  # noqa: S608
            f" OR session.id IN (SELECT session.id FROM session WHERE {whole.sql}))"
        )
        rows = self.storage.database.execute_sql(
            self.storage.database.dialect(sql), (*ids, *doomed.params, *whole.params)
        ).fetchall()
        return {row[0] for row in rows}
