"""`kaged project`: the projects and their config."""

from __future__ import annotations

import click

from .options import Options, json_option, limit_option, pass_options
from .output import limited, show_block, show_json, show_list, show_record, visible


@click.group
def project() -> None:
    """List, show and add projects."""


@project.command("list")
@limit_option
@json_option
@pass_options
def list_projects(options: Options, limit: int, as_json: bool) -> None:
    """List the projects, by name.

    JSON: a list of name, id, created_at, archived_at.
    """
    with options.reading():
        from ..models import Project

        query = Project.select(Project.name, Project.id, Project.created_at, Project.archived_at).order_by(Project.name)
        rows = limited(query, limit)
    show_list(rows, ["id", "created_at", "archived_at", "name"], options, as_json=as_json, limit=limit)


@project.command
@click.argument("name")
@json_option
@pass_options
def add(options: Options, name: str, as_json: bool) -> None:
    """Add a project. JSON: name, id."""
    with options.writing():
        from ..models import Project

        added = Project.add(name, actor=f"operator:{options.operator}")
    if as_json:
        show_json({"name": added.name, "id": added.id})
    else:
        click.echo(f"added the project {visible(added.name)}")


@project.command
@click.argument("name")
@json_option
@pass_options
def show(options: Options, name: str, as_json: bool) -> None:
    """Show a project with its newest config.

    JSON: name, id, created_at, archived_at, prompts, plugins, sessions (how many), config (version, id, created_at,
    author, message, digest, source, parsed; null before the first).
    """
    with options.reading():
        from ..models import Plugin, Project, Prompt, Session

        found = Project.named(name)
        newest = found.config()
        record = {
            "name": found.name,
            "id": found.id,
            "created_at": found.created_at,
            "archived_at": found.archived_at,
            "prompts": Prompt.select().where(Prompt.project == found).count(),
            "plugins": Plugin.select().where((Plugin.project == found) & Plugin.removed_at.is_null()).count(),
            "sessions": Session.select().where(Session.project == found).count(),
        }
    keys = ("version", "id", "created_at", "author", "message", "digest", "source", "parsed")
    config = None if newest is None else {key: getattr(newest, key) for key in keys}
    if as_json:
        show_json({**record, "config": config})
        return
    show_record(record)
    if config is not None:
        source, parsed = config.pop("source"), config.pop("parsed")
        click.echo("\nconfig:")
        show_record(config)
        show_block("source", source)
        show_block("parsed", parsed)
