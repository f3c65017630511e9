"""An open store: the models bound to it, transactions, durability, notifications, ownership.

`connect` is how a daemon, a command or a test opens one. One store is open in a process at a time, because Peewee's
models are bound for the whole process.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import schema
from .engines import open_engine
from .engines.engine import Engine
from .errors import SchemaTooOld, SettingsError, StorageClosed, StorageError, TransactionError
from .identity import raise_floor, ulid_ms
from .models import Model
from .models.base import Identified, bind
from .settings import Settings, load, make_directory

logger = logging.getLogger("kagedb")

_guard = threading.RLock()
_current: Storage | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What a subscriber is told after a commit: what happened (`run.finished`), to what (`run:01J…`), where."""

    kind: str
    subject: str
    project: str | None


class Storage:
    """An open store. Made by `connect`; also a context manager that closes it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.database = engine.database
        self.read_only = engine.read_only
        self.standing: schema.Standing | None = None
        self._subscribers: list[Callable[[Change], Any]] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Storage {self.engine.place}{' (closed)' if self._closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def transaction(self, durability: str = "full") -> AbstractContextManager[Any]:
        """One short write transaction; nested, a savepoint. Also usable as a decorator.

        `durability` is "full" (on disk when the block is left) or "relaxed" (may lose the last seconds at a power cut,
        never consistency); the strongest wish in a transaction wins. Raises StorageBusy after
        `storage.busy_timeout_ms`, TransactionError in another asyncio task of the thread or inside a snapshot.
        """
        self._require_open()
        return self.database.atomic(durability)

    def snapshot(self) -> AbstractContextManager[Any]:
        """A consistent read across several queries; a write inside it is an error."""
        self._require_open()
        return self.database.snapshot()

    def subscribe(self, callback: Callable[[Change], Any]) -> Callable[[], None]:
        """Call `callback` with a Change for each one made through this store, once, after its outermost commit.

        In the thread that committed; it should be quick, and what it raises is logged. Gives a function that ends the
        subscription.
        """
        self._subscribers.append(callback)
        return partial(self._unsubscribe, callback)

    def _unsubscribe(self, callback: Callable[[Change], Any]) -> None:
        if callback in self._subscribers:
            self._subscribers.remove(callback)

    def notify(self, kind: str, subject: str, project: str | None) -> None:
        """Tell the subscribers of a change once it is committed; for the verbs."""
        if self._subscribers:
            change = Change(kind, subject, project)
            for callback in list(self._subscribers):
                self.database.after_commit(partial(callback, change))

    def close(self) -> None:
        """Close the store and give back its locks. Again is harmless. Raises TransactionError inside a transaction."""
        global _current
        with _guard:
            if self._closed:
                return
            if self.database.in_transaction():
                raise TransactionError("the store cannot be closed inside a transaction", "leave the block first")
            self._closed = True
            if _current is self:
                _current = None
                bind(None)
            self.engine.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StorageClosed("the store is closed", "open it again with kagedb.connect()")


def connect(
    url: str | None = None,
    *,
    mode: str | None = None,
    config: str | os.PathLike[str] | None = None,
    migrate: bool = True,
    read_only: bool = False,
    exclusive: bool = False,
) -> Storage:
    """Open the store and bind the models to it.

    Where it is follows from `url`, else `KAGED_DATABASE_URL`, else the config file, else `mode` ("user" or "system").
    With `migrate` a missing store is made and an old one migrated (after a copy of it); without, SchemaTooOld or
    StorageNotFound. `read_only` makes and migrates nothing. `exclusive` is for the daemon: a second one gets
    StorageInUse, saying who holds the store.
    Raises SettingsError, and the errors of the store and schema in kagedb.errors.
    """
    if read_only and exclusive:
        raise SettingsError("a store cannot be opened both read_only and exclusive", "choose one")
    return open_storage(
        load(url=url, mode=mode, config=config), migrate=migrate and not read_only, read_only=read_only, exclusive=exclusive
    )


def open_storage(
    settings: Settings,
    *,
    migrate: bool = True,
    read_only: bool = False,
    exclusive: bool = False,
    actor: str = "system:kagedb",
) -> Storage:
    """`connect` with settings that are loaded already; `actor` is who a migration is put down to."""
    global _current
    with _guard:
        if _current is not None:
            raise StorageError(
                f"this process has a store open already: {_current.engine.place}", "close it first: storage.close()"
            )
        engine = open_engine(settings, read_only=read_only)
        storage = Storage(engine, settings)
        try:
            engine.open(create=migrate)
            bind(storage)
            storage.standing = _fit(storage, migrate, actor)
            if exclusive:
                engine.own(_description())
        except BaseException:
            bind(None)
            engine.close()
            raise
        _current = storage
        return storage


def current() -> Storage | None:
    """The store that is open in this process, or None."""
    return _current


def _fit(storage: Storage, migrate: bool, actor: str) -> schema.Standing:
    engine = storage.engine
    try:
        standing, _ = schema.ensure(
            engine, migrate=migrate, copy=partial(_copy_before_migration, engine, storage.settings), actor=actor
        )
    except SchemaTooOld:
        if not engine.read_only:
            raise
        # An operator may look at a store that is not migrated yet; the verbs say what to do.
        standing = schema.look(engine)
        bind(storage, lambda: schema.too_old(engine, standing))
        return standing
    raise_floor(newest_ms(engine))
    return standing


def newest_ms(engine: Engine) -> int:
    """The time of the newest row of the store, in Unix milliseconds; 0 where it is empty. Looks at keys only."""
    tables = [model._meta.table_name for model in Model.all() if issubclass(model, Identified)]
    query = " UNION ALL ".join(f'SELECT MAX(id) FROM "{table}"' for table in tables)  # noqa: S608
    ids = [row[0] for row in engine.database.execute_sql(query).fetchall() if row[0] is not None]
    last = engine.database.execute_sql("SELECT at FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
    return max([last[0] if last else 0, *(ulid_ms(id) for id in ids)])


def _copy_before_migration(engine: Engine, settings: Settings, standing: schema.Standing) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    backups = Path(settings.backup_directory)
    make_directory(backups)
    target = backups / f"before-{standing.pending[0].name}-{stamp}-{os.getpid()}"
    target.mkdir(mode=0o700)
    return engine.copy_aside(target)


def _description() -> str:
    program = os.path.basename(sys.argv[0] or "python") if sys.argv else "python"
    return f"{program} since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"


@atexit.register
def _close_at_exit() -> None:
    # Closing takes the turn to write; leaving it to the collector would not.
    if _current is not None and not _current.database.in_transaction():
        _current.close()
