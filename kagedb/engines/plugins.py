"""What a plugin's own tables ask of an engine: to keep a statement to them, to list them, to remove them.

Which statements there are, the ledger and the errors that its author reads are in models/plugin_tables.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..errors import StorageForbidden

if TYPE_CHECKING:
    from .database import StoreDatabase


def prefix(plugin: str) -> str:
    """How the name of everything begins that belongs to the plugin of that name."""
    return f"p_{plugin}__"


def refusal(plugin: str, what: str) -> StorageForbidden:
    """What the author reads whose statement wanted `what`."""
    return StorageForbidden(
        f"the plugin {plugin!r} can touch only its own tables, and wanted more: {what}",
        f"name tables and indexes {prefix(plugin)}..., and let references stay among them",
    )


class PluginTables(ABC):
    """The tables of plugins in one store."""

    def __init__(self, database: StoreDatabase) -> None:
        self.database = database

    @abstractmethod
    def confine(self, plugin: str, *, changes_schema: bool) -> AbstractContextManager[None]:
        """Inside a transaction or snapshot: while it lasts, the plugin's tables are all that this thread can touch.

        Raises StorageForbidden, when it is entered where the operator has to grant something first, and when a
        statement wanted more. `changes_schema` says that the statement makes, changes or drops something.
        """

    @abstractmethod
    def require_granted(self, plugin: str) -> None:
        """Raises StorageForbidden where the operator has to grant something before the plugin can have tables."""

    @abstractmethod
    def tables(self, plugin: str) -> list[str]:
        """The plugin's tables, sorted by name; none where it cannot have any."""

    @abstractmethod
    def drop(self, plugin: str) -> None:
        """Drop everything of the plugin; inside the caller's transaction."""
