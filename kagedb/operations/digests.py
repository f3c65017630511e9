"""What is in a store, in numbers that two copies can be compared by: rows and a digest for each table.

The encoding is the same on both engines: integers and booleans as decimal digits, text as UTF-8, bytes as they are,
NULL marked, text and bytes preceded by their length; columns by name, rows by key. JSON is the text that is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..engines.archive import Contents, Table
from ..errors import StorageCorrupt
from ..models.blob import unpacked
from ..models.project import digest_text
from . import audit

DOMAIN = b"kaged.table.1"
"""Begins every digest, so that one made by another encoding is never taken for one of these."""

BATCH_BYTES = 1 << 18
"""Hashed at a time: a call a row would cost as much as the hashing."""

WRONG_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Facts:
    """A table's rows and digest (hex; "" where it was not taken)."""

    table: Table
    rows: int
    digest: str = ""


@dataclass(slots=True)
class Examined:
    """What was found in a state of a store; `wrong` is empty where all of it is in order."""

    facts: dict[str, Facts]
    head: tuple[int, str] | None = None
    """The newest audit event: its number and hash in hex."""
    wrong: list[str] = field(default_factory=list)


Progress = Callable[[int, int], None]


def counts(contents: Contents) -> Examined:
    """Rows alone: a fraction of the cost of digests."""
    found = {}
    for table in contents.tables():
        (rows,) = contents.raw(f'SELECT COUNT(*) FROM "{table.name}"').fetchone()  # noqa: S608
        found[table.name] = Facts(table, rows)
    return Examined(found, head(contents))


def digests(contents: Contents, progress: Progress | None = None) -> Examined:
    """Every row's part in a digest, with what stored hashes say of it."""
    examined = Examined({})
    tables = contents.tables()
    for number, table in enumerate(tables):
        examined.facts[table.name] = _digest(contents, table, examined.wrong)
        if progress is not None:
            progress(number + 1, len(tables))
    examined.head = head(contents)
    return examined


def examine(contents: Contents, progress: Progress | None = None) -> Examined:
    """Everything that can be found wrong: damage, what stored hashes say, the audit chain, a store without tables."""
    damage = contents.damage()
    if damage:
        return Examined({}, wrong=damage)
    try:
        examined = digests(contents, progress)
        if "audit_event" not in examined.facts:
            examined.wrong.append("it has no tables of a kaged store")
            return examined
        verdict = audit.verify_in(contents)
    except StorageCorrupt as error:
        return Examined({}, wrong=[error.message])
    if verdict.result == audit.BROKEN:
        examined.wrong.append(f"the audit log is broken at event {verdict.seq}: {verdict.wrong}")
    return examined


def head(contents: Contents) -> tuple[int, str] | None:
    if not any(table.name == "audit_event" for table in contents.tables()):
        return None
    row = contents.raw("SELECT seq, hash FROM audit_event ORDER BY seq DESC LIMIT 1").fetchone()
    return (row[0], bytes(row[1]).hex()) if row else None


def differences(known: dict[str, Facts], found: dict[str, Facts]) -> list[str]:
    """In words, how the tables found differ from those that were noted."""
    told = [f"the table {name} is missing" for name in known.keys() - found.keys()]
    told += [f"the table {name} is not in the manifest" for name in found.keys() - known.keys()]
    for name in known.keys() & found.keys():
        was, now = known[name], found[name]
        if was.rows != now.rows:
            told.append(f"{name} has {now.rows} rows, the manifest says {was.rows}")
        elif was.digest and now.digest and was.digest != now.digest:
            told.append(f"{name} has other contents than the manifest says")
    return sorted(told)


def _digest(contents: Contents, table: Table, wrong: list[str]) -> Facts:
    digest = hashlib.sha256(b"%b %b %b\n" % (DOMAIN, table.name.encode(), ",".join(table.columns).encode()))
    proof = _proof(table)
    rows = waiting = 0
    parts: list[bytes] = []
    for row in contents.rows(table):
        rows += 1
        for value in row:
            kind = type(value)
            if kind is str:
                data = value.encode()
                parts.append(b"t%d:" % len(data))
                parts.append(data)
                waiting += len(data)
            elif kind is int or kind is bool:
                parts.append(b"i%d," % value)
            elif value is None:
                parts.append(b"n")
            elif kind is bytes:
                parts.append(b"b%d:" % len(value))
                parts.append(value)
                waiting += len(value)
            else:
                parts.append(b"r%b," % repr(float(value)).encode())
        waiting += 8 * len(row)
        if waiting > BATCH_BYTES:
            digest.update(b"".join(parts))
            parts.clear()
            waiting = 0
        if proof is not None and len(wrong) < WRONG_SHOWN and (said := proof(row)):
            wrong.append(said)
    digest.update(b"".join(parts))
    return Facts(table, rows, digest.hexdigest())


# What rows say of themselves: a hash that was stored with them when they were written.


def _proof(table: Table) -> Callable[[tuple[Any, ...]], str] | None:
    """What tells of a row whether it is what it was, in words where not; None for tables that store no hash."""
    known = _PROOFS.get(table.name)
    if known is None:
        return None
    columns, tell = known
    if not set(columns) <= set(table.columns):
        # A store of another schema.
        return None
    places = [table.columns.index(column) for column in columns]
    return lambda row: tell(*(row[place] for place in places))


def _prove_config(id: str, source: str, parsed: str, digest: str) -> str:
    return "" if digest_text(source, parsed) == digest else f"project_config {id} is not what its digest says"


def _prove_prompt(id: str, body: str, config: str | None, digest: str) -> str:
    return "" if digest_text(body, config or "") == digest else f"prompt_version {id} is not what its digest says"


def _prove_blob(digest: bytes, codec: str, size: int, data: bytes) -> str:
    try:
        if hashlib.sha256(unpacked(digest, codec, size, data)).digest() == digest:
            return ""
    except StorageCorrupt:
        pass
    return f"blob {digest.hex()} is not what its digest says"


_PROOFS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "project_config": (("id", "source", "parsed", "digest"), _prove_config),
    "prompt_version": (("id", "body", "config", "digest"), _prove_prompt),
    "blob": (("digest", "codec", "size", "data"), _prove_blob),
}


def plain(facts: dict[str, Facts]) -> dict[str, Any]:
    """Facts as a manifest has them."""
    return {
        name: {
            "rows": one.rows,
            "digest": one.digest,
            "columns": list(one.table.columns),
            "kinds": list(one.table.kinds),
            "key": list(one.table.key),
        }
        for name, one in facts.items()
    }


def from_plain(found: dict[str, Any]) -> dict[str, Facts]:
    """The other way. Raises KeyError, TypeError or ValueError where it is none."""
    return {
        name: Facts(
            Table(name, tuple(one["columns"]), tuple(one["kinds"]), tuple(one["key"])), int(one["rows"]), one["digest"]
        )
        for name, one in found.items()
    }


def tables(facts: dict[str, Facts]) -> list[Table]:
    return [one.table for one in facts.values()]
