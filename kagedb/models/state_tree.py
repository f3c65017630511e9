"""How a state becomes a tree of content-addressed nodes, and how bytes come back out of one. Knows of no tables.

Strategy: a node is a piece of the bytes of the whole in which references stand for the bytes of other nodes. JSON text
is cut where elements of lists and values of dictionaries end, and where to cut follows from the content alone, so that
a change makes new nodes for the path to it and for nothing else, wherever in a list it is. Restoring is joining.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidValue, LimitExceeded, StorageCorrupt

DIGEST_BYTES = 32

NODE_REFERENCES = 64
"""References in a node at most; their number is its first byte."""

INLINE_BYTES = 512
"""What weighs less stays in the node that it is found in: a row of its own would cost a quarter of that again."""

INLINE_REFERENCES = 32
"""So many references stay in the node that they are found in, which is written anew for each change below it anyway."""

NODE_MIN_BYTES, NODE_MEAN_BYTES, NODE_MAX_BYTES = 1024, 2048, 4096
"""Weight of a node over several elements. Smaller ones compress badly, larger ones are rewritten for little: twice as
much stored a fifth more of a conversation, and the same of a long list of short elements."""

REFERENCE_WEIGHT = 128
"""A reference weighs more than its 32 bytes, which do not compress: 16 in a node on average, and trees stay low."""

PIECE_BYTES = 16 * 1024
"""Long text and bytes are cut after so many: a log that grows costs its last piece."""

INTEGER_BITS = 4_096
"""Far above what programs count with, and below the 4,300 digits from which Python refuses to read a number."""

HEADER_BYTES = 64
"""The root begins with two sizes and a line end; 20 digits each are enough for 64 bits."""

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Reference(bytes):
    """The digest of a node, standing for all bytes below it."""

    __slots__ = ()


Parts = list[bytes]
"""Bytes, some of them References."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A root, the nodes below and including it by their digest, and how many bytes they stand for."""

    root: bytes
    nodes: dict[bytes, bytes]
    size: int


def state_tree(state: Any, binaries: Mapping[str, bytes], depth: int) -> Tree:
    """The tree of a JSON value nested at most `depth` levels, and of named byte strings.

    Tuples become lists. Raises InvalidValue, LimitExceeded.
    """
    builder = _Builder()
    builder.weigh(state, depth)
    value = builder.value(state)
    names: Parts = []
    content: Parts = []
    if binaries:
        sizes = {}
        for name, data in binaries.items():
            if not isinstance(name, str) or not isinstance(data, bytes | bytearray | memoryview):
                raise InvalidValue("binaries are bytes under names that are text", 'write {"screen": b"..."}')
            sizes[name] = len(data)
        builder.weigh(sizes, 1)
        names = builder.value(sizes)
        content = builder.sequence((builder.plain(bytes(data)) for data in binaries.values()), b"")
    header = b"%d %d\n" % (builder.size(value), builder.size(names))
    root = builder.node([header, *value, *names, *content])
    return Tree(root, builder.nodes, builder.sizes[root] - len(header))


def bytes_tree(data: bytes) -> Tree:
    """The tree of a byte string."""
    builder = _Builder()
    parts = builder.plain(data)
    root = parts[0] if len(parts) == 1 and type(parts[0]) is Reference else builder.node(parts)
    return Tree(root, builder.nodes, len(data))


def split_state(whole: bytes) -> tuple[Any, dict[str, bytes]]:
    """The state and the byte strings in what the root of a `state_tree` stands for."""
    header, _, _ = whole[:HEADER_BYTES].partition(b"\n")
    state_size, names_size = map(int, header.split())
    start = len(header) + 1
    state = _decode(whole[start : start + state_size])
    start += state_size
    binaries = {}
    if names_size:
        sizes = _decode(whole[start : start + names_size])
        start += names_size
        for name, size in sizes.items():
            binaries[name] = whole[start : start + size]
            start += size
    return state, binaries


def _decode(text: bytes) -> Any:
    return json.loads(text.decode("utf-8", "surrogatepass"))


def references(node: bytes) -> list[bytes]:
    """The digests in a node, or in its first bytes."""
    count = node[0]
    return [node[1 + at * DIGEST_BYTES : 1 + (at + 1) * DIGEST_BYTES] for at in range(count)]


def body_start(node: bytes) -> int:
    """Where in a node the part begins that may be compressed."""
    return 1 + node[0] * DIGEST_BYTES


def expand(root: bytes, fetch: Callable[[list[bytes]], dict[bytes, bytes]]) -> bytes:
    """The bytes that `root` stands for; `fetch` gives the nodes with these digests.

    Raises StorageCorrupt where a node is missing, or is not what its digest says.
    """
    nodes: dict[bytes, Parts] = {}
    wanted = [root]
    while wanted:
        found = fetch(wanted)
        following: dict[bytes, None] = {}
        for digest in wanted:
            node = found.get(digest)
            if node is None:
                raise StorageCorrupt(f"the blob {digest.hex()} is missing", "restore a backup")
            if hashlib.sha256(node).digest() != digest:
                raise StorageCorrupt(f"the blob {digest.hex()} is damaged", "restore a backup")
            parts = nodes[digest] = _parts(node)
            following.update((part, None) for part in parts if type(part) is Reference)
        wanted = [digest for digest in following if digest not in nodes]
    out: list[bytes] = []
    _join(nodes, root, out)
    return b"".join(out)


def _join(nodes: dict[bytes, Parts], digest: bytes, out: list[bytes]) -> None:
    for part in nodes[digest]:
        if type(part) is Reference:
            _join(nodes, part, out)
        else:
            out.append(part)


