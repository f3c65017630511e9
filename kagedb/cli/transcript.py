"""`kaged transcript`: list, show, read, replay, export and import recordings of terminals."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

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
from .output import duration, limited, show_json, show_list, show_record, show_table, size, visible, write_out

TAIL_LINES = 100
"""Lines of a tail where --lines says nothing: a few screens."""

_CLOCK = re.compile(r"(?:(?:(\d{1,5}):)?(\d{1,7}):)?(\d{1,9}(?:\.\d{1,3})?)")

FORMATS = ("asciicast-v2", "asciicast-v3", "raw", "text")


class ClockType(click.ParamType):  # type: ignore[type-arg]
    """A time of a recording, as people type it, in milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _CLOCK.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is not a time; write 90, 1:30 or 1:02:03", param, ctx)
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return round(((hours * 60 + minutes) * 60 + seconds) * 1000)


@click.group
def transcript() -> None:
    """List, read, replay, export and import recordings."""


@transcript.command("list")
@project_option
@session_option
@limit_option
@json_option
@pass_options
def list_transcripts(options: Options, project: str | None, session: str | None, limit: int, as_json: bool) -> None:
    """List the transcripts, newest first.

    JSON: a list of id, session, project, title, created_at, closed_at (null while it is recorded, and after a crash),
    duration_ms, output_bytes, stored_bytes, chunks.
    """
    with options.reading():
        from ..models import Transcript

        query = Transcript.select(Transcript.id).where(Transcript.continues.is_null()).order_by(Transcript.id.desc())
        found = limited(narrowed(query, Transcript.session, session=session, project=project), limit)
        rows = [_described(Transcript.by_id(row["id"])) for row in found]
    shown = ["id", "created_at", "duration", "output", "stored", "project", "title"]
    if not as_json:
        rows = [_readable(row) for row in rows]
    show_list(rows, shown, options, as_json=as_json, limit=limit)


@transcript.command
@click.argument("id", callback=as_ulid)
@json_option
@pass_options
def show(options: Options, id: str, as_json: bool) -> None:
    """Show what is known of a transcript; reads all of it.

    JSON: what `list` gives, and run, columns, rows, parts, marks (at_ms, label), gaps (at_ms, lost_bytes).
    """
    with options.reading(snapshot=False):
        from ..models import Transcript
        from ..models.segment import Gap, Mark

        found = Transcript.by_id(id)
        record = {
            **_described(found),
            "run": found.run_id,
            "columns": found.columns,
            "rows": found.rows,
            "parts": len(found.parts()),
        }
        marks: list[dict[str, Any]] = []
        gaps: list[dict[str, Any]] = []
        for event in found.events():
            if isinstance(event, Mark):
                marks.append({"at_ms": event.at_ms, "label": event.label})
            elif isinstance(event, Gap):
                gaps.append({"at_ms": event.at_ms, "lost_bytes": event.lost_bytes})
    if as_json:
        show_json({**record, "marks": marks, "gaps": gaps})
        return
    show_record(_readable(record))
    happened = [
        *({"time": _clock(mark["at_ms"]), "what": "mark", "label": mark["label"]} for mark in marks),
        *({"time": _clock(gap["at_ms"]), "what": "gap", "label": f"{gap['lost_bytes']:,} bytes"} for gap in gaps),
    ]
    if happened:
        click.echo()
        show_table(sorted(happened, key=lambda one: one["time"]), ["time", "what", "label"])


@transcript.command
@click.argument("id", callback=as_ulid)
@click.option("-n", "--lines", type=click.IntRange(min=1), default=TAIL_LINES, show_default=True, help="So many lines.")
@pass_options
def tail(options: Options, id: str, lines: int) -> None:
    """Print the last lines of a transcript.

    Into a file or pipe as they were, on a terminal the text and colours alone.
    """
    with options.reading():
        from ..models import Transcript
        from ..models.plain import plain_text

        found = Transcript.by_id(id).tail(lines)
    stream = sys.stdout.buffer
    if stream.isatty():
        click.echo("".join(plain_text([found], colours=True)) + "\x1b[0m", color=True)
    else:
        stream.write(found)
        stream.flush()


