"""Packing what happened on a terminal, and unpacking it: no store is needed for that."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagedb.errors import StorageCorrupt
from kagedb.models.segment import (
    CHUNK_BYTES,
    SEGMENT_BYTES,
    SEGMENT_CHUNKS,
    TICK_MS,
    Chunk,
    Event,
    Gap,
    Mark,
    Output,
    Packed,
    Packer,
    Resize,
    Unpacker,
    pack_gap,
    pack_whole,
)
from recordings import joined, output

SIZES = st.integers(1, 65_535)
HAPPENINGS = st.lists(
    st.tuples(
        st.integers(0, 400),  # ticks since the one before
        st.one_of(
            st.binary(min_size=1, max_size=300),
            st.tuples(SIZES, SIZES),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            st.integers(0, 2**50),
        ),
        st.booleans(),  # whether the chunk is cut after it
    ),
    max_size=40,
)


def pack(happenings: list[tuple[int, Any, bool]]) -> tuple[list[Packed], list[Event]]:
    """Each as a chunk's method takes it; gives the chunks, and the events that are to come out of them."""
    packer, packed, events = Packer(), [], []
    tick, size = 0, (80, 24)
    chunk: Chunk | None = None
    for ticks, what, cut in happenings:
        tick += ticks
        chunk = chunk or Chunk(tick, *size)
        event: Event
        if isinstance(what, bytes):
            chunk.output(tick, what)
            event = Output(tick * TICK_MS, what)
        elif isinstance(what, str):
            chunk.mark(tick, what)
            event = Mark(tick * TICK_MS, what)
        elif isinstance(what, int):
            chunk.gap(tick, what)
            event = Gap(tick * TICK_MS, what)
        else:
            chunk.resize(tick, *what)
            event = Resize(tick * TICK_MS, *what)
            if what == size:
                event = Output(tick * TICK_MS, b"")
            size = what
        events.append(event)
        if cut:
            packed.append(packer.pack(chunk))
            chunk = None
    if chunk:
        packed.append(packer.pack(chunk))
    return packed, [event for event in events if not isinstance(event, Output) or event.data]


def unpack(packed: list[Packed], size: tuple[int, int] = (80, 24)) -> list[Event]:
    unpacker = Unpacker()
    unpacker.size = size
    return [
        event for key, one in keyed(packed) for event in unpacker.events(key, one.place, one.data, one.tick * TICK_MS)
    ]


def keyed(packed: list[Packed]) -> list[tuple[int, Packed]]:
    """Each under the key that it is stored under: a whole segment has that of its last chunk."""
    found, key = [], 999
    for one in packed:
        key += max(1, -one.place)
        found.append((key, one))
    return found


@settings(deadline=None, max_examples=200)
@given(HAPPENINGS)
def test_what_happened_comes_out_as_it_went_in(happenings: list[tuple[int, Any, bool]]) -> None:
    packed, events = pack(happenings)
    assert joined(unpack(packed)) == joined(events)
    raw = b"".join(outputs_of(packed))
    assert raw == b"".join(event.data for event in events if isinstance(event, Output))
    assert [one.size for one in packed] == [len(piece) for piece in outputs_of(packed)]


def segments(packed: list[Packed]) -> list[list[Packed]]:
    found: list[list[Packed]] = []
    for one in packed:
        if not one.place:
            found.append([])
        found[-1].append(one)
    return found


@settings(deadline=None, max_examples=200)
@given(HAPPENINGS)
def test_a_whole_segment_says_the_same_as_its_chunks(happenings: list[tuple[int, Any, bool]]) -> None:
    packed, events = pack(happenings)
    wholes = [pack_whole(segment) for segment in segments(packed)]
    assert joined(unpack(wholes)) == joined(events)
    assert b"".join(outputs_of(wholes)) == b"".join(outputs_of(packed))
    assert [whole.size for whole in wholes] == [sum(one.size for one in segment) for segment in segments(packed)]


