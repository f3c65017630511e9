"""`kaged transcript`: list, show, tail, export and import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kagedb
from commands import answer, answer_json, in_process
from kagedb import Project, Run, Session, Transcript
from kagedb.models.segment import Event, Gap, Mark, Output, Resize
from recordings import ANA, joined, output
from terminals import terminal

EVENTS: list[Event] = [
    Output(0, b"\x1b[1;32m$\x1b[0m make\r\n"),
    Mark(1600, "here it broke \x1b[31m"),
    Resize(3200, 100, 30),
    Gap(3200, 12_345),
    Output(65_008, "größer\r\nlast line \x1b]52;c;aGk=\x07\r\n".encode()),
]
RAW = b"".join(event.data for event in EVENTS if isinstance(event, Output))


@pytest.fixture
def id(migrated_url: str) -> str:
    """A transcript in the only project of the store, which nobody has open."""
    with kagedb.connect(url=migrated_url):
        session = Session.start(Project.add("house", actor=ANA), title="night watch", actor=ANA)
        run = Run.dispatch(session, agent="record", input={"command": ["make", "all the things"]})
        transcript = Transcript.load(session, 80, 24, EVENTS, run=run)
        run.finish(exit_status=2)
    return str(transcript.id)


def test_a_list_says_what_there_is_and_what_it_takes(migrated_url: str, id: str) -> None:
    text = answer(migrated_url, "transcript", "list")
    assert re.search(rf"{id} .* 1 min 05 s +\d+ bytes +\d+ bytes +house +night watch", text)
    (row,) = answer_json(migrated_url, "transcript", "list")
    assert row["id"] == id and row["output_bytes"] == len(RAW) and 0 < row["stored_bytes"] < 300
    assert (row["duration_ms"], row["chunks"]) == (65_008, 1)
    assert answer_json(migrated_url, "transcript", "list", "--project", "house") == [row]
    assert answer_json(migrated_url, "transcript", "list", "--session", row["session"].lower()) == [row]
    assert in_process("--url", migrated_url, "transcript", "list", "--project", "attic").exit_code == 1
    assert in_process("--url", migrated_url, "transcript", "list", "--session", id).exit_code == 1
    assert answer_json(migrated_url, "transcript", "list", "--limit", "0") == [row]


def test_show_says_when_it_was_marked_and_where_something_is_missing(migrated_url: str, id: str) -> None:
    text = answer(migrated_url, "transcript", "show", id)
    assert re.search(r"0:00:01\.600 +mark +here it broke \\x1b\[31m", text)
    assert re.search(r"0:00:03\.200 +gap +12,345 bytes", text)
    record = answer_json(migrated_url, "transcript", "show", id)
    assert (record["columns"], record["rows"], record["parts"]) == (80, 24, 1)
    assert record["marks"] == [{"at_ms": 1600, "label": "here it broke \x1b[31m"}]
    assert record["gaps"] == [{"at_ms": 3200, "lost_bytes": 12_345}]


def test_a_tail_is_bytes_into_a_pipe_and_text_with_colours_on_a_terminal(migrated_url: str, id: str) -> None:
    result = in_process("--url", migrated_url, "transcript", "tail", id, "-n", "2")
    assert result.stdout_bytes == "größer\r\nlast line \x1b]52;c;aGk=\x07\r\n".encode()
    assert in_process("--url", migrated_url, "transcript", "tail", id).stdout_bytes == RAW
    with terminal() as shown:
        assert shown.wait(shown.start("--url", migrated_url, "transcript", "tail", id)) == 0
        assert "\x1b[1;32m$\x1b[0m make\r\ngrößer\r\nlast line \r\n" in shown.shown.decode()
        assert b"\x1b]52" not in shown.shown


@pytest.mark.parametrize("to", ["stdout", "file"])
def test_every_export_is_written_to_standard_output_or_a_new_file(
    migrated_url: str, id: str, tmp_path: Path, to: str
) -> None:
    def exported(form: str) -> bytes:
        arguments = ["--url", migrated_url, "transcript", "export", id, "--format", form]
        if to == "file":
            path = tmp_path / form
            assert in_process(*arguments, "-o", str(path)).exit_code == 0
            again = in_process(*arguments, "-o", str(path))
            assert again.exit_code == 1 and "there is a file" in again.stderr
            return path.read_bytes()
        return in_process(*arguments).stdout_bytes

    assert exported("raw") == RAW
    assert exported("text").decode() == "$ make\ngrößer\nlast line \n"
    second = [json.loads(line) for line in exported("asciicast-v2").splitlines()]
    third = [json.loads(line) for line in exported("asciicast-v3").splitlines()]
    assert (second[0]["width"], second[0]["height"], second[0]["version"]) == (80, 24, 2)
    assert third[0]["term"] == {"cols": 80, "rows": 24} and third[0]["command"] == "make 'all the things'"
    assert [event[1] for event in second[1:]] == ["o", "m", "r", "m", "o"]
    assert third[-1][1:] == ["x", "2"] and third[-2][0] == 61.808


def test_an_export_that_cannot_be_written_says_where(migrated_url: str, id: str, tmp_path: Path) -> None:
    result = in_process("--url", migrated_url, "transcript", "export", id, "-o", str(tmp_path / "no" / "such.cast"))
    assert result.exit_code == 2 and "cannot be made: No such file or directory" in result.stderr


def test_a_reader_that_stops_reading_an_export_is_no_error_of_ours(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        session = Session.start(Project.add("house", actor=ANA), title="long", actor=ANA)
        id = Transcript.load(session, 80, 24, [Output(0, b"".join(output(3, 2_000_000)))]).id
    code = "from kagedb.cli import main; main()"
    command = [sys.executable, "-c", code, "--url", migrated_url, "transcript", "export", id, "--format", "raw"]
    reading = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reading.stdout and reading.stderr and reading.stdout.read(10)
    reading.stdout.close()
    assert reading.wait(30) == 141 and reading.stderr.read() == b""
    reading.stderr.close()


@pytest.mark.parametrize("form", ["asciicast-v2", "asciicast-v3"])
def test_an_export_that_is_imported_gives_the_same_events(
    migrated_url: str, id: str, tmp_path: Path, form: str
) -> None:
    file = tmp_path / "a.cast"
    answer(migrated_url, "transcript", "export", id, "--format", form, "-o", str(file))
    said = answer_json(migrated_url, "transcript", "import", str(file))
    assert (said["skipped"], said["cut_off"]) == ({}, False)
    with kagedb.connect(url=migrated_url, read_only=True):
        first, second = Transcript.by_id(id), Transcript.by_id(said["id"])
        assert joined(second.events()) == joined(first.events()) == EVENTS
        session, run = Session.by_id(said["session"]), Run.by_id(second.run_id)
        assert (session.title, session.state, session.project.name) == ("night watch", "ended", "house")
        assert run.exit_status == (2 if form == "asciicast-v3" else 0)
        assert run.input["command"] == "make 'all the things'" and run.input["file"] == "a.cast"
        assert run.input["recorded_at"] == first.created_at // 1000 * 1000
    again = tmp_path / "again.cast"
    answer(migrated_url, "transcript", "export", said["id"], "--format", form, "-o", str(again))
    assert again.read_bytes().splitlines()[1:-1] == file.read_bytes().splitlines()[1:-1]


def test_an_import_says_what_it_left_out(migrated_url: str, id: str, tmp_path: Path) -> None:
    file = tmp_path / "typed.cast"
    file.write_text(
        '{"version": 2, "width": 80, "height": 24}\n[1, "i", "x"]\n[1, "i", "y"]\n[1, "o", "z"]\n[2, "o", "cut'
    )
    result = in_process("--url", migrated_url, "transcript", "import", str(file), "--title", "typed in")
    assert result.exit_code == 0, result.stderr
    assert "left out: 2 keys that were pressed" in result.stderr and "ends within a line" in result.stderr
    assert answer_json(migrated_url, "transcript", "list")[0]["title"] == "typed in"


@pytest.mark.parametrize(
    "text", ["", "hello\n", '{"version": 2, "width": 80, "height": 24}\n[1, "o", "x"]\n[nonsense\n[2, "o", "y"]\n']
)
def test_a_file_that_is_no_recording_is_refused_and_nothing_is_stored(
    migrated_url: str, id: str, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "broken.cast"
    file.write_text(text)
    before = answer_json(migrated_url, "session", "list")
    result = in_process("--url", migrated_url, "transcript", "import", str(file))
    assert result.exit_code == 2 and re.search(r"line \d of broken.cast", result.stderr)
    assert answer_json(migrated_url, "session", "list") == before
    assert in_process("--url", migrated_url, "transcript", "import", str(tmp_path / "missing")).exit_code == 2


@pytest.mark.parametrize("words", [("show",), ("tail",), ("replay",), ("export",)])
def test_a_transcript_that_is_not_there_is_told(migrated_url: str, words: tuple[str, ...]) -> None:
    result = in_process("--url", migrated_url, "transcript", *words, "01M86CWBMA40ZS9EHC2065KCDM")
    assert result.exit_code == 1 and "see what there is with: kaged transcript list" in result.stderr
    assert in_process("--url", migrated_url, "transcript", *words, "nonsense").exit_code == 2


def test_a_transcript_that_grows_can_be_read_from_another_process(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        session = Session.start(Project.add("house", actor=ANA), title="live", actor=ANA)
        with Transcript.open(session, 80, 24) as recorder:
            recorder.write(b"so far\n")
            recorder.flush()
            code = "from kagedb.cli import main; main()"
            command = [sys.executable, "-c", code, "--url", migrated_url, "transcript"]
            done = subprocess.run([*command, "tail", recorder.transcript.id], capture_output=True, check=True)
            assert done.stdout == b"so far\n"
            done = subprocess.run([*command, "list", "--json"], capture_output=True, check=True)
            assert json.loads(done.stdout)[0]["closed_at"] is None


def test_an_hour_of_output_is_exported_without_filling_the_memory(migrated_url: str, tmp_path: Path) -> None:
    with kagedb.connect(url=migrated_url):
        session = Session.start(Project.add("house", actor=ANA), title="long", actor=ANA)
        pieces = output(5, 300_000)
        events = (Output(number, piece) for number, piece in enumerate(pieces * 40))
        id = Transcript.load(session, 80, 24, events).id
    began = time.monotonic()
    code = (
        "from kagedb.cli import kaged; kaged.main(prog_name='kaged', standalone_mode=False);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for form in ("raw", "asciicast-v3"):
        command = [sys.executable, "-c", code, "--url", migrated_url, "transcript", "export", id, "--format", form]
        done = subprocess.run([*command, "-o", str(tmp_path / form)], capture_output=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert os.path.getsize(tmp_path / "raw") > 10_000_000 and time.monotonic() - began < 60
    assert max(peaks) < 90_000  # KiB; Python with the store open is 50,000
