"""How an engine receives a whole store: in one transaction, with what guards and indexes it laid aside meanwhile.

What is taken to be whole, and what is compared, is in kagedb/operations/transfer.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .archive import Contents, Table

if TYPE_CHECKING:
    from .engine import Engine


class Receiver(ABC):
    """The place of one engine as the target of a copy; made by `Engine.receiver()`. The place is held by `hold`."""

    engine: Engine
    takes_lines = False
    """Whether rows are best loaded as the lines that `Contents.lines` gives."""

    def hold(self) -> None:
        """Keep everybody else out of the place, whatever is there. Raises StorageInUse, saying who has it open."""
        self.engine.archiver().hold()

    def receive(
        self,
        make: Callable[[], None],
        fill: Callable[[Receiver], None],
        check: Callable[[Contents], None],
        *,
        more: Callable[[], None] | None = None,
    ) -> None:
        """Make the place hold what `fill` loads; an error, or being killed, leaves it as it was.

        `make` makes the tables where there are none, `more` what else is to be there. `check` sees the whole, with its
        guards and indexes, and raises what is wrong with it.
        """

        def work() -> None:
            if not self.engine.tables():
                make()
            if more is not None:
                more()
            with self.errors():
                made_again = self.lay_aside()
                self.empty()
                fill(self)
                for statement in made_again:
                    self.engine.database.raw(statement)
                check(self.contents())

        self.engine.database.slow_transaction_ms = 0
        self.replace(work)

    @abstractmethod
    def replace(self, work: Callable[[], None]) -> None:
        """Run `work` in one transaction at the end of which the place has the new store."""

    @abstractmethod
    def require_place(self) -> None:
        """Raises what would keep a store from being made here, as far as can be told without making one."""

    @abstractmethod
    def require_room(self, wanted_bytes: int) -> None:
        """Raises StorageFull where so much will not fit."""

    @abstractmethod
    def lay_aside(self) -> list[str]:
        """Drop what guards and checks rows one by one, and what is cheaper made at the end.

        Gives the statements that make all of it again, from what the engine itself says of it.
        """

    @abstractmethod
    def empty(self) -> None:
        """Remove the rows that a new store has."""

    @abstractmethod
    def load(self, table: Table, rows: Iterable[tuple[Any, ...]]) -> None:
        """Add rows, as they come; values in the order of `table.columns`, as `Contents.rows` gives them."""

    def load_lines(self, table: Table, pieces: Iterable[bytes]) -> None:
        """Add rows that are lines already; only where the engine `takes_lines`."""
        raise NotImplementedError

    @abstractmethod
    def contents(self) -> Contents:
        """What is in the place, inside the transaction."""

    @abstractmethod
    def errors(self) -> AbstractContextManager[None]:
        """A driver's error in the block becomes one of errors.py."""
