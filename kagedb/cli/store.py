"""`kaged init`, `status`, `migrate` and `config`: the store as a whole."""

from __future__ import annotations

import os
from dataclasses import asdict

import click

from . import privileges
from .options import Options, json_option, pass_options
from .output import Row, local_time, show_json, show_record, show_table, size, visible


@click.command
@pass_options
def init(options: Options) -> None:
    """Make the store, and say where.

    A store of an older schema is migrated; where all is well already, nothing happens. In system mode root makes the
    home for the user kaged.
    """
    said = privileges.prepare_home(options.settings)
    with options.migrating() as storage:
        standing = storage.standing
        place, copy = storage.engine.place, storage.kept_copy
    if standing is None or not standing.pending:
        done = "the store is there already"
    else:
        done = "migrated the store" if standing.applied else "made the store"
    click.echo(f"{done}: {visible(place)} ({options.settings.mode} mode)")
    if copy is not None:
        click.echo(f"a copy from before the migration: {visible(os.fspath(copy))}")
    if said:
        options.note(visible(said))


@click.command
@json_option
@pass_options
def status(options: Options, as_json: bool) -> None:
    """Say where the store is and how it is.

    Its place, size, rows, and who has it. Changes nothing; works beside the daemon, and on a store that is not
    migrated yet.

    JSON: place, origin, mode, engine, library, schema, pending, bytes_by_part, free_bytes (what holds nothing, about),
    writer_busy_percent (how often somebody wrote while it was looked), rows, owner (pid, description), newest_at,
    backup_at (when the newest verified backup was made), warnings.
    """
    with options.reading(any_schema=True) as storage:
        # It imports the store, which `kaged --help` must not.
        from ..operations import health

        found = health.status(storage)
    if as_json:
        show_json({**asdict(found), "owner": found.owner and found.owner._asdict()})
        return
    pending = f"{len(found.pending)} pending, run: kaged migrate" if found.pending else "current"
    rows = [f"{table} {count:,}" for table, count in found.rows.items() if count]
    show_record(
        {
            "store": found.place,
            "named by": found.origin,
            "mode": found.mode,
            "engine": found.library,
            "schema": f"{found.schema} ({pending})",
            "size": [f"{part} {size(count)}" for part, count in found.bytes_by_part.items()],
            "free": size(found.free_bytes),
            "writer": f"busy {found.writer_busy_percent} % of the time",
            "rows": rows or "none",
            "newest row": local_time(found.newest_at),
            "backup": local_time(found.backup_at) if found.backup_at else "none that is verified",
            "owner": str(found.owner) if found.owner else "no daemon",
        }
    )
    for warning in found.warnings:
        click.echo(f"warning: {visible(warning)}")


@click.command
@click.option("--plan", is_flag=True, help="Only say what would be done.")
@json_option
@pass_options
def migrate(options: Options, plan: bool, as_json: bool) -> None:
    """Bring the store to this version's schema.

    A copy of it is made before; nobody may have it open.

    JSON: place, from, to, applied, copy. JSON with --plan: place, schema, pending (name, summary), copy_directory,
    copy_bytes, free_bytes, obstacles.
    """
    if plan:
        _show_plan(options, as_json)
        return
    # A store that is missing is for `init` to make: a mistyped path must not become an empty one.
    with options.reading(any_schema=True, scripts=True):
        pass
    with options.migrating() as storage:
        standing = storage.standing
        assert standing is not None, "an open store has been looked at"
        done: Row = {
            "place": storage.engine.place,
            "from": standing.version,
            "to": standing.pending[-1].name if standing.pending else standing.version,
            "applied": [script.name for script in standing.pending],
            "copy": os.fspath(storage.kept_copy) if storage.kept_copy else None,
        }
    if as_json:
        show_json(done)
    elif not done["applied"]:
        click.echo(f"nothing to do: {visible(done['place'])} has the schema {done['to']}")
    else:
        show_record(done)


def _show_plan(options: Options, as_json: bool) -> None:
    with options.reading(any_schema=True, scripts=True) as storage:
        from ..operations import health

        found = health.plan(storage)
    if as_json:
        show_json(asdict(found))
        return
    if not found.pending:
        click.echo(f"nothing to do: {visible(found.place)} has the schema {found.schema}")
        return
    show_record(
        {
            "store": found.place,
            "schema": found.schema,
            "copy first": f"{size(found.copy_bytes)} into {found.copy_directory} ({size(found.free_bytes)} free)",
        }
    )
    click.echo()
    show_table([asdict(script) for script in found.pending], ["name", "summary"])
    for obstacle in found.obstacles:
        click.echo(f"in the way: {visible(obstacle)}")


@click.command
@json_option
@pass_options
def config(options: Options, as_json: bool) -> None:
    """Show each setting and where it was set.

    JSON: a list of name, value (as text), origin.
    """
    rows = [{"name": one.name, "value": one.value, "origin": one.origin} for one in options.settings.effective()]
    if as_json:
        show_json(rows)
    else:
        show_table(rows, ["name", "value", "origin"])
