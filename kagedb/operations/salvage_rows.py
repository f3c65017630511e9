"""The rows of one table on their way out of a damaged store: which of them are kept, and what is told of the others."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peewee

from ..engines.archive import INTEGER, Contents, Table
from ..engines.salvage import Hole, Shape, Wreck
from ..engines.scratch import ScratchSet
from ..fields import BooleanField, JSONField, UlidField
from ..identity import is_ulid, ulid_ms
from ..models import Model
from ..models.audit import DAY_MS, hash_body
from ..models.base import Identified
from .digests import proof

KEYS_SHOWN = 20
"""Keys and ranges named by table: as many as somebody would look at."""

RANGES_KEPT = 1_000

Key = list[Any]
"""A primary key as JSON has it; bytes in hex."""


@dataclass(slots=True)
class Range:
    """Rows that are lost between two that were found: the key before (None: from the first), and the one behind.

    `rows` is None where it cannot be told how many.
    """

    after: Key | None
    before: Key | None
    rows: int | None = None


@dataclass(slots=True)
class Tally:
    """What became of one table."""

    rows: int = 0
    lost: int | None = 0
    """None where it cannot be told."""
    ranges: list[Range] = field(default_factory=list)
    clashes: int = 0
    """Rows left out because their key, or another unique one, was there already."""
    clashing: list[Key] = field(default_factory=list)
    doubtful: int = 0
    """Rows that were kept, though a hash stored with them, or their place, says that they are not what they were."""
    doubted: list[Key] = field(default_factory=list)
    stand_ins: int = 0


class Reading:
    """The rows of one table on their way, and what is told of it afterwards."""

    def __init__(self, wreck: Wreck, shape: Shape, table: Table) -> None:
        self.tally = Tally()
        self._wreck = wreck
        self._shape = shape
        self._table = table
        self._places = [shape.columns.index(name) if name in shape.columns else None for name in table.columns]
        self._key = [table.columns.index(name) for name in shape.key if name in table.columns]
        self._unique = [[table.columns.index(name) for name in names] for names in shape.unique]
        self._checks = _checks(table)
        self._proof = _proof(table)
        identified = any(m._meta.table_name == table.name for m in Model.all() if issubclass(m, Identified))
        self._dated = (table.columns.index("id"), table.columns.index("created_at")) if identified else None
        self._seen = ScratchSet()
        self._holes: list[Hole] = []
        self._gap: Range | None = None
        self._last: Key | None = None

    def close(self) -> None:
        self._seen.close()

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows that are good, in the order of the columns of the target."""
        for item in self._wreck.rows(self._shape):
            if isinstance(item, Hole):
                self._hole(item)
                continue
            row = tuple(None if place is None else item.values[place] for place in self._places)
            if not all(check(row[place]) for place, check in self._checks) or not self._is_dated(row):
                self._hole(Hole(item.rowid - 1, item.rowid))
                continue
            if self._is_taken(row):
                self.leave_out(row)
                continue
            self.tally.rows += 1
            key = self._key_of(row)
            if item.doubtful or (self._proof is not None and not self._proof(row)):
                self.tally.doubtful += 1
                if len(self.tally.doubted) < KEYS_SHOWN:
                    self.tally.doubted.append(key)
            if self._gap is not None:
                self._gap.before = key
                self._gap = None
            self._last = key
            yield row

    def leave_out(self, row: tuple[Any, ...]) -> None:
        """Count a row whose key is there already."""
        self.tally.clashes += 1
        if len(self.tally.clashing) < KEYS_SHOWN:
            self.tally.clashing.append(self._key_of(row))

    def settle(self, contents: Contents) -> None:
        """Say what is lost, once all rows are loaded."""
        entries, missing, ranges = 0, array("q") if self._is_numbered() else None, _Ranges()
        for key in self._wreck.keys(self._shape):
            if key is None or (missing is not None and not isinstance(key[0], int)):
                # Nothing to compare with.
                if self._holes:
                    self.tally.lost = None
                    if missing is not None:
                        self._ranges_by_number(contents)
                return
            entries += 1
            if b"0:" + _bytes_of(key) in self._seen:
                ranges.found(key)
            elif missing is not None:
                # The index is in another order than the numbers.
                missing.append(key[0])
                ranges.rows += 1
            else:
                ranges.missing(key)
        self._compare(entries, self._number_ranges(missing) if missing is not None else ranges.list, ranges)

    def _compare(self, entries: int, ranges: list[Range], missing: _Ranges) -> None:
        """With what an index has: what it has more of is lost; the rest of the difference is keys that changed."""
        self.tally.lost = min(missing.rows, max(0, entries - self.tally.rows))
        self.tally.ranges = ranges if self.tally.lost else []
        self.tally.doubtful += missing.rows - self.tally.lost

    def _hole(self, hole: Hole) -> None:
        if not self._holes or self._holes[-1] != hole:
            if len(self._holes) < RANGES_KEPT:
                self._holes.append(hole)
            else:
                # Too many to be told one by one.
                self._holes[-1] = Hole(None, None)
        if self._gap is None and len(self.tally.ranges) < RANGES_KEPT:
            self._gap = Range(self._last, None)
            self.tally.ranges.append(self._gap)

    def _is_taken(self, row: tuple[Any, ...]) -> bool:
        kinds = [self._key, *self._unique] if self._key else self._unique
        parts = [
            b"%d:" % number + _bytes_of(row[place] for place in places)
            for number, places in enumerate(kinds)
            if all(row[place] is not None for place in places)
        ]
        if any(part in self._seen for part in parts[1:]):
            return True
        if parts and not self._seen.add(parts[0]):
            return True
        for part in parts[1:]:
            self._seen.add(part)
        return False

    def _is_dated(self, row: tuple[Any, ...]) -> bool:
        """Whether an id is not far later than its row: all ids and times to come would be made above it."""
        if self._dated is None:
            return True
        id, created_at = self._dated
        return bool(ulid_ms(row[id]) <= row[created_at] + DAY_MS)

    def _key_of(self, row: tuple[Any, ...]) -> Key:
        return _plain(row[place] for place in self._key)

    def _is_numbered(self) -> bool:
        return len(self._key) == 1 and self._table.kinds[self._key[0]] == INTEGER

    def _number_ranges(self, missing: array[int]) -> list[Range]:
        found: list[Range] = []
        first = before = None
        for key in [*sorted(missing), None]:
            if before is not None and first is not None and (key is None or key != before + 1):
                after, behind = (
                    [one] if b"0:" + _bytes_of([one]) in self._seen else None for one in (first - 1, before + 1)
                )
                if len(found) < RANGES_KEPT:
                    found.append(Range(after, behind, before - first + 1))
                first = None
            first = key if first is None else first
            before = key
        return found

    def _ranges_by_number(self, contents: Contents) -> None:
        """Without an index: between which keys rows were missing, less what turned up elsewhere."""
        name, column = self._table.name, self._table.columns[self._key[0]]
        ranges: dict[tuple[Any, Any], Range] = {}
        for hole in self._holes[:KEYS_SHOWN]:
            after = before = None
            if hole.after is not None:
                (after,) = contents.raw(
                    f'SELECT MAX("{column}") FROM "{name}" WHERE "{column}" <= ?',  # noqa: S608
                    (hole.after,),
                ).fetchone()
            if hole.upto is not None:
                (before,) = contents.raw(
                    f'SELECT MIN("{column}") FROM "{name}" WHERE "{column}" > ?',  # noqa: S608
                    (hole.upto,),
                ).fetchone()
            ranges[after, before] = Range(None if after is None else [after], None if before is None else [before])
        self.tally.ranges = list(ranges.values())


