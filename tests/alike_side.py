"""One side of test_alike.py: a program that opens a store and does in it what it reads, line by line.

Its clock stands still until it is told to go on, and what it takes for chance is the same each time: two sides that
are told the same make the same ids, times, salts and hashes, so everything they say can be compared as it is.
"""

from __future__ import annotations

import base64
import pickle
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import peewee

import kagedb
from contents import contents
from kagedb import (
    AuditEvent,
    Plugin,
    Project,
    ProjectConfig,
    Prompt,
    PromptLabel,
    PromptVersion,
    Run,
    RunNode,
    Session,
    identity,
    json_text,
)
from kagedb.models import Model, audit

START_NS = 1_900_000_000_000_000_000
"""In 2030: after the floor of any store, so that the clock is what counts."""


class Side:
    """An open store, the transactions entered in it, and the models that its calls have given, by number."""

    def __init__(self) -> None:
        self.storage: Any = None
        self.entered: list[Any] = []
        self.kept: dict[int, Any] = {}
        self.told: list[Any] = []
        self.now_ns = START_NS
        self.chance = random.Random()
        identity.time = SimpleNamespace(time_ns=lambda: self.now_ns)  # type: ignore[assignment]
        for module in (identity, audit):
            module.os = SimpleNamespace(urandom=lambda count: self.chance.randbytes(count))  # type: ignore[assignment]

    def open(self, url: str) -> None:
        self.now_ns = START_NS
        self.chance.seed(1)
        identity._last_ms, identity._ulid_ms = 0, -1
        self.kept.clear()
        self.storage = kagedb.connect(url)
        self.storage.subscribe(self.told.append)

    def close(self) -> Any:
        """Leave everything as if it had gone well, and give all that the store holds then."""
        while self.entered:
            try:
                self.leave()
            except kagedb.TransactionError:
                pass
        held = contents(self.storage)
        self.storage.close()
        return held

    def tick(self, ms: int) -> None:
        self.now_ns += ms * 1_000_000

    # Transactions.

    def enter(self, durability: str) -> None:
        self._enter(self.storage.transaction(durability))

    def enter_atomic(self) -> None:
        self._enter(self.storage.database.atomic())

    def enter_snapshot(self) -> None:
        self._enter(self.storage.snapshot())

    def _enter(self, context: Any) -> None:
        context.__enter__()
        self.entered.append(context)

    def leave(self) -> None:
        self.entered.pop().__exit__(None, None, None)

    def leave_by_an_error(self) -> None:
        error = LookupError("raised by the caller")
        self.entered.pop().__exit__(LookupError, error, None)

    def close_too_early(self) -> None:
        """Only ever called inside a transaction, where it is refused."""
        self.storage.close()

    def sql(self, text: str) -> Any:
        cursor = self.storage.database.execute_sql(text)
        return cursor.fetchall() if cursor.description else cursor.rowcount

    # Queries. Each gives plain values.

    def names(self, descending: bool, text: str) -> Any:
        order = Project.name.desc() if descending else Project.name
        query = Project.select(Project.name).order_by(order)
        found = [query.where(condition) for condition in (Project.name.contains(text), Project.name >= text)]
        return [list(part.tuples()) for part in (query, *found)]

    def parts(self, keys: tuple[str | int, ...], text: str) -> Any:
        part = json_text(Run.input, *keys)
        return (
            list(Run.select(part, Run.input, Run.output).order_by(part.desc(nulls="LAST"), Run.id).tuples()),
            [run.id for run in Run.select().where((part == text) | part.startswith(text)).order_by(Run.id)],
            list(Run.select(part, peewee.fn.COUNT(Run.id)).group_by(part).order_by(part.asc(nulls="FIRST")).tuples()),
            Run.select().where(part.is_null()).count(),
        )

    def totals(self) -> Any:
        runs = Run.select(
            Run.state,
            peewee.fn.COUNT(Run.id),
            peewee.fn.MIN(Run.agent),
            peewee.fn.MAX(Run.exit_status),
            peewee.fn.COUNT(Run.parent.distinct()),
        )
        joined = (
            PromptLabel.select(Prompt.name, PromptLabel.name, PromptVersion.version)
            .join(Prompt)
            .switch(PromptLabel)
            .join(PromptVersion, on=(PromptLabel.version == PromptVersion.id))
        )
        return (
            list(runs.group_by(Run.state).order_by(Run.state).tuples()),
            list(joined.order_by(Prompt.name, PromptLabel.name, PromptLabel.id).tuples()),
            list(Plugin.select(Plugin.name, Plugin.enabled).where(Plugin.enabled).order_by(Plugin.id).tuples()),
            AuditEvent.select(peewee.fn.MAX(AuditEvent.seq)).scalar(),
        )

    def page(self, number: int) -> Any:
        query = AuditEvent.select().order_by(AuditEvent.seq.desc()).paginate(number, 5)
        return [event.__data__ for event in query]

    def state_of(self, model: Model) -> Any:
        return type(model).by_id(model.id)

    # Writes that go by Peewee, not by a verb.

    def create_project(self, name: str) -> Any:
        return Project.create(name=name)

    def create_two(self, names: list[str]) -> Any:
        return Project.insert_many([{"name": name} for name in names]).execute() is not None

    def add_or_keep(self, name: str) -> Any:
        Project.insert(name=name).on_conflict_ignore().execute()
        return Project.select(Project.name, Project.archived_at).where(Project.name == name).tuples().get()

    def upsert(self, name: str, at: int) -> Any:
        insert = Project.insert(name=name, archived_at=at)
        insert.on_conflict(conflict_target=[Project.name], preserve=[Project.archived_at]).execute()
        return Project.select(Project.name, Project.archived_at).where(Project.name == name).tuples().get()

    def rename(self, project: Project, name: str) -> Any:
        project.name = name
        return project.save()

    def set_errors(self, agent: str, error: str | None) -> Any:
        return Run.update(error=error).where(Run.agent == agent).execute()

    def returning(self, agent: str, status: int) -> Any:
        query = Run.update(exit_status=status).where(Run.agent == agent).returning(Run.id, Run.exit_status)
        return sorted(query.tuples().execute())

    def delete(self, model: Model) -> Any:
        return type(model).delete_by_id(model.id)

    def delete_runs(self, agent: str) -> Any:
        return Run.delete().where(Run.agent == agent).execute()

    def change_version(self, version: PromptVersion) -> Any:
        return PromptVersion.update(body="changed").where(PromptVersion.id == version.id).execute()

    def forge(self, seq: int) -> Any:
        return AuditEvent.update(actor="operator:eve").where(AuditEvent.seq == seq).execute()


