"""Removing what retention has chosen: in batches, children first, each row looked at again in the turn that takes it.

What is chosen is in retention_rules.py, how long a batch may be in pace.py. It may be killed at any place: what is left
is consistent, fits the same rules, and goes the next time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from ..models import plugin_state
from ..models.transcript import SEQUENCE_BITS
from ..models.transcript_chunk import SIZES_PAGE_CHUNKS
from ..storage import Storage
from .audit import prune
from .checkpoints import AFTER_EVERY_ULID, Collection, Page, doomed_pages, remove_page
from .pace import Pace, cost_of
from .retention_rules import ATTACHMENTS, IN_SESSION, Condition, Rules

PAGE_ROWS = 50
"""Runs or attachments looked for at once; several pages may be removed in one transaction."""

Work = tuple[Callable[[], "Going"], int]
"""What to do inside a transaction, giving what it removed; and what that costs."""


@dataclass(slots=True)
class Going:
    """Rows by table, and the bytes of what was stored in them. Of runs that are emptied, the rows stay."""

    rows: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def add(self, other: Going) -> None:
        """Add what else goes."""
        for table, rows in other.rows.items():
            if rows:
                self.rows[table] = self.rows.get(table, 0) + rows
        self.bytes += other.bytes

    def count(self) -> int:
        """The rows of all tables."""
        return sum(self.rows.values())


class Removal:
    """Removes by class what `rules` say. `done` is what went, by class; `tell` is called with class and rows so far."""

    def __init__(self, storage: Storage, rules: Rules, pace: Pace, tell: Callable[[str, int], None]) -> None:
        self.storage = storage
        self.rules = rules
        self.pace = pace
        self.done: dict[str, Going] = defaultdict(Going)
        self._tell = tell
        self._still: dict[str, bool] = {}
        text = storage.database.text_bytes
        self._run_bytes = f"COALESCE({text('run.input')}, 0) + COALESCE({text('run.output')}, 0)"

    def sessions(self) -> None:
        """Whole sessions, with all that is below them."""
        self._work("sessions", self._of_sessions())

    def transcripts(self) -> None:
        """Transcripts with their chunks."""
        self._work("transcripts", self._transcripts(self.rules.transcripts()))

    def runs(self) -> None:
        """Inputs, outputs and attachments of runs."""
        self._work("runs", self._emptied())

    def checkpoints(self) -> None:
        """Checkpoints, without the blobs of their states."""
        self._work("checkpoints", self._checkpoints(self.rules.checkpoints()))

    def audit(self, before: int, seal: int, planned: Going, actor: str) -> None:
        """Sealed audit events of before a time (Unix milliseconds), none that a later seal than `seal` closed.

        `planned` is what they are.
        """
        done = self.done["audit"]

        def advance(rows: int, _: int) -> None:
            done.rows["audit_event"] = rows
            self._tell("audit", rows)

        try:
            prune(self.storage, before, actor=actor, progress=advance, pace=self.pace, seal=seal)
        finally:
            left = (
                f"SELECT COALESCE(SUM({self.storage.database.text_bytes('body')}), 0) FROM audit_event"  # noqa: S608
                " WHERE seq <= (SELECT MAX(last_seq) FROM audit_seal WHERE pruned_at IS NOT NULL)"
            )
            done.bytes = planned.bytes - int(self._rows(left)[0][0])

    def plugin_state(self) -> None:
        """Keys of plugins that have been absent for an hour."""
        before = self._expired()
        while self._turn("plugin_state", [self._sweep], self.pace.units):
            self.pace.pause()
        self.done["plugin_state"].bytes = before - self._expired()

    def blobs(self) -> None:
        """Blobs that nothing needs any more."""
        with Collection(self.storage, check=self.pace.check) as collection:
            try:
                collection.mark()
                collection.sweep(partial(self._tell, "blobs"), self.pace)
            finally:
                self.done["blobs"].add(Going({"blob": collection.result.blobs}, collection.result.bytes))

    # Batches.

    def _work(self, name: str, work: Iterator[Work]) -> None:
        for batch, cost in self.pace.batches(work):
            self._turn(name, batch, cost)
            self._tell(name, self.done[name].count())
            self.pace.pause()

    def _turn(self, name: str, batch: list[Callable[[], Going]], cost: int) -> int:
        self._still.clear()
        going = Going()
        with self.pace.turn(self.storage, cost):
            for take in batch:
                going.add(take())
        self.done[name].add(going)
        return going.count()

    def _rows(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self.storage.database.execute_sql(
            self.storage.database.dialect(sql), params
        ).fetchall()
        return rows

    def _pages(self, sql: str, last: str, *params: Any) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of a query a page at a time, each asked for when the one before it has been taken.

        The first column is the key that they are sorted by, and the first `?` the key to go on from.
        """
        while page := self._rows(f"{sql} LIMIT {PAGE_ROWS}", last, *params):
            yield page
            last = page[-1][0]

    def _each(self, sql: str, last: str, *params: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of `_pages` one by one."""
        return chain.from_iterable(self._pages(sql, last, *params))

    def _write(self, sql: str, *params: Any) -> int:
        return int(self.storage.database.execute_sql(self.storage.database.dialect(sql), params).rowcount)

    def _session_goes(self, session: str) -> bool:
        """Whether a session is still doomed, asked once in each transaction."""
        if session not in self._still:
            doomed = self.rules.sessions()
            self._still[session] = bool(
                self._rows(f"SELECT 1 FROM session WHERE session.id = ? AND {doomed.sql}", session, *doomed.params)  # noqa: S608
            )
        return self._still[session]

    # Sessions.

    def _of_sessions(self) -> Iterator[Work]:
        doomed = self.rules.sessions()
        sql = f"SELECT session.id FROM session WHERE session.id > ? AND {doomed.sql} ORDER BY session.id"  # noqa: S608
        for (session,) in self._each(sql, "", *doomed.params):
            yield from self._checkpoints(doomed, of=session)
            yield from self._transcripts(doomed, of=session)
            yield from self._runs_of(session)
            yield partial(self._take_session, session), 1

    def _take_session(self, session: str) -> Going:
        left = " UNION ALL ".join(
            f"SELECT 1 FROM {table} WHERE session_id = ?"  # noqa: S608
            for table in ("run", "transcript", "checkpoint", "checkpoint_head")
        )
        if not self._session_goes(session) or self._rows(f"{left} LIMIT 1", session, session, session, session):
            return Going()
        return Going({"session": self._write("DELETE FROM session WHERE id = ?", session)})

    def _runs_of(self, session: str) -> Iterator[Work]:
        """All runs of a session, newest first: mostly, children come before their parents."""
        sql = (
            f"SELECT id, {self._run_bytes}, {ATTACHMENTS} FROM run WHERE id < ? AND session_id = ?"  # noqa: S608
            " ORDER BY id DESC"
        )
        for run, size, attached in self._each(sql, AFTER_EVERY_ULID, session):
            if attached > PAGE_ROWS:
                yield from self._attachments(run, partial(self._session_goes, session))
                attached = PAGE_ROWS
            yield partial(self._take_run, session, run), cost_of(size) + attached

    def _take_run(self, session: str, run: str) -> Going:
        if not self._session_goes(session):
            return Going()
        rows = self._rows(f"SELECT {self._run_bytes} FROM run WHERE id = ?", run)  # noqa: S608
        attached = self._write("DELETE FROM run_attachment WHERE run_id = ?", run)
        # A child that was made by a process whose clock was behind; its turn comes.
        self._write("UPDATE run SET parent_id = NULL WHERE parent_id = ?", run)
        gone = self._write("DELETE FROM run WHERE id = ?", run)
        return Going({"run_attachment": attached, "run": gone}, sum(size for (size,) in rows))

    # Runs.

    def _emptied(self) -> Iterator[Work]:
        doomed = self.rules.runs()
        sql = (
            f"SELECT run.id, {self._run_bytes}, {ATTACHMENTS} FROM {IN_SESSION['runs']}"  # noqa: S608
            f" WHERE run.id > ? AND {doomed.sql} ORDER BY run.id"
        )
        for run, size, attached in self._each(sql, "", *doomed.params):
            # Said first: a run must not look as if it never had any.
            yield partial(self._empty, run, attached <= PAGE_ROWS), cost_of(size) + min(attached, PAGE_ROWS)
            if attached > PAGE_ROWS:
                yield from self._attachments(run, partial(self._run_goes, run))

    def _run_goes(self, run: str) -> bool:
        doomed = self.rules.runs()
        sql = f"SELECT 1 FROM {IN_SESSION['runs']} WHERE run.id = ? AND {doomed.sql}"  # noqa: S608
        return bool(self._rows(sql, run, *doomed.params))

    def _empty(self, run: str, with_attachments: bool) -> Going:
        if not self._run_goes(run):
            return Going()
        ((size,),) = self._rows(f"SELECT {self._run_bytes} FROM run WHERE id = ?", run)  # noqa: S608
        emptied = self._write(
            "UPDATE run SET input = 'null', output = NULL, pruned_at = COALESCE(pruned_at, ?) WHERE id = ?",
            self.rules.now,
            run,
        )
        attached = self._write("DELETE FROM run_attachment WHERE run_id = ?", run) if with_attachments else 0
        return Going({"run": emptied, "run_attachment": attached}, size)

    def _attachments(self, run: str, goes: Callable[[], bool]) -> Iterator[Work]:
        """The attachments of a run that has many, page by page."""
        sql = "SELECT id FROM run_attachment WHERE id > ? AND run_id = ? ORDER BY id"
        for page in self._pages(sql, "", run):
            yield partial(self._take_attachments, run, page[0][0], page[-1][0], goes), len(page)

    def _take_attachments(self, run: str, first: str, last: str, goes: Callable[[], bool]) -> Going:
        if not goes():
            return Going()
        sql = "DELETE FROM run_attachment WHERE run_id = ? AND id BETWEEN ? AND ?"
        return Going({"run_attachment": self._write(sql, run, first, last)})

    # Checkpoints.

    def _checkpoints(self, doomed: Condition, of: str | None = None) -> Iterator[Work]:
        for page, cost in doomed_pages(self.storage, doomed, of):
            yield partial(self._take_checkpoints, page, doomed), cost

    def _take_checkpoints(self, page: Page, doomed: Condition) -> Going:
        gone = remove_page(self.storage, page, doomed)
        return Going({"checkpoint": gone.checkpoints, "checkpoint_head": gone.heads})

    # Transcripts.

    def _transcripts(self, doomed: Condition, of: str | None = None) -> Iterator[Work]:
        where, params = ("transcript.session_id = ? AND ", (of,)) if of else ("", ())
        sql = (
            f"SELECT transcript.id, transcript.number FROM {IN_SESSION['transcripts']}"  # noqa: S608
            f" WHERE transcript.id > ? AND {where}{doomed.sql} ORDER BY transcript.id"
        )
        for transcript, number in self._each(sql, "", *params, *doomed.params):
            yield from self._transcript(transcript, number, doomed)

    def _transcript(self, transcript: str, number: int, doomed: Condition) -> Iterator[Work]:
        """Its chunks, oldest first, and with the last of them its row."""
        first, end = number << SEQUENCE_BITS, number + 1 << SEQUENCE_BITS
        take = partial(self._take_transcript, transcript, doomed)
        cost, after = 1, first - 1
        while True:
            page = self._rows(
                "SELECT key, LENGTH(data) FROM transcript_chunk WHERE key > ? AND key < ?"  # noqa: S608
                f" ORDER BY key LIMIT {SIZES_PAGE_CHUNKS}",
                after,
                end,
            )
            for key, size in page:
                cost += cost_of(size)
                if cost >= self.pace.units:
                    yield partial(take, first, key, False), cost
                    first, cost = key + 1, 1
                after = key
            if len(page) < SIZES_PAGE_CHUNKS:
                break
        yield partial(take, first, end - 1, True), cost

    def _take_transcript(self, transcript: str, doomed: Condition, first: int, last: int, whole: bool) -> Going:
        source = f"{IN_SESSION['transcripts']} WHERE transcript.id = ? AND {doomed.sql}"
        if not self._rows(f"SELECT 1 FROM {source}", transcript, *doomed.params):  # noqa: S608
            return Going()
        sizes = "SELECT COALESCE(SUM(LENGTH(data)), 0) FROM transcript_chunk WHERE key BETWEEN ? AND ?"
        size = int(self._rows(sizes, first, last)[0][0])
        chunks = self._write("DELETE FROM transcript_chunk WHERE key BETWEEN ? AND ?", first, last)
        if not whole:
            return Going({"transcript_chunk": chunks}, size)
        # What went on from it stays, as one that begins there.
        self._write("UPDATE transcript SET continues_id = NULL WHERE continues_id = ?", transcript)
        gone = self._write("DELETE FROM transcript WHERE id = ?", transcript)
        return Going({"transcript_chunk": chunks, "transcript": gone}, size)

    # Plugin state.

    def _expired(self) -> int:
        sql = "SELECT COALESCE(SUM(size), 0) FROM plugin_state WHERE expires_at < ?"
        return int(self._rows(sql, self.rules.now - plugin_state.GRACE_MS)[0][0])

    def _sweep(self) -> Going:
        return Going({"plugin_state": plugin_state.sweep(self.pace.units)})
