"""The `kaged` command as tests run it: as a program, or in this process where that shows the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import click
from click.testing import CliRunner, Result

from kagedb.cli import kaged
from programs import run_python

KAGED = "from kagedb.cli import main; main()"


def run_kaged(
    *arguments: str, env: Mapping[str, str] | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `kaged` as a program; `before` is code that it runs first."""
    return run_python(f"{before}\n{KAGED}", *arguments, env=env)


def in_process(*arguments: str) -> Result:
    """Run `kaged` here; no store may be open."""
    return CliRunner().invoke(kaged, arguments, prog_name="kaged")


def answer(url: str, *arguments: str) -> str:
    """What a command prints about the store at `url`; it must succeed."""
    result = in_process("--url", url, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer_json(url: str, *arguments: str) -> Any:
    """The JSON document that a command prints with `--json`."""
    return json.loads(answer(url, *arguments, "--json"))


def commands(group: click.Group = kaged, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command that does something, by the words after `kaged`."""
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= commands(command, (*words, name))
        else:
            found[*words, name] = command
    return found
