"""Plain text out of terminal output, wherever it was cut."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagedb.models.plain import LINE_CHARACTERS, SEQUENCE_CHARACTERS, plain_text
from recordings import output

CASES = [
    (b"plain\r\nlines\r\n", "plain\nlines\n"),
    (b"\x1b[1;31mred\x1b[0m \x1b[38;5;200mpink\x1b[m", "red pink"),
    (b"\x1b]0;the title\x07shown\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "shownlink"),
    (b"\x1bP1$r0m\x1b\\\x1b_hidden\x1b\\after", "after"),
    (b"\x1b(B\x1b=\x1b7\x1b8\x1bMtext", "text"),
    (b"10%\r20%\r100%\r\n", "100%\n"),
    (b"downloading 100%\r\x1b[Kdone\r\n", "done\n"),
    (b"a long line\rshort\r\n", "shortg line\n"),
    (b"abc\b\b\bxy\n", "xyc\n"),
    (b"man\bn pa\bage\n", "man page\n"),
    (b"tab\tstays\x00\x07\x0e\n", "tab\tstays\n"),
    ("größer 漢字 🙂\n".encode(), "größer 漢字 🙂\n"),
    (b"bad \xff\xc3( end", "bad \ufffd\ufffd( end"),
    ("c1 \x9b31m controls\n".encode(), "c1 31m controls\n"),
    (b"ends in a sequence\x1b[3", "ends in a sequence"),
    (b"\r\r\n", "\n"),
]


@pytest.mark.parametrize(("data", "text"), CASES)
def test_a_reader_sees_what_was_left_on_the_line(data: bytes, text: str) -> None:
    assert "".join(plain_text([data])) == text


@pytest.mark.parametrize(("data", "text"), CASES)
def test_where_the_output_was_cut_makes_no_difference(data: bytes, text: str) -> None:
    assert "".join(plain_text(data[at : at + 1] for at in range(len(data)))) == text
    for cut in range(len(data)):
        assert "".join(plain_text([data[:cut], b"", data[cut:]])) == text


@settings(deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 3000), max_size=10))
def test_where_it_was_cut_makes_no_difference_to_random_output_either(seed: int, cuts: list[int]) -> None:
    data = b"".join(output(seed, 3000))
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert "".join(plain_text(pieces)) == "".join(plain_text([data]))


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_no_control_character_is_left_whatever_came(data: bytes) -> None:
    text = "".join(plain_text([data]))
    assert not [character for character in text if ord(character) < 32 and character not in "\n\t"]
    assert not [character for character in text if 0x7F <= ord(character) < 0xA0]


def test_colours_can_stay_and_nothing_else_does() -> None:
    data = (
        b"\x1b[2J\x1b[H\x1b[31mred\x1b[0m \x1b[1mbold\x1b[0m\x1b]0;title\x07\r\n10%\r\x1b[32m20%\x1b[0m\r\n\x1b[?1049h"
    )
    assert "".join(plain_text([data], colours=True)) == ("\x1b[31mred\x1b[0m \x1b[1mbold\x1b[0m\n\x1b[32m20%\x1b[0m\n")


def test_lines_come_one_by_one_each_with_its_end() -> None:
    assert list(plain_text([b"one\r\ntw", b"o\r\n\r\nthree"])) == ["one\n", "two\n", "\n", "three"]


def test_neither_a_line_nor_a_sequence_that_never_ends_fills_the_memory() -> None:
    pieces = list(plain_text([b"x" * 1000] * 500))
    assert "".join(pieces) == "x" * 500_000 and max(map(len, pieces)) < LINE_CHARACTERS + 2000
    text = "".join(plain_text([b"\x1b]0;" + b"y" * SEQUENCE_CHARACTERS, b"y" * 100, b"\nnext line\n"]))
    assert text.endswith("\nnext line\n") and "\x1b" not in text


def test_ten_megabytes_take_seconds_not_minutes() -> None:
    pieces = output(1, 2_000_000)
    began = time.monotonic()
    for _ in plain_text(pieces):
        pass
    assert time.monotonic() - began < 10
