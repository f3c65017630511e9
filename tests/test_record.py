"""`kaged record`: real programs on a real terminal. What is stored is what they wrote; the operator notices nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kagedb
from commands import in_process, run_kaged
from kagedb import Project, Run, Session, Transcript
from kagedb.models.segment import Output, Resize
from recordings import ANA, screen
from terminals import Terminal, terminal


@pytest.fixture
def recorded_url(migrated_url: str) -> str:
    """A store with one project, which nobody has open."""
    with kagedb.connect(url=migrated_url):
        Project.add("house", actor=ANA)
    return migrated_url


def newest(url: str) -> tuple[Transcript, Run, Session, bytes]:
    with kagedb.connect(url=url, read_only=True):
        found = Transcript.select().order_by(Transcript.id.desc()).get()
        return found, Run.by_id(found.run_id), Session.by_id(found.session_id), b"".join(found.raw())


def events(url: str) -> list[object]:
    with kagedb.connect(url=url, read_only=True):
        return list(Transcript.select().order_by(Transcript.id.desc()).get().events())


def record(shown: Terminal, url: str, *command: str, **more: str) -> subprocess.Popen[str]:
    return shown.start("-q", "--url", url, "record", "--", *command, **more)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def program(name: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} here; other programs of its kind are recorded too")
    return name


# Programs.


def press(*keys: tuple[bytes | Callable[[bytes], bool], bytes]) -> Callable[[Terminal], None]:
    """Type each once what goes before it has been shown."""

    def typing(shown: Terminal) -> None:
        for seen, key in keys:
            shown.wait_for(seen)
            shown.type(key)

    return typing


CURSES = """
import curses, time
def main(screen):
    curses.start_color()
    for row in range(curses.LINES - 1):
        screen.addstr(row, row, "größe %d" % row, curses.A_BOLD)
    screen.refresh()
    while (key := screen.getch()) != ord("q"):
        screen.addstr(2, 40, "key %d, %d x %d " % (key, curses.COLS, curses.LINES))
        screen.refresh()
