"""`kaged run`: agent runs and the subagent invocations below them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ..errors import NotFound
from .options import Options, as_ulid, json_option, limit_option, narrowed, output_option, pass_options, session_option
from .output import (
    Row,
    duration,
    limited,
    local_time,
    refuse_terminal,
    show_block,
    show_json,
    show_list,
    show_record,
    show_table,
    show_text,
    size,
    write_out,
)

if TYPE_CHECKING:
    from ..models import Run, RunNode


@click.group
def run() -> None:
    """List and show runs of agents."""


@run.command("list")
@session_option
@limit_option
@json_option
@pass_options
def list_runs(options: Options, session: str | None, limit: int, as_json: bool) -> None:
    """List the runs, newest first.

    JSON: a list of id, session, parent, agent, state, exit_status, error, started_at, finished_at.
    """
    with options.reading():
        from ..models import Run

        query = Run.select(
            Run.id,
            Run.session,
            Run.parent,
            Run.agent,
            Run.state,
            Run.exit_status,
            Run.error,
            Run.started_at,
            Run.finished_at,
        ).order_by(Run.id.desc())
        rows = limited(narrowed(query, Run.session, session=session), limit)
    for row in rows:
        row["exit"] = row["exit_status"]
        row["took"] = _took(row)
    keys = ["id", "state", "exit", "started_at", "took", "session", "agent"]
    if as_json:
        for row in rows:
            del row["exit"], row["took"]
    show_list(rows, keys, options, as_json=as_json, limit=limit)


@run.command
@click.argument("id", callback=as_ulid)
@json_option
@pass_options
def show(options: Options, id: str, as_json: bool) -> None:
    """Show a run with its input and output.

    JSON: id, session, parent, agent, state, exit_status, error, started_at, finished_at, prompt (project, name,
    version; null where none was named), attachments (name, kind, size), pruned_at (when retention removed input, output
    and attachments, or null), input, output.
    """
    with options.reading():
        from ..models import Run, RunAttachment

        found = Run.by_id(id)
        record = _record(found)
        attachments = [
            {"name": one.name, "kind": one.kind, "size": one.size}
            for one in found.attachments.order_by(RunAttachment.id)
        ]
        version = found.prompt_version
        prompt = None
        if version is not None:
            named = version.prompt
            prompt = {"project": named.project.name, "name": named.name, "version": version.version}
    if as_json:
        show_json(
            {
                **record,
                "prompt": prompt,
                "attachments": attachments,
                "pruned_at": found.pruned_at,
                "input": found.input,
                "output": found.output,
            }
        )
        return
    error = record.pop("error")
    show_record(
        {
            **record,
            "took": _took(record),
            "prompt": f"{prompt['project']} {prompt['name']} version {prompt['version']}" if prompt else None,
            "attachments": [f"{one['name']} ({one['kind']}, {size(one['size'])})" for one in attachments],
        }
    )
    if error is not None:
        show_block("error", error)
    if found.pruned_at is not None:
        click.echo(f"\ninput, output and attachments were pruned: {local_time(found.pruned_at)}")
        return
    show_block("input", found.input)
    if found.output is not None:
        show_block("output", found.output)


@run.command
@click.argument("id", callback=as_ulid)
@click.argument("name")
@output_option
@pass_options
def attachment(options: Options, id: str, name: str, output: str) -> None:
    """Write what was attached to a run under a name.

    Every byte of it is checked.
    """
    with options.reading():
        from ..models import Run

        data = Run.by_id(id).attachment(name)
    if isinstance(data, bytes):
        refuse_terminal(output)
        write_out(output, [data])
    elif output == "-" and sys.stdout.isatty():
        show_text(data)
    else:
        write_out(output, [data.encode("utf-8", "surrogatepass")])


@run.command
@click.argument("id", callback=as_ulid)
@json_option
@pass_options
def tree(options: Options, id: str, as_json: bool) -> None:
    """Show runs and their subagents as a tree.

    ID is a session, or a run with all below it; oldest first.

    JSON: a list in that order of depth, id, session, parent, agent, state, exit_status, error, started_at,
    finished_at.
    """
    with options.reading():
        from ..models import Run, RunNode, Session

        if Session.select().where(Session.id == id).exists():
            forest = RunNode.forest(Run.of(Session.by_id(id)))
        elif Run.select().where(Run.id == id).exists():
            forest = [Run.by_id(id).tree()]
        else:
            raise NotFound(f"there is no session and no run {id}", "list them with: kaged session list, kaged run list")
    rows = _flat(forest)
    if as_json:
        show_json(rows)
        return
    if not rows:
        options.note("there are none")
    for row in rows:
        row["agent"] = "  " * row["depth"] + row["agent"]
        row["exit"] = row["exit_status"]
        row["took"] = _took(row)
    show_table(rows, ["agent", "state", "exit", "started_at", "took", "id"])


def _record(run: Run) -> Row:
    return {
        "id": run.id,
        "session": run.session_id,
        "parent": run.parent_id,
        **{key: getattr(run, key) for key in ("agent", "state", "exit_status", "error", "started_at", "finished_at")},
    }


def _flat(forest: list[RunNode]) -> list[Row]:
    """Parents before their children, with their depth. Not by recursion: agents may nest as deep as they like."""
    rows = []
    waiting = [(0, node) for node in reversed(forest)]
    while waiting:
        depth, node = waiting.pop()
        rows.append({"depth": depth, **_record(node.run)})
        waiting += [(depth + 1, child) for child in reversed(node.children)]
    return rows


def _took(row: Row) -> str:
    return "-" if row["finished_at"] is None else duration(row["finished_at"] - row["started_at"])
