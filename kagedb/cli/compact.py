"""`kaged compact`: give space that holds nothing back."""

from __future__ import annotations

from dataclasses import asdict

import click

from .options import Options, deadline_option, json_option, pass_options
from .output import duration, show_json, show_record, size, visible
from .progress import end_tidily, progress_bars


@click.command
@deadline_option
@json_option
@pass_options
def compact(options: Options, deadline: float | None, as_json: bool) -> None:
    """Give back the space that pruned and changed rows have left.

    In short steps beside the running daemon; whatever ends it, the next run goes on. A store that was reloaded from a
    dump is rewritten once, for which nothing else may have it open. Exit status 75: something else has.

    JSON: place, before and after (part to bytes), given_back, free_bytes, longest_hold_ms, took_ms, finished, notes.
    """
    end_tidily()
    with options.writing() as storage:
        from ..operations import compacting

        with progress_bars(options) as tell:
            done = compacting.compact(storage, deadline_seconds=deadline, progress=tell)
    for note in done.notes:
        options.note(visible(f"note: {note}"))
    if as_json:
        show_json(asdict(done))
        return
    show_record(
        {
            "store": done.place,
            "before": [f"{part} {size(count)}" for part, count in done.before.items()],
            "after": [f"{part} {size(count)}" for part, count in done.after.items()],
            "given back": size(done.given_back),
            "still free inside": size(done.free_bytes),
            "took": f"{duration(done.took_ms)}; writers waited {done.longest_hold_ms} ms at most",
            "finished": "yes" if done.finished else "no, the next run goes on",
        }
    )