import locale
locale.setlocale(locale.LC_ALL, "C.UTF-8")
curses.wrapper(main)
"""

FULL_SCREEN = {
    "curses": (python(CURSES), press((b"e 20", b"a"), (b"key 97", b"q"))),
    "vim": (
        ("vim", "-u", "NONE", "-N", "file"),
        press((b"file", b"ihello \xc3\xa4\x1b"), (b"\xc3\xa4", b":set nu\r"), (b"  1 ", b":q!\r")),
    ),
    "less": (("less", "file"), press((b"line 5", b" "), (b"line 40", b"/line 400\r"), (b"line 41", b"q"))),
    "top": (("top", "-b", "-n", "2", "-d", "0.3"), press()),
}


@pytest.mark.parametrize("name", FULL_SCREEN)
def test_a_full_screen_program_is_recorded_as_it_was_shown(
    recorded_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    command, typing = FULL_SCREEN[name]
    program(command[0])
    (tmp_path / "file").write_text("".join(f"line {number}\n" for number in range(1000)))
    monkeypatch.chdir(tmp_path)
    with terminal(100, 30) as shown:
        recording = record(shown, recorded_url, *command)
        typing(shown)
        assert shown.wait(recording) == 0, shown.shown
        whole = shown.shown
    transcript, run, session, raw = newest(recorded_url)
    assert raw == whole and len(raw) > 200
    assert (transcript.columns, transcript.rows) == (100, 30) and transcript.closed_at
    assert (run.state, run.exit_status, run.input) == ("finished", 0, {"command": list(command)})
    assert session.state == "ended"
    for version in ("2", "3"):
        result = in_process(
            "--url", recorded_url, "transcript", "export", transcript.id, "--format", f"asciicast-v{version}"
        )
        import showreel.core.parser

        file = tmp_path / f"{version}.cast"
        file.write_bytes(result.stdout_bytes)
        cast = showreel.core.parser.parse(file)
        text = "".join(event.data for event in cast.events if event.etype == "o")
        for until in (len(raw) // 3, len(raw) // 2):  # the last screen of most is the one they leave behind
            assert screen(100, 30, text.encode()[:until]) == screen(100, 30, raw[:until])
        assert text.encode() == raw


def test_a_coloured_log_of_git_is_recorded(recorded_url: str, tmp_path: Path) -> None:
    program("git")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run([*git, "init", "-q"], check=True)
    for number in range(5):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", f"größer {number}"], check=True)
    command = [*git, "--no-pager", "log", "--color=always", "--decorate", "--stat"]
    with terminal() as shown:
        assert shown.wait(record(shown, recorded_url, *command)) == 0
    expected = subprocess.run(command, check=True, capture_output=True).stdout
    assert newest(recorded_url)[3] == expected.replace(b"\n", b"\r\n") and b"\x1b[33m" in expected


def list_files(url: str, directory: Path, files: int) -> int:
    listed = directory / "listed"
    listed.mkdir()
    for number in range(files):
        (listed / f"{number:06}-{'x' * 200}").touch()
    command = ["ls", "-lR", str(listed)]
    with terminal() as shown:
        assert shown.wait(record(shown, url, *command)) == 0
        whole = shown.shown
    expected = subprocess.run(command, check=True, capture_output=True).stdout.replace(b"\n", b"\r\n")
    assert whole == expected
    assert newest(url)[3] == expected
    return len(expected)


def test_a_long_listing_is_recorded_to_the_last_byte(recorded_url: str, tmp_path: Path) -> None:
    assert list_files(recorded_url, tmp_path, 4_500) > 1_000_000


@pytest.mark.slow
def test_a_listing_of_ten_megabytes_is_recorded_to_the_last_byte(recorded_url: str, tmp_path: Path) -> None:
    assert list_files(recorded_url, tmp_path, 42_000) > 10_000_000


BYTE_BY_BYTE = """
import os, time
for byte in "größer 漢字 🙂\\n".encode() + bytes(range(128, 256)) + b"\\xff\\xc3\\x28\\n":
    os.write(1, bytes([byte]))
    time.sleep(0.002)
