"""`kaged record`: a command on a real terminal, recorded as a session."""

from __future__ import annotations

import os
import pwd
import sys

import click

from ..errors import EXIT_FAILED
from . import privileges
from .options import Options, pass_options
from .output import Told


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--project", metavar="NAME", help="Record into this project; not needed where there is only one.")
@click.option("--title", metavar="TEXT", default="", help="The title of the session; the command where it is missing.")
@click.argument("command", nargs=-1, metavar="[--] [COMMAND [ARGUMENT]...]", type=click.UNPROCESSED)
@click.pass_context
@pass_options
def record(options: Options, ctx: click.Context, project: str | None, title: str, command: tuple[str, ...]) -> None:
    """Run COMMAND, or your shell, on a terminal and record it.

    What it shows becomes a session with one run.

    Keys are passed on and not recorded. Ends with the exit status of the command (128 + N where signal N ended it; 126
    and 127 where it cannot be started), or 1 where it is 0 but the output could not be stored whole.
    """
    privileges.require_own_store(options.settings)
    with options.writing():
        from ..operations import record as recording

        sys.stdout.flush()
        done = recording.record(
            recording.choose_project(project), command or (_shell(),), title=title, actor=f"operator:{options.operator}"
        )
    for trouble in done.troubles:
        Told(trouble.message, trouble.hint, EXIT_FAILED).show()
    options.note(f"recorded; play it with: kaged transcript replay {done.transcript.id}")
    ctx.exit(done.exit_status or (EXIT_FAILED if done.troubles else 0))


def _shell() -> str:
    if shell := os.environ.get("SHELL"):
        return shell
    try:
        return pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    except KeyError:
        return "/bin/sh"
