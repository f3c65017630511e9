"""asciicast: programs that are not ours take what is exported and show the same screen, and it reads back as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import showreel.core.parser
from hypothesis import given, settings
from hypothesis import strategies as st

from kagedb import Transcript
from kagedb.errors import InvalidValue
from kagedb.formats import asciicast
from kagedb.formats.asciicast import Header
from kagedb.models.segment import TICK_MS, Event, Gap, Mark, Output, Resize
from recordings import joined, new_session, output, screen

HEADER = Header(80, 24, started_at=1_795_511_166_000, title='night "watch" größer', command="top -b", exit_status=3)

EVENTS: list[Event] = [
    Output(0, b"\x1b[2J\x1b[H\x1b[1;31mred\x1b[0m\r\n"),
    Output(160, "größer 漢字 🙂\r\n".encode()),
    Mark(160, 'here it broke, "quoted" \x1b \u2028'),
    Resize(320, 100, 30),
    Gap(480, 12_345),
    Output(2_000_000_000, b"\tthe end\x7f\x00"),
]


def lines(header: Header, events: list[Event], version: int) -> list[str]:
    return list(asciicast.write(header, events, version))


def read(text: str | bytes) -> tuple[asciicast.Cast, list[Event]]:
    data = text.encode() if isinstance(text, str) else text
    cast = asciicast.read(data.splitlines(keepends=True), "a.cast")
    events = list(cast.events)
    return cast, events


@pytest.mark.parametrize("version", [2, 3])
def test_an_export_reads_back_the_same(version: int) -> None:
    cast, events = read("".join(lines(HEADER, EVENTS, version)))
    assert events == EVENTS
    assert (cast.skipped, cast.cut_off) == ({}, False)
    expected = HEADER if version == 3 else Header(80, 24, HEADER.started_at, HEADER.title, HEADER.command)
    assert cast.header == expected


EVENT = st.one_of(
    st.builds(Output, st.integers(0, 50), st.text(min_size=1, max_size=20).map(lambda text: text.encode())),
    st.builds(Resize, st.integers(0, 50), st.integers(1, 65_535), st.integers(1, 65_535)),
    st.builds(
        Mark,
        st.integers(0, 50),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
    ),
    st.builds(Gap, st.integers(0, 50), st.integers(0, 2**50)),
)


@settings(deadline=None)
@given(st.lists(EVENT, max_size=20), st.sampled_from([2, 3]))
def test_any_text_reads_back_the_same(steps: list[Event], version: int) -> None:
    at_ms, events = 0, []
    for step in steps:
        at_ms += step.at_ms * TICK_MS
        events.append(type(step)(at_ms, *[getattr(step, name) for name in step.__slots__[1:]]))
    assert joined(read("".join(lines(Header(80, 24), events, version)))[1]) == joined(events)


def test_a_character_that_came_in_two_reads_is_whole_and_what_is_no_text_is_marked() -> None:
    whole = "größer 漢字 🙂".encode()
    for cut in range(len(whole) + 1):
        events: list[Event] = [Output(0, whole[:cut]), Resize(16, 90, 30), Output(32, whole[cut:])]
        text = "".join(json.loads(line)[2] for line in lines(Header(80, 24), events, 2)[1:] if '"o"' in line)
        assert text == "größer 漢字 🙂"
    one_by_one: list[Event] = [Output(0, whole[at : at + 1]) for at in range(len(whole))]
    assert "".join(json.loads(line)[2] for line in lines(Header(80, 24), one_by_one, 3)[1:]) == "größer 漢字 🙂"
    broken: list[Event] = [Output(0, b"\xff\xc3"), Gap(16, 1), Output(32, b"\xb6 end \xe6\xbc")]
    data = [json.loads(line) for line in lines(Header(80, 24), broken, 2)[1:]]
    assert [event[2] for event in data if event[1] == "o"] == ["\ufffd", "\ufffd", "\ufffd end ", "\ufffd"]


def test_a_file_that_is_looked_at_does_nothing_to_the_terminal() -> None:
    text = "".join(lines(HEADER, [Output(0, bytes(range(256)) + "\x9b31m\u2028".encode())], 2))
    assert not [character for character in text if not character.isprintable() and character != "\n"]


# Programs that are not ours.


@pytest.fixture
def cast_files(storage: Any, tmp_path: Path) -> tuple[bytes, dict[int, Path]]:
    """The bytes of a recording, and its exports in both versions."""
    pieces = output(11, 60_000)
    with Transcript.open(new_session(), 90, 30) as recorder:
        for piece in pieces:
            recorder.write(piece)
    files = {}
    for version in asciicast.VERSIONS:
        files[version] = tmp_path / f"v{version}.cast"
        header = Header(90, 30, recorder.transcript.created_at, "night watch", "top", exit_status=0)
        files[version].write_text("".join(asciicast.write(header, recorder.transcript.events(), version)))
    return b"".join(pieces), files


@pytest.mark.sqlite_only
def test_the_player_of_the_formats_authors_plays_an_export_to_the_same_screen(
    cast_files: tuple[bytes, dict[int, Path]],
) -> None:
    """asciinema 2.4, which knows version 2. (The engine makes no difference to a file.)"""
    whole, files = cast_files
    done = subprocess.run([sys.executable, "-m", "asciinema", "cat", files[2]], capture_output=True, check=True)
    assert screen(90, 30, done.stdout) == screen(90, 30, whole)
    assert done.stdout.decode() == whole.decode(errors="replace")


@pytest.mark.parametrize("version", asciicast.VERSIONS)
def test_an_independent_parser_takes_both_versions_and_sees_the_same_screen(
    cast_files: tuple[bytes, dict[int, Path]], version: int
) -> None:
    whole, files = cast_files
    cast = showreel.core.parser.parse(files[version])
    assert (cast.header.version, cast.header.term.cols, cast.header.term.rows) == (version, 90, 30)
    assert cast.header.title == "night watch"
    shown = "".join(event.data for event in cast.events if event.etype == "o")
    assert screen(90, 30, shown.encode()) == screen(90, 30, whole)


def test_the_times_that_an_independent_parser_sees_are_ours(tmp_path: Path) -> None:
    for version in asciicast.VERSIONS:
        file = tmp_path / f"{version}.cast"
        file.write_text("".join(lines(HEADER, EVENTS[:5], version)))
        times = [round(event.time * 1000) for event in showreel.core.parser.parse(file).events]
        assert times[:5] == [0, 160, 160, 320, 480]


# Files that are not ours.

V2 = '{"version": 2, "width": 80, "height": 24}\n'
V3 = '{"version": 3, "term": {"cols": 80, "rows": 24}}\n'


def test_what_other_recorders_write_is_read() -> None:
    cast, events = read(
        '{"version": 3, "term": {"cols": 100, "rows": 30, "type": "xterm", "theme": {}}, "timestamp": 1504467315,'
        ' "tags": ["x"], "title": null, "env": {"SHELL": "/bin/zsh"}, "idle_time_limit": 2.5}\n'
        '# a comment\n\n[0.248, "o", "Hello "]\n[1.001, "i", "q"]\n[0.5, "o", "World"]\n[0.1, "new", {"a": 1}]\n'
        '[1, "m", ""]\n[0.25, "x", "7"]\n'
    )
    assert events == [Output(248, b"Hello "), Output(1749, b"World"), Mark(2849, "")]
    assert cast.header == Header(100, 30, 1_504_467_315_000, exit_status=7)
    assert cast.skipped == {"i": 1, "new": 1}


def test_what_a_recorder_that_was_killed_left_is_read_up_to_its_last_whole_line() -> None:
    cast, events = read(V2 + '[0.5, "o", "whole"]\n[0.9, "o", "cut o')
    assert events == [Output(500, b"whole")] and cast.cut_off
    cast, events = read("\ufeff" + V2 + '[0.5, "o", "whole"]')
    assert events == [Output(500, b"whole")] and not cast.cut_off


def test_times_of_version_2_that_run_backwards_are_held() -> None:
    assert read(V2 + '[1.5, "o", "a"]\n[1.0, "o", "b"]\n')[1] == [Output(1500, b"a"), Output(1500, b"b")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1 of a.cast is not JSON"),
        ("hello\n", "line 1 of a.cast is not JSON"),
        ("[1, 2]\n", "line 1 of a.cast is not the header of an asciicast"),
        ('{"version": 1, "stdout": []}\n', "is an asciicast of version 1"),
        ('{"version": "2"}\n', "is an asciicast of version '2'"),
        ('{"version": 2, "width": 80}\n', "has no height from 1 to 65535"),
        ('{"version": 2, "width": 80, "height": 0}\n', "has no height"),
        ('{"version": 2, "width": true, "height": 24}\n', "has no width"),
        ('{"version": 3, "width": 80, "height": 24}\n', "has no cols"),
        ('{"version": 3, "term": []}\n', "has no term of the right kind"),
        ('{"version": 2, "width": 80, "height": 24, "title": 5}\n', "has no title of the right kind"),
        ('{"version": 2, "width": 80, "height": 24, "timestamp": 1e300}\n', "has no timestamp"),
        (V2 + "[0.1]\n", "line 2 of a.cast is not an event"),
        (V2 + '\n{"a": 1}\n', "line 3 of a.cast is not an event"),
        (V2 + '[-1, "o", "x"]\n', "has no time in seconds"),
        (V2 + '["1", "o", "x"]\n', "has no time in seconds"),
        (V2 + '[NaN, "o", "x"]\n', "has no time in seconds"),
        (V2 + '[1e999, "o", "x"]\n', "has no time in seconds"),
        (V2 + f'[{10**400}, "o", "x"]\n', "has no time in seconds"),
        (V3 + '[2147483647, "o", "x"]\n[2147483647, "o", "y"]\n', "line 3 of a.cast is at an impossible time"),
        (V2 + '[1, 5, "x"]\n', "has no event code"),
        (V2 + '[1, "o", 5]\n', "has data that is not text"),
        (V2 + '[1, "r", "80 24"]\n', "has no size like 80x24"),
        (V2 + '[1, "r", "0x24"]\n', "has no size like 80x24"),
        (V2 + '[1, "r", "99999x24"]\n', "has no size like 80x24"),
        (V2 + "[" * 100_000 + "\n", "is not JSON"),
        (V2 + '[1, "o", "x"]\nnonsense\n[2, "o", "y"]\n', "line 3 of a.cast is not JSON"),
    ],
)
def test_what_is_no_recording_is_refused_with_its_line(text: str, why: str) -> None:
    with pytest.raises(InvalidValue, match=why.replace("(", r"\(")):
        read(text)


def test_bytes_that_are_not_utf_8_and_surrogates_are_survived() -> None:
    with pytest.raises(InvalidValue, match=r"line 2 of a\.cast is not JSON in UTF-8"):
        read(V2.encode() + b'[1, "o", "\xff"]\n[2, "o", "y"]\n')
    assert read(V2 + '[1, "o", "\\ud800"]\n[2, "m", "\\ud800\\u0000"]\n')[1] == [
        Output(1000, b"?"),
        Mark(2000, "?\ufffd"),
    ]
