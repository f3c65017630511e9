"""`kaged backup`, `backups`, `verify` and `restore`: copies of the whole store, and the way back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..errors import EXIT_DAMAGED
from . import privileges
from .options import Options, json_option, pass_options
from .output import Row, duration, show_json, show_record, show_table, size, visible
from .progress import Tell, end_tidily, progress_bars

if TYPE_CHECKING:
    from ..operations.backup_set import BackupSet

_STANDARD = "-"


@click.command
@click.option(
    "--format",
    "form",
    type=click.Choice(["copy", "sql"]),
    default="copy",
    show_default=True,
    help="The engine's own file, or the SQL that makes the store anew.",
)
@click.option("--compress", type=click.Choice(["gzip", "zstd"]), help="Compress the file with this program.")
@click.option("--quick", is_flag=True, help="No digests, and it is not read back: verify it later.")
@click.option(
    "--output", metavar="DIR|FILE|-", help="Put the set there: in a directory, or as one tar file, or to stdout."
)
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Then remove sets older than the newest N.")
@click.option("--keep-days", type=click.IntRange(min=1), metavar="N", help="Then remove sets older than N days.")
@click.option(
    "--limit-rate", type=click.FloatRange(min=0.1), metavar="MIB", help="Copy no more MiB a second than that."
)
@json_option
@pass_options
def backup(
    options: Options,
    form: str,
    compress: str | None,
    quick: bool,
    output: str | None,
    keep: int | None,
    keep_days: int | None,
    limit_rate: float | None,
    as_json: bool,
) -> None:
    """Make a verified backup set, beside the running daemon.

    It is the store as it is at one moment. With --keep and --keep-days a set stays that either of them keeps. Exit
    status 3: the store is damaged, the set is kept and marked suspect; 75: another backup is being made, or the copy
    is too slow for what is being written.

    JSON: name, directory, sequence, bytes, rows, verified, held_ms, took_ms, removed, notes.
    """
    if as_json and output == _STANDARD:
        raise click.UsageError("--json and --output - both want the standard output")
    end_tidily()
    with options.reading(any_schema=True, scripts=True, snapshot=False) as storage:
        from ..operations import backup as backups
        from ..operations import packing
        from ..operations.scratch import scratch

        directory = Path(storage.settings.backup_directory)
        to_file = output is not None and output != _STANDARD and not output.endswith("/") and not os.path.isdir(output)
        one_file = to_file or output == _STANDARD
        if one_file and (keep or keep_days):
            raise click.UsageError("--keep and --keep-days are for sets in a directory")
        if output is not None and not one_file:
            directory = Path(os.path.abspath(output))
        with progress_bars(options) as tell:
            plan = backups.Plan(
                form=form,
                compression=compress or "",
                quick=quick,
                bytes_per_second=round((limit_rate or 0) * 1024 * 1024),
                keep=keep,
                keep_days=keep_days,
                progress=tell,
            )
            if not one_file:
                made = backups.make(storage.engine, directory, plan)
            else:
                near = Path(os.path.abspath(output or "")).parent if to_file else backups.ready(directory)
                with scratch(near) as place:
                    made = backups.make(storage.engine, place, plan)
                    if to_file:
                        packing.pack_file(Path(made.directory), Path(os.path.abspath(output or "")))
                    else:
                        packing.pack(Path(made.directory), sys.stdout.buffer)
    for note in made.notes:
        options.note(visible(note))
    if as_json:
        show_json(asdict(made))
    elif output == _STANDARD:
        options.note(f"written: {made.name}, {size(made.bytes)}")
    else:
        show_record(
            {
                "set": made.name,
                "in": os.path.abspath(output or "") if to_file else os.fspath(directory),
                "size": f"{size(made.bytes)}, {made.rows:,} rows",
                "verified": made.verified,
                "took": f"{duration(made.took_ms)}; the snapshot was held {duration(made.held_ms)}",
                "removed": made.removed,
            }
        )


@click.command
@json_option
@pass_options
def backups(options: Options, as_json: bool) -> None:
    """List the backup sets, oldest first.

    JSON: a list of sequence, name, state ("verified", "unverified", "suspect"), created_at, verified_at, bytes, rows,
    engine, form, schema, before (the migration it was made before), wrong (why it is suspect).
    """
    privileges.become_owner(options.settings)
    from ..operations import backup_set

    directory = Path(options.settings.backup_directory)
    rows: list[Row] = [asdict(backup_set.listed(one)) for one in backup_set.sets_in(directory)]
    if as_json:
        show_json(rows)
        return
    if not rows:
        options.note(f"there are no sets in {visible(os.fspath(directory))}")
    for row in rows:
        row["size"] = size(row["bytes"]) if row["bytes"] is not None else "-"
    show_table(rows, ["sequence", "state", "created_at", "verified_at", "size", "rows", "before", "name"])
    for row in rows:
        if row["wrong"]:
            click.echo(f"{row['name']} is suspect: {visible('; '.join(row['wrong']))}")


@click.command
@click.argument("set", required=False, metavar="[SET]")
@click.option("--all", "every", is_flag=True, help="Every set that there is.")
@json_option
@pass_options
@click.pass_context
def verify(ctx: click.Context, options: Options, set: str | None, every: bool, as_json: bool) -> None:
    """Prove a backup set: checksums, and every row of it.

    SET is a number or name out of `kaged backups`, the path of a set or of a tar file, or - for a tar file on the
    standard input. Without SET, the newest. Needs no store and no database server. Exit status 3: a set is damaged; it
    is kept and marked suspect.

    JSON: a list of name, sequence, rows, bytes, wrong (empty where the set is good).
    """
    if every and set is not None:
        raise click.UsageError("SET and --all contradict each other")
    end_tidily()
    privileges.become_owner(options.settings)
    from ..operations import backup_set, verifying

    directory = Path(options.settings.backup_directory)
    verdicts = []
    with progress_bars(options) as tell, _named(directory, set) as one:
        sets = [one] if one is not None else backup_set.sets_in(directory)
        for each in sets if every else sets[-1:]:
            told = None if tell is None else _labelled(tell, f"verifying {each.name}")
            verdicts.append(verifying.verify(options.settings, each, told))
    if as_json:
        show_json([asdict(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            said = f"damaged: {'; '.join(verdict.wrong)}" if verdict.wrong else "good"
            click.echo(f"{verdict.name} is {visible(said)}")
        if not verdicts:
            options.note(f"there are no sets in {visible(os.fspath(directory))}")
    if any(verdict.wrong for verdict in verdicts):
        ctx.exit(EXIT_DAMAGED)


@click.command
@click.argument("set", required=False, metavar="[SET]")
@click.option("--latest", is_flag=True, help="The newest verified set.")
@click.option("--to", metavar="URL", help="Restore to this place instead of the store's own.")
@json_option
@pass_options
def restore(options: Options, set: str | None, latest: bool, to: str | None, as_json: bool) -> None:
    """Make a backup set the store again.

    The old store is kept beside it. SET is a number or name out of `kaged backups`, the path of a set or of a tar file,
    or - for a tar file on the standard input. The set is verified first. Nobody may have the store open (exit status
    75). Killed at any moment, it leaves the old store or the new one.

    JSON: place, name, sequence, schema, rows, replaced (number and hash of the old audit head), kept (where the old
    store is).
    """
    from ..settings import load

    if latest == (set is not None):
        raise click.UsageError("give SET, or --latest")
    end_tidily()
    settings = options.settings if to is None else load(url=to, mode=options.mode, config=options.config)
    directory = Path(options.settings.backup_directory)
    privileges.become_owner(settings, scripts=True)
    from ..operations import restore as restoring

    with progress_bars(options) as tell, _named(directory, set) as one:
        done = restoring.restore(settings, one, sets=directory, actor=f"operator:{options.operator}", progress=tell)
    if as_json:
        show_json(asdict(done))
        return
    show_record(
        {
            "store": done.place,
            "set": done.name,
            "schema": done.schema,
            "rows": f"{done.rows:,}",
            "old store": done.kept or "there was none",
        }
    )


@contextmanager
def _named(directory: Path, text: str | None) -> Iterator[BackupSet | None]:
    """The set that SET means; a tar file is unpacked for as long as the block lasts."""
    from ..operations import backup_set, packing
    from ..operations.scratch import scratch

    if text is None:
        yield None
        return
    if text != _STANDARD and not os.path.isfile(text):
        yield backup_set.named(directory, text)
        return
    opened: Any = nullcontext(sys.stdin.buffer) if text == _STANDARD else open(text, "rb")  # noqa: SIM115
    near = directory if text == _STANDARD else Path(os.path.abspath(text)).parent
    file: IO[bytes]
    with opened as file, scratch(near) as place:
        found = packing.unpack(file, place)
        yield backup_set.named(directory, os.fspath(found))


def _labelled(tell: Tell, label: str) -> Callable[[int, int], None]:
    return lambda done, whole: tell(label, done, whole)