@settings(deadline=None, max_examples=100)
@given(HAPPENINGS, st.data())
def test_a_segment_that_becomes_whole_under_a_reader_gives_nothing_twice_and_loses_nothing(
    happenings: list[tuple[int, Any, bool]], data: st.DataObject
) -> None:
    packed, events = pack([*happenings, (1, b"the end", True)])
    rows = keyed(packed)
    read = data.draw(st.integers(0, len(rows)))
    first = read
    while first and (first == len(rows) or rows[first][1].place):
        first -= 1
    whole = pack_whole([one for _, one in rows[first:]])
    for take in ("events", "output"):
        unpacker = Unpacker()
        unpacker.size = 80, 24
        found: list[Any] = []
        # What a reader sees whose next statement comes after the change: keys beyond the last one that it has read.
        later = [(rows[-1][0], whole)] if read < len(rows) else []
        for key, one in [*rows[:read], *later]:
            arguments = (key, one.place, one.data)
            if take == "events":
                found += unpacker.events(*arguments, one.tick * TICK_MS)
            else:
                found.append(unpacker.output(*arguments))
        if take == "events":
            assert joined(found) == joined(events)
        else:
            assert b"".join(found) == b"".join(outputs_of(packed))


def test_small_chunks_take_less_as_a_whole() -> None:
    packed, _ = pack([(125, f"\x1b[1;1H{number} words\r\n".encode() * 30, True) for number in range(SEGMENT_CHUNKS)])
    assert len(pack_whole(packed).data) < 0.8 * sum(len(one.data) for one in packed)


def outputs_of(packed: list[Packed]) -> list[bytes]:
    unpacker = Unpacker()
    return [unpacker.output(key, one.place, one.data) for key, one in keyed(packed)]


def test_a_segment_can_be_read_without_those_before_it_and_says_how_large_the_terminal_was() -> None:
    packed, _ = pack([(0, b"x" * CHUNK_BYTES, True), (1, (132, 43), False)] + [(1, b"y" * CHUNK_BYTES, True)] * 40)
    starts = [index for index, one in enumerate(packed) if not one.place]
    assert len(starts) == 3 and starts[1] == SEGMENT_BYTES // CHUNK_BYTES
    assert unpack(packed[starts[1] :])[0] == Resize(packed[starts[1]].tick * TICK_MS, 132, 43)
    assert unpack(packed[starts[1] :], (132, 43))[0] == Output(packed[starts[1]].tick * TICK_MS, b"y" * CHUNK_BYTES)


def test_a_quiet_terminal_begins_a_new_segment_too() -> None:
    packed, _ = pack([(125, b"tick\r\n", True)] * (SEGMENT_CHUNKS * 2 + 1))
    assert [index for index, one in enumerate(packed) if not one.place] == [0, SEGMENT_CHUNKS, SEGMENT_CHUNKS * 2]


def test_a_gap_is_a_segment_of_its_own() -> None:
    gap = pack_gap(7, 12_345, 100, 30)
    assert (gap.place, gap.size) == (0, 0) and len(gap.data) < 30
    assert unpack([gap]) == [Resize(7 * TICK_MS, 100, 30), Gap(7 * TICK_MS, 12_345)]


def test_a_chunk_that_is_missing_is_noticed() -> None:
    packed, _ = pack([(1, bytes(piece), True) for piece in output(1, 2000) if piece])
    for missing in (0, len(packed) // 2):
        with pytest.raises(StorageCorrupt, match="or one before it is missing"):
            unpack(packed[:missing] + packed[missing + 1 :])


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_chunk_raises_storage_corrupt_or_nothing_and_never_hangs(seed: int) -> None:
    """Deflate has no checksum: a flipped bit may give other bytes. It must not give another kind of error."""
    packed, _ = pack([(1, bytes(piece), True) for piece in output(seed, 3000) if piece])
    rng = random.Random(seed)
    noticed = 0
    began = time.monotonic()
    for _ in range(300):
        victim = rng.randrange(len(packed))
        damaged = bytearray(packed[victim].data)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        one = packed[victim]
        broken = [
            *packed[:victim],
            replace(one, data=bytes(damaged)),
            *packed[victim + 1 :],
        ]
        try:
            unpack(broken)
            outputs_of(broken)
        except StorageCorrupt:
            noticed += 1
    assert noticed > 100
    assert time.monotonic() - began < 60


def test_many_small_writes_of_a_moment_are_one_event() -> None:
    packed, _ = pack([(0, b"a", False)] * 100 + [(1, b"b", False)] + [(0, b"b", False)] * 99)
    assert unpack(packed) == [Output(0, b"a" * 100), Output(TICK_MS, b"b" * 100)]