"""


def test_characters_that_come_in_pieces_and_bytes_that_are_none_are_recorded(recorded_url: str) -> None:
    with terminal() as shown:
        assert shown.wait(record(shown, recorded_url, *python(BYTE_BY_BYTE))) == 0
    expected = "größer 漢字 🙂\r\n".encode() + bytes(range(128, 256)) + b"\xff\xc3\x28\r\n"
    transcript, *_, raw = newest(recorded_url)
    assert raw == expected
    text = in_process("--url", recorded_url, "transcript", "export", transcript.id, "--format", "text").stdout
    assert text.startswith("größer 漢字 🙂\n") and "\ufffd" in text.splitlines()[1]


RESIZED = """
import os, signal, sys, time
sizes = []
signal.signal(signal.SIGWINCH, lambda *_: (sizes.append(tuple(os.get_terminal_size(0))), print(*sizes[-1], flush=True)))
print("ready", flush=True)
while len(sizes) < 3: time.sleep(0.01)
"""


def test_a_window_that_is_resized_resizes_the_terminal_of_the_command(recorded_url: str) -> None:
    sizes = [(100, 30), (132, 43), (60, 20)]
    with terminal(80, 24) as shown:
        recording = record(shown, recorded_url, *python(RESIZED))
        shown.wait_for(b"ready")
        for columns, rows in sizes:
            shown.resize(columns, rows)
            shown.wait_for(f"{columns} {rows}\r\n".encode())
        assert shown.wait(recording) == 0
    found = events(recorded_url)
    assert [(event.columns, event.rows) for event in found if isinstance(event, Resize)] == sizes
    for columns, rows in sizes:
        said = next(e for e in found if isinstance(e, Output) and f"{columns} {rows}".encode() in e.data)
        resize = next(e for e in found if isinstance(e, Resize) and e.columns == columns)
        assert found.index(resize) < found.index(said)


# Keys, signals, ends.


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("true",), 0),
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -TERM $$"), 128 + signal.SIGTERM),
        (("sh", "-c", "kill -KILL $$"), 128 + signal.SIGKILL),
    ],
)
def test_the_exit_status_is_passed_on_and_kept(recorded_url: str, command: tuple[str, ...], status: int) -> None:
    with terminal() as shown:
        assert shown.wait(record(shown, recorded_url, *command)) == status
    assert newest(recorded_url)[1].exit_status == status


@pytest.mark.parametrize(("name", "status"), [("no-such-command", 127), ("/etc/passwd", 126), ("/", 126)])
def test_a_command_that_cannot_be_started_is_told_as_a_shell_tells_it(
    recorded_url: str, name: str, status: int
) -> None:
    with terminal() as shown:
        modes = shown.modes
        assert shown.wait(record(shown, recorded_url, name)) == status
        assert shown.modes == modes
        assert f"kaged: the command '{name}' cannot be started: ".encode() in shown.shown
    transcript, run, session, raw = newest(recorded_url)
    assert (run.state, run.exit_status, raw, session.state) == ("failed", status, b"", "ended")
    assert transcript.closed_at


def test_without_a_command_it_is_the_shell(recorded_url: str) -> None:
    with terminal() as shown:
        recording = shown.start(
            "--url", recorded_url, "record", "--title", "by hand", env={"SHELL": "/bin/sh", "PS1": "$ "}
        )
        shown.wait_for(b"$ ")
        shown.type(b"tty; echo $((6 * 7)); exit 5\r")
        assert shown.wait(recording) == 5
        assert b"recorded; play it with: kaged transcript replay 01" in shown.shown
    _, run, session, raw = newest(recorded_url)
    assert b"\r\n42\r\n" in raw and b"/dev/pts/" in raw
    assert run.input == {"command": ["/bin/sh"]} and session.title == "by hand"


def test_keys_are_passed_on_one_by_one_and_are_not_recorded_unless_shown(recorded_url: str) -> None:
    code = "import getpass; secret = getpass.getpass(); print('got', len(secret)); input('more? ')"
    with terminal() as shown:
        recording = record(shown, recorded_url, *python(code))
        shown.wait_for(b"Password:")
        shown.type(b"hunter2\r")
        shown.wait_for(b"got 7")
        shown.type(b"shown\x7f\r")
        assert shown.wait(recording) == 0
    raw = newest(recorded_url)[3]
    assert b"hunter2" not in raw and b"more? shown\b \b\r\n" in raw


def test_ctrl_c_is_for_the_command_alone(recorded_url: str) -> None:
    code = """
