"""`kaged prune`: remove what is older, or more, than the `[retention]` of the config lets stay."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

import click

from .options import Options, json_option, pass_options
from .output import EXIT_INTERRUPTED, Row, show_json, show_table, size
from .progress import progress_bars

if TYPE_CHECKING:
    from ..operations.retention_removal import Going


@click.command
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@json_option
@pass_options
@click.pass_context
def prune(ctx: click.Context, options: Options, dry_run: bool, as_json: bool) -> None:
    """Remove what the config's [retention] does not keep.

    What is open, running, being recorded or pinned stays; prompts and configs always do. Works beside the daemon, in
    batches of a few milliseconds. Ctrl-C ends it between two of them. Room in the file is given back by: kaged compact

    JSON: limits (as in the config), would_remove and removed (null with --dry-run), each by class (sessions,
    transcripts, runs, checkpoints, audit, plugin_state, blobs) with rows (by table) and bytes; stopped,
    longest_hold_ms.
    """
    opened = options.reading(snapshot=False) if dry_run else options.writing()
    with _Ending() as ending, opened as storage:
        from ..operations import retention

        found = retention.plan(storage)
        if not as_json:
            _show(found.classes)
        if not dry_run:
            ending.between_batches = True
            with progress_bars(options) as tell:
                done = retention.prune(
                    storage, found, actor=f"operator:{options.operator}", stop=ending.asked, progress=tell
                )
    removed = None if dry_run else done.classes
    if as_json:
        show_json(
            {
                "limits": asdict(found.limits),
                "would_remove": _plain(found.classes),
                "removed": removed and _plain(removed),
                "stopped": not dry_run and done.stopped,
                "longest_hold_ms": None if dry_run else round(done.longest_hold_ms, 3),
            }
        )
    elif found.empty():
        options.note("there is nothing to remove")
    elif dry_run:
        options.note("nothing was changed")
    else:
        rows = sum(going.count() for going in done.classes.values())
        freed = sum(going.bytes for going in done.classes.values())
        what = "ended early, as it was asked to: " if done.stopped else ""
        click.echo(f"{what}removed or emptied {rows:,} rows, {size(freed)}")
        options.note("the room is used again by new rows; kaged compact gives it back to the disk")
    if not dry_run and done.stopped:
        ctx.exit(EXIT_INTERRUPTED)


class _Ending:
    """Ctrl-C and SIGTERM: at once while nothing is changed, then between two batches, so that it can be said what was.

    Asked a second time, it ends at once in any case; the batch at hand is undone.
    """

    def __init__(self) -> None:
        self.between_batches = False
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked or not self.between_batches:
            signal.default_int_handler(number, frame)
        self._asked = True


def _plain(classes: dict[str, Going]) -> dict[str, Row]:
    return {name: asdict(going) for name, going in classes.items()}


def _show(classes: dict[str, Going]) -> None:
    rows: list[Row] = [
        {
            "class": name,
            "rows": ", ".join(f"{table} {count:,}" for table, count in going.rows.items()),
            "size": size(going.bytes),
        }
        for name, going in classes.items()
        if going.count()
    ]
    show_table(rows, ["class", "size", "rows"])
