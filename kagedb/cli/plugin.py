"""`kaged plugin`: the plugins that are installed in the projects, and the state that they keep."""

from __future__ import annotations

from typing import IO

import click

from .options import Options, json_option, limit_option, output_option, pass_options, project_option
from .output import limited, shortened, show_block, show_json, show_list, show_record, size, write_out


@click.group
def plugin() -> None:
    """List and show plugins, and look after their state."""


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

    JSON: name, project, id, version, enabled, created_at, permissions, state_keys (how many), tables (its own),
    manifest.
    """
    with options.reading():
        from ..models import Plugin, Project

        found = Plugin.named(Project.named(project), name)
        record = {
            "name": found.name,
            "project": project,
            "id": found.id,
            "version": found.version,
            "enabled": found.enabled,
            "created_at": found.created_at,
            "permissions": found.manifest["permissions"],
            "state_keys": found.state.usage().keys,
            "tables": found.database().tables(),
        }
    if as_json:
        show_json({**record, "manifest": found.manifest})
        return
    show_record(record)
    show_block("manifest", found.manifest)


@plugin.command
@click.argument("project")
@click.argument("name")
@click.option("--prefix", default="", metavar="TEXT", help="Only keys that begin so.")
@click.option("--after", metavar="KEY", help="Only keys after this one.")
@limit_option
@json_option
@pass_options
def state(options: Options, project: str, name: str, prefix: str, after: str | None, limit: int, as_json: bool) -> None:
    """List the keys of a plugin's state with their values, in order.

    JSON: a list of key, revision, expires_at (null where it stays), value.
    """
    with options.reading():
        from ..models import Plugin, Project

        found = Plugin.named(Project.named(project), name).state
        entries = found.list(prefix, after=after, limit=limit + 1 if limit else found.usage().keys)
    rows = [
        {"key": entry.key, "revision": entry.revision, "expires_at": entry.expires_at, "value": entry.value}
        for entry in entries
    ]
    if not as_json:
        for row in rows:
            row["value"] = shortened(row["value"])
    show_list(rows, ["key", "revision", "expires_at", "value"], options, as_json=as_json, limit=limit)


@plugin.command
@click.argument("project")
@click.argument("name")
@json_option
@pass_options
def usage(options: Options, project: str, name: str, as_json: bool) -> None:
    """Show how much of its quota a plugin's state takes.

    JSON: keys, bytes, max_keys, max_bytes.
    """
    with options.reading():
        from dataclasses import asdict

        from ..models import Plugin, Project

        used = Plugin.named(Project.named(project), name).state.usage()
    if as_json:
        show_json(asdict(used))
        return
    show_record(
        {"keys": f"{used.keys:,} of {used.max_keys:,}", "size": f"{size(used.bytes)} of {size(used.max_bytes)}"}
    )


@plugin.command
@click.argument("project")
@click.argument("name")
@output_option
@pass_options
def export(options: Options, project: str, name: str, output: str) -> None:
    """Write a plugin's whole state as lines of JSON, for `load`."""
    with options.reading():
        from ..models import Plugin, Project

        text = Plugin.named(Project.named(project), name).state.export()
    write_out(output, [text.encode()])


@plugin.command
@click.argument("project")
@click.argument("name")
@click.argument("file", type=click.File(encoding="utf-8"))
@pass_options
def load(options: Options, project: str, name: str, file: IO[str]) -> None:
    """Put an export in the place of a plugin's whole state. FILE - is standard input."""
    text = file.read()
    with options.writing():
        from ..models import Plugin, Project

        keys = Plugin.named(Project.named(project), name).state.load(text)
    options.note(f"the plugin {name!r} has {keys:,} keys now")


@plugin.command
@click.argument("project")
@click.argument("name")
@click.confirmation_option("--yes", prompt="Remove every key of the plugin's state?", help="Do not ask.")
@pass_options
def wipe(options: Options, project: str, name: str) -> None:
    """Remove every key of a plugin's state. The plugin and its tables stay."""
    with options.writing():
        from ..models import Plugin, Project

        keys = Plugin.named(Project.named(project), name).state.wipe()
    options.note(f"removed {keys:,} keys")
