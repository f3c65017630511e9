"""Content-addressed bytes: the nodes of trees (state_tree.py) in a table; and the attachments of runs made of them.

Nothing refers to a blob by a foreign key, which would be looked for at every deletion of one: whether a tree is whole
is known from its digests, and what nothing refers to any more is for `kagedb.operations.checkpoints.collect`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import peewee

# Trees and compression are imported where they are used: most starts of a daemon need neither.
from ..errors import AlreadyExists, InvalidValue, LimitExceeded, NotFound, StorageCorrupt
from ..fields import BlobField, IntegerField, NameField, TextField
from ..identity import new_ulid, raise_floor, ulid_ms
from .base import Hot, Identified, Model, Parameter, bound_store
from .run import Run

BATCH_ROWS = 200
"""Blobs asked for or written in one statement: half a megabyte of nodes, and few round trips to a server."""

RAW, ZLIB = "raw", "zlib"

COMPRESSION_LEVEL = 6
"""zlib's own choice; 9 is half as fast and saves one byte in a hundred of nodes as short as these."""


class Blob(Model):
    """A node under its SHA-256; stored once, whoever refers to it.

    `data` is the node, its part after the references compressed where `codec` is "zlib"; `size` its length before that.
    """

    digest = BlobField(primary_key=True)
    codec = TextField()
    size = IntegerField()
    data = BlobField()

    class Meta:
        table_name = "blob"

    @classmethod
    def pack(cls, nodes: dict[bytes, bytes]) -> dict[bytes, tuple[str, int, bytes] | None]:
        """What `keep` stores of each node: compressed, or None for what the store has already."""
        known = cls.known(nodes)
        return {digest: None if digest in known else packed(node) for digest, node in nodes.items()}

    @classmethod
    def keep(cls, nodes: dict[bytes, bytes], ready: dict[bytes, tuple[str, int, bytes] | None]) -> None:
        """Insert what the store does not have; inside the caller's transaction.

        Each node is looked for again, not its root alone: of a tree that nothing referred to, a collection may have
        removed a part, or remove one between `pack` and now.
        """
        known = cls.known(nodes)
        database = bound_store().database
        rows = [(digest, *(ready[digest] or packed(node))) for digest, node in nodes.items() if digest not in known]
        for batch in batches(rows):
            places = ", ".join(["(?, ?, ?, ?)"] * len(batch))
            sql = f'INSERT INTO "blob" ("digest", "codec", "size", "data") VALUES {places}'  # noqa: S608
            database.execute_sql(database.dialect(sql), [value for row in batch for value in row])

    @classmethod
    def known(cls, digests: Iterable[bytes]) -> set[bytes]:
        """Those of the digests that the store has."""
        return {bytes(row[0]) for row in cls._look_up('"digest"', digests)}

    @classmethod
    def fetch(cls, digests: Iterable[bytes]) -> dict[bytes, bytes]:
        """The nodes that there are of these digests. Raises StorageCorrupt where one cannot be decompressed."""
        rows = cls._look_up('"digest", "codec", "size", "data"', digests)
        return {bytes(digest): unpacked(digest, codec, size, data) for digest, codec, size, data in rows}

    @classmethod
    def heads(cls, digests: Iterable[bytes], length: int) -> dict[bytes, bytes]:
        """The first `length` bytes of the nodes, in which their references are."""
        rows = cls._look_up(f'"digest", substr("data", 1, {length:d})', digests)
        return {bytes(digest): bytes(head) for digest, head in rows}

    @classmethod
    def stored_bytes(cls, digests: Iterable[bytes]) -> int:
        """What those of the digests take that the store has, compressed as they are."""
        return sum(row[1] for row in cls._look_up('"digest", length("data")', digests))

    @classmethod
    def _look_up(cls, columns: str, digests: Iterable[bytes]) -> Iterator[tuple[Any, ...]]:
        database = bound_store().database
        for batch in batches([bytes(digest) for digest in digests]):
            places = ", ".join("?" * len(batch))
            sql = f'SELECT {columns} FROM "blob" WHERE "digest" IN ({places})'  # noqa: S608
            yield from database.execute_sql(database.dialect(sql), batch).fetchall()


