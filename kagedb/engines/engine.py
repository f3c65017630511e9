"""The small interface behind which the engines stand. Nothing above this folder asks which one it is.

An engine is one store at one place: its database (a Peewee database with the words of transactions.py), the locks
between processes, its catalogue, and the few whole-store operations that only it knows how to do.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from ..settings import Settings
    from .archive import Archiver, Contents
    from .compacting import Compaction
    from .database import StoreDatabase
    from .query import Answer
    from .salvage import Wreck
    from .transfer import Receiver

HISTORY_TABLE = "schema_migration"
"""The table of applied migrations; a place that has it is a kaged store."""

PLUGIN_TABLE = re.compile(r"p_.+__")
"""Tables and views of plugins, which have a ledger of their own and are not part of the schema."""

STARTER_WAIT_SECONDS = 600.0
"""How long a starter waits for another one's migration: it copies and rewrites the whole store, minutes on a card."""

USE_GRACE_SECONDS = 1.0
"""How long `exclude` tries: another starter holds the use lock for the instant in which it reads the history."""


class Holder(NamedTuple):
    """Who holds a lock: process id (0 where it cannot be told) and what it said of itself."""

    pid: int
    description: str = ""

    def __str__(self) -> str:
        who = f"process {self.pid}" if self.pid else "another process"
        return f"{who} ({self.description})" if self.description else who


class Figures(NamedTuple):
    """What `kaged status` says of a store's size and library."""

    library: str
    """Engine and version in words, e.g. "SQLite 3.46.1"."""
    bytes_by_part: dict[str, int]
    """Part of the store to bytes, e.g. {"database": ..., "wal": ...}."""
    warnings: Sequence[str] = ()
    """What the operator should know of this library or place; each says what mends it."""
    free_bytes: int = 0
    """Of those bytes, what holds nothing and `compact` would give back or make usable again, about."""


class Engine(ABC):
    """One store at one place. Made by `engines.open_engine`; nothing is touched before `open`."""

    name: ClassVar[str]
    database: StoreDatabase

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        self.settings = settings
        self.read_only = read_only

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the store is, for people; never with a secret."""

    @property
    @abstractmethod
    def audit_key_path(self) -> Path:
        """Where the current key of the audit log's seals is kept, if there is one: beside the store, never in it."""

    @abstractmethod
    def open(self, *, create: bool) -> None:
        """Check the place and make ready to connect; with `create`, a missing store may be made by `change_schema`.

        Raises StorageNotFound where there is none and none may be made, StorageForbidden, StorageCorrupt.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is a store at the place, of whatever schema."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection of this process and give back every lock."""

    # Forks (forks.py).

    @abstractmethod
    def before_fork(self) -> None: ...

    @abstractmethod
    def after_fork_in_parent(self) -> None: ...

    @abstractmethod
    def after_fork_in_child(self) -> None: ...

    # Locks between processes. They end with the process, however it dies.

    @abstractmethod
    def share(self) -> None:
        """Take the use lock, shared. Waits for a migration; raises StorageInUse where a restore holds the store."""

    @abstractmethod
    def unshare(self) -> None: ...

    @abstractmethod
    def exclude(self) -> None:
        """Make the shared use lock exclusive. Raises StorageInUse, saying who has the store open."""

    @abstractmethod
    def readmit(self) -> None:
        """Make the exclusive use lock shared again."""

    @abstractmethod
    def starters_line(self) -> AbstractContextManager[None]:
        """Where starters that found an old schema wait for each other."""

    @abstractmethod
    def own(self, description: str) -> None:
        """Become the one owner (the daemon). Raises StorageInUse, saying who owns the store."""

    @abstractmethod
    def owner(self) -> Holder | None:
        """Who owns the store, other than this process."""

    # The catalogue.

    @abstractmethod
    def tables(self) -> list[str]:
        """The store's tables, sorted by name."""

    @abstractmethod
    def views(self) -> dict[str, tuple[str, ...]]:
        """The store's views, sorted by name, with the columns of each in their order."""

    @abstractmethod
    def catalogue(self) -> list[str]:
        """The schema as sorted lines: columns, types, collations, keys, indexes, constraints, triggers and their state.

        Two stores of one engine have the same lines when, and only when, they have the same schema.
        """

    @abstractmethod
    def change_schema(self, work: Callable[[], None]) -> None:
        """Run `work` in one transaction in which the schema may change; all of it or nothing.

        A store that is not there yet is made whole or not at all. Raises what `work` raises, MigrationFailed where it
        leaves a dangling reference.
        """

    # Whole-store words.

    @abstractmethod
    def figures(self) -> Figures: ...

    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of the store on its disk, about."""

    @abstractmethod
    def archiver(self) -> Archiver:
        """How the store is copied into a backup set and brought back (archive.py)."""

    @abstractmethod
    def receiver(self) -> Receiver:
        """How the place becomes the target of a copy (transfer.py)."""

    @abstractmethod
    def wreck(self, make: Callable[[Engine], None]) -> AbstractContextManager[Wreck]:
        """What can be read of a damaged store (salvage.py), kept from everybody else; the engine is not opened.

        `make` makes the tables of this version in a fresh engine. Raises StorageNotFound, StorageInUse; StorageCorrupt
        where nothing looks like a store; StateError where the files are not ours to read.
        """

    @abstractmethod
    def reading(self) -> AbstractContextManager[Contents]:
        """The store as it is at one moment, through a connection of its own, for as long as the block lasts."""

    @abstractmethod
    def query(self, sql: str, named: Mapping[str, str], positional: Sequence[str]) -> AbstractContextManager[Answer]:
        """The answer to one statement that somebody has written, with values for each `:name` and `?` in it.

        Whatever the text is, it can only read. Raises ReadOnlyStorage where it would do more, InvalidValue where it is
        wrong. Ctrl-C ends it.
        """

    @abstractmethod
    def require_space(self) -> None:
        """Raises StorageFull where the disk of the store has not enough room to rewrite it once."""

    @abstractmethod
    def erase_traces(self, table: str) -> None:
        """See to it that bytes removed from `table` are gone from the database's own files.

        Raises StorageBusy where a reader keeps them there. The file system and the disk may still hold them.
        """

    @abstractmethod
    def compact(self, run: Compaction) -> None:
        """Give back the space that holds nothing, beside whoever reads and writes, and the marks that are missing.

        Says in `run` what came of it. Raises StorageInUse where it needs the store to itself, StorageFull.
        """

    @contextmanager
    def gently(self) -> Iterator[Callable[[int], float]]:
        """While the block lasts, no commit of this thread does work for others that can be done in a turn of its own.

        Gives what does it: to be called after each transaction with the pages that it has written, about. That gives
        the seconds for which it kept other writers waiting.
        """
        yield lambda pages: 0.0

    @abstractmethod
    def until(self, moment: float) -> AbstractContextManager[None]:
        """End what this thread asks inside the block at `moment` (time.monotonic()): it raises TimeIsUp.

        The block is a short part of a snapshot; Ctrl-C is seen in it where one statement takes long.
        """

    @abstractmethod
    def writer(self) -> Holder | None:
        """Who has the turn to write at this moment, other than this process."""

    @abstractmethod
    def damage(self) -> list[str]:
        """What the engine itself finds wrong with the store: pages, indexes, references. Reads all of it."""

    @abstractmethod
    def exposed(self) -> list[str]:
        """The files of the store that others may read or that are somebody else's; each with what mends that."""

    @abstractmethod
    def missing_marks(self) -> list[str]:
        """What a store reloaded from a dump has lost: application id, auto_vacuum and the like."""
