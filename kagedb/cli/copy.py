"""`kaged copy`: the whole store into an empty place, on either engine."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from .options import Options, json_option, pass_options
from .output import duration, show_json, show_record, size, visible
from .progress import end_tidily, progress_bars

FIT = {"missing": "nothing is there yet", "empty": "a store without rows"}


@click.command
@click.option("--to", required=True, metavar="URL", help="Where to: sqlite:///path/to/kaged.db or postgresql://...")
@click.option("--dry-run", is_flag=True, help="Only say what would be moved, and whether the place is fit for it.")
@json_option
@pass_options
def copy(options: Options, to: str, dry_run: bool, as_json: bool) -> None:
    """Copy this store to another place or engine, and compare.

    The place must be missing or have a store without rows. Killed at any moment, it is as it was or has the whole
    store. The source may be in use: what is copied is its state at one moment. An audit event says so in both. Tables
    of plugins come along, made by the scripts that the plugins ran.

    JSON: source, target, place (what was there: missing or empty), rows (by table), bytes, head (number and hash),
    dry_run, since (rows that the source got or lost after that moment, by table), notes.
    """
    from ..settings import load

    end_tidily()
    settings = load(url=to, mode=options.mode, config=options.config)
    began = time.monotonic()
    with options.reading() if dry_run else options.writing() as storage, progress_bars(options, rows=True) as tell:
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
        if dry_run:
            record["place"] = f"fit: {FIT[done.place]}"
        else:
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
