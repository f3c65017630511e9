"""What happened on a terminal, and how it is packed: events, the chunks they are kept in, the segments chunks form.

A segment is one raw deflate stream (RFC 1951) that is readable without the segments before it; a chunk is the piece of
it that was written at once. Once it is complete it is packed again as one piece, since many small rows leave gaps in
the pages of a database. Nothing here knows of tables or threads; the bytes are never interpreted.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import StorageCorrupt

TICK_MS = 16
"""What times are rounded down to: a frame of a 60 Hz screen. Finer times would be a fifth of what is stored."""

CHUNK_BYTES = 16 * 1024
"""Output a chunk holds at most, and so what a crash can lose of a fast program: half the wear of 4 KiB, and 64 KiB
would halve it once more but lose four times as much."""

SEGMENT_BYTES = 256 * 1024
"""Output after which the next chunk begins a new segment: reading starts there, in about a millisecond; longer segments
would be no smaller on the disk."""

SEGMENT_CHUNKS = 256
"""Chunks after which the next one begins a new segment: a quiet terminal fills no segment in a day."""

_RAW_DEFLATE = -15
_OUTPUT, _RESIZE, _MARK, _GAP = range(4)


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that the terminal was sent; `at_ms` is milliseconds since the transcript began, here and below."""

    at_ms: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """From here on the terminal had this size, in characters."""

    at_ms: int
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A place that somebody marked."""

    at_ms: int
    label: str


@dataclass(frozen=True, slots=True)
class Gap:
    """What came before is missing here: so many bytes of output had to be dropped."""

    at_ms: int
    lost_bytes: int


Event = Output | Resize | Mark | Gap


class Chunk:
    """A chunk that is being filled. Ticks count from the beginning of the transcript and never go back."""

    __slots__ = ("_frames", "_parts", "_run", "_run_tick", "_tick", "columns", "first_tick", "rows", "size")

    def __init__(self, tick: int, columns: int, rows: int) -> None:
        self.first_tick = tick
        self.columns = columns
        self.rows = rows
        self.size = 0
        """Bytes of output."""
        self._parts: list[bytes] = []
        self._frames = bytearray()
        self._tick = tick
        self._run = 0
        self._run_tick = tick

    @property
    def full(self) -> bool:
        return self.size >= CHUNK_BYTES or len(self._frames) >= CHUNK_BYTES

    @property
    def last_tick(self) -> int:
        return max(self._tick, self._run_tick)

    def output(self, tick: int, data: bytes) -> None:
        """Add output: all of one tick becomes one event."""
        if tick != self._run_tick:
            self._end_run()
            self._run_tick = tick
        self._run += len(data)
        self._parts.append(data)
        self.size += len(data)

    def resize(self, tick: int, columns: int, rows: int) -> None:
        self._frame(tick, _RESIZE, columns, rows)

    def mark(self, tick: int, label: str) -> None:
        text = label.encode()
        self._frame(tick, _MARK, len(text))
        self._frames += text

    def gap(self, tick: int, lost_bytes: int) -> None:
        self._frame(tick, _GAP, lost_bytes)

    def plain(self, *, begins_segment: bool) -> bytes:
        """The chunk before compression: all output in one piece (so it compresses well), then when it came."""
        self._end_run()
        size = bytearray()
        _put(size, self.size)
        start = bytearray()
        if begins_segment:
            for number in (_RESIZE, self.columns, self.rows):
                _put(start, number)
        return b"".join((size, *self._parts, start, self._frames))

    def _end_run(self) -> None:
        if self._run:
            run, self._run = self._run, 0
            self._frame(self._run_tick, _OUTPUT, run)

    def _frame(self, tick: int, kind: int, *numbers: int) -> None:
        self._end_run()
        _put(self._frames, (tick - self._tick) << 2 | kind)
        self._tick = tick
        for number in numbers:
            _put(self._frames, number)


@dataclass(slots=True)
class Packed:
    """A chunk as it is stored, or a whole segment.

    `place` is its position in its segment, 0 for the one that begins it. That of a whole segment is negative: the
    number of chunks that it was.
    """

    tick: int
    last_tick: int
    columns: int
    rows: int
    """The size of the terminal when it began."""
    place: int
    size: int
    """Bytes of output."""
    data: bytes
    lost_bytes: int = 0
    """For a chunk that is nothing but a gap: bytes of output that are missing."""


class Packer:
    """Packs the chunks of one transcript, in order."""

    def __init__(self) -> None:
        self.begin_segment()

    def begin_segment(self) -> None:
        """Make the next chunk readable without those before it."""
        self._place = 0
        self._size = 0

    def pack(self, chunk: Chunk) -> Packed:
        if self._size >= SEGMENT_BYTES or self._place >= SEGMENT_CHUNKS:
            self.begin_segment()
        if not self._place:
            self._deflate = zlib.compressobj(wbits=_RAW_DEFLATE)
        plain = chunk.plain(begins_segment=not self._place)
        data = self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        packed = Packed(chunk.first_tick, chunk.last_tick, chunk.columns, chunk.rows, self._place, chunk.size, data)
        self._place += 1
        self._size += chunk.size
        return packed


def pack_gap(tick: int, lost_bytes: int, columns: int, rows: int) -> Packed:
    """A segment of its own that says what is missing before the next one."""
    chunk = Chunk(tick, columns, rows)
    chunk.gap(tick, lost_bytes)
    packed = Packer().pack(chunk)
    packed.lost_bytes = lost_bytes
    return packed


def pack_whole(chunks: Sequence[Packed]) -> Packed:
    """A complete segment in one piece, with the same events."""
    inflate = zlib.decompressobj(_RAW_DEFLATE)
    outputs: list[bytes] = []
    frames = bytearray()
    last_tick = chunks[0].tick
    for chunk in chunks:
        plain = inflate.decompress(chunk.data)
        size, start = _get(plain, 0)
        outputs.append(plain[start : start + size])
        # Its first frame counts from its first tick; in the whole from the last one of the chunk before.
        head, rest = _get(plain, start + size)
        _put(frames, head + ((chunk.tick - last_tick) << 2))
        frames += plain[rest:]
        last_tick = chunk.last_tick
    whole = bytearray()
    _put(whole, sum(map(len, outputs)))
    deflate = zlib.compressobj(wbits=_RAW_DEFLATE)
    data = deflate.compress(b"".join((whole, *outputs, frames))) + deflate.flush()
    first = chunks[0]
    return Packed(first.tick, last_tick, first.columns, first.rows, -len(chunks), sum(map(len, outputs)), data)


class Unpacker:
    """Unpacks chunks one after the other, by rising keys, beginning with one that begins a segment.

    Where the chunks of a segment turn out to have been replaced by the whole of it meanwhile, what was read of it
    already is left out. Raises StorageCorrupt where a chunk is damaged or missing.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        """Columns and rows of the terminal, as far as was read."""
        self._key = self._place = -1
        self._seen_bytes = self._seen_frames = 0

    def output(self, key: int, place: int, data: bytes) -> bytes:
        """The output of a chunk alone: a tenth of the cost of its events."""
        plain, end, start = self._plain(key, place, data)
        seen, self._seen_bytes = self._seen_bytes if place < 0 else 0, self._seen_bytes + end - start
        return plain[start + seen : end]

    def events(self, key: int, place: int, data: bytes, at_ms: int) -> Iterator[Event]:
        """The events of a chunk whose first is at `at_ms`. A size that the terminal has already is no event."""
        plain, end, output = self._plain(key, place, data)
        seen = self._seen_frames if place < 0 else 0
        position = end
        try:
            while position < len(plain):
                head, position = _get(plain, position)
                number, position = _get(plain, position)
                at_ms += (head >> 2) * TICK_MS
                kind = head & 3
                event: Event | None = None
                if kind == _OUTPUT:
                    event = Output(at_ms, plain[output : output + number])
                    output += number
                elif kind == _RESIZE:
                    rows, position = _get(plain, position)
                    if self.size != (number, rows):
                        event = Resize(at_ms, number, rows)
                elif kind == _MARK:
                    event = Mark(at_ms, plain[position : position + number].decode())
                    position += number
                else:
                    event = Gap(at_ms, number)
                if seen:
                    seen -= 1
                    continue
                self._seen_frames += 1
                if isinstance(event, Resize):
                    self.size = event.columns, event.rows
                if event is not None:
                    yield event
        except (IndexError, UnicodeDecodeError):
            raise damaged(key) from None
        if output != end:
            raise damaged(key)

    def _plain(self, key: int, place: int, data: bytes) -> tuple[bytes, int, int]:
        """A chunk decompressed, where its output ends, and where it begins."""
        if place > 0:
            if (key, place) != (self._key + 1, self._place + 1):
                raise damaged(key)
        else:
            self._inflate = zlib.decompressobj(_RAW_DEFLATE)
            if not (place < 0 and key + place < self._key <= key):
                self._seen_bytes = self._seen_frames = 0
        self._key, self._place = key, place if place >= 0 else -2
        try:
            plain = self._inflate.decompress(data)
            size, start = _get(plain, 0)
        except (zlib.error, IndexError):
            raise damaged(key) from None
        if start + size > len(plain):
            raise damaged(key)
        return plain, start + size, start


def is_gap(data: bytes) -> bool:
    """Whether a chunk that begins a segment is nothing but a gap."""
    unpacker = Unpacker()
    events = unpacker.events(0, 0, data, 0)
    return [type(event) for event in itertools.islice(events, 2)] == [Resize, Gap]


def damaged(key: int) -> StorageCorrupt:
    return StorageCorrupt(
        f"the transcript chunk {key} is damaged, or one before it is missing",
        "look at the whole store with: kaged check",
    )


def _put(into: bytearray, number: int) -> None:
    """Append an unsigned integer, seven bits a byte, the low ones first, the top bit set where more follow."""
    while number > 0x7F:
        into.append(number & 0x7F | 0x80)
        number >>= 7
    into.append(number)


def _get(data: bytes, position: int) -> tuple[int, int]:
    """The integer at `position`, and the position after it. Raises IndexError at the end."""
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
