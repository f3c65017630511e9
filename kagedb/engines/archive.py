"""What a backup asks of an engine: a store's contents at one moment, a copy in one file, and the way back.

`Contents` is a state of a store that is read table by table, alike on both engines; `RowHashes` is one of which little
more than hashes is left. `Archiver` is made by `Engine.archiver()`, `Reader` by `open_reader`. What a backup set is,
and when it is good, is in kagedb.operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import HISTORY_TABLE

if TYPE_CHECKING:
    from .engine import Engine

COPY, SQL = "copy", "sql"
"""The forms of a set: the engine's own file, or the text of SQL statements that make the store anew."""

FIRST_OF_HISTORY = f"SELECT name, applied_at FROM {HISTORY_TABLE} ORDER BY name LIMIT 1"  # noqa: S608

INTEGER, REAL, TEXT, BLOB, BOOLEAN = "integer", "real", "text", "blob", "boolean"


@dataclass(frozen=True, slots=True)
class Table:
    """A table as both engines have it: its columns by name, with the kind of value of each; `key` orders its rows."""

    name: str
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    key: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pace:
    """How hard a copy may press: `bytes_per_second` (0: as fast as it goes), and whom it tells how far it is.

    Above `wal_bytes` of write-ahead log the throttle is lifted; at twice that the copy gives up, since a reader that is
    slower than the writers would fill the disk.
    """

    wal_bytes: int
    bytes_per_second: int = 0
    progress: Callable[[int, int], None] | None = None
    """Called with bytes done and in all, about."""


@dataclass(frozen=True, slots=True)
class Looking:
    """What somebody wants to see of each row of a table, while the rows go by once and in no order."""

    columns: tuple[str, ...]
    look: Callable[..., tuple[Any, ...]]
    """Takes a row's values of `columns`, and gives what is to be remembered of the row: its values of `remembered`."""
    remembered: tuple[str, ...] = ()
    """Columns that can be asked for afterwards, besides those of the key."""
    indexed: str = ""
    """One of those by which rows will be looked up, where it is not NULL."""


Looks = Callable[[Table], Looking | None]
"""Asked when the rows of a table begin."""


class State(ABC):
    """One unchanging state of a store, whatever is left of it."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """Every table, by name; those of plugins and the history too."""

    @abstractmethod
    def count(self, table: Table) -> int:
        """How many rows it has."""

    @abstractmethod
    def raw(self, sql: str, params: tuple[Any, ...] = ()) -> Any:
        """A cursor over a short query, written with `?`."""

    @abstractmethod
    def stream(self, sql: str, params: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a long query, in constant memory."""

    @abstractmethod
    def hashes(self, table: Table) -> Iterator[list[bytes]]:
        """The hashes of the rows (copy_text.py) in the order of their keys, some at a time; without a key in any."""


class RowHashes(State):
    """A state whose rows have gone by: `raw` and `stream` know no more of them than `Looks` had remembered."""


class Contents(State):
    """A state with all its rows."""

    finished = False
    """Whether it is read from the copy's own bytes, so that whatever is found here is true of the copy."""

    @abstractmethod
    def rows(self, table: Table) -> Iterator[tuple[Any, ...]]:
        """The rows in the order of their keys, as plain values in the order of `table.columns`; in constant memory.

        Those of a table without a key come in any order.
        """

    def hashes(self, table: Table) -> Iterator[list[bytes]]:
        from .copy_text import batches, hashes_of

        return map(hashes_of, batches(self.rows(table), table))

    def lines(self, table: Table) -> Iterator[bytes]:
        """The same rows as text, in pieces of whole lines; copy_text.py says which text."""
        from .copy_text import lines_of

        return lines_of(self.rows(table), table)

    @abstractmethod
    def give_up_beyond(self, log_bytes: int) -> None:
        """Raise StorageBusy in what is read from now on, where a log grows because this state is held.

        It may get twice as large as that, or as much larger than it is now.
        """

    @abstractmethod
    def damage(self) -> list[str]:
        """What the engine itself finds wrong: pages, indexes, references. Empty where nothing is."""


class Reader(ABC):
    """The data files of one engine's sets, read back without a store; made by `engines.open_reader`."""

    @abstractmethod
    def reading(
        self, data: Path, form: str, tables: list[Table], scratch: Path
    ) -> AbstractContextManager[Contents | RowHashes]:
        """What is in a data file, from its own bytes; `scratch` is an empty directory for that.

        Raises StorageCorrupt where it cannot be read to its end.
        """


@dataclass(frozen=True, slots=True)
class Present:
    """What can be read of the store that is at a place before another one is put there."""

    first: tuple[str, int] | None = None
    """The first line of its history: script and time, by which a store is known wherever it is."""
    head: tuple[int, str] | None = None
    """Its newest audit event: number, and hash in hex."""


class Archiver(ABC):
    """Copies of one engine's stores."""

    engine: Engine

    @abstractmethod
    def file_name(self, form: str) -> str:
        """What the data file of a set is called."""

    @abstractmethod
    def require_ready(self, form: str) -> None:
        """Raises SettingsError where a program that is needed is missing or too old; before anything is begun."""

    @abstractmethod
    def copy(self, target: Path, form: str, pace: Pace, *, packed: bool) -> AbstractContextManager[Contents]:
        """Write the store, as it is at one moment, into the new file `target`; gives its contents at that moment.

        The file is whole when the block has been left. `packed` says that it will be compressed by somebody else.
        Raises StorageBusy where the copy is too slow for the writers, StorageFull, StorageCorrupt.
        """

    # The way back.

    @abstractmethod
    def hold(self) -> None:
        """Keep everybody else out of the place, whatever is there. Raises StorageInUse, saying who has it open."""

    @abstractmethod
    def present(self) -> Present:
        """What is at the place; empty where there is nothing, or nothing that can be read."""

    @abstractmethod
    def put(self, data: Path, form: str, check: Callable[[Contents], None], record: Callable[[str], None]) -> str:
        """Make what is in `data` the store of the place; whoever is killed leaves the old one or the new one.

        Calls `check` with the new contents, which raises what is wrong, and then `record`, inside a transaction of the
        new store, with the name under which the old one is kept ("" where there was none). Gives that name.
        """
