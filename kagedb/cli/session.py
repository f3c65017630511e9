"""`kaged session`: the sessions of the projects."""

from __future__ import annotations

import click

from .options import Options, as_ulid, json_option, limit_option, pass_options, project_option
from .output import limited, show_block, show_json, show_list, show_record


@click.group
def session() -> None:
    """List, show and pin sessions."""


@session.command("list")
@project_option
@limit_option
@json_option
@pass_options
def list_sessions(options: Options, project: str | None, limit: int, as_json: bool) -> None:
    """List the sessions, newest first.

    JSON: a list of id, project, state, title, created_at, attached_at, detached_at, ended_at, pinned.
    """
    with options.reading():
        from ..models import Project, Session

        query = (
            Session.select(
                Session.id,
                Project.name.alias("project"),
                Session.state,
                Session.title,
                Session.created_at,
                Session.attached_at,
                Session.detached_at,
                Session.ended_at,
                Session.pinned,
            )
            .join(Project)
            .order_by(Session.id.desc())
        )
        if project is not None:
            query = query.where(Session.project == Project.named(project))
        rows = limited(query, limit)
    show_list(
        rows,
        ["id", "state", "pinned", "created_at", "ended_at", "project", "title"],
        options,
        as_json=as_json,
        limit=limit,
    )


@session.command
@click.argument("id", callback=as_ulid)
@json_option
@pass_options
def show(options: Options, id: str, as_json: bool) -> None:
    """Show a session.

    JSON: id, project, state, title, created_at, attached_at, detached_at, ended_at, pinned, runs (state: how many),
    metadata.
    """
    with options.reading():
        from peewee import fn

        from ..models import Run, Session

        found = Session.by_id(id)
        keys = ("state", "title", "created_at", "attached_at", "detached_at", "ended_at", "pinned")
        record = {"id": found.id, "project": found.project.name, **{key: getattr(found, key) for key in keys}}
        counts = Run.select(Run.state, fn.COUNT(Run.id)).where(Run.session == found).group_by(Run.state)
        runs = dict(counts.order_by(Run.state).tuples())
    if as_json:
        show_json({**record, "runs": runs, "metadata": found.metadata})
        return
    show_record({**record, "runs": [f"{count:,} {state}" for state, count in runs.items()]})
    if found.metadata:
        show_block("metadata", found.metadata)


@session.command
@click.argument("id", callback=as_ulid)
@pass_options
def pin(options: Options, id: str) -> None:
    """Keep a session and all that is below it, whatever is pruned."""
    with options.writing():
        from ..models import Session

        Session.by_id(id).pin()


@session.command
@click.argument("id", callback=as_ulid)
@pass_options
def unpin(options: Options, id: str) -> None:
    """Let pruning remove a session and what is below it again."""
    with options.writing():
        from ..models import Session

        Session.by_id(id).unpin()
