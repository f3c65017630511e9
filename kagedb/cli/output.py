"""What `kaged` prints: tables, records, JSON, and errors in two lines with their exit status.

Stored text may be hostile: nothing here lets a control character through to a terminal.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from ..errors import EXIT_FAILED, EXIT_USAGE, AlreadyExists, KagedError

if TYPE_CHECKING:
    from .options import Options

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells say it."""
EXIT_PIPE = 141
"""The reader of our output went away: 128 + SIGPIPE, as shells say it."""

VALUE_CHARACTERS = 60
"""Of a JSON value in a table: two of them and a name beside them still fit a wide terminal."""

Row = dict[str, Any]
"""What a command prints of one thing, as it is in the JSON: keys that end in _at are times in Unix milliseconds."""


# Text.


def visible(text: str, *, lines: bool = False) -> str:
    """`text` with everything escaped that a terminal would obey or not show; with `lines`, line ends and tabs stay."""
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        character
        if character.isprintable() or character in kept
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def local_time(ms: int | None) -> str:
    """A time in Unix milliseconds as `2026-11-24 08:10:03` in the zone of the host; as it is where a clock has none."""
    if ms is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms // 1000))
    except (OverflowError, OSError, ValueError):
        return f"{ms} ms"


def duration(ms: int) -> str:
    """Milliseconds in the unit a person would choose."""
    if ms < 60_000:
        return f"{ms / 1000:.1f} s"
    minutes, seconds = divmod(ms // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def size(count: int) -> str:
    """Bytes in the unit a person would choose."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def shortened(value: Any) -> str:
    """A JSON value on one line, cut off where a table would become unreadable."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 3] + "..."


def _cell(key: str, value: Any) -> str:
    if value is None or value == []:
        return "-"
    if key == "at" or key.endswith("_at"):
        return local_time(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(visible(str(item)) for item in value)
    return visible(str(value))


def _heading(key: str) -> str:
    return key.removesuffix("_at").replace("_", " ")


def _width(text: str) -> int:
    """Columns of a terminal that `text` takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


# Printing.


def show_json(document: Any) -> None:
    """Print one JSON document, in ASCII: as safe for a terminal as for a program."""
    click.echo(json.dumps(document, indent=2))


def show_table(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Print the columns `keys` of the rows, aligned, under a heading; nothing where there are no rows."""
    if not rows:
        return
    headings = [_heading(key).upper() for key in keys]
    show_grid(headings, lambda: ([_cell(key, row[key]) for key in keys] for row in rows))


def show_grid(headings: Sequence[str], lines: Callable[[], Iterable[Sequence[str]]]) -> None:
    """Print lines of cells, aligned, under their headings; `lines` is asked twice, so that they need no memory."""
    widths = [_width(heading) for heading in headings]
    for line in lines():
        widths = [max(width, _width(text)) for width, text in zip(widths, line, strict=True)]
    # Nothing is padded after the last.
    widths[-1:] = [0]
    for line in chain([headings], lines()):
        padded = (text + " " * (width - _width(text)) for text, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def show_list(rows: list[Row], keys: Sequence[str], options: Options, *, as_json: bool, limit: int) -> None:
    """Print what a query limited by `limited` gave; says so where there is more, or nothing."""
    shown = rows[:limit] if limit else rows
    if as_json:
        show_json(shown)
    else:
        show_table(shown, keys)
    if not rows and not as_json:
        options.note("there are none")
    if len(shown) < len(rows):
        options.note(f"there are more than {limit}: --limit 0 shows all")


def limited(query: Any, limit: int) -> list[Row]:
    """The rows of a query as dicts: `limit` of them and one more that tells that there are more; all where it is 0."""
    return list((query.limit(limit + 1) if limit else query).dicts())


def show_record(record: Row) -> None:
    """Print a thing's values, and the items of lists, one a line; JSON and longer text belong into `show_block`."""
    width = max(len(_heading(key)) for key in record)
    for key, value in record.items():
        label = _heading(key)
        for item in value if isinstance(value, list) and value else [value]:
            click.echo(f"{label.ljust(width)}  {_cell(key, item)}".rstrip())
            label = ""


def show_block(title: str, value: Any) -> None:
    """Print text of several lines, or a JSON value, under a title; one that is text, as that text."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(f"\n{title}:")
    click.echo(visible(text, lines=True).removesuffix("\n"))


def show_text(text: str) -> None:
    """Print stored text: as it is, byte for byte, into a file or pipe; safe to look at on a terminal."""
    if sys.stdout.isatty():
        click.echo(visible(text, lines=True), nl=not text.endswith("\n"))
    else:
        sys.stdout.buffer.write(text.encode())


def write_out(path: str, pieces: Iterable[bytes]) -> None:
    """Write bytes to standard output where the path is "-", else to a new file, readable by its owner: all or no file.

    Raises AlreadyExists, BadParameter.
    """
    if path == "-":
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"there is a file {path} already", "name another one, or remove it") from None
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be made: {error.strerror}", param_hint="'--output'") from None
    try:
        with open(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
    except BaseException:
        os.unlink(path)
        raise


def refuse_terminal(path: str) -> None:
    """Raises BadParameter where `write_out` would send bytes that somebody else made to a terminal."""
    if path == "-" and sys.stdout.isatty():
        raise click.BadParameter("these are bytes, and not for a terminal; name a file", param_hint="'--output'")


# Errors.


class Told(click.ClickException):
    """An error as the operator reads it: what happened, and on a second line what to do."""

    def __init__(self, message: str, hint: str, exit_status: int) -> None:
        super().__init__(message)
        self.hint = hint
        self.exit_code = exit_status  # type: ignore[misc]  # click sets it on classes, and reads it from instances

    def show(self, file: Any = None) -> None:
        click.echo(f"kaged: {_one_line(self.message)}", file=file, err=True)
        if self.hint:
            click.echo(_one_line(self.hint), file=file, err=True)


@contextmanager
def telling(ctx: click.Context) -> Iterator[None]:
    """Turn whatever goes wrong inside into something to be read and an exit status; no traceback, no secret."""
    try:
        yield
    except (click.exceptions.Exit, click.exceptions.Abort, Told):
        raise
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        path = (error.ctx or ctx).command_path
        raise Told(error.format_message(), f"see what it takes: {path} --help", EXIT_USAGE) from None
    except click.ClickException:
        raise
    except KagedError as error:
        raise Told(error.message, error.hint, error.exit_status) from None
    except KeyboardInterrupt:
        ctx.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        _point_stdout_to_nothing()
        ctx.exit(EXIT_PIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise _internal(ctx, error) from None
        _point_stdout_to_nothing()
        raise Told(f"the output cannot be written: {error.strerror}", "write it elsewhere", EXIT_FAILED) from None
    except Exception as error:
        raise _internal(ctx, error) from None


def _internal(ctx: click.Context, error: Exception) -> Told:
    """A bug of ours, or a driver's error that nobody foresaw."""
    from .options import Options

    options = ctx.find_object(Options)
    # It is in the instance once the settings could be loaded; before that no URL is known.
    settings = vars(options).get("settings") if options else None
    scrub = settings.url.scrub if settings else str
    if options and options.verbose:
        import traceback

        click.echo(visible(scrub("".join(traceback.format_exception(error))), lines=True), err=True, nl=False)
    what = f"internal error: {type(error).__name__}: {error}"
    return Told(scrub(what), "run it again with kaged -v for the traceback, and report it", EXIT_FAILED)


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def _point_stdout_to_nothing() -> None:
    """What is still buffered has nowhere to go; Python would complain of that at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
