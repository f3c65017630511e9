"""Plain text out of terminal output, for reading and searching: no emulation, so what a full-screen program drew stays
a heap of its pieces. Lines that were written over (progress bars) come as they were left.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator

SEQUENCE_CHARACTERS = 4096
"""An escape sequence that goes on for longer is none: a program died in the middle of one, or wrote no text at all."""

LINE_CHARACTERS = 65_536
"""A line that is longer is cut, so that a program that never ends one does not fill the memory."""

# ECMA-48, sections 5.4 (control sequences), 5.6 (control strings) and 5.3 (the others that ESC begins).
_SEQUENCE = re.compile(
    r"\x1b\[(?P<parameters>[0-?]*)[ -/]*(?P<final>[@-~])"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"
    r"|\x1b[ -/]*[0-~]"
    r"|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)\Z")
_ERASE = "\x1a"
"""Stands for "erase to the end of the line" once no other control character is left."""
_OVERWRITTEN = re.compile(rf"[\r\b{_ERASE}]")
_CELL = re.compile(r"(\x1b\[[0-9;:]*m)|(.)", re.DOTALL)


def plain_text(pieces: Iterable[bytes], *, colours: bool = False) -> Iterator[str]:
    """The lines of terminal output, each with its line end but the last; with `colours`, colours and bold stay.

    Bytes that are not UTF-8 come as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    unfinished = line = ""

    def replace(found: re.Match[str]) -> str:
        final, parameters = found["final"], found["parameters"]
        if final == "K" and parameters in ("", "0"):
            return _ERASE
        return found[0] if colours and final == "m" else ""

    for piece in itertools.chain(pieces, (None,)):
        text = unfinished + (decoder.decode(piece) if piece is not None else decoder.decode(b"", final=True))
        tail = _UNFINISHED.search(text)
        unfinished = ""
        if tail is not None and len(text) - tail.start() <= SEQUENCE_CHARACTERS:
            unfinished, text = text[tail.start() :], text[: tail.start()]
        *ended, line = (line + _SEQUENCE.sub(replace, text)).split("\n")
        for whole in ended:
            yield _as_left(whole) + "\n"
        if len(line) > LINE_CHARACTERS:
            yield _as_left(line)
            line = ""
    if line:
        yield _as_left(line)


def _as_left(line: str) -> str:
    """A line as it looked in the end."""
    line = line.rstrip("\r")
    if not _OVERWRITTEN.search(line):
        return line
    cells: list[str] = []
    column = 0
    colour = ""
    for set_colour, character in _CELL.findall(line):
        if set_colour:
            colour += set_colour
        elif character == "\r":
            column = 0
        elif character == "\b":
            column = max(0, column - 1)
        elif character == _ERASE:
            del cells[column:]
        else:
            cells.extend(" " * (column - len(cells)))
            cells[column : column + 1] = [colour + character]
            colour = ""
            column += 1
    return "".join(cells) + colour
