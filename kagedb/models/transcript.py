"""Terminal transcripts: raw bytes as the terminal sent them, in chunks under one packed key, and the ways to read them.

Their rows are in transcript_chunk.py, how they are written while a terminal runs in recorder.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import peewee

# What is in a chunk is imported where it is read or written: most starts of a daemon need none of it.
from ..errors import InvalidValue, KagedError, NotFound, StateError
from ..fields import IntegerField, MillisField
from .base import Counter, Hot, Identified, Parameter, bound_store
from .run import Run
from .session import ENDED, Session
from .transcript_chunk import PAGE_CHUNKS, SIZES_PAGE_CHUNKS, TranscriptChunk

if TYPE_CHECKING:
    from .recorder import Recorder
    from .segment import Event

SEQUENCE_BITS = 24
"""Of the key: 16.7 million chunks are a year of one every two seconds; then a continuation takes over. 39 bits are left
for the numbers of transcripts."""

TERMINAL_SIDE = range(1, 65_536)
"""Columns and rows a terminal can have (`struct winsize` of tty_ioctl(4))."""

TAIL_LINE_BYTES = 1024
"""What a line may take on average in a tail: a full-screen program ends few lines and would drag in all it drew."""


class Transcript(Identified):
    """One recording; `number` is never used again and begins the keys of its chunks.

    `columns` and `rows` are the size of the terminal when it began. Times of events count from `created_at`.
    """

    session = peewee.ForeignKeyField(Session, backref="transcripts")
    run = peewee.ForeignKeyField(Run, null=True, backref="transcripts", index=False)
    number = IntegerField(unique=True)
    continues = peewee.ForeignKeyField("self", null=True, backref="continuations", index=False)
    columns = IntegerField()
    rows = IntegerField()
    closed_at = MillisField(null=True)

    class Meta:
        table_name = "transcript"

    _next_number = Hot(
        lambda: (
            Counter.update({Counter.value: Counter.value + 1})
            .where(Counter.name == "transcript")
            .returning(Counter.value)
        )
    )
    _close = Hot(
        lambda: Transcript.update({Transcript.closed_at: Parameter("at", Transcript.closed_at)}).where(
            Transcript.id == Parameter("id", Transcript.id)
        )
    )
    _continuation = Hot(
        lambda: Transcript.select().where(
            (Transcript.session == Parameter("session", Transcript.session))
            & (Transcript.continues == Parameter("id", Transcript.id))
        )
    )
    _of_session = Hot(
        lambda: (
            Transcript.select()
            .where(Transcript.session == Parameter("session", Transcript.session))
            .order_by(Transcript.number)
        )
    )

    # Writing.

    @classmethod
    def open(
        cls,
        session: Session,
        columns: int,
        rows: int,
        *,
        run: Run | None = None,
        on_error: Callable[[KagedError], Any] | None = None,
    ) -> Recorder:
        """Begin to record a terminal of that size; a session may have several transcripts, also at once.

        `on_error` is called, in another thread, when what was recorded cannot be written (a full disk); recording goes
        on in memory (see Recorder). Without it, that is logged. Raises StateError where the session has ended, NotFound
        where it is not in the store or the run belongs to another one, InvalidValue for an impossible size.
        """
        from .recorder import Recorder

        check_size(columns, rows)
        with bound_store().transaction("relaxed"):
            found = Session._state_of.one(id=session.id)
            if found is None:
                raise NotFound(f"there is no session {session.id}", "list them with: kaged session list")
            if found[0] == ENDED:
                raise StateError(f"the session {session.id} has ended", "start another one")
            if run is not None and run.session_id != session.id:
                raise NotFound(f"the run {run.id} is not in the session {session.id}")
            transcript = cls._put(session.id, run.id if run is not None else None, columns, rows, None)
        return Recorder(transcript, on_error)

    @classmethod
    def load(
        cls, session: Session, columns: int, rows: int, events: Iterable[Event], *, run: Run | None = None
    ) -> Self:
        """Store a recording that was made elsewhere, with the times of its events; Gap events keep their place.

        Raises what `open` and `Recorder.flush` raise; what was stored until then stays.
        """
        with cls.open(session, columns, rows, run=run) as recorder:
            recorder.load(events)
        return cls.by_id(recorder.transcript.id)

    def _continue(self, columns: int, rows: int, at: int) -> Self:
        """Another transcript, for what this one has no more keys for."""
        self._close.run(id=self.id, at=at)
        return self._put(self.session_id, self.run_id, columns, rows, self.id)

    @classmethod
    def _put(cls, session: str, run: str | None, columns: int, rows: int, continues: str | None) -> Self:
        number = cls._next_number.one()[0]
        return cls.put(session=session, run=run, number=number, continues=continues, columns=columns, rows=rows)

    # Reading: statement by statement, so that a long read holds nothing back and another thread may go on recording.

    @classmethod
    def of(cls, session: Session) -> list[Self]:
        """The transcripts of a session, oldest first, without continuations: those are read with what they continue."""
        rows = cls._of_session.run(session=session.id).fetchall()
        return [found for found in map(cls.from_row, rows) if found.continues_id is None]

    def parts(self) -> list[Self]:
        """This transcript and its continuations, which are read as one."""
        parts = [self]
        while (row := self._continuation.one(session=self.session_id, id=parts[-1].id)) is not None:
            parts.append(self.from_row(row))
        return parts

    def events(self, from_ms: int = 0) -> Iterator[Event]:
        """What happened, in order: Output, Resize, Mark and Gap of kagedb.models.segment.

        With `from_ms` (milliseconds since it began) it starts at the segment that holds that time, so that some events
        are earlier. Raises StorageCorrupt when it comes to damage.
        """
        from .segment import Unpacker

        unpacker = Unpacker()
        unpacker.size = self.columns, self.rows
        for key, at, place, _, data in self._chunks(from_ms):
            yield from unpacker.events(key, place, bytes(data), max(0, at - self.created_at))

    def replay(self, from_ms: int = 0, speed: float = 1.0) -> Iterator[Event]:
        """`events`, each when its time has come: sleeps between them, `speed` times as fast as they happened.

        Those of before `from_ms` come at once. An asyncio program takes `events` and waits by itself.
        """
        if not speed > 0:
            raise InvalidValue(f"a replay cannot be {speed} times as fast", "give a speed above 0, like 2 or 0.5")
        began = time.monotonic()
        for event in self.events(from_ms):
            ahead = (event.at_ms - from_ms) / 1000 / speed - (time.monotonic() - began)
            if ahead > 0:
                time.sleep(ahead)
            yield event

    def raw(self) -> Iterator[bytes]:
        """The bytes that the terminal was sent, as they were, piece by piece."""
        from .segment import Unpacker

        unpacker = Unpacker()
        for key, _, place, _, data in self._chunks():
            yield unpacker.output(key, place, bytes(data))

    def text(self) -> Iterator[str]:
        """The output as plain text, line by line; without emulation, see plain.py."""
        from .plain import plain_text

        return plain_text(self.raw())

    def tail(self, lines: int) -> bytes:
        """The last `lines` lines of output, as the terminal was sent them; fewer where they are longer than 1 KiB.

        What is still in a recorder's memory is not among them: `Recorder.flush` first.
        """
        from .segment import SEGMENT_BYTES

        if lines < 1:
            raise InvalidValue(f"a tail of {lines} lines", "ask for at least one")
        pieces: list[bytes] = []
        found = size = 0
        for piece in self._segments_backwards():
            pieces.append(piece)
            found += piece.count(b"\n")
            size += len(piece)
            if found > lines or size >= max(SEGMENT_BYTES, lines * TAIL_LINE_BYTES):
                break
        whole = b"".join(reversed(pieces))
        position = len(whole) - whole.endswith(b"\n")
        for _ in range(lines):
            position = whole.rfind(b"\n", 0, position)
            if position < 0:
                return whole
        return whole[position + 1 :]

    def usage(self) -> Usage:
        """What it takes, continuations included. Reads as many rows as it has chunks, and what is in the last ones."""
        chunks = output = stored = last = 0
        for part in self.parts():
            for _, _, at, size, length in part._sizes():
                chunks, output, stored, last = chunks + 1, output + size, stored + length, at
        end = max((event.at_ms for event in self.events(max(0, last - self.created_at))), default=0)
        return Usage(chunks, output, stored, end)

    def _chunks(self, from_ms: int = 0) -> Iterator[tuple[int, int, int, int, bytes]]:
        from .segment import damaged, is_gap

        parts = self.parts()
        key = 0
        if from_ms > 0:
            while len(parts) > 1 and (first := parts[1]._first()) is not None and first[1] <= self.created_at + from_ms:
                del parts[0]
            key = parts[0]._segment_at(self.created_at + from_ms)
        for part in parts:
            expected = max(key, part.first_key)
            while True:
                page = TranscriptChunk._page.run(after=expected - 1, end=part.end_key).fetchall()
                for row in page:
                    # A row that stands for several chunks may go over what was read of them; none may be left out.
                    if row[0] - max(0, -row[2] - 1) > expected and (row[2] or not is_gap(bytes(row[4]))):
                        raise damaged(row[0])
                    expected = row[0] + 1
                    yield row
                if len(page) < PAGE_CHUNKS:
                    break

    def _segments_backwards(self) -> Iterator[bytes]:
        """The output of each segment, the newest first."""
        from .segment import Unpacker

        for part in reversed(self.parts()):
            before = part.end_key
            while (last := TranscriptChunk._last.one(first=part.first_key, before=before)) is not None:
                key, place = last
                before = key - max(0, place)
                unpacker = Unpacker()
                rows = TranscriptChunk._span.run(first=before, last=key).fetchall()
                yield b"".join(unpacker.output(key, place, bytes(data)) for key, place, data in rows)

    def _first(self) -> tuple[int, int] | None:
        found: tuple[int, int] | None = TranscriptChunk._seek.one(key=self.first_key, end=self.end_key)
        return found

    def _segment_at(self, at: int) -> int:
        """The key of the first chunk of the segment in which that time (Unix milliseconds) is: a binary search."""
        first = self._first()
        last = TranscriptChunk._last.one(first=self.first_key, before=self.end_key)
        if first is None or last is None:
            return self.first_key
        low, high = first[0], last[0]
        while low < high:
            middle = (low + high + 1) // 2
            row = TranscriptChunk._seek.one(key=middle, end=self.end_key)
            if row is not None and row[0] <= high and row[1] <= at:
                low = row[0]
            else:
                high = middle - 1
        found = TranscriptChunk._last.one(first=self.first_key, before=low + 1)
        return low - max(0, found[1]) if found is not None else low

    # The budget of a session.

    @classmethod
    def stored_bytes(cls, session: str) -> int:
        """What the chunks of all transcripts of a session take. Reads as many rows as there are chunks."""
        parts = map(cls.from_row, cls._of_session.run(session=session).fetchall())
        return sum(length for part in parts for *_, length in part._sizes())

    @classmethod
    def drop_oldest(cls, session: str, excess_bytes: int) -> int:
        """Drop the oldest segments of a session, with a gap in their place, until so much is free; gives how much is.

        A segment that may still be written to stays. Inside the caller's transaction.
        """
        freed = 0
        for part in map(cls.from_row, cls._of_session.run(session=session).fetchall()):
            if freed >= excess_bytes:
                break
            freed += part._drop(excess_bytes - freed)
        return freed

    def _drop(self, excess_bytes: int) -> int:
        from .segment import pack_gap

        freed = lost = 0  # of the segments that go
        segment_freed = segment_lost = 0  # of the one that is being looked at
        key = at = cut = cut_at = 0
        for next_key, place, next_at, size, length in self._sizes():
            if place <= 0 and key:
                cut, cut_at = key, at
                freed, lost = freed + segment_freed, lost + segment_lost
                segment_freed = segment_lost = 0
                if freed >= excess_bytes:
                    break
            key, at = next_key, next_at
            segment_freed += length
            segment_lost += size if size or place else TranscriptChunk.lost_bytes_of(key)
        else:
            if self.closed_at is not None and key:
                cut, cut_at = key, at
                freed, lost = freed + segment_freed, lost + segment_lost
        gap = pack_gap(0, lost, self.columns, self.rows)
        if freed <= len(gap.data):
            return 0
        TranscriptChunk._delete.run(first=self.first_key, last=cut)
        TranscriptChunk.insert_packed(cut, cut_at, gap)
        return freed - len(gap.data)

    def _sizes(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Key, place, time, output bytes and stored bytes of each chunk of this part."""
        after = self.first_key - 1
        while True:
            page = TranscriptChunk._sizes.run(after=after, end=self.end_key).fetchall()
            yield from page
            if len(page) < SIZES_PAGE_CHUNKS:
                return
            after = page[-1][0]

    @property
    def first_key(self) -> int:
        """The first key that a chunk can have."""
        return int(self.number) << SEQUENCE_BITS

    @property
    def end_key(self) -> int:
        """The key after the last one that a chunk can have."""
        return int(self.number) + 1 << SEQUENCE_BITS


# Few transcripts have either; deleting a run or a transcript has to look for them.
Transcript.add_index(Transcript.index(Transcript.run, where=Transcript.run.is_null(False)))
Transcript.add_index(Transcript.index(Transcript.continues, where=Transcript.continues.is_null(False)))


class Usage(NamedTuple):
    """What a transcript takes: chunks, bytes of output, bytes stored (compressed), and how long it lasts in ms."""

    chunks: int
    output_bytes: int
    stored_bytes: int
    duration_ms: int


def check_size(columns: Any, rows: Any) -> None:
    """Raises InvalidValue where a terminal cannot have that size."""
    for name, value in (("columns", columns), ("rows", rows)):
        if not isinstance(value, int) or isinstance(value, bool) or value not in TERMINAL_SIDE:
            raise InvalidValue(f"a terminal of {value!r} {name}", "a terminal has 1 to 65535 of them")
