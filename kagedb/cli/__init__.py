"""The `kaged` command: the group that holds the families of commands, and `main`, the console script.

One file a family; each parses, calls and prints. A daemon can add the group to its own: `commands.add_command(kaged)`.
A family is imported when one of its commands is asked for, and the store when a command opens it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from .. import __version__
from .options import Options
from .output import EXIT_INTERRUPTED, telling

_FAMILIES = {
    "init": "store",
    "status": "store",
    "migrate": "store",
    "config": "store",
    "check": "check",
    "compact": "compact",
    "backup": "backup",
    "backups": "backup",
    "verify": "backup",
    "restore": "backup",
    "copy": "copy",
    "prune": "prune",
    "salvage": "salvage",
    "query": "query",
    "project": "project",
    "prompt": "prompt",
    "plugin": "plugin",
    "session": "session",
    "run": "run",
    "checkpoint": "checkpoint",
    "transcript": "transcript",
    "audit": "audit",
    "systemd": "systemd",
    "record": "record",
}
"""Each command, in the order of the help, and the file it is in, where it has the same name."""


class KagedGroup(click.Group):
    """A group whose commands are imported when they are asked for, and whose errors are told in two lines."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_FAMILIES, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        family = _FAMILIES.get(cmd_name)
        if family is None:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(f".{family}", __name__), cmd_name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with telling(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with telling(ctx):
            result = super().invoke(ctx)
            # Here, where a reader that went away or a full disk can still be told; Python's own flush comes too late.
            if sys.stdout is not None:
                sys.stdout.flush()
            return result


@click.group(cls=KagedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--user", "mode", flag_value="user", help="Per-user mode: the store is below your own home.")
@click.option("--system", "mode", flag_value="system", help="System mode: the store is below /var/lib/kaged.")
@click.option("--url", metavar="URL", help="The store: sqlite:///path/to/kaged.db or postgresql://user@host/database.")
@click.option("--config", metavar="FILE", help="The config file; it must be there.")
@click.option("-v", "--verbose", is_flag=True, help="Say what is going on, and show tracebacks of internal errors.")
@click.option("-q", "--quiet", is_flag=True, help="No notes and warnings, only errors and what was asked for.")
@click.version_option(__version__, "-V", "--version", prog_name="kaged", message="%(prog)s %(version)s")
@click.pass_context
def kaged(
    ctx: click.Context, mode: str | None, url: str | None, config: str | None, verbose: bool, quiet: bool
) -> None:
    """Look after the store of kaged.

    Where it is follows from --url, else KAGED_DATABASE_URL, else the config file, else the mode; `kaged config` says
    so. Exit status: 0 done; 1 it failed or found something wrong; 2 wrong usage or settings; 3 a damaged store;
    4 cannot tell; 75 busy, try again.
    """
    if verbose and quiet:
        raise click.UsageError("-v and -q contradict each other", ctx)
    ctx.obj = Options(url=url, mode=mode, config=config, verbose=verbose, quiet=quiet)
    ctx.obj.set_up_logging()


def main() -> None:
    """The console script `kaged`."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # A name that the terminal's encoding does not have is shown escaped; it is no reason to fail.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        kaged.main(prog_name="kaged")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
