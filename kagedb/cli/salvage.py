"""`kaged salvage`: what can be read of a damaged store, into a fresh one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from . import privileges
from .options import Options, json_option, pass_options
from .output import show_json, show_table, visible
from .progress import end_tidily, progress_bars

if TYPE_CHECKING:
    from ..operations.salvage_rows import Key, Range

RANGES_SHOWN = 10
"""Lines by table: enough to see what kind of thing was lost; --json has more."""


@click.command
@click.option("--to", required=True, metavar="URL", help="Where to: sqlite:///path/to/new.db or postgresql://...")
@json_option
@pass_options
def salvage(options: Options, to: str, as_json: bool) -> None:
    """Save what can be read of a damaged store into a new one.

    For a store that no backup can replace. The damaged files are only read, and nobody may have them open; the new
    place must be missing or have a store without rows. Killed at any moment, it is as it was or has what was saved.

    JSON: source, target, tables (each: rows, lost, ranges (after, before, rows), clashes, clashing, doubtful, doubted,
    stand_ins; keys are lists), rows, lost (null: it cannot be told), audit, notes.
    """
    from ..settings import load

    end_tidily()
    settings = load(url=to, mode=options.mode, config=options.config)
    privileges.become_owner(options.settings, scripts=True)
    from ..operations import salvage as salvaging

    with progress_bars(options) as tell:
        done = salvaging.salvage(options.settings, settings, actor=f"operator:{options.operator}", progress=tell)
    if as_json:
        show_json(asdict(done))
        return
    rows = [
        {
            "table": name,
            "rows": f"{tally.rows:,}",
            "lost": "?" if tally.lost is None else f"{tally.lost:,}",
            "doubtful": f"{tally.doubtful:,}",
            "clashes": f"{tally.clashes:,}",
            "stand_ins": f"{tally.stand_ins:,}",
        }
        for name, tally in done.tables.items()
    ]
    show_table(rows, ["table", "rows", "lost", "doubtful", "clashes", "stand_ins"])
    for name, tally in done.tables.items():
        for one in tally.ranges[:RANGES_SHOWN]:
            click.echo(f"lost of {name}: {_range(one)}")
        if len(tally.ranges) > RANGES_SHOWN:
            click.echo(f"lost of {name}: {len(tally.ranges) - RANGES_SHOWN} more ranges, shown by --json")
        if tally.doubted:
            click.echo(f"doubtful in {name}: {', '.join(map(_key, tally.doubted))}")
        if tally.clashing:
            click.echo(f"left out of {name}, since the key was there: {', '.join(map(_key, tally.clashing))}")
    click.echo(f"audit log: {visible(done.audit)}")
    for note in done.notes:
        options.note(visible(f"note: {note}"))
    lost = "cannot be told" if done.lost is None else f"{done.lost:,}"
    options.note(f"{done.rows:,} rows are in {visible(done.target)}; lost: {lost}")


def _range(one: Range) -> str:
    count = "rows" if one.rows is None else f"{one.rows:,} rows"
    after = "from the first" if one.after is None else f"after {_key(one.after)}"
    before = "to the last" if one.before is None else f"before {_key(one.before)}"
    return f"{count} {after}, {before}"


def _key(key: Key) -> str:
    values: list[Any] = [visible(str(value)) for value in key]
    return " ".join(values)
