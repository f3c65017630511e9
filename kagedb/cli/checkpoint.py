"""`kaged checkpoint`: the states of sessions that somebody may resume from or roll back to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import NotFound
from .audit import TimeType
from .options import (
    Options,
    as_ulid,
    json_option,
    limit_option,
    narrowed,
    output_option,
    pass_options,
    project_option,
    session_option,
)
from .output import (
    Row,
    limited,
    refuse_terminal,
    shortened,
    show_block,
    show_json,
    show_list,
    show_record,
    show_table,
    size,
    write_out,
)

if TYPE_CHECKING:
    from ..models import Checkpoint


@click.group
def checkpoint() -> None:
    """List, show, compare, restore, pin and prune checkpoints."""


@checkpoint.command("list")
@project_option
@session_option
@limit_option
@json_option
@pass_options
def list_checkpoints(options: Options, project: str | None, session: str | None, limit: int, as_json: bool) -> None:
    """List the checkpoints, newest first.

    JSON: a list of id, session, run, parent, state, head (whether the session stands on it), pinned, created_at, label,
    reason.
    """
    with options.reading():
        from ..models import Checkpoint, CheckpointHead

        query = Checkpoint.select(
            Checkpoint.id,
            Checkpoint.session.alias("session"),
            Checkpoint.run_id.alias("run"),
            Checkpoint.parent_id.alias("parent"),
            Checkpoint.state,
            Checkpoint.pinned,
            Checkpoint.created_at,
            Checkpoint.label,
            Checkpoint.reason,
        ).order_by(Checkpoint.id.desc())
        rows = limited(narrowed(query, Checkpoint.session, session=session, project=project), limit)
        heads = {session: CheckpointHead.of(session) for session in {row["session"] for row in rows}}
    for row in rows:
        row["head"] = row["id"] == heads[row["session"]]
    shown = ["id", "state", "head", "pinned", "created_at", "session", "label", "reason"]
    show_list(rows, shown, options, as_json=as_json, limit=limit)


@checkpoint.command
@click.argument("session", callback=as_ulid)
@json_option
@pass_options
def tree(options: Options, session: str, as_json: bool) -> None:
    """Show the checkpoints of a session as a tree, oldest first: each below the one that it came from.

    JSON: a list in that order of depth, id, session, run, parent, state, head, pinned, created_at, label, reason.
    """
    with options.reading():
        from ..models import Checkpoint, Session

        found = Checkpoint.of(Session.by_id(session))
        head = Checkpoint.head(Session.by_id(session))
        rows = _tree([_record(one, head) for one in found])
    if as_json:
        show_json(rows)
        return
    if not rows:
        options.note("there are none")
    for row in rows:
        row["checkpoint"] = "  " * row["depth"] + row["id"]
    show_table(rows, ["checkpoint", "state", "head", "pinned", "created_at", "label", "reason"])


@checkpoint.command
@click.argument("id", callback=as_ulid)
@json_option
@pass_options
def show(options: Options, id: str, as_json: bool) -> None:
    """Show a checkpoint with its state.

    JSON: id, session, run, parent, state (paused or resumed), head, pinned, created_at, label, reason, binaries (name:
    bytes), value (the state that was kept).
    """
    with options.reading():
        from ..models import Checkpoint

        found = Checkpoint.by_id(id)
        record = _record(found, Checkpoint.head(found.session))
        value, binaries = found.content()
    sizes = {name: len(data) for name, data in binaries.items()}
    if as_json:
        show_json({**record, "binaries": sizes, "value": value})
        return
    show_record({**record, "binaries": [f"{name} ({size(count)})" for name, count in sizes.items()]})
    show_block("value", value)


@checkpoint.command
@click.argument("id", callback=as_ulid)
@click.argument("other", callback=as_ulid)
@json_option
@pass_options
def diff(options: Options, id: str, other: str, as_json: bool) -> None:
    """Show what differs in the state of another checkpoint.

    JSON: a list of path (a JSON Pointer), change (added, removed or changed), before, after; of byte strings their
    lengths.
    """
    with options.reading():
        from ..models import Checkpoint

        found = Checkpoint.by_id(id).diff(Checkpoint.by_id(other))
    rows: list[Row] = [
        {"path": one.path, "change": one.change, "before": _plain(one.before), "after": _plain(one.after)}
        for one in found
    ]
    if as_json:
        show_json(rows)
        return
    if not rows:
        options.note("the states are equal")
    for row in rows:
        row["path"] = row["path"] or "(all)"
        row["before"] = "" if row["change"] == "added" else shortened(row["before"])
        row["after"] = "" if row["change"] == "removed" else shortened(row["after"])
    show_table(rows, ["change", "path", "before", "after"])


@checkpoint.command
@click.argument("id", callback=as_ulid)
@click.option("--binary", metavar="NAME", help="Write this byte string that was kept beside the state.")
@output_option
@pass_options
def restore(options: Options, id: str, binary: str | None, output: str) -> None:
    """Write the state of a checkpoint as JSON, every byte of it checked. Changes nothing in the store."""
    with options.reading():
        from ..models import Checkpoint

        value, binaries = Checkpoint.by_id(id).content()
    if binary is None:
        data = (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode()
    elif binary in binaries:
        data = binaries[binary]
        refuse_terminal(output)
    else:
        raise NotFound(
            f"the checkpoint {id} has no byte string {binary!r}", f"see them with: kaged checkpoint show {id}"
        )
    write_out(output, [data])


@checkpoint.command
@click.argument("id", callback=as_ulid)
@click.option("--off", is_flag=True, help="Let pruning remove it again.")
@pass_options
def pin(options: Options, id: str, off: bool) -> None:
    """Keep a checkpoint whatever is pruned."""
    with options.writing():
        from ..models import Checkpoint

        found = Checkpoint.by_id(id)
        found.unpin() if off else found.pin()


@checkpoint.command
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="Keep the newest N of each session.")
@click.option("--before", type=TimeType(), help="Remove only what is older: 2026-01-01, or 30d.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@json_option
@pass_options
def prune(options: Options, keep: int | None, before: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove checkpoints, and the bytes that nothing needs any more.

    What is pinned, what a session stands on and the newest of all stay. With --keep and --before, what both say goes.

    JSON: removed, kept (checkpoints), blobs, bytes (given back; null with --dry-run), missing (digests of blobs that
    should be there and are not).
    """
    if keep is None and before is None:
        raise click.UsageError("nothing says which to remove; give --keep or --before")
    opened = options.reading() if dry_run else options.writing()
    with opened as storage:
        from ..operations import checkpoints as work

        done = work.prune(storage, keep=keep, before=before, actor=f"operator:{options.operator}", dry_run=dry_run)
        gone = None if dry_run else work.collect(storage)
    if as_json:
        show_json(
            {
                "removed": done.removed,
                "kept": done.kept,
                "blobs": gone and gone.blobs,
                "bytes": gone and gone.bytes,
                "missing": gone.missing if gone else [],
            }
        )
        return
    if gone is None:
        click.echo(f"would remove {done.removed} checkpoints, and keep {done.kept}")
        return
    click.echo(f"removed {done.removed} checkpoints and {gone.blobs} blobs ({size(gone.bytes)}), kept {done.kept}")
    for digest in gone.missing:
        options.note(f"warning: the blob {digest} is missing; checkpoints that need it cannot be restored")


def _record(found: Checkpoint, head: Checkpoint | None) -> Row:
    return {
        "id": found.id,
        "session": found.session_id,
        "run": found.run_id,
        "parent": found.parent_id,
        "state": found.state,
        "head": head is not None and head.id == found.id,
        **{key: getattr(found, key) for key in ("pinned", "created_at", "label", "reason")},
    }


def _tree(rows: list[Row]) -> list[Row]:
    """Parents before their children, with their depth; what came from another session is a root."""
    children: dict[str | None, list[Row]] = {}
    here = {row["id"] for row in rows}
    for row in rows:
        children.setdefault(row["parent"] if row["parent"] in here else None, []).append(row)
    ordered: list[Row] = []
    waiting = [(0, row) for row in reversed(children.get(None, []))]
    while waiting:
        depth, row = waiting.pop()
        ordered.append({"depth": depth, **row})
        # An only child goes on at the depth of its parent: a session of a thousand steps is no staircase.
        below = children.get(row["id"], [])
        waiting += [(depth + (len(below) > 1), child) for child in reversed(below)]
    return ordered


def _plain(value: Any) -> Any:
    return f"{len(value)} bytes" if isinstance(value, bytes) else value
