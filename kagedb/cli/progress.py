"""What commands that take long do alike: a progress bar where somebody watches, and an orderly end when told to end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .options import Options

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def end_tidily() -> None:
    """SIGTERM, with which systemd stops a unit, undoes what is begun as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def progress_bars(options: Options, *, rows: bool = False) -> Iterator[Tell | None]:
    """A progress bar for each thing that is done, where somebody watches; with `rows`, also rows and rows a second."""
    if options.quiet or not sys.stderr.isatty():
        yield None
        return
    bars: dict[str, tuple[Any, float]] = {}

    def tell(what: str, done: int, whole: int) -> None:
        if what not in bars:
            finish()
            shown: dict[str, Any] = {"show_pos": True, "item_show_func": str} if rows else {}
            bars[what] = (
                click.progressbar(length=max(whole, 1), label=what, file=sys.stderr, **shown),
                time.monotonic(),
            )
        bar, began = bars[what]
        rate = f"{done / max(0.001, time.monotonic() - began):,.0f} rows/s" if rows else None
        bar.update(max(0, done - bar.pos), rate)

    def finish() -> None:
        for bar, _ in bars.values():
            bar.render_finish()

    try:
        yield tell
    finally:
        finish()
