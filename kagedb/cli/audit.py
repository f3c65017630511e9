"""`kaged audit`: look through the audit log, prove it, close it, and the two ways in which it may lose something."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from functools import partial
from typing import IO, Any

import click

from ..errors import EXIT_FAILED, EXIT_UNKNOWN, StorageNotFound
from .options import Options, json_option, limit_option, pass_options
from .output import Row, Told, local_time, show_block, show_json, show_list, show_record, visible
from .progress import progress_bars

FOLLOW_SECONDS = 1.0
"""Between looks for new events: soon enough to watch, and one query a second is nothing."""

_AGO = re.compile(r"(\d{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

_KEYS = ("seq", "at", "kind", "actor", "subject", "project")


class TimeType(click.ParamType):  # type: ignore[type-arg]
    """A time as people type it, in the zone of the host, as Unix milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        ago = _AGO.fullmatch(str(value))
        try:
            if ago:
                when = datetime.now().astimezone() - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
            else:
                when = datetime.fromisoformat(str(value)).astimezone()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a time; write 2026-11-24, 2026-11-24T08:10 or 30d (days ago)", param, ctx)
        return int(when.timestamp() * 1000)


@click.group
def audit() -> None:
    """Look through the audit log, and prove it."""


@audit.command("list")
@click.option(
    "--since", type=TimeType(), help="Not before this time: 2026-11-24, 2026-11-24T08:10, or 30d for 30 days ago."
)
@click.option("--until", type=TimeType(), help="Before this time.")
@click.option("--kind", help="Only this kind, such as policy.decision; policy is all that begin so.")
@click.option("--actor", help="Only what this actor did, such as operator:ana.")
@click.option("--subject", help="Only what was done to this, such as run:01J...")
@click.option("--project", help="Only what belongs to this project.")
@click.option("--follow", is_flag=True, help="Go on with new events as they come, until Ctrl-C.")
@limit_option
@json_option
@pass_options
def list_events(
    options: Options,
    since: int | None,
    until: int | None,
    kind: str | None,
    actor: str | None,
    subject: str | None,
    project: str | None,
    follow: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List the events of the audit log, newest first.

    JSON: a list of seq, at, kind, actor, subject, project, salt, body, body_hash, hash; with --follow an object a line.
    """
    if follow and until is not None:
        raise click.UsageError("--follow and --until contradict each other")
    with options.reading(snapshot=not follow) as storage:
        from ..models import Project
        from ..operations import audit as log

        project_id = Project.named(project).id if project is not None else None
        wanted = log.Filter(since, until, kind, actor, subject, project_id)
        if follow:
            _follow(storage, wanted, limit, as_json)
            return
        rows = [log.as_json(event) for event in log.newest(storage, wanted, limit + 1 if limit else 0)]
    show_list(rows, ["seq", "at", "kind", "actor", "subject"], options, as_json=as_json, limit=limit)


def _follow(storage: Any, wanted: Any, limit: int, as_json: bool) -> None:
    import json
    from dataclasses import replace

    from ..models import AuditEvent
    from ..operations import audit as log

    known = 0
    while True:
        last = AuditEvent.head()[0]
        if last > known:
            rows = [log.as_json(event) for event in log.newest(storage, replace(wanted, above=known), limit)]
            for row in reversed(rows):
                if as_json:
                    click.echo(json.dumps(row))
                else:
                    shown = (visible(str(row[key] or "-")) for key in ("kind", "actor", "subject"))
                    click.echo("  ".join((str(row["seq"]), local_time(row["at"]), *shown)))
            known, limit = last, 0
        time.sleep(FOLLOW_SECONDS)


@audit.command
@click.argument("seq", type=click.IntRange(min=1))
@json_option
@pass_options
def show(options: Options, seq: int, as_json: bool) -> None:
    """Show one event with its body.

    JSON: seq, at, kind, actor, subject, project, salt, body, body_hash, hash.
    """
    import json

    with options.reading():
        from ..models import AuditEvent
        from ..operations.audit import as_json as convert

        row = convert(AuditEvent.by_id(seq))
    if as_json:
        show_json(row)
        return
    show_record({**{key: row[key] for key in _KEYS}, "hash": row["hash"], "redacted": not row["body"]})
    if row["body"]:
        show_block("body", json.loads(row["body"]))


@audit.command
@pass_options
def head(options: Options) -> None:
    """Print the anchor line of the newest event, SEQ:HASH, to be kept somewhere else."""
    with options.reading():
        from ..models import AuditEvent

        seq, digest = AuditEvent.head()
    if not seq:
        raise Told("the audit log is empty", "there is nothing to note yet", EXIT_UNKNOWN)
    click.echo(f"{seq}:{digest.hex()}")


@audit.command
@pass_options
def seal(options: Options) -> None:
    """Seal what is not sealed yet, and print the anchor line of the newest seal."""
    with options.writing():
        from ..models import AuditSeal

        made = AuditSeal.close_all()
        newest = made or AuditSeal.select().order_by(AuditSeal.n.desc()).first()
    if made is None:
        options.note("everything is sealed already")
    if newest is not None:
        click.echo(f"{newest.last_seq}:{newest.head.hex()}")


@audit.command
@click.option("--new", is_flag=True, required=True, help="Make a key and print the first one.")
@click.option("--replace", is_flag=True, help="Though there is a key: later seals are made with the new one.")
@pass_options
def key(options: Options, new: bool, replace: bool) -> None:
    """Make a key for the seals, and print the first one, once.

    Keep the line away from this host: `kaged audit verify --key FILE` needs it. It is not stored here.
    """
    with options.writing() as storage:
        from ..operations.audit import new_key

        made = new_key(storage, replace=replace, actor=f"operator:{options.operator}")
        place = storage.seal_key_file().path
    click.echo(made.printed())
    options.note(f"keep this line somewhere else; it is not shown again. {place} has the key of the next seal only")


@audit.command
@click.option("--expect", multiple=True, metavar="SEQ:HASH", help="An anchor noted before; may be given several times.")
@click.option(
    "--key", "key_file", type=click.File("r"), help="A file with the first key of the seals, as it was printed."
)
@json_option
@pass_options
@click.pass_context
def verify(
    ctx: click.Context, options: Options, expect: tuple[str, ...], key_file: IO[str] | None, as_json: bool
) -> None:
    """Check every event and seal. Exit status 0: the log holds; 1: it is broken; 4: cannot tell.

    JSON: result ("holds", "broken", "cannot tell"), seq and wrong (the first bad event), events, first_seq, last_seq,
    head, seals, sealed_to, pruned_to, redacted, leftover, anchored_at, assurance ("chained", "sealed", "anchored").
    """
    from dataclasses import asdict

    from ..audit_key import parse_keys

    keys = parse_keys(key_file.read(), key_file.name) if key_file is not None else []
    try:
        with options.reading(any_schema=True) as storage:
            from ..operations import audit_verify as log

            anchors = [log.Anchor.parse(text) for text in expect]
            with progress_bars(options) as tell:
                found = log.verify(storage, expect=anchors, keys=keys, progress=tell and partial(tell, "verifying"))
    except StorageNotFound as error:
        raise Told(error.message, "there is nothing to verify", EXIT_UNKNOWN) from None
    if as_json:
        show_json(asdict(found))
        ctx.exit({log.HOLDS: 0, log.BROKEN: EXIT_FAILED}.get(found.result, EXIT_UNKNOWN))
    if found.result == log.UNKNOWN:
        raise Told(f"it cannot be told whether the audit log holds: {found.wrong}", "", EXIT_UNKNOWN)
    if found.result == log.BROKEN:
        raise Told(
            f"the audit log is broken at event {found.seq}: {found.wrong}",
            "keep the store as it is, and compare it with a backup: kaged audit export",
            EXIT_FAILED,
        )
    show_record(_verdict_row(found))


def _verdict_row(found: Any) -> Row:
    row: Row = {"result": found.result, "assurance": found.assurance, "events": found.events, "seals": found.seals}
    if found.sealed_to:
        row["sealed with the key up to"] = found.sealed_to
    if found.anchored_at:
        row["anchored at"] = found.anchored_at
    if found.pruned_to:
        row["pruned up to"] = found.pruned_to
    if found.redacted:
        row["redacted"] = found.redacted
    if found.leftover:
        row["still to be pruned"] = found.leftover
    row["head"] = f"{found.last_seq}:{found.head}"
    return row


@audit.command
@pass_options
def export(options: Options) -> None:
    """Write the whole log as lines of JSON, with everything that a verifier needs."""
    with options.reading() as storage:
        from ..operations.audit import export as lines

        for line in lines(storage):
            click.echo(line)


@audit.command
@click.option("--before", type=TimeType(), required=True, help="Remove what is older: 2026-01-01, or 365d.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@json_option
@pass_options
def prune(options: Options, before: int, dry_run: bool, as_json: bool) -> None:
    """Remove sealed ranges of events that are older; their seals stay, and an event says so.

    JSON: events, last_seq, seal (all null where there was nothing to remove).
    """
    opened = options.reading() if dry_run else options.writing()
    with opened as storage:
        from ..operations import audit as log

        with progress_bars(options) as tell:
            advance = tell and partial(tell, "pruning")
            done = log.prune(storage, before, actor=f"operator:{options.operator}", dry_run=dry_run, progress=advance)
    if as_json:
        show_json({name: getattr(done, name, None) for name in ("events", "last_seq", "seal")})
    elif done is None:
        options.note("no sealed range is entirely older than that")
    else:
        would = "would remove" if dry_run else "removed"
        click.echo(f"{would} {done.events} events, up to event {done.last_seq} (seal {done.seal})")


@audit.command
@click.argument("seq", type=click.IntRange(min=1))
@click.option("--reason", required=True, help="Why; it is kept in the log, so without what is to be redacted.")
@pass_options
def redact(options: Options, seq: int, reason: str) -> None:
    """Empty the body of an event for good. That, why and by whom is an event of its own."""
    with options.writing() as storage:
        from ..operations.audit import redact as empty

        done = empty(storage, seq, reason=reason, actor=f"operator:{options.operator}")
    click.echo(f"the body of event {seq} is gone; event {done.seq} says so")
