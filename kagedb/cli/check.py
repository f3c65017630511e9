"""`kaged check`: what is wrong with the store, and what mends it."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..errors import EXIT_FAILED
from .options import Options, json_option, pass_options
from .output import show_json, visible


@click.command
@json_option
@pass_options
@click.pass_context
def check(ctx: click.Context, options: Options, as_json: bool) -> None:
    """Look for anything wrong with the store and its backups.

    Integrity, schema, audit log, permissions, write-ahead log, free space, clock, and the age of the newest verified
    backup. Works beside the daemon. Exit status 1: something was found.

    JSON: place, checked (names), findings (check, wrong, mend), notes.
    """
    with options.reading(any_schema=True, scripts=True) as storage:
        from ..operations import checking

        found = checking.check(storage)
    if as_json:
        show_json(asdict(found))
    else:
        for name in found.checked:
            mine = [finding for finding in found.findings if finding.check == name]
            if not mine:
                click.echo(f"{name}: good")
            for finding in mine:
                click.echo(f"{name}: {visible(finding.wrong)}")
                click.echo(f"    {visible(finding.mend)}")
        for note in found.notes:
            options.note(visible(f"note: {note}"))
    if found.findings:
        ctx.exit(EXIT_FAILED)
