"""`kaged transcript replay` on a real terminal: the timing, the keys, and a terminal that is as it was afterwards."""

from __future__ import annotations

import time

import pytest

import kagedb
from commands import run_kaged
from kagedb import Transcript
from kagedb.models.segment import Event, Output, Resize
from recordings import new_session
from terminals import Terminal, terminal

SCENE: list[Event] = [
    Output(0, b"\x1b[?1049h\x1b[?25lbegin "),
    Output(480, b"middle \xff "),
    Resize(480, 100, 30),
    Output(960, b"end"),
]
RAW = b"\x1b[?1049h\x1b[?25lbegin middle \xff end"


def stored(url: str, events: list[Event]) -> str:
    with kagedb.connect(url=url):
        return str(Transcript.load(new_session(), 80, 24, events).id)


def replay(shown: Terminal, url: str, *arguments: str) -> tuple[int, float, bytes]:
    """Exit status, seconds from the first byte to the end, and what was shown."""
    playing = shown.start("-q", "--url", url, "transcript", "replay", *arguments)
    shown.wait_for(lambda seen: bool(seen))
    began = time.monotonic()
    status = playing.wait(30)
    took = time.monotonic() - began
    shown.wait(playing)
    return status, took, shown.shown


def test_a_replay_shows_every_byte_in_its_time_and_puts_the_terminal_back(migrated_url: str) -> None:
    id = stored(migrated_url, SCENE)
    with terminal() as shown:
        modes = shown.modes
        status, took, seen = replay(shown, migrated_url, id)
        assert shown.modes == modes
    assert status == 0 and 0.9 <= took < 2.5
    assert seen.startswith(RAW)
    rest = seen.removeprefix(RAW)
    assert b"\x1b[?1049l" in rest and b"\x1b[?25h" in rest and b"\x1b[?1000l" in rest


def test_a_replay_of_lines_does_not_leave_an_alternate_screen_it_never_entered(migrated_url: str) -> None:
    """It would move the cursor to where another program had left it."""
    id = stored(migrated_url, [Output(0, b"line\r\n\x1b[?1049hfull\x1b[?10"), Output(16, b"49lback")])
    with terminal() as shown:
        _, _, seen = replay(shown, migrated_url, id)
    assert b"\x1b[?1049l" not in seen.removeprefix(b"line\r\n\x1b[?1049hfull\x1b[?1049lback")


def test_speed_and_idle_shorten_it(migrated_url: str) -> None:
    id = stored(migrated_url, [Output(0, b"a"), Output(60_000, b"b"), Output(61_600, b"c")])
    with terminal() as shown:
        _, took, seen = replay(shown, migrated_url, id, "--idle", "0.2", "--speed", "2")
    assert 0.15 < took < 1.5 and seen.startswith(b"abc")


def test_it_begins_where_it_is_told_to_with_what_was_before_shown_at_once(migrated_url: str) -> None:
    id = stored(migrated_url, [Output(0, b"a"), Output(3_723_008, b"b"), Output(3_723_520, b"c")])
    for begin in ("1:02:03", "62:03", "3723"):
        with terminal() as shown:
            _, took, seen = replay(shown, migrated_url, id, "--from", begin)
        assert 0.4 < took < 2 and seen.startswith(b"abc")


def test_q_and_ctrl_c_leave(migrated_url: str) -> None:
    id = stored(migrated_url, [Output(0, b"shown"), Output(60_000, b"never shown")])
    for key in (b"q", b"\x03"):
        with terminal() as shown:
            modes = shown.modes
            playing = shown.start("--url", migrated_url, "transcript", "replay", id)
            shown.wait_for(b"shown")
            shown.type(key)
            assert shown.wait(playing) == 0
            assert b"never" not in shown.shown and shown.modes == modes


def test_space_pauses_and_goes_on(migrated_url: str) -> None:
    id = stored(migrated_url, [Output(0, b"a"), Output(800, b"b")])
    with terminal() as shown:
        playing = shown.start("--url", migrated_url, "transcript", "replay", id)
        shown.wait_for(b"a")
        shown.type(b" ")
        time.sleep(1.5)
        assert b"b" not in shown.shown
        shown.type(b"x ")
        began = time.monotonic()
        shown.wait_for(b"b")
        assert time.monotonic() - began < 1.2
        assert shown.wait(playing) == 0
        playing = shown.start("--url", migrated_url, "transcript", "replay", id, "--speed", "0.02")
        shown.wait_for(b"\x1b[0m\r\na")
        shown.type(b" ")
        shown.type(b"q")
        assert shown.wait(playing) == 0


def test_what_the_terminal_says_by_itself_is_not_taken_for_keys(migrated_url: str) -> None:
    """Programs ask terminals who they are; in a replay the answer comes to us, and it may hold a q."""
    id = stored(migrated_url, [Output(0, b'\x1b[c\x1bP$q"q\x1b\\asked'), Output(800, b"end")])
    with terminal() as shown:
        playing = shown.start("--url", migrated_url, "transcript", "replay", id)
        shown.wait_for(b"asked")
        shown.type(b'\x1bP1$r0"q\x1b\\')
        time.sleep(0.1)
        shown.type(b"\x1b[?64;1;2q")
        assert shown.wait(playing) == 0
        assert b"end" in shown.shown


@pytest.mark.parametrize("speed", ["0", "-1", "x"])
def test_an_impossible_speed_is_wrong_usage(migrated_url: str, speed: str) -> None:
    done = run_kaged("--url", migrated_url, "transcript", "replay", "01M86CWBMA40ZS9EHC2065KCDM", "--speed", speed)
    assert done.returncode == 2 and "--speed" in done.stderr


def test_a_replay_into_a_pipe_is_the_bytes_and_nothing_else(migrated_url: str) -> None:
    id = stored(migrated_url, [Output(0, b"a"), Output(160, b"b\r\n")])
    done = run_kaged("--url", migrated_url, "transcript", "replay", id)
    assert (done.returncode, done.stdout.encode()) == (0, b"ab\n")  # as text mode reads it


def test_nobody_is_held_up_while_it_plays(migrated_url: str) -> None:
    """A replay may last for hours: it holds no snapshot, and the daemon writes on."""
    id = stored(migrated_url, [Output(0, b"a"), Output(60_000, b"b")])
    with terminal() as shown:
        playing = shown.start("--url", migrated_url, "transcript", "replay", id)
        shown.wait_for(b"a")
        with kagedb.connect(url=migrated_url) as storage:
            with Transcript.open(new_session("another"), 80, 24) as recorder:
                recorder.write(b"meanwhile")
            if storage.engine.name == "sqlite":
                busy, log, moved = storage.database.execute_sql("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                assert (busy, log) == (0, moved)
        shown.type(b"q")
        shown.wait(playing)
