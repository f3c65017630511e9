"""Whether a store is pruned as its config wants it: what should have gone long ago, or takes more than it may.

What goes, and how, is in retention.py. Here are only counts and sums, each one statement, so that a check can end them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..identity import now_ms
from ..storage import Storage
from .retention import DAY_MS, MIB, Limits
from .retention_rules import ATTACHED_BYTES, CHUNK_BYTES, EVERYTHING, IN_SESSION, Bound, Condition, Rules

OVERDUE_DAYS = 14
"""The timer prunes every week; what two of its runs have left is told."""

OVER_SHARE = 0.1
"""A store grows between two prunings: what is beyond a limit by more than that is told."""


def overdue(storage: Storage) -> Iterator[str]:
    """Each thing that a pruning would remove and should have removed before, in words."""
    limits = Limits.of(storage.settings)
    input, output = (f"COALESCE({storage.database.text_bytes(f'run.{column}')}, 0)" for column in ("input", "output"))
    sizes = {"transcripts": CHUNK_BYTES, "runs": f"{input} + {output} + {ATTACHED_BYTES}"}
    for name in ("sessions", "transcripts", "runs", "checkpoints"):
        source = IN_SESSION.get(name, "session")
        days, mib = getattr(limits, f"{name}_days"), getattr(limits, f"{name}_mib")
        if days:
            before = Bound(before=max(0, now_ms() - (days + OVERDUE_DAYS) * DAY_MS))
            count = _count(storage, source, _may_go(name, before, limits.checkpoints_keep))
            if count:
                yield f"{count:,} {name} are over by more than {OVERDUE_DAYS} days: retention.{name}_days is {days}"
        if mib and name in sizes:
            (taken,) = storage.database.execute_sql(f"SELECT SUM({sizes[name]}) FROM {source}").fetchone()  # noqa: S608
            over = (taken or 0) > mib * MIB * (1 + OVER_SHARE)
            if over and _count(storage, source, _may_go(name, EVERYTHING, limits.checkpoints_keep)):
                yield f"the {name} take {taken:,} bytes: retention.{name}_mib is {mib}"


def _may_go(name: str, bound: Bound, keep: int) -> Condition:
    condition: Condition = getattr(Rules(now_ms(), bound, bound, bound, bound, keep), name)()
    return condition


def _count(storage: Storage, source: str, condition: Condition) -> int:
    sql = storage.database.dialect(f"SELECT COUNT(*) FROM {source} WHERE {condition.sql}")  # noqa: S608
    return int(storage.database.execute_sql(sql, condition.params).fetchone()[0])
