"""`kaged check`: what is wrong with the store, and what mends it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

import click

from ..errors import StorageError
from .options import Options, deadline_option, json_option, pass_options
from .output import show_json, visible
from .progress import end_tidily, progress_bars


@click.command
@click.option("--quick", is_flag=True, help="Leave out what reads the whole store.")
@deadline_option
@json_option
@pass_options
@click.pass_context
def check(ctx: click.Context, options: Options, quick: bool, deadline: float | None, as_json: bool) -> None:
    """Look for anything wrong with the store and its backups.

    Schema, permissions, log, space, clock, backups; then, without --quick, integrity, hashes, blobs and audit log.
    Works beside the daemon. Exit status 1: something was found; 3: damage was found; 4: nothing was found, but not
    all was looked at.

    JSON: place, checked (names), left_out and unfinished (check, why), findings (check, wrong, mend, damage), notes.
    """
    end_tidily()
    with ExitStack() as stack:
        try:
            storage = stack.enter_context(options.reading(any_schema=True, scripts=True, snapshot=False))
        except StorageError as error:
            from ..operations import checking

            found = checking.unopened(options.settings, error)
        else:
            from ..operations import checking

            tell = stack.enter_context(progress_bars(options))
            found = checking.check(storage, quick=quick, deadline_seconds=deadline, progress=tell)
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
        for said, of in (("left out", found.left_out), ("cannot be told", found.unfinished)):
            for why in dict.fromkeys(one.why for one in of):
                click.echo(f"{said}, {visible(why)}: {', '.join(one.check for one in of if one.why == why)}")
        for note in found.notes:
            options.note(visible(f"note: {note}"))
    ctx.exit(found.exit_status)
