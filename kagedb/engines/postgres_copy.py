"""PostgreSQL's COPY as a stream in either direction: pieces of lines out of the server, and into it.

What the lines are is in copy_text.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

PIECE_BYTES = 1 << 17
"""Of lines handed over at a time."""

PIECES_WAITING = 2
"""How far the server may be ahead of whoever takes the pieces."""

CANCEL_SECONDS = 0.2
"""Between requests to cancel: one that comes before the statement has begun does nothing."""


def copied_out(connection: Any, query: str) -> Iterator[bytes]:
    """What a query gives, as pieces of whole lines, out of the transaction that the connection is in.

    psycopg2 pushes the lines, so they come through a thread of their own, which ends with the iteration. Whoever leaves
    that before its end leaves the transaction to be rolled back.
    """
    pieces = _Pieces()

    def work() -> None:
        try:
            with connection.cursor() as cursor:
                # A database may have been set to write bytes in the old form.
                cursor.execute("SET LOCAL bytea_output = hex")
                cursor.copy_expert(f"COPY ({query}) TO STDOUT", pieces)
            pieces.end(None)
        except BaseException as error:
            pieces.end(error)

    thread = threading.Thread(target=work, name="kaged copy", daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        pieces.room.release(PIECES_WAITING)
        while thread.is_alive():
            if not pieces.ended:
                connection.cancel()
            thread.join(CANCEL_SECONDS)


def copy_in(connection: Any, table: str, columns: str, pieces: Iterable[bytes]) -> None:
    """Add the lines to a table; an error of `pieces` goes on as it is, and what was sent is not kept."""
    source = _Source(pieces)
    with connection.cursor() as cursor:
        try:
            cursor.copy_expert(f"COPY {table} ({columns}) FROM STDIN", source, PIECE_BYTES)
        except Exception:
            if source.error is not None:
                raise source.error from None
            raise


class _Pieces:
    """The file that psycopg2 writes lines into, a call for each; iterated in another thread."""

    def __init__(self) -> None:
        self.ended = False
        self.room = threading.Semaphore(PIECES_WAITING)
        self._queue: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        self._lines: list[bytes] = []
        self._size = 0

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size >= PIECE_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        self.room.acquire()
        self._queue.put(b"".join(self._lines))
        self._lines, self._size = [], 0

    def end(self, error: BaseException | None) -> None:
        self.ended = True
        if error is None and self._lines:
            self._hand_over()
        self._queue.put(error)

    def __iter__(self) -> Iterator[bytes]:
        while isinstance(piece := self._queue.get(), bytes):
            yield piece
            self.room.release()
        if piece is not None:
            raise piece


class _Source:
    """The file that psycopg2 reads lines from, in pieces of any size; of an error it says only that there was one."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._next: Callable[[], bytes | None] = iter(pieces).__next__
        self.error: BaseException | None = None

    def read(self, _: int) -> bytes:
        try:
            return self._next() or b""
        except StopIteration:
            return b""
        except BaseException as error:
            self.error = error
            raise
