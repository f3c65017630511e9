"""A recording as a whole: a session with one run and its transcript, made by `kaged record` or out of a file.

How a command gets a terminal is in terminal.py, how a transcript is kept in models/.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import KagedError, NotFound, StateError
from ..fields import TITLE_CHARACTERS
from ..formats import asciicast
from ..models import Project, Run, Session, Transcript
from ..models.base import bound_store
from ..models.recorder import Recorder
from . import terminal

RECORD_AGENT = "record"
"""What the run of a recorded command is by; people's commands are not an agent's."""

IMPORT_AGENT = "import"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a recorded command. `troubles` are what kept its output from the store, if anything did."""

    transcript: Transcript
    exit_status: int
    troubles: list[KagedError]


def choose_project(name: str | None) -> Project:
    """The project of that name; without one, the only project there is. Raises NotFound, StateError."""
    if name is not None:
        return Project.named(name)
    found = list(Project.select().where(Project.archived_at.is_null()).order_by(Project.name).limit(2))
    if not found:
        raise NotFound("there is no project to record into", "make one: kaged project add NAME")
    if len(found) > 1:
        raise StateError("there are several projects to record into", "name one: --project NAME")
    project: Project = found[0]
    return project


def record(project: Project, command: Sequence[str], *, title: str, actor: str) -> Recorded:
    """Run a command on the operator's terminal and record it as a session of the project.

    Raises KagedError where it cannot be started, and what Session.start and Transcript.open raise. What it wrote is
    shown whatever happens to the store.
    """
    troubles: list[KagedError] = []
    columns, rows = terminal.size_of_terminal()
    given = [_text(argument) for argument in command]
    with bound_store().transaction():
        session = Session.start(project, title=_title(title or shlex.join(given)), actor=actor)
        run = Run.dispatch(session, agent=RECORD_AGENT, input={"command": given})
        recorder = Transcript.open(session, columns, rows, run=run, on_error=troubles.append)
    try:
        status = terminal.run(command, recorder.write, recorder.resize)
    except BaseException as error:
        failed = partial(run.fail, _title(str(error)) or type(error).__name__)
        _end(recorder, partial(failed, exit_status=getattr(error, "exit_status", None)), session, actor, troubles)
        raise
    _end(recorder, partial(run.finish, exit_status=status), session, actor, troubles)
    return Recorded(recorder.transcript, status, troubles)


def import_cast(project: Project, path: str, *, title: str, actor: str) -> tuple[Transcript, asciicast.Cast]:
    """Store the recording in a file as a session of the project; gives what was read, too.

    Raises InvalidValue where it is damaged, before anything is stored, and OSError.
    """
    name = os.path.basename(path)
    with open(path, "rb") as file:
        for _ in asciicast.read(file, name).events:
            """Read once to the end: a recording that is damaged is not stored in part."""
        file.seek(0)
        cast = asciicast.read(file, name)
        header = cast.header
        described = {"file": _text(name), "command": header.command, "recorded_at": header.started_at}
        with bound_store().transaction():
            session = Session.start(project, title=_title(title or header.title or _text(name)), actor=actor)
            run = Run.dispatch(session, agent=IMPORT_AGENT, input=described)
        try:
            transcript = Transcript.load(session, header.columns, header.rows, cast.events, run=run)
        except BaseException as error:
            run.fail(_title(str(error)) or type(error).__name__)
            session.end(actor=actor)
            raise
    run.finish(exit_status=header.exit_status or 0)
    session.end(actor=actor)
    return transcript, cast


def header_of(transcript: Transcript) -> asciicast.Header:
    """What an export says of a transcript."""
    run = Run.by_id(transcript.run_id) if transcript.run_id is not None else None
    given: Any = run.input if run is not None else None
    command = given.get("command") if isinstance(given, dict) else None
    if isinstance(command, list) and all(isinstance(argument, str) for argument in command):
        command = shlex.join(command)
    return asciicast.Header(
        columns=transcript.columns,
        rows=transcript.rows,
        started_at=transcript.created_at,
        title=Session.by_id(transcript.session_id).title,
        command=command if isinstance(command, str) else "",
        exit_status=run.exit_status if run is not None else None,
    )


def _end(
    recorder: Recorder, end_run: Callable[[], None], session: Session, actor: str, troubles: list[KagedError]
) -> None:
    """Trouble with the store is told beside the exit status, not instead of it."""
    for step in (recorder.close, end_run, partial(session.end, actor=actor)):
        try:
            step()
        except KagedError as error:
            if str(error) not in map(str, troubles):
                troubles.append(error)


def _text(argument: str) -> str:
    """An argument as JSON can hold it: bytes that are not UTF-8 are shown as what they are."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _title(text: str) -> str:
    """One line of text, no longer than a title may be."""
    line = "".join(character if character.isprintable() else " " for character in text).strip()
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1] + "…"
