"""Transcripts: what a recorder wrote is read back, as bytes, as events, by lines and by time, while it goes on too."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import kagedb.models.transcript_chunk
from kagedb import NotFound, Run, Session, StateError, StorageCorrupt, Transcript
from kagedb.errors import ImmutableError, InvalidValue
from kagedb.models import TranscriptChunk, stream
from kagedb.models.segment import SEGMENT_BYTES, Event, Gap, Mark, Output, Resize
from recordings import ANA, joined, new_session, output

if TYPE_CHECKING:
    from kagedb.storage import Storage


@pytest.fixture
def session(storage: Storage) -> Session:
    return new_session()


def stored(session: Session, pieces: list[bytes]) -> Transcript:
    """A transcript of that output, which is closed."""
    with Transcript.open(session, 80, 24) as recorder:
        for piece in pieces:
            recorder.write(piece)
    return Transcript.by_id(recorder.transcript.id)


def test_what_was_written_is_read_back_byte_for_byte(session: Session) -> None:
    pieces = output(1, 600_000)
    transcript = stored(session, pieces)
    assert b"".join(transcript.raw()) == b"".join(pieces)
    assert b"".join(event.data for event in transcript.events() if isinstance(event, Output)) == b"".join(pieces)
    assert transcript.usage().output_bytes == sum(map(len, pieces))


def test_all_kinds_of_bytes_are_taken_and_a_buffer_may_be_used_again(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        buffer = bytearray(b"one ")
        recorder.write(buffer)
        buffer[:] = b"two "
        recorder.write(memoryview(buffer))
        buffer[:] = b"XXXX"
        recorder.write(b"")
        recorder.write(bytes(range(256)))
        for wrong in ("text", 5, None, [1]):
            with pytest.raises(InvalidValue, match="takes bytes"):
                recorder.write(wrong)  # type: ignore[arg-type]
    assert b"".join(recorder.transcript.raw()) == b"one two " + bytes(range(256))


def test_one_write_of_megabytes_is_cut_into_chunks(session: Session) -> None:
    data = b"".join(output(2, 3_000_000))
    assert b"".join(stored(session, [data]).raw()) == data


def test_events_come_with_their_times_and_in_their_order(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        moments = []
        for step in (
            lambda: recorder.write(b"first"),
            lambda: recorder.resize(100, 30),
            lambda: recorder.mark("here it broke"),
            lambda: recorder.resize(100, 30),
            lambda: recorder.write(b"last"),
        ):
            time.sleep(0.05)
            before = time.monotonic()
            step()
            moments.append([(moment - recorder._began) * 1000 for moment in (before, time.monotonic())])
    events = list(recorder.transcript.events())
    assert [type(event) for event in events] == [Output, Resize, Mark, Output]
    first, resize, mark, last = events
    assert resize == Resize(resize.at_ms, 100, 30) and mark == Mark(mark.at_ms, "here it broke")
    for event, (before, after) in zip(events, (*moments[:3], moments[4]), strict=True):
        assert before - 16 <= event.at_ms <= after and event.at_ms % 16 == 0
    assert (first, last) == (Output(first.at_ms, b"first"), Output(last.at_ms, b"last"))


@pytest.mark.parametrize(
    ("data", "lines", "expected"),
    [
        (b"", 3, b""),
        (b"one", 1, b"one"),
        (b"one\n", 1, b"one\n"),
        (b"one\ntwo", 1, b"two"),
        (b"one\ntwo\n", 1, b"two\n"),
        (b"one\r\ntwo\r\n\r\n", 2, b"two\r\n\r\n"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"one\ntwo\n", 2, b"one\ntwo\n"),
        (b"one\ntwo\n", 50, b"one\ntwo\n"),
    ],
)
def test_a_tail_is_the_last_lines_ended_or_not(session: Session, data: bytes, lines: int, expected: bytes) -> None:
    assert stored(session, [data]).tail(lines) == expected


def test_a_tail_goes_over_as_many_segments_as_it_needs_and_no_further(session: Session, monkeypatch: Any) -> None:
    rows = [f"{number:07} {'x' * (number % 90)}\n".encode() for number in range(40_000)]
    transcript = stored(session, rows)
    for lines in (1, 1000, 10_000, 39_999, 40_000, 40_001):
        assert transcript.tail(lines) == b"".join(rows[-lines:])
    read: list[int] = []
    plain = TranscriptChunk._span.run
    monkeypatch.setattr(TranscriptChunk._span, "run", lambda **keys: read.append(keys["first"]) or plain(**keys))
    transcript.tail(1000)
    assert len(read) <= 2  # the last one may just have begun
    with pytest.raises(InvalidValue, match="a tail of 0 lines"):
        transcript.tail(0)


def test_the_tail_of_a_program_that_ends_no_line_is_bounded(session: Session) -> None:
    transcript = stored(session, [b"\x1b[H" + b"x" * 997] * 3000)
    assert len(transcript.tail(100)) <= 2 * SEGMENT_BYTES


def loaded(session: Session, seconds: int) -> Transcript:
    """Two hundred bytes each tenth of a second; each piece says when it was."""
    pieces = (Output(at_ms, f"{at_ms:010}".encode() * 20) for at_ms in range(0, seconds * 1000, 100))
    return Transcript.load(session, 80, 24, pieces)


def test_reading_from_a_time_starts_at_the_segment_that_holds_it(session: Session) -> None:
    transcript = loaded(session, 600)
    everything = list(transcript.events())
    for from_ms in (0, 1, 99_984, 100_000, 300_123, 599_000, 10_000_000):
        events = list(transcript.events(from_ms))
        assert events == everything[-len(events) :]
        skipped = everything[: -len(events)]
        assert not skipped or skipped[-1].at_ms <= from_ms
        assert events[0].at_ms <= from_ms
        early = sum(len(event.data) for event in events if event.at_ms < from_ms and isinstance(event, Output))
        assert early <= SEGMENT_BYTES + 16_384


def test_finding_a_time_takes_a_binary_search(session: Session, storage: Storage, monkeypatch: Any) -> None:
    transcript = loaded(session, 3600)
    statements: list[str] = []
    plain = storage.database.execute_sql
    monkeypatch.setattr(
        storage.database, "execute_sql", lambda sql, *rest, **more: statements.append(sql) or plain(sql, *rest, **more)
    )
    assert next(transcript.events(1_800_000)).at_ms <= 1_800_000
    assert len(statements) < 20 < transcript.usage().chunks


def test_a_replay_takes_its_time_divided_by_the_speed_and_shows_what_was_before_at_once(session: Session) -> None:
    transcript = Transcript.load(
        session, 80, 24, [Output(0, b"a"), Output(1600, b"b"), Output(1920, b"c"), Mark(2400, "end")]
    )
    began = time.monotonic()
    came = [(event.at_ms, time.monotonic() - began) for event in transcript.replay(from_ms=1600, speed=4)]
    assert [at_ms for at_ms, _ in came] == [0, 1600, 1920, 2400]
    for (_, moment), expected in zip(came, (0, 0, 0.08, 0.2), strict=True):
        assert expected <= moment < expected + 0.4
    for wrong in (0, -1, float("nan")):
        with pytest.raises(InvalidValue, match="times as fast"):
            next(transcript.replay(speed=wrong))


def test_text_is_what_a_reader_wants(session: Session) -> None:
    transcript = stored(session, [b"\x1b[1mbo", b"ld\x1b[0m gr\xc3", b"\xb6\xc3\x9fe\r\n10%\r20%\rdone\r\n", b"last"])
    assert list(transcript.text()) == ["bold größe\n", "done\n", "last"]


def test_numbers_are_never_used_again(session: Session) -> None:
    first = stored(session, [b"secret"])
    second = stored(session, [b"other"])
    with kagedb.storage.current().transaction():  # type: ignore[union-attr]
        TranscriptChunk.delete().where(TranscriptChunk.key >= first.first_key).execute()
        Transcript.delete().execute()
    third = stored(session, [b"new"])
    assert first.number < second.number < third.number
    assert b"".join(third.raw()) == b"new"


def test_a_transcript_that_outgrows_its_keys_goes_on_in_a_continuation(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "SEQUENCES", 300)
    events: list[Event] = [Output(0, b"begin\n"), Resize(0, 132, 43)]
    events += [Output(at_ms, f"{at_ms:09}\n".encode() * 160) for at_ms in range(16, 16 * 1600, 16)]
    transcript = Transcript.load(session, 80, 24, events)
    parts = transcript.parts()
    assert len(parts) > 3 and len({part.number for part in parts}) == len(parts)
    assert [part.continues_id for part in parts] == [None, *(part.id for part in parts[:-1])]
    assert all(part.closed_at for part in parts)
    assert joined(transcript.events()) == joined(events)
    assert b"".join(transcript.raw()) == b"".join(event.data for event in events if isinstance(event, Output))
    assert transcript.tail(5000) == b"".join(event.data for event in events if isinstance(event, Output))[-50_000:]
    for from_ms in (16, 5000, 12_000, 25_000):
        began = next(transcript.events(from_ms))
        assert from_ms - 3000 < began.at_ms <= from_ms
        assert any(event.at_ms == from_ms // 16 * 16 for event in transcript.events(from_ms))
    assert Transcript.of(session) == [transcript]
    assert transcript.usage().output_bytes == sum(len(event.data) for event in events if isinstance(event, Output))
    keys = [row.key for row in TranscriptChunk.select()]
    assert all(key & 0xFFFFFF < 300 for key in keys)


def test_a_session_has_several_transcripts_also_at_once(session: Session) -> None:
    run = Run.dispatch(session, agent="planner", input={})
    with Transcript.open(session, 80, 24, run=run) as one, Transcript.open(session, 132, 43) as two:
        for number in range(100):
            one.write(f"one {number}\n".encode())
            two.write(f"two {number}\n".encode())
    assert [found.id for found in Transcript.of(session)] == [one.transcript.id, two.transcript.id]
    assert b"".join(one.transcript.raw()) == b"".join(f"one {number}\n".encode() for number in range(100))
    assert b"".join(two.transcript.raw()) == b"".join(f"two {number}\n".encode() for number in range(100))
    found = Transcript.by_id(one.transcript.id)
    assert (found.run_id, found.columns, found.rows) == (run.id, 80, 24)
    assert found.closed_at >= found.created_at


def test_a_transcript_is_opened_for_a_session_that_goes_on_and_a_terminal_that_can_be(session: Session) -> None:
    other = new_session("another")
    run = Run.dispatch(other, agent="planner", input={})
    with pytest.raises(NotFound, match="is not in the session"):
        Transcript.open(session, 80, 24, run=run)
    for columns, rows in ((0, 24), (80, -1), (65_536, 24), (80, 24.0), (True, 24), ("80", 24), (None, None)):
        with pytest.raises(InvalidValue, match="a terminal of"):
            Transcript.open(session, columns, rows)  # type: ignore[arg-type]
    session.end(actor=ANA)
    with pytest.raises(StateError, match="has ended"):
        Transcript.open(session, 80, 24)
    Session.delete().where(Session.id == session.id).execute()
    with pytest.raises(NotFound, match="there is no session"):
        Transcript.open(session, 80, 24)
    assert Transcript.select().count() == 0


def test_a_transcript_can_be_read_while_another_thread_records(session: Session) -> None:
    pieces = output(3, 2_000_000)
    whole = b"".join(pieces)
    recorder = Transcript.open(session, 80, 24)
    done = threading.Event()

    def record() -> None:
        for piece in pieces:
            recorder.write(piece)
        recorder.close()
        done.set()

    thread = threading.Thread(target=record)
    thread.start()
    sizes = []
    while not done.is_set():
        found = b"".join(recorder.transcript.raw())
        assert whole.startswith(found)
        tail = recorder.transcript.tail(20)
        assert tail in whole
        sizes.append(len(found))
        joined(recorder.transcript.events(500))
    thread.join()
    assert sizes == sorted(sizes) and len(set(sizes)) > 2
    assert b"".join(recorder.transcript.raw()) == whole


def rows_of(transcript: Transcript) -> list[int]:
    query = TranscriptChunk.select(TranscriptChunk.place).order_by(TranscriptChunk.key)
    return [
        place
        for (place,) in query.where(TranscriptChunk.key.between(transcript.first_key, transcript.end_key)).tuples()
    ]


def test_a_segment_that_is_complete_becomes_one_row_and_the_last_one_when_it_is_closed(session: Session) -> None:
    recorder = Transcript.open(session, 80, 24)
    line = b"a line that compresses well\r\n" * 1000
    for _ in range(30):
        recorder.write(line)
        recorder.flush()
    places = rows_of(recorder.transcript)
    wholes = [place for place in places if place < 0]
    assert len(wholes) == 30 * len(line) // SEGMENT_BYTES and all(place < -8 for place in wholes)
    assert places[len(wholes) :] == list(range(len(places) - len(wholes)))
    recorder.close()
    assert rows_of(recorder.transcript) == [*wholes, -(len(places) - len(wholes))]
    assert b"".join(recorder.transcript.raw()) == line * 30
    assert recorder.transcript.usage().chunks == len(wholes) + 1


def test_bytes_that_do_not_compress_are_not_written_twice(session: Session) -> None:
    with Transcript.open(session, 80, 24) as recorder:
        for _ in range(40):
            recorder.write(os.urandom(16_384))
            recorder.flush()
    assert sorted(rows_of(recorder.transcript)) == sorted([*range(16), *range(16), *range(8)])


def test_what_a_reader_began_is_not_disturbed_when_the_segment_becomes_one_row(
    session: Session, monkeypatch: Any
) -> None:
    for module in (kagedb.models.transcript, kagedb.models.transcript_chunk):
        monkeypatch.setattr(module, "PAGE_CHUNKS", 2)  # so that most of what they read comes after the change
    pieces = output(6, 700_000)
    recorder = Transcript.open(session, 80, 24)
    readers: list[tuple[list[Any], Iterator[Any]]] = []
    for number, piece in enumerate(pieces):
        recorder.write(piece)
        if number % 2000 == 1999:
            recorder.flush()
            for read in (recorder.transcript.raw, recorder.transcript.events):
                begun = read()
                readers.append((list(itertools.islice(begun, number // 1000)), begun))
    recorder.close()
    assert len(readers) >= 6 and all(found for found, _ in readers) and len(rows_of(recorder.transcript)) <= 3
    sizes = []
    for found, rest in readers:
        found += rest
        data = b"".join(event.data if isinstance(event, Output) else event for event in found)
        # One that had come to the end of what there was then stops there.
        assert b"".join(pieces).startswith(data)
        sizes.append(len(data))
    assert sizes.count(sum(map(len, pieces))) > len(sizes) // 2


def test_a_chunk_is_never_changed(session: Session) -> None:
    transcript = stored(session, [b"as it was"])
    with pytest.raises(ImmutableError, match="a chunk of a transcript is never changed"):
        TranscriptChunk.update({TranscriptChunk.data: b""}).execute()
    assert b"".join(transcript.raw()) == b"as it was"


def test_what_is_missing_in_the_middle_is_damage_and_not_less_output(session: Session) -> None:
    """A chunk of a segment that was being recorded, and then a segment that was complete."""
    recorder = Transcript.open(session, 80, 24)
    recorder.write(b"".join(output(4, 100_000)))
    recorder.flush()
    TranscriptChunk.delete().where(TranscriptChunk.key == recorder.transcript.first_key + 3).execute()
    complete = stored(session, output(5, 1_000_000))
    wholes = [row.key for row in TranscriptChunk.select().where(TranscriptChunk.key > complete.first_key)]
    assert len(wholes) == 4
    for transcript, missing in ((recorder.transcript, None), (complete, wholes[2]), (complete, wholes[0])):
        TranscriptChunk.delete().where(TranscriptChunk.key == missing).execute()
        for read in (transcript.raw, transcript.events, transcript.text):
            with pytest.raises(StorageCorrupt, match="is damaged, or one before it is missing"):
                for _ in read():  # type: ignore[operator]
                    pass
    recorder._stream.give_up("is of no use")


def test_an_imported_gap_keeps_its_place(session: Session) -> None:
    events: list[Event] = [Output(0, b"a"), Gap(160, 5000), Output(320, b"b")]
    assert list(Transcript.load(session, 80, 24, events).events()) == events


def test_times_that_run_backwards_are_held(session: Session) -> None:
    events = [Output(320, b"a"), Output(160, b"b"), Output(480, b"c")]
    found = list(Transcript.load(session, 80, 24, iter(events)).events())
    assert found == [Output(320, b"ab"), Output(480, b"c")]


def test_a_load_that_fails_half_way_leaves_what_was_stored_and_a_closed_transcript(session: Session) -> None:
    def broken() -> Iterator[Event]:
        yield Output(0, b"kept")
        raise InvalidValue("a damaged line")

    with pytest.raises(InvalidValue, match="a damaged line"):
        Transcript.load(session, 80, 24, broken())
    (found,) = Transcript.of(session)
    assert b"".join(found.raw()) == b"kept" and found.closed_at


def test_an_empty_transcript_reads_as_nothing(session: Session) -> None:
    transcript = stored(session, [])
    assert list(transcript.raw()) == list(transcript.events()) == list(transcript.text()) == []
    assert transcript.tail(10) == b"" and list(transcript.events(5000)) == []
    assert transcript.usage() == type(transcript.usage())(0, 0, 0, 0)


def test_memory_does_not_grow_with_a_transcript_that_is_read(session: Session) -> None:
    import tracemalloc

    with Transcript.open(session, 80, 24) as recorder:
        for piece in itertools.islice(itertools.cycle(output(5, 100_000)), 200_000):
            recorder.write(piece)
    tracemalloc.start()
    size = sum(map(len, recorder.transcript.raw()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 7_000_000 and peak < 3_500_000
