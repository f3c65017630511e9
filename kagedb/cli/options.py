"""What was said before the command, how a command opens the store it means, and options that many commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from ..identity import is_ulid
from ..settings import Settings, load
from . import privileges

if TYPE_CHECKING:
    from ..storage import Storage

ROWS_SHOWN = 50
"""Rows of a list where --limit says nothing: two screens."""


@dataclass
class Options:
    """The options of `kaged` itself."""

    url: str | None
    mode: str | None
    config: str | None
    verbose: bool
    quiet: bool
    operator: str = field(default_factory=privileges.login_name)
    """Who is at the keyboard."""

    @cached_property
    def settings(self) -> Settings:
        """The settings in force. Raises SettingsError."""
        return load(url=self.url, mode=self.mode, config=self.config)

    def set_up_logging(self) -> None:
        """Warnings go to stderr, with -v everything, with -q errors alone. A program that logs is left alone."""
        import logging

        logger = logging.getLogger("kagedb")
        logger.setLevel(logging.DEBUG if self.verbose else logging.ERROR if self.quiet else logging.WARNING)
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("kaged: %(message)s"))
            logger.addHandler(handler)

    def note(self, text: str) -> None:
        """Say something beside what was asked for, unless -q."""
        if not self.quiet:
            click.echo(text, err=True)

    @contextmanager
    def reading(self, *, any_schema: bool = False, scripts: bool = False, snapshot: bool = True) -> Iterator[Storage]:
        """The store, opened to be read, in one snapshot unless it is to be watched.

        Print after the block: a reader that stops reading must not hold the snapshot. Raises SchemaTooOld where
        migrations are pending, except with `any_schema`. `scripts` says that the migration scripts will be read.
        """
        privileges.become_owner(self.settings, scripts=scripts)
        from .. import storage as store
        from ..models.base import bound_store

        with store.open_storage(self.settings, migrate=False, read_only=True) as storage:
            if not any_schema:
                bound_store()
            with storage.snapshot() if snapshot else nullcontext():
                yield storage

    @contextmanager
    def writing(self) -> Iterator[Storage]:
        """The store, opened to be changed; it must be there, with this version's schema."""
        privileges.become_owner(self.settings)
        from .. import storage as store

        with store.open_storage(self.settings, migrate=False) as storage:
            yield storage

    @contextmanager
    def migrating(self) -> Iterator[Storage]:
        """The store, made if it is missing and migrated if it is old, by the operator."""
        privileges.become_owner(self.settings, scripts=True)
        from .. import storage as store

        with store.open_storage(self.settings, actor=f"operator:{self.operator}") as storage:
            yield storage


pass_options = click.make_pass_decorator(Options)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document; times are Unix milliseconds."
)

project_option = click.option("--project", metavar="NAME", help="Only what belongs to this project.")

deadline_option = click.option(
    "--deadline", type=click.FloatRange(min=0), metavar="SECONDS", help="Go on for so long at most, then say how far."
)

output_option = click.option(
    "-o", "--output", default="-", metavar="FILE", help="A new file; - is standard output.", show_default=True
)


def limit_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--limit N` of a list."""
    decorate = click.option(
        "--limit",
        type=click.IntRange(min=0),
        default=ROWS_SHOWN,
        show_default=True,
        help="At most so many rows; 0 for all.",
    )
    return decorate(command)


def session_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--session ID` of a list."""
    return click.option("--session", callback=as_ulid, metavar="ID", help="Only those of this session.")(command)


def narrowed(query: Any, key: Any, *, session: str | None, project: str | None = None) -> Any:
    """`query` as `--session` and `--project` want it; `key` is its reference to the session. Raises NotFound."""
    from ..models import Project, Session

    if session is not None:
        query = query.where(key == Session.by_id(session).id)
    if project is not None:
        query = query.where(key.in_(Session.select(Session.id).where(Session.project == Project.named(project).id)))
    return query


def as_ulid(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A callback for an argument or option that is a ULID as people type it, in lower case too."""
    if value is None:
        return None
    text = value.upper()
    if not is_ulid(text):
        raise click.BadParameter(f"{value!r} is not an id; an id has 26 letters and digits", ctx, param)
    return text