import time
try:
    print("waiting", flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""
    with terminal() as shown:
        recording = record(shown, recorded_url, *python(code))
        shown.wait_for(b"waiting\r\n")
        shown.type(b"\x03")
        assert shown.wait(recording) == 0
    assert newest(recorded_url)[3] == b"waiting\r\n^Cinterrupted\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_kaged_reaches_the_command_and_the_terminal_is_put_back(recorded_url: str, number: int) -> None:
    with terminal() as shown:
        modes = shown.modes
        recording = record(shown, recorded_url, "sh", "-c", "echo started; exec sleep 30")
        shown.wait_for(b"started")
        assert shown.modes != modes
        recording.send_signal(number)
        assert shown.wait(recording) == 128 + number
        assert shown.modes == modes
    assert newest(recorded_url)[1].exit_status == 128 + number


def test_the_terminal_is_put_back_when_the_store_is_lost_in_the_middle(recorded_url: str) -> None:
    """Every insert fails from now on, as on a full disk; the operator goes on working and hears of it at the end."""
    before = """
from kagedb.errors import StorageFull
from kagedb.models import TranscriptChunk
def refuse(**_): raise StorageFull("the disk of the store is full", "free some space")
TranscriptChunk._insert.run = refuse
"""
    with terminal() as shown:
        modes = shown.modes
        recording = record(shown, recorded_url, "sh", "-c", "seq 20000; exit 0", before=before)
        assert shown.wait(recording) == 1
        assert b"\r\n19999\r\n20000\r\n" in shown.shown and shown.shown.count(b"the disk of the store is full") <= 2
        assert b"kaged: the disk of the store is full\r\nfree some space\r\n" in shown.shown
        assert shown.modes == modes
        recording = record(shown, recorded_url, "sh", "-c", "exit 9", before=before)
        assert shown.wait(recording) == 9


def test_keys_out_of_a_pipe_reach_the_command_and_end(recorded_url: str, tmp_path: Path) -> None:
    lines = "".join(f"line {number}\n" for number in range(2000))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from kagedb.cli import main; main()",
            "-q",
            "--url",
            recorded_url,
            "record",
            "wc",
            "-lc",
        ],
        input=lines.encode(),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.split()) == (0, [b"2000", str(len(lines)).encode()]), done
    assert newest(recorded_url)[3] == done.stdout


def test_it_works_without_any_terminal(recorded_url: str) -> None:
    done = run_kaged("-q", "--url", recorded_url, "record", "sh", "-c", "stty size; cat; echo end")
    assert (done.returncode, done.stdout) == (0, "24 80\nend\n"), done.stderr
    transcript, *_, raw = newest(recorded_url)
    assert raw == b"24 80\r\nend\r\n" and (transcript.columns, transcript.rows) == (80, 24)


def test_a_reader_that_goes_away_hangs_up(recorded_url: str) -> None:
    command = [
        sys.executable,
        "-c",
        "from kagedb.cli import main; main()",
        "-q",
        "--url",
        recorded_url,
        "record",
        "yes",
    ]
    recording = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert recording.stdout and recording.stdout.read(10) == b"y\r\ny\r\ny\r\ny"
    recording.stdout.close()
    assert recording.wait(30) == 128 + signal.SIGHUP


def test_a_process_that_the_command_leaves_behind_does_not_hold_the_terminal(recorded_url: str) -> None:
    began = time.monotonic()
    with terminal() as shown:
        recording = record(shown, recorded_url, "sh", "-c", "trap '' HUP; (sleep 15; echo late) & echo done")
        assert shown.wait(recording) == 0
    assert time.monotonic() - began < 12  # a start may take seconds on a machine that does other things too
    assert newest(recorded_url)[3] == b"done\r\n"


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 20), marks=pytest.mark.slow)], ids=len)
def test_what_a_command_writes_last_is_not_lost(recorded_url: str, seeds: range) -> None:
    for seed in seeds:
        size = random.Random(seed).randrange(1, 300_000)
        with terminal() as shown:
            code = f"import os; data = b'x' * {size}\nwhile data: data = data[os.write(1, data):]"
            assert shown.wait(record(shown, recorded_url, *python(code))) == 0
            assert shown.shown == b"x" * size
        assert newest(recorded_url)[3] == b"x" * size


def test_kill_9_of_the_recorder_hangs_up_and_leaves_what_was_shown(recorded_url: str, tmp_path: Path) -> None:
    mark = tmp_path / "hung up"
    with terminal() as shown:
        script = f"trap 'touch \"{mark}\"; exit' HUP; echo begun; while true; do sleep 0.1; done"
        recording = record(shown, recorded_url, "sh", "-c", script)
        shown.wait_for(b"begun")
        time.sleep(2.3)
        recording.kill()
        recording.wait()
    transcript, run, _, raw = newest(recorded_url)
    assert raw == b"begun\r\n" and (run.state, transcript.closed_at) == ("running", None)
    deadline = time.monotonic() + 10
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Where it goes.