def _parts(node: bytes) -> Parts:
    """A node taken apart: before each reference the number of bytes before it, and after the last the rest."""
    parts: Parts = []
    at = body_start(node)
    lengths = []
    for _ in range(node[0]):
        length = shift = 0
        while True:
            byte = node[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(length)
    for digest, length in zip(references(node), lengths, strict=True):
        if length:
            parts.append(node[at : at + length])
            at += length
        parts.append(Reference(digest))
    if at < len(node):
        parts.append(node[at:])
    return parts


class _Builder:
    """Nodes being made. `heavy` are the lists and dictionaries that are too large to stay inside another node."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, bytes] = {}
        self.sizes: dict[bytes, int] = {}
        self.heavy: set[int] = set()

    def weigh(self, value: Any, depth_left: int) -> int:
        """Check a value and estimate the length of its text; what stays inside another node follows from that alone."""
        kind = type(value)
        if kind is str:
            return len(value) + 2
        if kind is dict or kind is list or kind is tuple:
            if depth_left <= 0:
                raise LimitExceeded(
                    "the checkpoint's state is nested too deeply",
                    "raise limits.json_depth in the config, or flatten it",
                )
            weight = 2
            if kind is dict:
                for key, item in value.items():
                    if type(key) is not str:
                        raise InvalidValue(
                            f"the checkpoint's state has a key of the type {type(key).__name__}",
                            "keys of a JSON object are text",
                        )
                    weight += len(key) + 4 + self.weigh(item, depth_left - 1)
            else:
                for item in value:
                    weight += 1 + self.weigh(item, depth_left - 1)
            if weight > INLINE_BYTES:
                self.heavy.add(id(value))
            return weight
        if value is None or kind is bool:
            return 4
        if kind is int:
            if value.bit_length() > INTEGER_BITS:
                raise InvalidValue("the checkpoint's state holds an integer beyond 4,096 bits", "keep it as text")
            return 8
        if kind is float:
            if value - value != 0:
                raise InvalidValue(
                    f"the checkpoint's state holds {value}, which JSON cannot hold", "use null or text instead"
                )
            return 8
        raise InvalidValue(
            f"the checkpoint's state holds a {kind.__name__}, which JSON cannot hold",
            "use dicts, lists, text, numbers, booleans and None; pass byte strings as binaries=",
        )

    def value(self, value: Any) -> Parts:
        if type(value) is str:
            return self.plain(_text(value))
        if id(value) not in self.heavy:
            return [_text(value)]
        if type(value) is dict:
            items = ([*self.plain(_text(key)), b":", *self.value(item)] for key, item in value.items())
            return [b"{", *self.sequence(items, b","), b"}"]
        return [b"[", *self.sequence((self.value(item) for item in value), b","), b"]"]

    def plain(self, data: bytes) -> Parts:
        """Bytes that have no structure, cut at fixed places so that what is appended changes no earlier piece."""
        if len(data) <= INLINE_BYTES:
            return [data]
        pieces = [self.node([data[at : at + PIECE_BYTES]]) for at in range(0, len(data), PIECE_BYTES)]
        return self.sequence(([piece] for piece in pieces), b"")

    def sequence(self, items: Iterable[Parts], separator: bytes) -> Parts:
        """Items one after the other: as they are where they are few, else as references to nodes over them."""
        parts, nodes = self._level(list(items), separator)
        while nodes:
            parts, nodes = self._level([[node] for node in nodes], b"")
        return parts

    def _level(self, items: list[Parts], separator: bytes) -> tuple[Parts, list[bytes]]:
        """The nodes over the items; or the items themselves and no node, where they are few and small."""
        parts: Parts = []
        for item in items:
            if parts and separator:
                parts.append(separator)
            parts += item
        refs = sum(type(part) is Reference for part in parts)
        if refs <= INLINE_REFERENCES and sum(map(len, parts)) - refs * DIGEST_BYTES <= INLINE_BYTES:
            return parts, []
        nodes: list[bytes] = []
        parts, weight, count = [], 0, 0
        before = b""
        for item in items:
            refs = sum(type(part) is Reference for part in item)
            item_weight = sum(map(len, item)) + refs * (REFERENCE_WEIGHT - DIGEST_BYTES)
            if count + refs > NODE_REFERENCES:
                nodes.append(self.node(parts))
                parts, weight, count = [], 0, 0
            if before:
                parts.append(before)
            parts += item
            weight += item_weight
            count += refs
            before = separator
            if weight >= NODE_MIN_BYTES and (weight >= NODE_MAX_BYTES or _is_boundary(item, item_weight)):
                nodes.append(self.node(parts))
                parts, weight, count = [], 0, 0
        if parts:
            nodes.append(self.node(parts))
        return [], nodes

    def node(self, parts: Parts) -> Reference:
        refs, texts, lengths = [], [], bytearray()
        size = run = 0
        for part in parts:
            if type(part) is Reference:
                size += self.sizes[part]
                while run >= 0x80:
                    lengths.append(run & 0x7F | 0x80)
                    run >>= 7
                lengths.append(run)
                run = 0
                refs.append(part)
            else:
                texts.append(part)
                run += len(part)
                size += len(part)
        raw = b"".join((bytes((len(refs),)), *refs, bytes(lengths), *texts))
        reference = Reference(hashlib.sha256(raw).digest())
        self.nodes[reference] = raw
        self.sizes[reference] = size
        return reference

    def size(self, parts: Parts) -> int:
        return sum(self.sizes[part] if type(part) is Reference else len(part) for part in parts)


def _text(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "surrogatepass")


def _is_boundary(item: Parts, weight: int) -> bool:
    """Whether a node ends after this item: by chance, once in so many bytes, but always alike for the same item."""
    return zlib.crc32(b"".join(item)) * (NODE_MEAN_BYTES - NODE_MIN_BYTES) < weight << 32
