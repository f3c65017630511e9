"""`kaged plugin`: the plugins that are installed in the projects."""

from __future__ import annotations

import click

from .options import Options, json_option, limit_option, pass_options, project_option
from .output import limited, show_block, show_json, show_list, show_record


@click.group
def plugin() -> None:
    """List and show plugins."""


@plugin.command("list")
@project_option
@limit_option
@json_option
@pass_options
def list_plugins(options: Options, project: str | None, limit: int, as_json: bool) -> None:
    """List the installed plugins, by project and name.

    JSON: a list of project, name, id, version, enabled, created_at.
    """
    with options.reading():
        from ..models import Plugin, Project

        query = (
            Plugin.select(
                Project.name.alias("project"),
                Plugin.name,
                Plugin.id,
                Plugin.version,
                Plugin.enabled,
                Plugin.created_at,
            )
            .join(Project)
            .where(Plugin.removed_at.is_null())
            .order_by(Project.name, Plugin.name)
        )
        if project is not None:
            query = query.where(Plugin.project == Project.named(project))
        rows = limited(query, limit)
    show_list(
        rows, ["id", "enabled", "created_at", "project", "name", "version"], options, as_json=as_json, limit=limit
    )


@plugin.command
@click.argument("project")
@click.argument("name")
@json_option
@pass_options
def show(options: Options, project: str, name: str, as_json: bool) -> None:
    """Show a plugin.

    JSON: name, project, id, version, enabled, created_at, permissions, state_keys (how many), manifest.
    """
    with options.reading():
        from ..models import Plugin, PluginState, Project

        found = Plugin.named(Project.named(project), name)
        record = {
            "name": found.name,
            "project": project,
            "id": found.id,
            "version": found.version,
            "enabled": found.enabled,
            "created_at": found.created_at,
            "permissions": found.manifest["permissions"],
            "state_keys": PluginState.select().where(PluginState.plugin == found).count(),
        }
    if as_json:
        show_json({**record, "manifest": found.manifest})
        return
    show_record(record)
    show_block("manifest", found.manifest)