def test_it_says_which_project_it_needs(migrated_url: str) -> None:
    result = in_process("--url", migrated_url, "record", "true")
    assert result.exit_code == 1 and "there is no project to record into" in result.stderr
    with kagedb.connect(url=migrated_url):
        for name in ("house", "garden"):
            Project.add(name, actor=ANA)
        Project.add("old", actor=ANA).archive(actor=ANA)
    result = in_process("--url", migrated_url, "record", "true")
    assert result.exit_code == 1 and "name one: --project NAME" in result.stderr
    result = in_process("--url", migrated_url, "record", "--project", "attic", "true")
    assert result.exit_code == 1 and "there is no project 'attic'" in result.stderr
    result = in_process("--url", migrated_url, "record", "--project", "old", "true")
    assert result.exit_code == 1 and "archived" in result.stderr
    assert run_kaged("--url", migrated_url, "record", "--project", "garden", "true").returncode == 0
    with kagedb.connect(url=migrated_url, read_only=True):
        assert [session.project.name for session in Session.select()] == ["garden"]


def test_on_a_new_store_the_hint_leads_to_a_recording(url: str) -> None:
    assert run_kaged("--url", url, "init").returncode == 0
    told = in_process("--url", url, "record", "true").stderr
    assert "make one: kaged project add NAME" in told
    assert in_process("--url", url, "project", "add", "house").stdout == "added the project house\n"
    again = in_process("--url", url, "project", "add", "house")
    assert again.exit_code == 1 and "there is a project 'house' already" in again.stderr
    done = run_kaged("--url", url, "record", "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_a_store_that_is_missing_is_told_before_the_command_runs(url: str, tmp_path: Path) -> None:
    result = in_process("--url", url, "record", "touch", str(tmp_path / "ran"))
    assert result.exit_code == 1 and not (tmp_path / "ran").exists()


def test_arguments_that_are_not_utf_8_and_long_ones_are_kept_readable(recorded_url: str) -> None:
    with terminal() as shown:
        command = ("echo", os.fsdecode(b"\xff\xfe"), "x" * 2000, "two\nlines")
        assert shown.wait(record(shown, recorded_url, *command)) == 0
    _, run, session, raw = newest(recorded_url)
    assert raw.startswith(b"\xff\xfe xxx")
    assert run.input["command"] == ["echo", "\\xff\\xfe", "x" * 2000, "two\nlines"]
    assert (
        session.title.startswith("echo '\\xff\\xfe' xxx")
        and session.title.endswith("x…")
        and len(session.title) == 1000
    )


def test_the_session_is_audited_as_the_operators(recorded_url: str) -> None:
    assert run_kaged("--url", recorded_url, "record", "true", env={"SUDO_USER": "ana"}).returncode == 0
    with kagedb.connect(url=recorded_url, read_only=True):
        from kagedb import AuditEvent

        found = [(event.kind, event.actor) for event in AuditEvent.select().order_by(AuditEvent.seq)]
    assert found[-2:] == [("session.started", "operator:ana"), ("session.ended", "operator:ana")]


@pytest.mark.sqlite_only
def test_root_runs_nothing_for_somebody_else(tmp_path: Path) -> None:
    """About the owner of a file: only root can make a store that is somebody else's."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a store to somebody else")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    url = f"sqlite://{home}/kaged.db"
    with kagedb.connect(url=url):
        Project.add("house", actor=ANA)
    for path in (home, *home.iterdir()):
        os.chown(path, 65_534, 65_534)
    done = run_kaged("--url", url, "record", "touch", str(tmp_path / "ran"))
    assert done.returncode == 1 and not (tmp_path / "ran").exists()
    assert "nothing is run as somebody else" in done.stderr and "sudo -u nobody kaged" in done.stderr