class RunAttachment(Identified):
    """What JSON cannot hold of a run: bytes, text with NULs, large output. `size` is in bytes, text in UTF-8."""

    run = peewee.ForeignKeyField(Run, backref="attachments", index=False)
    name = NameField()
    kind = TextField()
    size = IntegerField()
    blob = BlobField()

    class Meta:
        table_name = "run_attachment"
        indexes = ((("run", "name"), True),)

    _named = Hot(
        lambda: RunAttachment.select().where(
            (RunAttachment.run == Parameter("run", RunAttachment.run))
            & (RunAttachment.name == Parameter("name", RunAttachment.name))
        )
    )
    _newest = Hot(lambda: RunAttachment.select(RunAttachment.id).order_by(RunAttachment.id.desc()).limit(1))

    @classmethod
    def add(cls, run: Run, name: str, data: bytes | str) -> Self:
        """Keep `data` under `name`; the same again is the attachment that is there. What `run.attach` does."""
        if isinstance(data, str):
            kind, content = "text", data.encode("utf-8", "surrogatepass")
        elif isinstance(data, bytes | bytearray | memoryview):
            kind, content = "bytes", bytes(data)
        else:
            raise InvalidValue(f"an attachment is bytes or text, not {type(data).__name__}", "encode it first")
        from .state_tree import bytes_tree

        store = bound_store()
        limit = store.database.limits.attachment_bytes
        if len(content) > limit:
            raise LimitExceeded(
                f"the attachment {name!r} has {len(content):,} bytes; the limit is {limit:,}",
                "raise limits.attachment_bytes in the config, or keep the data in a file and attach its name",
            )
        tree = bytes_tree(content)
        ready = Blob.pack(tree.nodes)
        with store.transaction():
            if Run._parent_of.one(id=run.id) is None:
                raise NotFound(f"there is no run {run.id}", "list them with: kaged run list")
            row = cls._named.one(run=run.id, name=name)
            if row is not None:
                there = cls.from_row(row)
                if (there.kind, there.blob) != (kind, tree.root):
                    raise AlreadyExists(f"the run {run.id} has another attachment {name!r}", "choose another name")
                return there
            Blob.keep(tree.nodes, ready)
            return cls.put(id=next_id(cls._newest), run=run.id, name=name, kind=kind, size=len(content), blob=tree.root)

    @classmethod
    def named(cls, run: Run, name: str) -> Self:
        """The attachment of that name. Raises NotFound."""
        row = cls._named.one(run=run.id, name=name)
        if row is None:
            if Run.by_id(run.id).pruned_at is not None:
                raise NotFound(
                    f"the attachments of the run {run.id} were pruned",
                    "raise retention.runs_days and retention.runs_mib in the config, or pin sessions, to keep others",
                )
            raise NotFound(f"the run {run.id} has no attachment {name!r}", f"list them with: kaged run show {run.id}")
        return cls.from_row(row)

    def content(self) -> bytes | str:
        """What was attached, checked by digest. Raises StorageCorrupt."""
        from .state_tree import expand

        data = expand(self.blob, Blob.fetch)
        return data.decode("utf-8", "surrogatepass") if self.kind == "text" else data


def next_id(newest: Hot) -> str:
    """A ULID above the newest of a table, whichever process made that; inside the caller's transaction.

    A collection tells by it what was added since it began to look.
    """
    row = newest.one()
    made = new_ulid()
    if row is not None and made <= row[0]:
        raise_floor(ulid_ms(row[0]) + 1)
        made = new_ulid()
    return made


def packed(node: bytes) -> tuple[str, int, bytes]:
    """Codec, size and data of a node as it is stored."""
    import zlib

    from .state_tree import body_start

    start = body_start(node)
    compressed = zlib.compress(node[start:], COMPRESSION_LEVEL)
    if start + len(compressed) < len(node):
        return ZLIB, len(node), node[:start] + compressed
    return RAW, len(node), node


def unpacked(digest: bytes, codec: str, size: int, data: bytes) -> bytes:
    """The node that was stored; no more than `size` bytes of it."""
    import zlib

    from .state_tree import body_start

    data = bytes(data)
    try:
        if codec == ZLIB:
            start = body_start(data)
            data = data[:start] + zlib.decompressobj().decompress(data[start:], size)
    except (zlib.error, IndexError) as error:
        raise StorageCorrupt(f"the blob {bytes(digest).hex()} is damaged: {error}", "restore a backup") from error
    return data


def batches(rows: list[Any], size: int = BATCH_ROWS) -> Iterator[list[Any]]:
    """The rows, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
