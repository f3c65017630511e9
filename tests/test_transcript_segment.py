"""Packing what happened on a terminal, and unpacking it: no store is needed for that."""

from __future__ import annotations

import random
import time
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
        event for one in packed for event in unpacker.events(one.place, one.data, one.tick * TICK_MS, "of the test")
    ]


@settings(deadline=None, max_examples=200)
@given(HAPPENINGS)
def test_what_happened_comes_out_as_it_went_in(happenings: list[tuple[int, Any, bool]]) -> None:
    packed, events = pack(happenings)
    assert joined(unpack(packed)) == joined(events)
    unpacker = Unpacker()
    raw = b"".join(unpacker.output(one.place, one.data, "of the test") for one in packed)
    assert raw == b"".join(event.data for event in events if isinstance(event, Output))
    assert [one.size for one in packed] == [len(piece) for piece in outputs_of(packed)]


def outputs_of(packed: list[Packed]) -> list[bytes]:
    unpacker = Unpacker()
    return [unpacker.output(one.place, one.data, "of the test") for one in packed]


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
            Packed(one.tick, 80, 24, one.place, one.size, bytes(damaged)),
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
