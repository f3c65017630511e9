"""What the tests of transcripts share: sessions, output of all kinds, and what a terminal shows of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pyte

from kagedb import Project, Session
from kagedb.models.segment import Event, Output

ANA = "operator:ana"

PIECES: tuple[Callable[[random.Random], bytes], ...] = (
    lambda rng: f"line {rng.random()} {'=' * rng.randrange(120)}\r\n".encode(),
    lambda rng: (
        f"\x1b[{rng.randrange(1, 25)};{rng.randrange(1, 81)}H\x1b[3{rng.randrange(8)}m{rng.random():.3f}".encode()
    ),
    lambda rng: "größer, 漢字, 🙂 ".encode()[rng.randrange(4) :],
    lambda rng: rng.randbytes(rng.randrange(60)),
    lambda rng: b"\r\x1b[K" + b"#" * rng.randrange(70),
)
"""What programs send terminals: lines, a full screen, text cut inside a character, bytes that are no text, a bar."""


def new_session(title: str = "night watch") -> Session:
    """A session, in a project of its own."""
    return Session.start(Project.add(f"project of {title}", actor=ANA), title=title, actor=ANA)


def output(seed: int, size: int) -> list[bytes]:
    """Pieces of output, at least `size` bytes in all, the same for the same seed."""
    rng = random.Random(seed)
    pieces: list[bytes] = []
    while size > 0:
        pieces.append(rng.choice(PIECES)(rng))
        size -= len(pieces[-1])
    return pieces


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with all output of one moment in one: into how many pieces it was cut says nothing."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Output) and isinstance(last, Output) and event.at_ms == last.at_ms:
            found[-1] = Output(event.at_ms, last.data + event.data)
        else:
            found.append(event)
    return found


class Screen(pyte.Screen):
    """pyte's, which vim's query for the terminal's keyboard modes (`CSI ? 4 m`) makes fail."""

    def select_graphic_rendition(self, *attributes: int, private: bool = False) -> None:
        if not private:
            super().select_graphic_rendition(*attributes)


def screen(columns: int, rows: int, data: bytes) -> list[str]:
    """What a terminal of that size shows after this output."""
    shown = Screen(columns, rows)
    pyte.ByteStream(shown).feed(data)
    # Not its `display`, which fails where half of a wide character has been overwritten.
    return ["".join(shown.buffer[row][column].data for column in range(columns)) for row in range(rows)]