@transcript.command
@click.argument("id", callback=as_ulid)
@click.option(
    "--speed", type=click.FloatRange(0.01, 1000), default=1.0, show_default=True, help="So many times as fast."
)
@click.option(
    "--from", "from_ms", type=ClockType(), default="0", metavar="TIME", help="Begin there: 90, 1:30, 1:02:03."
)
@click.option("--idle", type=click.FloatRange(min=0), metavar="SECONDS", help="Cut longer pauses to so many seconds.")
@pass_options
def replay(options: Options, id: str, speed: float, from_ms: int, idle: float | None) -> None:
    """Play a transcript on this terminal. Space pauses and goes on, q leaves.

    The terminal obeys what was recorded, as it obeyed the program; what it says in answer is not taken for keys.
    """
    with options.reading(snapshot=False):
        from ..models import Transcript
        from ..operations import replay as playing
        from ..operations.terminal import size_of_terminal

        found = Transcript.by_id(id)
        if sys.stdout.buffer.isatty():
            columns, rows = size_of_terminal()
            if columns < found.columns or rows < found.rows:
                options.note(f"recorded on {found.columns}x{found.rows}, shown on {columns}x{rows} characters")
        idle_ms = None if idle is None else round(idle * 1000)
        playing.Player(speed=speed, idle_ms=idle_ms).play(found.events(from_ms), from_ms)


@transcript.command
@click.argument("id", callback=as_ulid)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True, help="What it becomes."
)
@output_option
@pass_options
def export(options: Options, id: str, form: str, output: str) -> None:
    """Write a transcript for other programs.

    asciicast-v2 and asciicast-v3 are for asciinema and its players. raw is the bytes as the terminal was sent them;
    text is without colours, and a heap of pieces where a full-screen program drew.
    """
    with options.reading(snapshot=False):
        from ..models import Transcript

        pieces = _exported(Transcript.by_id(id), form)
        write_out(output, pieces)


@transcript.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True))
@click.option("--project", metavar="NAME", help="Import into this project; not needed where there is only one.")
@click.option(
    "--title", metavar="TEXT", default="", help="The title of the session; that of the file where it is missing."
)
@json_option
@pass_options
def import_file(options: Options, file: str, project: str | None, title: str, as_json: bool) -> None:
    """Store a recording of asciinema as a session with one run.

    asciicast of version 2 or 3 is read.

    JSON: id (of the transcript), session, skipped (event codes that were left out: how many), cut_off (whether the file
    ended within a line, which was left out).
    """
    file = os.path.abspath(file)
    with options.writing():
        from ..operations import record as recording

        stored, cast = recording.import_cast(
            recording.choose_project(project), file, title=title, actor=f"operator:{options.operator}"
        )
    if as_json:
        show_json({"id": stored.id, "session": stored.session_id, "skipped": cast.skipped, "cut_off": cast.cut_off})
        return
    click.echo(f"stored as transcript {stored.id} of the session {stored.session_id}")
    for code, count in cast.skipped.items():
        what = "keys that were pressed" if code == "i" else f"events of the unknown code {visible(code)}"
        options.note(f"left out: {count:,} {what}")
    if cast.cut_off:
        options.note("the file ends within a line, which was left out")


def _described(found: Any) -> dict[str, Any]:
    parts = found.parts()
    usage = found.usage()
    return {
        "id": found.id,
        "session": found.session_id,
        "project": found.session.project.name,
        "title": found.session.title,
        "created_at": found.created_at,
        "closed_at": parts[-1].closed_at,
        "duration_ms": usage.duration_ms,
        "output_bytes": usage.output_bytes,
        "stored_bytes": usage.stored_bytes,
        "chunks": usage.chunks,
    }


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {
        "duration_ms": ("duration", duration),
        "output_bytes": ("output", size),
        "stored_bytes": ("stored", size),
    }
    readable = {}
    for key, value in row.items():
        name, show = numbers.get(key, (key, None))
        readable[name] = show(value) if show is not None else value
    return readable


def _clock(ms: int) -> str:
    minutes, seconds = divmod(ms / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{seconds:06.3f}"


def _exported(found: Any, form: str) -> Iterator[bytes]:
    if form == "raw":
        yield from found.raw()
    elif form == "text":
        for line in found.text():
            yield line.encode()
    else:
        from ..formats import asciicast
        from ..operations.record import header_of

        version = 2 if form == "asciicast-v2" else 3
        for line in asciicast.write(header_of(found), found.events(), version):
            yield line.encode()
