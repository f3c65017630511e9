"""An open store: the models bound to it, transactions, durability, notifications, ownership.

`connect` is how a daemon, a command or a test opens one. One store is open in a process at a time, because Peewee's
models are bound for the whole process.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from . import schema
from .engines import open_engine
from .engines.engine import Engine
from .errors import SchemaTooOld, SettingsError, StorageCorrupt, StorageError, TransactionError
from .identity import is_ulid, raise_floor, ulid_ms
from .models import Model
from .models.base import Identified, bind
from .settings import Settings, load

if TYPE_CHECKING:
    from .audit_key import KeyFile

logger = logging.getLogger("kagedb")

_guard = threading.RLock()
_current: Storage | None = None


class Change(NamedTuple):
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
        """How the store stood when it was opened; what was pending then has been applied, except when read only."""
        self.kept_copy: Path | None = None
        """Where the copy is that was made before migrating, if opening migrated an older store."""
        self._subscribers: list[Callable[[Change], Any]] = []
        self._before_close: list[Callable[[], None]] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Storage {self.engine.place}{' (closed)' if self._closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def transaction(self, durability: str = "full") -> AbstractContextManager[Any]:
        """One short write transaction; nested, a savepoint. Also usable as a decorator.

        `durability` is "full" (on disk when the block is left) or "relaxed" (may lose the last seconds at a power cut,
        never consistency); the strongest wish in a transaction wins. Raises StorageBusy after
        `storage.busy_timeout_ms`, TransactionError in another asyncio task of the thread or inside a snapshot.
        """
        return self.database.atomic(durability)

    def snapshot(self) -> AbstractContextManager[Any]:
        """A consistent read across several queries; a write inside it is an error."""
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

    def before_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the store is about to be closed and can still be written; for the verbs."""
        self._before_close.append(callback)

    def notify(self, kind: str, subject: str, project: str | None) -> None:
        """Tell the subscribers of a change once it is committed; for the verbs."""
        if self._subscribers:
            change = Change(kind, subject, project)
            for callback in list(self._subscribers):
                self.database.after_commit(partial(callback, change))

    def seal_mac(self, n: int, message: bytes) -> bytes | None:
        """The MAC of a seal where the operator asked for a key; forgets the key once the seal is committed."""
        file = self.seal_key_file()
        key = file.load()
        if key is None:
            return None
        if n < key.n:
            raise StorageError(
                f"the audit key {file.path} begins at seal {key.n}, beyond seal {n} of {self.engine.place}",
                "it belongs to another store, or this one was restored: kaged audit key --new --replace",
            )
        self.database.after_commit(partial(file.advance, n + 1))
        return key.at(n).mac(message)

    @property
    def seal_key_place(self) -> str:
        """Where the key of the seals is, or would be."""
        return str(self.engine.audit_key_path)

    def seal_key_file(self) -> KeyFile:
        """Where the key of the seals is kept, if the operator asked for one."""
        from .audit_key import KeyFile  # needed at a seal, not at a start

        return KeyFile(self.engine.audit_key_path)

    def close(self) -> None:
        """Close the store and give back its locks. Again is harmless. Raises TransactionError inside a transaction.

        Transactions of other threads are given `storage.busy_timeout_ms` to end; no new ones begin.
        """
        global _current
        with _guard:
            if self._closed:
                return
            if self.database.in_transaction():
                raise TransactionError("the store cannot be closed inside a transaction", "leave the block first")
            while self._before_close:
                self._before_close.pop()()
            self._closed = True
            try:
                self.engine.close()
            finally:
                # Not before: other threads may be ending what they have begun.
                if _current is self:
                    _current = None
                    bind(None)


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
        load(url=url, mode=mode, config=config),
        migrate=migrate and not read_only,
        read_only=read_only,
        exclusive=exclusive,
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
        standing, storage.kept_copy = schema.ensure(engine, migrate=migrate, actor=actor, backup=_backup)
    except SchemaTooOld:
        if not engine.read_only:
            raise
        # An operator may look at a store that is not migrated yet; the verbs say what to do.
        standing = schema.look(engine)
        bind(storage, lambda: schema.too_old(engine, standing))
        return standing
    raise_floor(newest_ms(engine))
    return standing


def _backup(engine: Engine, script: str) -> AbstractContextManager[Path]:
    # By name: it is of the floor above, and needed only where a store is migrated.
    made: AbstractContextManager[Path] = importlib.import_module("kagedb.operations.backup").before_migration(
        engine, script
    )
    return made


def newest_ms(engine: Engine, among: Collection[str] | None = None) -> int:
    """The time of the newest row of the store, in Unix milliseconds; 0 where it is empty. Looks at keys only.

    `among` are the tables there are, for a store of an older schema.
    """
    tables = [model._meta.table_name for model in Model.all() if issubclass(model, Identified)]
    if among is not None:
        tables = [table for table in tables if table in among]
    query = " UNION ALL ".join(f'SELECT MAX(id) FROM "{table}"' for table in tables)  # noqa: S608
    try:
        ids = [row[0] for row in engine.database.execute_sql(query).fetchall() if row[0] is not None]
        last = engine.database.execute_sql("SELECT at FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
    except Exception as error:
        # Damage shows only when a row is fetched, past what translates a statement's errors.
        raise engine.database.translate(error) from error
    odd = [id for id in ids if not is_ulid(id)] + [last for last in (last or ())[:1] if not isinstance(last, int)]
    if odd:
        # All that is made from now on would be made above it.
        raise StorageCorrupt(
            f"{engine.place} is damaged: the newest id or time of a table is {str(odd[0])[:60]!r}",
            "keep it as it is, and restore a backup: kaged restore --latest",
        )
    return max([last[0] if last else 0, *(ulid_ms(id) for id in ids)])


def _description() -> str:
    program = os.path.basename(sys.argv[0] or "python") if sys.argv else "python"
    return f"{program} since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"


@atexit.register
def _close_at_exit() -> None:
    # Closing takes the turn to write; leaving it to the collector would not.
    if _current is not None and not _current.database.in_transaction():
        _current.close()
