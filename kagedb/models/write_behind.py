"""Plugin state that is held in memory on request (`flush_seconds`) and written together: commits wear a flash card.

One thread for a store writes what is due; reading a key, changing others and closing the store know of what is held.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import KagedError, LimitExceeded, NotFound, StateError
from .base import BoundStore

if TYPE_CHECKING:
    from .plugin_state import State, Usage

logger = logging.getLogger("kagedb")

FLUSH_SECONDS_MAX = 3_600
"""An hour of state to lose is more than anybody should want; a commit an hour wears nothing."""

RETRY_SECONDS = 5.0
"""Between attempts where the store cannot be written."""


class Held:
    """A value that is to be written. `expires_at` counts from when it was set, not from when it is written."""

    __slots__ = ("expires_at", "key", "size", "state", "value")

    def __init__(self, state: State, key: str, value: Any, size: int, expires_at: int | None) -> None:
        self.state = state
        self.key = key
        self.value = value
        self.size = size
        self.expires_at = expires_at


class _Holder:
    """What is held for one store. The lock is held for microseconds, never while the store is asked for anything."""

    def __init__(self, store: BoundStore) -> None:
        self.store = store
        self.waking = threading.Condition(threading.Lock())
        self.held: dict[tuple[str, str], Held] = {}
        self.used: dict[str, Usage] = {}
        """What each plugin used when it began to be held back."""
        self.due_at: float | None = None
        self._thread: threading.Thread | None = None
        self._ended = False
        store.before_close(self._end)

    def add(self, held: Held, flush_seconds: float, used: Usage) -> bool:
        """Hold a value; False where that might exceed the quota, so that it must be looked at exactly."""
        due_at = time.monotonic() + flush_seconds
        with self.waking:
            if self._ended:
                return False
            plugin = held.state.id
            used = self.used.setdefault(plugin, used)
            others = [other.size for (id, key), other in self.held.items() if id == plugin and key != held.key]
            if used.keys + len(others) >= used.max_keys or used.bytes + sum(others) + held.size > used.max_bytes:
                return False
            self.held[plugin, held.key] = held
            if self.due_at is None or due_at < self.due_at:
                self.due_at = due_at
                self._wake()
        return True

    def _wake(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="kaged-plugin-state", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The interpreter is ending, or has no thread to give: closing the store writes it.
                return
            self._thread = thread
        self.waking.notify()

    def _run(self) -> None:
        while True:
            with self.waking:
                while not self._ended and (self.due_at is None or self.due_at > time.monotonic()):
                    self.waking.wait(None if self.due_at is None else self.due_at - time.monotonic())
                if self._ended:
                    return
                self.due_at = None
            try:
                self.write()
            except KagedError as error:
                logger.error("plugin state cannot be written, and is tried again: %s", error)
                with self.waking:
                    self.due_at = time.monotonic() + RETRY_SECONDS

    def write(self, plugin: str | None = None) -> None:
        """Write what is held, of one plugin or of all. Raises StorageError, and then nothing is forgotten."""
        if not self._going(plugin):
            return
        with self.store.database.atomic():
            # Looked at again inside the turn to write: nobody else writes an older value afterwards.
            going = self._going(plugin)
            for held in going:
                try:
                    held.state._put(held.key, held.value, held.size, held.expires_at, None)
                except (LimitExceeded, NotFound, StateError) as error:
                    logger.error("the value of %r of %r is dropped: %s", held.key, held.state, error)
            self.store.database.after_commit(partial(self._written, going))

    def _going(self, plugin: str | None) -> list[Held]:
        with self.waking:
            return [held for (id, _), held in self.held.items() if plugin in (None, id)]

    def _written(self, going: list[Held]) -> None:
        with self.waking:
            for held in going:
                if self.held.get((held.state.id, held.key)) is held:
                    del self.held[held.state.id, held.key]
                self.used.pop(held.state.id, None)

    def forget(self, plugin: str) -> None:
        with self.waking:
            for found in [found for found in self.held if found[0] == plugin]:
                del self.held[found]

    def _end(self) -> None:
        """The store is about to be closed."""
        with self.waking:
            self._ended = True
            self.waking.notify()
        try:
            self.write()
        except KagedError as error:
            logger.error("the store was closed without the last of the plugin state: %s", error)


_holder: _Holder | None = None
_choosing = threading.Lock()


def _holder_of(store: BoundStore) -> _Holder | None:
    return _holder if _holder is not None and _holder.store is store else None


def held(store: BoundStore, plugin: str, key: str) -> Held | None:
    """What is held under that key."""
    holder = _holder_of(store)
    return None if holder is None else holder.held.get((plugin, key))


def hold(store: BoundStore, held: Held, flush_seconds: float) -> bool:
    """Hold a value; False where it must be written at once: in a transaction, or near the quota."""
    global _holder
    database = store.database
    if database.read_only or database.in_transaction():
        return False
    with _choosing:
        holder = _holder_of(store)
        if holder is None:
            holder = _holder = _Holder(store)
    used = holder.used.get(held.state.id)
    if used is None:
        held.state._require_installed()
        used = held.state._used()
    return holder.add(held, flush_seconds, used)


def flush(store: BoundStore, plugin: str) -> None:
    """Write what is held of a plugin."""
    holder = _holder_of(store)
    if holder is not None:
        holder.write(plugin)


def forget(store: BoundStore, plugin: str) -> None:
    """Drop what is held of a plugin once the transaction is committed that removes its state."""
    holder = _holder_of(store)
    if holder is not None:
        store.database.after_commit(partial(holder.forget, plugin))


def _forget_after_fork() -> None:
    # What is held is the parent's to write; a lock may be held by a thread that is not here.
    global _holder, _choosing
    _choosing = threading.Lock()
    if _holder is not None:
        holder, _holder = _holder, None
        holder.waking = threading.Condition(threading.Lock())
        holder.held.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
