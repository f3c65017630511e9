"""`kaged copy`: the whole store into an empty place, on either engine."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from .options import Options, json_option, pass_options
from .output import duration, show_json, show_record, size, visible


@click.command
@click.option("--to", required=True, metavar="URL", help="Where to: sqlite:///path/to/kaged.db or postgresql://...")
@click.option("--dry-run", is_flag=True, help="Only say what would be moved, and whether the place is fit for it.")
@json_option
@pass_options
def copy(options: Options, to: str, dry_run: bool, as_json: bool) -> None:
    """Copy this store to another place or engine, and compare.

    The place must be missing or have a store without rows. Killed at any moment, it is as it was or has the whole
    store. The source may be in use: what is copied is its state at one moment. An audit event says so in both.

    JSON: source, target, rows (by table), bytes, head (number and hash), dry_run, since (rows that the source got or
    lost after that moment, by table), notes.
    """
    from ..settings import load

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # undo what is begun, as for Ctrl-C
    settings = load(url=to, mode=options.mode, config=options.config)
    began = time.monotonic()
    with options.reading() if dry_run else options.writing() as storage, _bar(options) as tell:
        from ..operations import transfer

        done = transfer.copy(storage, settings, actor=f"operator:{options.operator}", dry_run=dry_run, progress=tell)
    if as_json:
        show_json(asdict(done))
    else:
        rows = sum(done.rows.values())
        seconds = time.monotonic() - began
        record: dict[str, Any] = {
            "from": done.source,
            "to": done.target,
            "rows": [f"{table} {count:,}" for table, count in done.rows.items() if count],
            "size": size(done.bytes),
        }
        if not dry_run:
            record["took"] = f"{duration(round(seconds * 1000))}, {rows / seconds:,.0f} rows a second"
        show_record(record)
        if not dry_run:
            click.echo(f"\nto use the new store, in the config file of the daemon:\n\n{transfer.config_line(settings)}")
    if dry_run:
        options.note("nothing was changed")
    if done.since:
        changes = ", ".join(f"{table} {rows:+,}" for table, rows in done.since.items())
        options.note(f"written to the source after the copy's moment, and not in it: {changes}")
    for note in done.notes:
        options.note(visible(note))


@contextmanager
def _bar(options: Options) -> Iterator[Callable[[str, int, int], None] | None]:
    """Rows, and rows a second, where somebody watches."""
    if options.quiet or not sys.stderr.isatty():
        yield None
        return
    bars: dict[str, tuple[Any, float]] = {}

    def tell(what: str, done: int, whole: int) -> None:
        if what not in bars:
            for shown, _ in bars.values():
                shown.render_finish()
            bars[what] = (
                click.progressbar(length=max(whole, 1), label=what, file=sys.stderr, show_pos=True, item_show_func=str),
                time.monotonic(),
            )
        bar, began = bars[what]
        bar.update(max(0, done - bar.pos), f"{done / max(0.001, time.monotonic() - began):,.0f} rows/s")

    try:
        yield tell
    finally:
        for shown, _ in bars.values():
            shown.render_finish()