VERBS: dict[str, Callable[..., Any]] = {
    "Project.add": Project.add,
    "Project.named": Project.named,
    "Project.configure": Project.configure,
    "Project.config": Project.config,
    "Project.archive": Project.archive,
    "ProjectConfig.by_id": ProjectConfig.by_id,
    "Prompt.edit": Prompt.edit,
    "Prompt.label": Prompt.label,
    "Prompt.resolve": Prompt.resolve,
    "Prompt.resolve_at": Prompt.resolve_at,
    "Prompt.diff": Prompt.diff,
    "Plugin.install": Plugin.install,
    "Plugin.named": Plugin.named,
    "Plugin.enable": Plugin.enable,
    "Plugin.disable": Plugin.disable,
    "Plugin.uninstall": Plugin.uninstall,
    "Session.start": Session.start,
    "Session.attach": Session.attach,
    "Session.detach": Session.detach,
    "Session.end": Session.end,
    "Run.dispatch": Run.dispatch,
    "Run.finish": Run.finish,
    "Run.fail": Run.fail,
    "Run.cancel": Run.cancel,
    "Run.interrupt": Run.interrupt,
    "Run.tree": Run.tree,
    "Run.left_open": Run.left_open,
    "AuditEvent.record": AuditEvent.record,
    "AuditEvent.of": AuditEvent.of,
}


def plain(value: Any) -> Any:
    """A value that the other end can read without knowing our classes, and that says all there is to compare.

    Only a model is a tuple: of its class and what it holds.
    """
    if isinstance(value, Model):
        return type(value).__name__, {name: plain(part) for name, part in value.__data__.items()}
    if isinstance(value, RunNode):
        return [plain(value.run), [plain(child) for child in value.children]]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, kagedb.Change):
        return [value.kind, value.subject, value.project]
    if isinstance(value, bool | int | float):
        return [type(value).__name__, repr(value)]  # True is not 1, 1.0 is not "1.0", and -0.0 is not 0.0
    return value


def plain_error(error: Exception) -> Any:
    """What a caller sees of it. A driver's error has words of its own, and a class for wrong SQL of its own."""
    cause = error.__cause__
    because = plain_error(cause) if isinstance(cause, kagedb.KagedError) else None
    if isinstance(error, peewee.OperationalError | peewee.ProgrammingError):
        return "DatabaseError", "", because
    return type(error).__name__, "" if isinstance(error, peewee.PeeweeException) else str(error), because


def answer(
    side: Side, name: str, arguments: dict[str, Any], models: dict[str, int], keep_as: int, elsewhere: bool
) -> Any:
    """Do one thing, `elsewhere` in a thread of its own.

    Gives what it gave or raised, what subscribers were told, how deep in transactions we are, and how durable the
    outermost is to be.
    """
    if elsewhere:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(answer, side, name, arguments, models, keep_as, False).result()
    try:
        arguments = {**arguments, **{parameter: side.kept[number] for parameter, number in models.items()}}
        receiver = arguments.pop("it", None)
        verb = VERBS.get(name) or getattr(side, name)
        value = verb(receiver, **arguments) if receiver is not None else verb(**arguments)
        if isinstance(value, Model):
            side.kept[keep_as] = value
        result = "gave", plain(value)
    except Exception as error:
        result = "raised", plain_error(error)
    told, side.told[:] = plain(side.told), []
    return result, told, len(side.entered), side.storage.database._state.durability


def main() -> None:
    side = Side()
    for line in sys.stdin:
        said = answer(side, *pickle.loads(base64.b64decode(line)))
        print(base64.b64encode(pickle.dumps(said)).decode(), flush=True)


if __name__ == "__main__":
    main()
