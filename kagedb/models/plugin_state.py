"""The state that a plugin keeps: keys with a JSON value, a revision and perhaps a time after which they are absent.

`plugin.state` gives a State; the table is in plugin.py, and what is written later on request in write_behind.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peewee

from ..errors import Conflict, InvalidValue, LimitExceeded, NotFound, StateError
from ..fields import INTEGER_MAX, INTEGER_MIN
from ..identity import now_ms
from . import write_behind
from .base import Hot, Parameter, bound_store
from .plugin import Plugin, PluginState

GRACE_MS = 3_600_000
"""How long the revision of a key that was deleted or has expired is remembered, so that nobody who holds it can take a
new value under that key for the old one. An hour: holding a revision for longer than that is no compare-and-set."""

SWEEP_SECONDS = 60.0
"""Between two sweeps of a process. What is swept is absent already; this only gives back its room."""

SWEEP_ROWS = 100
"""Rows that one sweep removes, as part of somebody's write."""

EXPORT_KIND, EXPORT_VERSION = "plugin state", 1

PENDING = -1
"""The revision of a value that `flush_seconds` holds back: none yet, so that no compare-and-set can succeed with it."""

_last_sweep = 0.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value. `expires_at` is in Unix milliseconds, None where it does not expire."""

    key: str
    value: Any
    revision: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """How many keys a plugin has, the bytes of them and their values as JSON, and the limits of both."""

    keys: int
    bytes: int
    max_keys: int
    max_bytes: int


def _row_of(key: str = "key") -> Any:
    return (PluginState.plugin == Parameter("plugin", PluginState.plugin)) & (
        PluginState.key == Parameter(key, PluginState.key)
    )


def _live(now: Any = None) -> Any:
    """The condition that a row is there: deleted and expired ones are not, at that very moment."""
    if now is None:
        now = Parameter("now", PluginState.expires_at)
    return PluginState.expires_at.is_null() | (PluginState.expires_at > now)


_stored = ("revision", "expires_at", "size", "value")


class State:
    """What `plugin.state` gives. Every verb is one transaction of its own, or part of the one around it."""

    _get = Hot(lambda: PluginState.select(PluginState.value, PluginState.revision).where(_row_of() & _live()))
    _look = Hot(
        lambda: PluginState.select(
            PluginState.revision, PluginState.expires_at, PluginState.size, PluginState.value
        ).where(_row_of())
    )
    _replace = Hot(
        lambda: PluginState.update(
            {getattr(PluginState, name): Parameter(name, getattr(PluginState, name)) for name in _stored}
        ).where(_row_of())
    )
    _usage = Hot(
        lambda: PluginState.select(
            peewee.fn.COUNT(PluginState.key), peewee.fn.COALESCE(peewee.fn.SUM(PluginState.size), 0)
        ).where((PluginState.plugin == Parameter("plugin", PluginState.plugin)) & _live())
    )
    _removed_at = Hot(lambda: Plugin.select(Plugin.removed_at).where(Plugin.id == Parameter("id", Plugin.id)))

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin
        self.id: str = plugin.id

    def __repr__(self) -> str:
        return f"<state of plugin:{self.id}>"

    def get(self, key: str, default: Any = None) -> tuple[Any, int]:
        """The value and its revision; `default` and 0 where the key is absent."""
        held = write_behind.held(bound_store(), self.id, key)
        if held is not None:
            return (default, 0) if _is_over(held.expires_at) else (held.value, PENDING)
        row = self._get.one(plugin=self.id, key=key, now=now_ms())
        return (default, 0) if row is None else (PluginState.value.python_value(row[0]), row[1])

    def set(
        self,
        key: str,
        value: Any,
        *,
        ttl: float | None = None,
        if_revision: int | None = None,
        flush_seconds: float | None = None,
    ) -> int:
        """Keep a JSON value; gives its revision, which is greater than any the key had within the last hour.

        After `ttl` seconds the key is absent; without it the key stays. `if_revision` is the revision the key must
        have, 0 for absent: else Conflict. With `flush_seconds` the value is held in memory and written within so many
        seconds together with what else is held, or when the store is closed; a crash loses it, and -1 is given.
        Raises InvalidValue, LimitExceeded (nothing is written), StateError where the plugin is uninstalled.
        """
        size = _size(key, value)
        expires_at = _expiry(ttl)
        store = bound_store()
        if flush_seconds is not None:
            if if_revision is not None:
                raise InvalidValue("if_revision compares with what is stored now", "leave out flush_seconds")
            if not 0 < flush_seconds <= write_behind.FLUSH_SECONDS_MAX:
                raise InvalidValue(
                    f"flush_seconds is {flush_seconds}", f"from above 0 to {write_behind.FLUSH_SECONDS_MAX}"
                )
            held = write_behind.Held(self, key, value, size, expires_at)
            if write_behind.hold(store, held, flush_seconds):
                return PENDING
        self._settle(key, if_revision)
        with store.database.atomic():
            self.flush()
            return self._put(key, value, size, expires_at, if_revision)

    def delete(self, key: str, *, if_revision: int | None = None) -> bool:
        """Make the key absent; whether it was there. Raises Conflict where it has another revision than asked for."""
        self._settle(key, if_revision)
        with bound_store().database.atomic():
            self.flush()
            now = now_ms()
            row = self._look.one(plugin=self.id, key=key)
            there = row is not None and not _is_over(row[1], now)
            self._compare(key, row[0] if there else 0, if_revision)
            if there:
                # The row stays for a while: its revision must not be given to another value.
                self._replace.run(plugin=self.id, key=key, revision=row[0] + 1, expires_at=now, size=0, value=None)
        return there

    def list(self, prefix: str = "", *, after: str | None = None, limit: int = 100) -> list[Entry]:
        """The first `limit` keys that begin with `prefix` and come after the key `after`, in order of code points."""
        self.flush()
        query = PluginState.select(PluginState.key, *(getattr(PluginState, name) for name in _stored))
        where = (PluginState.plugin == self.id) & _live(now_ms())
        if after is not None and after >= prefix:
            where &= PluginState.key > after
        else:
            where &= PluginState.key >= prefix
        end = _after_prefix(prefix)
        if end is not None:
            where &= PluginState.key < end
        rows = query.where(where).order_by(PluginState.key).limit(limit).tuples()
        return [Entry(key, value, revision, expires_at) for key, revision, expires_at, _, value in rows]

    def increment(self, key: str, by: int = 1, *, ttl: float | None = None) -> int:
        """Add to an integer, 0 where the key is absent, and give the sum; no other writer comes between.

        `ttl` in seconds begins anew; without it the time that the key has stays. Raises InvalidValue where the value is
        no integer, or the sum has more than 64 bits.
        """
        if not isinstance(by, int) or isinstance(by, bool):
            raise InvalidValue(f"an increment is an integer, not {by!r}")
        expires_at = _expiry(ttl)
        with bound_store().database.atomic():
            self.flush()
            row = self._look.one(plugin=self.id, key=key)
            value = 0
            if row is not None and not _is_over(row[1]):
                value = PluginState.value.python_value(row[3])
                expires_at = row[1] if ttl is None else expires_at
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidValue(f"the value of {key!r} is no integer", "set it to one first")
            total = value + by
            if not INTEGER_MIN <= total <= INTEGER_MAX:
                raise InvalidValue(f"the sum of {key!r} has more than 64 bits")
            self._put(key, total, _size(key, total), expires_at, None)
        return total

    @contextmanager
    def transaction(self, durability: str = "full") -> Iterator[State]:
        """Several verbs as one: all of them or none, and no other writer between them.

        With `durability="relaxed"` a power cut may lose the last seconds; a verb alone is on disk when it returns.
        """
        with bound_store().transaction(durability):
            self.flush()
            yield self

    def usage(self) -> Usage:
        """How much of its quota the plugin uses."""
        self.flush()
        return self._used()

    def flush(self) -> None:
        """Write now what `flush_seconds` holds back of this plugin."""
        write_behind.flush(bound_store(), self.id)

    def wipe(self) -> int:
        """Remove every key; how many there were."""
        with bound_store().database.atomic():
            write_behind.forget(bound_store(), self.id)
            keys = self._used().keys
            PluginState.wipe.run(plugin=self.id)
        return keys

    def export(self) -> str:
        """The whole state as lines of JSON, which `load` takes, on either engine."""
        self.flush()
        query = PluginState.select(PluginState.key, *(getattr(PluginState, name) for name in _stored))
        rows = query.where((PluginState.plugin == self.id) & _live(now_ms())).order_by(PluginState.key).tuples()
        lines: list[dict[str, Any]] = [
            {"key": key, "revision": revision, "expires_at": expires_at, "value": value}
            for key, revision, expires_at, _, value in rows
        ]
        head = {"kagedb": EXPORT_KIND, "version": EXPORT_VERSION, "plugin": self.plugin.name, "keys": len(lines)}
        return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in (head, *lines))

    def load(self, text: str) -> int:
        """Put what `export` gave in the place of the whole state; how many keys it has then.

        Keys that have expired meanwhile are left out. Raises InvalidValue, LimitExceeded; then nothing has changed.
        """
        entries = _parse(text)
        with bound_store().database.atomic():
            self.flush()
            now = now_ms()
            mine = PluginState.plugin == self.id
            old = dict(PluginState.select(PluginState.key, PluginState.revision).where(mine).tuples())
            dead = {PluginState.revision: PluginState.revision + 1, PluginState.expires_at: now, PluginState.size: 0}
            PluginState.update({**dead, PluginState.value: None}).where(mine & _live(now)).execute()
            kept = [entry for entry in entries if not _is_over(entry.expires_at, now)]
            sizes = {entry.key: _size(entry.key, entry.value) for entry in kept}
            self._check_quota(len(sizes), sum(sizes.values()))
            self._require_installed()
            for entry in kept:
                values = {"expires_at": entry.expires_at, "size": sizes[entry.key], "value": entry.value}
                if entry.key in old:
                    revision = max(entry.revision, old[entry.key] + 2)
                    self._replace.run(plugin=self.id, key=entry.key, revision=revision, **values)
                else:
                    PluginState._insert.run(plugin=self.id, key=entry.key, revision=entry.revision, **values)
        return len(kept)

    def _settle(self, key: str, if_revision: int | None) -> None:
        # On its own: a Conflict undoes its transaction, and the value would have no revision for ever.
        if if_revision is not None and write_behind.held(bound_store(), self.id, key) is not None:
            self.flush()

    # What the verbs share; inside a transaction.

    def _put(self, key: str, value: Any, size: int, expires_at: int | None, if_revision: int | None) -> int:
        self._require_installed()
        now = now_ms()
        row = self._look.one(plugin=self.id, key=key)
        there = row is not None and not _is_over(row[1], now)
        self._compare(key, row[0] if there else 0, if_revision)
        size_before = row[2] if there else 0
        if not there or size > size_before:
            used = self._used()
            self._check_quota(used.keys + (not there), used.bytes + size - size_before)
        revision = 1 if row is None else row[0] + 1
        values = {"revision": revision, "expires_at": expires_at, "size": size, "value": value}
        if row is None:
            PluginState._insert.run(plugin=self.id, key=key, **values)
        else:
            self._replace.run(plugin=self.id, key=key, **values)
        _sweep_now_and_then()
        return revision

    def _used(self) -> Usage:
        keys, size = self._usage.one(plugin=self.id, now=now_ms())
        limits = bound_store().database.limits
        return Usage(int(keys), int(size), limits.plugin_keys, limits.plugin_bytes)

    def _check_quota(self, keys: int, size: int) -> None:
        limits = bound_store().database.limits
        for number, limit, what in (
            (keys, limits.plugin_keys, "keys"),
            (size, limits.plugin_bytes, "bytes"),
        ):
            if number > limit:
                name = self.plugin.name
                raise LimitExceeded(
                    f"the state of the plugin {name!r} would have {number:,} {what}; the limit is {limit:,}",
                    f"delete what is not needed, or raise limits.plugin_{what} in the config",
                )

    def _compare(self, key: str, revision: int, if_revision: int | None) -> None:
        if if_revision is not None and if_revision != revision:
            raise Conflict(
                f"the key {key!r} has revision {revision}, not {if_revision}", "read it again and decide anew"
            )

    def _require_installed(self) -> None:
        row = self._removed_at.one(id=self.id)
        if row is None:
            raise NotFound(f"there is no plugin {self.id}", "list them with: kaged plugin list")
        if row[0] is not None:
            raise StateError(f"the plugin {self.plugin.name!r} is uninstalled", "install it again first")


def sweep(rows: int = SWEEP_ROWS) -> int:
    """Remove at most so many rows, of any plugin, that have been absent for an hour; how many there were."""
    database = bound_store().database
    sql = (
        "DELETE FROM plugin_state WHERE (plugin_id, key) IN"
        " (SELECT plugin_id, key FROM plugin_state WHERE expires_at < ? LIMIT ?)"
    )
    return int(database.execute_sql(database.dialect(sql), (now_ms() - GRACE_MS, rows)).rowcount)


def _sweep_now_and_then() -> None:
    global _last_sweep
    now = time.monotonic()
    if now - _last_sweep >= SWEEP_SECONDS:
        _last_sweep = now
        sweep()


def _size(key: str, value: Any) -> int:
    """Bytes that count for the quota. Raises InvalidValue, LimitExceeded where the key or value cannot be stored."""
    return len(PluginState.key.check(key).encode()) + len(PluginState.value.check(value).encode())


def _expiry(ttl: float | None) -> int | None:
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < INTEGER_MAX / 10**6:
        raise InvalidValue(f"a ttl is a number of seconds above 0, not {ttl!r}", "leave it out to keep the key")
    return now_ms() + max(1, int(ttl * 1000))


def _is_over(expires_at: int | None, now: int | None = None) -> bool:
    return expires_at is not None and expires_at <= (now_ms() if now is None else now)


def _after_prefix(prefix: str) -> str | None:
    """The lowest text above all that begin with `prefix`, in order of code points; None where there is no such text."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            # Surrogates are no characters: UTF-8 has none, and no text in the store.
            return prefix[:-1] + chr(0xE000 if last == 0xD7FF else last + 1)
        prefix = prefix[:-1]
    return None


def _parse(text: str) -> list[Entry]:
    """The entries of an export. Raises InvalidValue naming the line that is wrong."""
    entries: dict[str, Entry] = {}
    head: Any = None
    # Not splitlines(): values may hold what that takes for the end of a line.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            found = json.loads(line)
            if head is None:
                head = found
                if (head["kagedb"], head["version"], type(head["keys"])) != (EXPORT_KIND, EXPORT_VERSION, int):
                    raise ValueError("another kind of export")
                continue
            entry = Entry(found["key"], found["value"], found["revision"], found["expires_at"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidValue(
                f"line {number} is not one of an export of a plugin's state", "load what kaged plugin export wrote"
            ) from error
        _size(entry.key, entry.value)
        PluginState.revision.check(entry.revision)
        PluginState.expires_at.db_value(entry.expires_at)
        if entry.key in entries or entry.revision < 1:
            raise InvalidValue(f"line {number} has a key again, or a revision below 1")
        entries[entry.key] = entry
    if head is None or head["keys"] != len(entries):
        raise InvalidValue(f"the export is not whole: it has {len(entries)} keys", "export it again")
    return list(entries.values())