class _Ranges:
    """Keys as an index has them, in its order, of which some are missing in the table."""

    def __init__(self) -> None:
        self.list: list[Range] = []
        self.rows = 0
        self._last: Key | None = None
        self._gap: Range | None = None

    def found(self, key: Iterable[Any]) -> None:
        self._last = _plain(key)
        if self._gap is not None:
            self._gap.before, self._gap = self._last, None

    def missing(self, key: Iterable[Any]) -> None:
        self.rows += 1
        if self._gap is None:
            self._gap = Range(self._last, None, 0)
            if len(self.list) < RANGES_KEPT:
                self.list.append(self._gap)
        self._gap.rows = (self._gap.rows or 0) + 1


# What a value must be, beside what its column says.


def _checks(table: Table) -> list[tuple[int, Callable[[Any], bool]]]:
    for model in Model.all():
        if model._meta.table_name == table.name:
            checks = []
            for one in model._meta.sorted_fields:
                base = one
                while isinstance(base, peewee.ForeignKeyField):
                    base = base.rel_field
                for kind, check in _CHECKS.items():
                    if isinstance(base, kind):
                        checks.append((table.columns.index(one.column_name), check))
            return checks
    return []


def _is_json(text: Any) -> bool:
    if text is None:
        return True
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    raise ValueError(word)


_CHECKS: dict[type, Callable[[Any], bool]] = {
    JSONField: _is_json,
    UlidField: lambda value: value is None or is_ulid(value),
    BooleanField: lambda value: value in (None, 0, 1),
}


def _proof(table: Table) -> Callable[[tuple[Any, ...]], bool] | None:
    """Whether the hash that is stored with a row fits it; None for tables that have none."""
    if table.name == "audit_event":
        salt, body, stored = (table.columns.index(name) for name in ("salt", "body", "body_hash"))
        # A redacted body has neither.
        return lambda row: not row[body] or hash_body(row[salt], row[body]) == row[stored]
    told = proof(table)
    return None if told is None else lambda row: not told(row)


def _bytes_of(values: Iterable[Any]) -> bytes:
    parts = []
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode()
        parts.append(b"%d:" % len(data) + data)
    text = b"".join(parts)
    return text if len(text) <= 200 else hashlib.sha256(text).digest()


def _plain(key: Iterable[Any]) -> Key:
    return [value.hex() if isinstance(value, bytes) else value for value in key]
