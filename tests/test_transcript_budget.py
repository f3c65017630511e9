"""The budget of a session's transcripts: the oldest output goes, whole segments at a time, and a gap says so."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kagedb
from kagedb import Session, Transcript
from kagedb.models.segment import SEGMENT_BYTES, Event, Gap, Output, Resize
from recordings import new_session

BUDGET_BYTES = 1 << 20
"""The smallest that can be set."""


@pytest.fixture
def session(migrated_url: str, tmp_path: Path) -> Iterator[Session]:
    config = tmp_path / "config.toml"
    config.write_text(f"[transcripts]\nsession_bytes = {BUDGET_BYTES}\n")
    with kagedb.connect(url=migrated_url, config=config):
        yield new_session()


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that do not compress, so that what is written is what is stored."""
    return random.Random(seed).randbytes(size)


def record(session: Session, data: bytes) -> Transcript:
    with Transcript.open(session, 80, 24) as recorder:
        for at in range(0, len(data), 50_000):
            recorder.write(data[at : at + 50_000])
            recorder.flush()
    return Transcript.by_id(recorder.transcript.id)


def split(transcript: Transcript) -> tuple[int, bytes]:
    """How much the gap at the beginning says is missing, and what there is; where there is none, 0."""
    events: list[Event] = list(transcript.events())
    gaps = [event for event in events if isinstance(event, Gap)]
    if gaps:
        assert len(gaps) == 1 and isinstance(events[0], Gap)
    return sum(gap.lost_bytes for gap in gaps), b"".join(event.data for event in events if isinstance(event, Output))


def test_the_oldest_output_goes_and_the_gap_says_how_much(session: Session) -> None:
    whole = noise(5_000_000)
    transcript = record(session, whole)
    lost, kept = split(transcript)
    assert whole.endswith(kept) and lost + len(kept) == len(whole)
    assert len(kept) > BUDGET_BYTES - BUDGET_BYTES // 16 - 2 * SEGMENT_BYTES
    assert Transcript.stored_bytes(session.id) <= BUDGET_BYTES + SEGMENT_BYTES
    assert b"".join(transcript.raw()) == kept and transcript.usage().output_bytes == len(kept)
    assert (
        transcript.tail(3) == kept[kept[:-1].rfind(b"\n", 0, kept[:-1].rfind(b"\n", 0, kept[:-1].rfind(b"\n"))) + 1 :]
    )


def test_a_session_within_its_budget_loses_nothing(session: Session) -> None:
    whole = noise(BUDGET_BYTES - 100_000)
    assert split(record(session, whole)) == (0, whole)


def test_the_oldest_transcript_of_a_session_goes_first_and_other_sessions_lose_nothing(session: Session) -> None:
    other = record(new_session("other"), noise(800_000, 9))
    parts = [noise(400_000, seed) for seed in range(5)]
    transcripts = [record(session, part) for part in parts]
    found = [split(transcript) for transcript in transcripts]
    assert found[0] == (400_000, b"")
    assert [lost + len(kept) for lost, kept in found] == [400_000] * 5
    assert found[-1] == (0, parts[-1])
    assert Transcript.stored_bytes(session.id) <= BUDGET_BYTES + SEGMENT_BYTES
    assert split(other) == (0, noise(800_000, 9))
    assert [transcript.id for transcript in Transcript.of(session)] == [transcript.id for transcript in transcripts]


def test_two_terminals_of_a_session_share_its_budget(session: Session) -> None:
    whole = noise(3_000_000)
    with Transcript.open(session, 80, 24) as one, Transcript.open(session, 80, 24) as two:
        for at in range(0, len(whole), 20_000):
            one.write(whole[at : at + 20_000])
            two.write(whole[at : at + 20_000])
            one.flush()
            two.flush()
    assert Transcript.stored_bytes(session.id) <= BUDGET_BYTES + 2 * SEGMENT_BYTES
    for recorder in (one, two):
        lost, kept = split(recorder.transcript)
        assert whole.endswith(kept) and lost + len(kept) == len(whole) and kept


def test_the_size_of_the_terminal_outlives_the_resize_that_was_dropped(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        recorder.resize(132, 43)
        for at in range(0, 3_000_000, 50_000):
            recorder.write(noise(50_000, at))
            recorder.flush()
    sizes = [event for event in recorder.transcript.events() if isinstance(event, Resize)]
    assert sizes[-1] == Resize(sizes[-1].at_ms, 132, 43)


def test_a_reader_is_not_disturbed_by_what_is_dropped_under_it(session: Session) -> None:
    whole = noise(6_000_000)
    recorder = Transcript.open(session, 80, 24)
    done = threading.Event()

    def write() -> None:
        for at in range(0, len(whole), 20_000):
            recorder.write(whole[at : at + 20_000])
            recorder.flush()
        recorder.close()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not done.is_set():
        for event in recorder.transcript.events():
            if isinstance(event, Output):
                assert event.data in whole
        recorder.transcript.tail(100)
        reads += 1
    thread.join()
    assert reads > 1
