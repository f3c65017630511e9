"""Which rows retention takes, as conditions in SQL: what they never touch, and the bounds that limits have set.

Bounds come from retention.py, removal is in retention_removal.py; both ask here, so that what is said is what goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..models.session import ENDED
from ..models.transcript import SEQUENCE_BITS

QUIET_MS = 86_400_000
"""A transcript that was never closed counts as over a day after its session has ended and its last output: the daemon
died under it. A recorder that lives writes within seconds."""


class Condition(NamedTuple):
    """A condition in SQL, with `?` for its parameters."""

    sql: str
    params: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """What of a class is old enough: what ended before `before`, or not after the row `id` that ended at `at`.

    Times in Unix milliseconds; as it is made, nothing is.
    """

    before: int = 0
    at: int = -1
    id: str = ""

    def over(self, end: str, id: str) -> Condition:
        """The condition on a row that ended at `end` and has that key."""
        return Condition(f"({end} < ? OR ({end}, {id}) <= (?, ?))", (self.before, self.at, self.id))


EVERYTHING = Bound(before=1 << 62)
"""The bound of whatever may be touched at all."""

_CHUNKS = (
    f"transcript_chunk.key >= transcript.number * {1 << SEQUENCE_BITS}"
    f" AND transcript_chunk.key < (transcript.number + 1) * {1 << SEQUENCE_BITS}"
)
_LAST_OUTPUT = f"(SELECT at FROM transcript_chunk WHERE {_CHUNKS} ORDER BY key DESC LIMIT 1)"  # noqa: S608
_NOT_RECORDED = (
    f"(transcript.closed_at IS NOT NULL OR (session.state = '{ENDED}' AND session.ended_at < ?"
    f" AND COALESCE({_LAST_OUTPUT}, 0) < ?))"
)

CHUNKS = f"(SELECT COUNT(*) FROM transcript_chunk WHERE {_CHUNKS})"  # noqa: S608
CHUNK_BYTES = f"(SELECT COALESCE(SUM(LENGTH(data)), 0) FROM transcript_chunk WHERE {_CHUNKS})"  # noqa: S608
ATTACHMENTS = "(SELECT COUNT(*) FROM run_attachment WHERE run_attachment.run_id = run.id)"
ATTACHED_BYTES = "(SELECT COALESCE(SUM(size), 0) FROM run_attachment WHERE run_attachment.run_id = run.id)"

_NEWEST_ATTACHED = "COALESCE((SELECT run_id FROM run_attachment ORDER BY id DESC LIMIT 1), '')"
_NEWEST_CHECKPOINT = "COALESCE((SELECT id FROM checkpoint ORDER BY id DESC LIMIT 1), '')"

IN_SESSION = {
    "transcripts": "transcript JOIN session ON session.id = transcript.session_id",
    "runs": "run JOIN session ON session.id = run.session_id",
    "checkpoints": "checkpoint JOIN session ON session.id = checkpoint.session_id",
}
"""What each condition below is over."""

TRANSCRIPT_END = "COALESCE(transcript.closed_at, session.ended_at)"


@dataclass(frozen=True, slots=True)
class Rules:
    """The conditions under some bounds; each is over a row of its class and that of its session."""

    now: int
    """The time, in Unix milliseconds, that all of it is as of."""
    sessions_bound: Bound = Bound()
    transcripts_bound: Bound = Bound()
    runs_bound: Bound = Bound()
    checkpoints_bound: Bound = Bound()
    keep: int = 0
    """Of each session's checkpoints so many stay, the newest."""

    def sessions(self) -> Condition:
        """Ended sessions of which everything goes: without a pin, a recording, an open run in them.

        Ids are made above the newest of their table, by which a collection of blobs tells what was added: the session
        of the newest checkpoint stays, and that of the newest attachment, until there is a newer one.
        """
        over = self.sessions_bound.over("session.ended_at", "session.id")
        quiet = self.now - QUIET_MS
        return Condition(
            f"session.state = '{ENDED}' AND NOT session.pinned AND {over.sql}"  # noqa: S608
            f" AND session.id NOT IN (SELECT session_id FROM checkpoint WHERE id = {_NEWEST_CHECKPOINT})"
            f" AND session.id NOT IN (SELECT session_id FROM run WHERE id = {_NEWEST_ATTACHED})"
            " AND NOT EXISTS (SELECT 1 FROM checkpoint WHERE checkpoint.session_id = session.id AND checkpoint.pinned)"
            " AND NOT EXISTS (SELECT 1 FROM run WHERE run.session_id = session.id AND run.finished_at IS NULL)"
            " AND NOT EXISTS (SELECT 1 FROM transcript WHERE transcript.session_id = session.id"
            f" AND NOT {_NOT_RECORDED})",
            (*over.params, quiet, quiet),
        )

    def transcripts(self) -> Condition:
        """Transcripts that are closed, or that nobody can be recording."""
        over = self.transcripts_bound.over(TRANSCRIPT_END, "transcript.id")
        quiet = self.now - QUIET_MS
        return Condition(f"NOT session.pinned AND {_NOT_RECORDED} AND {over.sql}", (quiet, quiet, *over.params))

    def runs(self) -> Condition:
        """Finished runs that have not been emptied, or not wholly; not that of the newest attachment."""
        over = self.runs_bound.over("run.finished_at", "run.id")
        return Condition(
            f"NOT session.pinned AND run.finished_at IS NOT NULL AND {over.sql} AND run.id <> {_NEWEST_ATTACHED}"  # noqa: S608
            " AND (run.pruned_at IS NULL"
            " OR EXISTS (SELECT 1 FROM run_attachment WHERE run_attachment.run_id = run.id))",
            over.params,
        )

    def checkpoints(self) -> Condition:
        """Checkpoints without a pin that are not among the newest, and that no session stands on."""
        over = self.checkpoints_bound.over("checkpoint.created_at", "checkpoint.id")
        of_session = "SELECT id FROM checkpoint AS newer WHERE newer.session_id = checkpoint.session_id"
        newest = f"({of_session} ORDER BY id DESC LIMIT 1)"
        kept = "1 = 1"
        if self.keep:
            kept = f"checkpoint.id < ({of_session} ORDER BY id DESC LIMIT 1 OFFSET {self.keep - 1:d})"
        return Condition(
            f"NOT session.pinned AND NOT checkpoint.pinned AND {over.sql} AND checkpoint.id <> {_NEWEST_CHECKPOINT}"  # noqa: S608
            f" AND {kept}"
            # It stands where it was rolled back to, until it has a checkpoint above `newest_id`; else on its newest.
            f" AND checkpoint.id <> COALESCE((SELECT checkpoint_id FROM checkpoint_head AS head"
            f" WHERE head.session_id = checkpoint.session_id AND head.newest_id >= {newest}), {newest})",
            over.params,
        )

    def not_with_sessions(self) -> Condition:
        """That the row's session does not go as a whole, and the row with it."""
        whole = self.sessions()
        return Condition(f"session.id NOT IN (SELECT session.id FROM session WHERE {whole.sql})", whole.params)  # noqa: S608
