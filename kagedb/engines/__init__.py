"""Everything that only one engine knows. Nothing outside this folder asks which engine it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..settings import Settings
    from .archive import Looks, Reader
    from .engine import Engine

MODULES_IMPORTED_LATER = tuple(
    f"{__name__}.{name}"
    for name in (
        "compacting",
        "copy_text",
        "postgres_compact",
        "postgres_query",
        "postgres_transfer",
        "sqlite_compact",
        "sqlite_condition",
        "sqlite_making",
        "sqlite_query",
        "sqlite_transfer",
        "sqlite_wreck",
    )
)
"""What the engines import when it is needed, for whoever must import everything beforehand."""


def open_engine(settings: Settings, *, read_only: bool = False) -> Engine:
    """The engine for `settings.url`; only its own module is imported."""
    if settings.url.scheme == "sqlite":
        from .sqlite import SqliteEngine

        return SqliteEngine(settings, read_only=read_only)
    from .postgres import PostgresEngine

    return PostgresEngine(settings, read_only=read_only)


def open_reader(name: str, settings: Settings, looks: Looks) -> Reader:
    """What reads the backup sets of the engine `name`, whichever one the store of `settings` is on.

    Where the rows of a set are in no order, each is shown to `looks` when it is read.
    """
    if name == "sqlite":
        from .sqlite_archive import SqliteReader

        return SqliteReader()
    from .postgres_reading import PostgresReader

    return PostgresReader(settings, looks)
