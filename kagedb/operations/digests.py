"""What is in a store, in numbers that two copies can be compared by: rows and a digest for each table.

A digest is taken of the hashes of the table's rows (engines/copy_text.py): the same on both engines, columns by name,
rows by key. JSON is the text that is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from ..engines.archive import Contents, State, Table
from ..engines.copy_text import batches, hashes_of, piece_hashes, text_of
from ..errors import StorageCorrupt
from ..models.blob import unpacked
from ..models.project import digest_text
from . import audit_verify

DOMAIN = b"kaged.table.3"
"""Begins every digest, so that one made by another encoding is never taken for one of these."""

HASHES = 1 << 256
"""How many there are; sums of them are taken modulo this."""

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
        found[table.name] = Facts(table, contents.count(table))
    return Examined(found, head(contents))


def digests(contents: Contents, progress: Progress | None = None, *, chain: bool = False) -> Examined:
    """Every row's part in a digest, with what stored hashes say of it; with `chain`, the audit chain's too."""
    examined = Examined({})
    tables = contents.tables()
    for number, table in enumerate(tables):
        digesting = Digesting(table, contents, examined.wrong, chain=chain)
        digesting.run()
        examined.facts[table.name] = digesting.facts()
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
        examined = digests(contents, progress, chain=True)
        if "audit_event" not in examined.facts:
            examined.wrong.append("it has no tables of a kaged store")
        return examined
    except StorageCorrupt as error:
        return Examined({}, wrong=[error.message])


def head(contents: State) -> tuple[int, str] | None:
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


class TableDigest:
    """The digest of a table: SHA-256 of its name and columns, and then of the hash of each row.

    In the order of their keys. Rows without a key have no order that both engines would keep: then it is the sum of the
    hashes, which is the same in any.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._rows = 0
        columns = ",".join(table.columns).encode()
        self._digest = hashlib.sha256(b"%b %b %b\n" % (DOMAIN, table.name.encode(), columns))
        self._sum = 0

    def add(self, hashes: list[bytes]) -> None:
        """The next rows."""
        self._rows += len(hashes)
        if self._table.key:
            self._digest.update(b"".join(hashes))
        else:
            self._sum = (self._sum + sum(int.from_bytes(one, "big") for one in hashes)) % HASHES

    def facts(self) -> Facts:
        """After the last row."""
        digest = self._digest.copy()
        if not self._table.key:
            digest.update(self._sum.to_bytes(digest.digest_size, "big"))
        return Facts(self._table, self._rows, digest.hexdigest())


class Digesting:
    """The digest of one table, taken while its rows pass by on their way to somebody else.

    What rows say of themselves is added to `wrong`; without that list it is not asked. `chain` says that audit events
    are asked as well whether each follows the one before. `count` is told of every piece how many rows it has.
    """

    def __init__(
        self,
        table: Table,
        contents: Contents,
        wrong: list[str] | None = None,
        *,
        chain: bool = False,
        count: Callable[[int], None] | None = None,
    ) -> None:
        self._table = table
        self._contents = contents
        self._wrong = wrong if wrong is not None else []
        self._proof = proof(table) if wrong is not None else None
        self._chain = _Chain(contents, table) if chain and table.name == "audit_event" else None
        self._count = count
        self._digest = TableDigest(table)

    def facts(self) -> Facts:
        """After the last row."""
        if self._chain is not None and (said := self._chain.end()):
            self._wrong.append(said)
        return self._digest.facts()

    def run(self) -> None:
        """Where the rows go nowhere else."""
        if self._proof is None and self._chain is None:
            for hashes in self._contents.hashes(self._table):
                self._add(hashes)
            return
        for batch in batches(self._contents.rows(self._table), self._table):
            self._add(hashes_of(batch))
            self._ask(batch)

    def lines(self) -> Iterator[bytes]:
        """The table's lines."""
        if self._proof is not None or self._chain is not None:
            return map(self._passes, batches(self._contents.rows(self._table), self._table))
        return map(self._pass_lines, self._contents.lines(self._table))

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The table's rows as values."""
        for batch in batches(self._contents.rows(self._table), self._table):
            self._passes(batch)
            yield from batch

    def _pass_lines(self, piece: bytes) -> bytes:
        self._add(piece_hashes(piece))
        return piece

    def _passes(self, batch: list[tuple[Any, ...]]) -> bytes:
        piece = text_of(batch)
        self._add(piece_hashes(piece))
        self._ask(batch)
        return piece

    def _ask(self, batch: list[tuple[Any, ...]]) -> None:
        if self._proof is not None:
            for row in batch:
                if len(self._wrong) < WRONG_SHOWN and (said := self._proof(row)):
                    self._wrong.append(said)
        if self._chain is not None:
            self._chain.follow(batch)

    def _add(self, hashes: list[bytes]) -> None:
        self._digest.add(hashes)
        if self._count is not None:
            self._count(len(hashes))


class _Chain:
    """The audit log, verified along the rows that are read anyway."""

    def __init__(self, contents: Contents, table: Table) -> None:
        require_log(table)
        self._verifying = audit_verify.Verifying(contents)
        self._arranged = itemgetter(*map(table.columns.index, audit_verify.COLUMNS))

    def follow(self, rows: list[tuple[Any, ...]]) -> None:
        event, arranged = self._verifying.event, self._arranged
        for row in rows:
            event(*arranged(row))

    def end(self) -> str:
        return chain_told(self._verifying.end())


def require_log(table: Table) -> None:
    """Raises StorageCorrupt where the table of audit events has not what every version of it has."""
    if missing := set(audit_verify.COLUMNS) - set(table.columns):
        raise StorageCorrupt(f"the audit log has no {', '.join(sorted(missing))}", "see what differs: kaged check")


def chain_told(verdict: audit_verify.Verdict) -> str:
    """What is wrong with the audit chain; "" where nothing is."""
    broken = verdict.result == audit_verify.BROKEN
    return f"the audit log is broken at event {verdict.seq}: {verdict.wrong}" if broken else ""


# What rows say of themselves: a hash that was stored with them when they were written.


def proof(table: Table) -> Callable[[tuple[Any, ...]], str] | None:
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


def disproved(contents: Contents, tick: Callable[[], None]) -> list[str]:
    """Of the rows that store a hash, those that it does not fit, in words; the first few. Calls `tick` at each row."""
    wrong: list[str] = []
    for table in contents.tables():
        tell = proof(table)
        if tell is None:
            continue
        for row in contents.rows(table):
            tick()
            if said := tell(row):
                wrong.append(said)
                if len(wrong) == WRONG_SHOWN:
                    return wrong
    return wrong


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
