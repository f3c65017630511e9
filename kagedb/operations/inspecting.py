"""What the rows of a set that come in no order are asked, and what is then made of their hashes.

Everything that examine (digests.py) finds in a state with rows is found here too. Where the rows come from is in the
engines.
"""

from __future__ import annotations

from typing import Any

from ..engines.archive import Looking, RowHashes, Table
from . import audit_verify
from .digests import WRONG_SHOWN, Examined, Progress, TableDigest, chain_told, head, proof, require_log


class Inspecting:
    """Made for one set of so many `tables`; `looks` is for its reader, `examined` for after that.

    `progress` is told of each table twice: when its rows begin, and when its digest is made.
    """

    def __init__(self, tables: int, progress: Progress | None = None) -> None:
        self._progress = progress
        self._steps, self._done = 2 * tables, 0
        self._wrong: list[str] = []
        self._events = audit_verify.Beforehand()

    def looks(self, table: Table) -> Looking | None:
        """What is wanted of the rows of a table."""
        self._step()
        if table.name == "audit_event":
            require_log(table)
            seq, *rest = audit_verify.COLUMNS
            return Looking((seq, *rest), self._events.look, tuple(rest), indexed="subject")
        if table.name == "audit_seal":
            columns = tuple(column for column in table.columns if column not in table.key)
            return Looking(columns, _all, columns)
        if (prove := proof(table)) is None:
            return None

        def look(*row: Any) -> tuple[()]:
            if len(self._wrong) < WRONG_SHOWN and (said := prove(row)):
                self._wrong.append(said)
            return ()

        return Looking(table.columns, look)

    def examined(self, hashes: RowHashes) -> Examined:
        """What was found, with the audit chain."""
        examined = Examined({}, wrong=self._wrong)
        for table in hashes.tables():
            digest = TableDigest(table)
            for some in hashes.hashes(table):
                digest.add(some)
            examined.facts[table.name] = digest.facts()
            self._step()
        if "audit_event" not in examined.facts:
            examined.wrong.append("it has no tables of a kaged store")
        elif said := chain_told(audit_verify.verify_beforehand(hashes)):
            examined.wrong.append(said)
        examined.head = head(hashes)
        return examined

    def _step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._steps)


def _all(*values: Any) -> tuple[Any, ...]:
    return values
