"""`kaged systemd`: the timers that back up every night and look after the store every week, of the system or a user."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Options, json_option, pass_options
from .output import show_json, visible

if TYPE_CHECKING:
    from ..operations.systemd import UnitFile


def _mode_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option("--root", metavar="DIR", default="/", help="The system's files below this directory: an image."),
        click.option("--system", "mode", flag_value="system", help="For the system: /etc/systemd/system."),
        click.option("--user", "mode", flag_value="user", help="For your own account: ~/.config/systemd/user."),
    ):
        command = decorate(command)
    return command


@click.group
def systemd() -> None:
    """Back up, prune, compact, check and verify by timers."""


@systemd.command
@_mode_options
@json_option
@pass_options
def show(options: Options, mode: str | None, root: str, as_json: bool) -> None:
    """Print the files that `install` would write.

    JSON: a list of path, text.
    """
    files, _ = _files(options, mode, root)
    if as_json:
        show_json([{"path": os.fspath(file.path), "text": file.text} for file in files])
        return
    click.echo("\n".join(f"## {visible(os.fspath(file.path))}\n{file.text}" for file in files), nl=False)


@systemd.command
@_mode_options
@pass_options
def install(options: Options, mode: str | None, root: str) -> None:
    """Write the units, and say how they are started.

    The paths in them are those of this installation and store.
    """
    from ..operations import systemd as units

    files, chosen = _files(options, mode, root)
    units.install(files)
    for file in files:
        click.echo(f"wrote {visible(os.fspath(file.path))}")
    flag = "--user " if chosen == "user" else ""
    click.echo("to start them:")
    if chosen == "system":
        click.echo("  systemd-sysusers && systemd-tmpfiles --create")
    click.echo(f"  systemctl {flag}daemon-reload")
    click.echo(f"  systemctl {flag}enable --now {' '.join(units.TIMERS)}")
    if chosen == "user" and not units.lingers():
        click.echo("a user's timers run only while the user is logged in; to let them run always:")
        click.echo("  loginctl enable-linger")


@systemd.command
@_mode_options
@pass_options
def uninstall(options: Options, mode: str | None, root: str) -> None:
    """Remove what `install` wrote; drop-ins of your own stay."""
    from ..operations import systemd as units

    settings = _options(options, mode).settings
    removed = units.uninstall(settings, Path(os.path.abspath(root)))
    for path in removed:
        click.echo(f"removed {visible(os.fspath(path))}")
    if not removed:
        options.note("nothing of it was there")
        return
    flag = "--user " if settings.mode == "user" else ""
    click.echo("to stop what is running of them:")
    click.echo(f"  systemctl {flag}disable --now {' '.join(units.TIMERS)}; systemctl {flag}daemon-reload")


def _options(options: Options, mode: str | None) -> Options:
    return options if mode is None else replace(options, mode=mode)


def _files(options: Options, mode: str | None, root: str) -> tuple[list[UnitFile], str]:
    from ..operations import systemd as units

    settings = _options(options, mode).settings
    return units.unit_files(settings, Path(os.path.abspath(root)), units.program()), settings.mode
