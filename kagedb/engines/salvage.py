"""What salvage asks of an engine: the rows that can still be read of a store that the engine itself may refuse.

`Wreck` is made by `Engine.wreck()`. What becomes of the rows, and what is told of the lost ones, is in
kagedb/operations/salvage.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(slots=True)
class Shape:
    """A table as the damaged store has it; columns in the order in which they are stored."""

    name: str
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of each column what a value of it is (archive.py), or "" for anything."""
    required: tuple[bool, ...]
    defaults: tuple[Any, ...]
    key: tuple[str, ...]
    unique: tuple[tuple[str, ...], ...]
    """The columns of each unique key but the primary one."""
    references: tuple[tuple[str, str, str], ...]
    """Each foreign key of one column: that column, and the table and column to which it refers."""
    strict: bool
    statements: tuple[str, ...] = ()
    """What makes the table and its indexes, for a table that no migration script makes."""
    engine: str = ""
    """The name of the engine whose words `statements` are."""


class Hole(NamedTuple):
    """A place in a table where rows are missing or damaged, by their numbers in it: after the one, up to the other."""

    after: int | None
    upto: int | None


class Read(NamedTuple):
    """A row that could be read: its number in the table, and its values in the order of the columns."""

    rowid: int
    values: tuple[Any, ...]
    doubtful: bool = False
    """Its number does not fit where it was found."""


@dataclass(slots=True)
class Survey:
    """What is known of a store before its rows are read."""

    shapes: list[Shape] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is wrong with the store as a whole, and what is left behind of it, in words."""


class Wreck(ABC):
    """A damaged store that nobody else has open, and that is only read."""

    place: str
    survey: Survey

    @abstractmethod
    def rows(self, shape: Shape) -> Iterator[Read | Hole]:
        """The rows of a table, those first whose place in it is known; in constant memory."""

    @abstractmethod
    def keys(self, shape: Shape) -> Iterator[tuple[Any, ...] | None]:
        """The primary keys that an index of the table has, in its order; at last None where it is damaged or none."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raises StorageInUse where somebody has written to the store meanwhile."""
