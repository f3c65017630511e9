"""What all commands of `kaged` have in common: errors, exit statuses, help, and what they let through to a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import kagedb
from commands import KAGED, answer, answer_json, commands, in_process, run_kaged
from kagedb import Project, Prompt
from kagedb.cli import kaged
from kagedb.cli.output import duration, local_time, size, visible
from programs import run_python

READING = [
    ("status",),
    ("migrate",),
    ("migrate", "--plan"),
    ("project", "list"),
    ("project", "show", "house"),
    ("prompt", "list"),
    ("prompt", "show", "house", "planner"),
    ("prompt", "diff", "house", "planner", "1", "2"),
    ("plugin", "list"),
    ("plugin", "show", "house", "mail"),
    ("session", "list"),
    ("session", "show", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
    ("run", "list"),
    ("run", "show", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
    ("run", "tree", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
]
HOSTILE = "\x1b]0;owned\x07\x9b31m\r\u202etxt\x08"


def tables_in(url: str) -> list[str]:
    """What stands at the place: files beside the store, or tables."""
    if url.startswith("sqlite"):
        return sorted(os.listdir(Path(url.removeprefix("sqlite://")).parent))
    import psycopg2

    connection = psycopg2.connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT nspname FROM pg_namespace WHERE nspname = 'kaged'")
            return [name for (name,) in cursor.fetchall()]
    finally:
        connection.close()


# Help.


def test_help_and_version_do_not_load_the_store() -> None:
    for option in ("--help", "--version"):
        done = run_python(
            "import sys\nfrom kagedb.cli import kaged\n"
            f"try:\n    kaged.main([{option!r}])\nexcept SystemExit as end:\n    assert not end.code\n"
            "print([name for name in ('peewee', 'ulid', 'psycopg2', 'kagedb.storage') if name in sys.modules])",
            fresh=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n[]\n")


def test_the_module_and_the_script_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("kaged")
    said = {
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([sys.executable, "-m", "kagedb"], [script])
    }
    assert said == {f"kaged {kagedb.__version__}\n"}


def test_every_command_and_every_option_has_help() -> None:
    found = commands()
    assert len(found) > 10
    for words, command in found.items():
        assert command.get_short_help_str(limit=200), words
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (words, parameter.name)
    for parameter in kaged.params:
        assert isinstance(parameter, click.Option) and parameter.help, parameter.name


def test_the_lists_of_commands_are_not_cut_off_at_80_columns() -> None:
    for words in [[], *([name] for name in ("project", "prompt", "plugin", "session", "run"))]:
        shown = CliRunner().invoke(kaged, [*words, "--help"], terminal_width=80).output
        assert "..." not in shown.partition("Commands:")[2], shown


def test_every_report_can_be_had_as_json_and_says_what_is_in_it() -> None:
    reports = {"list", "show", "status", "tree", "diff", "config", "migrate", "verify"}
    for words, command in commands().items():
        options = {option for parameter in command.params for option in parameter.opts}
        if words[-1] in reports:
            assert "--json" in options, words
            assert "JSON: " in (command.help or ""), words


def test_every_list_takes_a_limit() -> None:
    lists = {words: command for words, command in commands().items() if words[-1] == "list"}
    assert len(lists) >= 5
    for words, command in lists.items():
        assert "--limit" in {option for parameter in command.params for option in parameter.opts}, words


# Errors.


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_command_that_reads_makes_no_store_and_says_what_does(url: str, command: tuple[str, ...]) -> None:
    before = tables_in(url)
    result = in_process("--url", url, *command)
    assert result.exit_code == 1
    assert result.stdout == ""
    what, hint = result.stderr.splitlines()
    assert what.startswith("kaged: there is no store at ")
    assert hint == "make one with: kaged init"
    assert tables_in(url) == before


def test_an_error_of_a_program_is_two_lines_on_stderr(url: str) -> None:
    done = run_kaged("--url", url, "status")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["--nope"],
        ["-v", "-q", "status"],
        ["status", "extra"],
        ["run", "show"],
        ["run", "show", "x" * 26],
        ["run", "list", "--limit", "-1"],
        ["prompt", "show", "house", "planner", "--version", "1", "--label", "x"],
        ["--url", "kaged.db", "status"],
        ["--config", "/nowhere/at/all", "config"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_is_two_lines(arguments: list[str]) -> None:
    done = run_kaged(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 2
    assert done.stderr.startswith("kaged: ")


def test_a_damaged_store_ends_with_3(tmp_path: Path) -> None:
    place = tmp_path / "kaged.db"
    place.write_bytes(b"no database" * 500)
    done = run_kaged("--url", f"sqlite://{place}", "status")
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 2)


def test_a_server_that_is_away_ends_with_75_and_no_secret_is_told() -> None:
    done = run_kaged("--url", "postgresql://ana:hunter2@127.0.0.1:1/kaged", "project", "list")
    assert done.returncode == 75
    assert len(done.stderr.splitlines()) == 2
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.postgres_only
@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_that_nobody_foresaw_is_no_traceback_without_v_and_never_a_secret(
    migrated_url: str, verbose: bool
) -> None:
    """A password in a URL is PostgreSQL's alone."""
    boom = (
        "import kagedb.operations.health as health, peewee\n"
        "def status(storage):\n    raise peewee.OperationalError('at hunter2: what is this?\\nmore')\n"
        "health.status = status"
    )
    done = run_kaged("--url", f"{migrated_url}&password=hunter2", *["-v"][: int(verbose)], "status", before=boom)
    assert (done.returncode, done.stdout) == (1, "")
    assert "hunter2" not in done.stderr
    what, hint = done.stderr.splitlines()[-2:]
    assert what.startswith("kaged: internal error: OperationalError: at ")
    assert "kaged -v" in hint
    assert ("Traceback" in done.stderr) is verbose
    assert verbose or len(done.stderr.splitlines()) == 2


def test_a_reader_that_goes_away_is_no_error(migrated_url: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", KAGED, "--url", migrated_url, "status"],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.sqlite_only
def test_output_that_cannot_be_written_is_told(migrated_url: str) -> None:
    """The engine does not matter to what is behind the store."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", KAGED, "--url", migrated_url, "status"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "kaged: the output cannot be written: No space left on device",
        "write it elsewhere",
    ]


@pytest.mark.sqlite_only
def test_ctrl_c_is_quiet(migrated_url: str) -> None:
    """The signal comes in the middle of a command, alike on both engines."""
    interrupted = (
        "import kagedb.operations.health as health, os, signal, time\n"
        "def status(storage):\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
        "health.status = status"
    )
    done = run_kaged("--url", migrated_url, "status", before=interrupted)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_daemon_can_have_the_commands_in_its_own(migrated_url: str, tmp_path: Path) -> None:
    @click.group
    @click.pass_context
    def daemon(context: click.Context) -> None:
        context.obj = "the daemon's own"

    @daemon.command
    @click.pass_obj
    def serve(mine: str) -> None:
        click.echo(mine)

    daemon.add_command(kaged)
    run = CliRunner()
    assert run.invoke(daemon, ["serve"]).output == "the daemon's own\n"
    listed = run.invoke(daemon, ["kaged", "--url", migrated_url, "status", "--json"])
    assert json.loads(listed.stdout)["rows"]["project"] == 0
    refused = run.invoke(daemon, ["kaged", "--url", f"sqlite://{tmp_path}/none.db", "status"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("kaged: there is no store at ")


# Text.


@pytest.fixture
def hostile_url(migrated_url: str) -> str:
    """A store with a prompt that would repaint the terminal, if it could."""
    with kagedb.connect(url=migrated_url):
        project = Project.add("house", actor="operator:ana")
        Prompt.edit(project, "planner", f"a\tb{HOSTILE}\nlast", actor="operator:ana", message=f"one{HOSTILE}\ntwo")
        Prompt.edit(project, "planner", "quiet\n", actor="operator:ana")
    return migrated_url


@pytest.mark.parametrize(
    "command",
    [
        ("prompt", "show", "house", "planner"),
        ("prompt", "show", "house", "planner", "--json"),
        ("prompt", "show", "house", "planner", "--version", "1", "--json"),
        ("prompt", "diff", "house", "planner", "1", "2", "--json"),
    ],
    ids=" ".join,
)
def test_stored_text_cannot_reach_the_terminal(hostile_url: str, command: tuple[str, ...]) -> None:
    shown = answer(hostile_url, *command)
    assert shown.replace("\n", "").isprintable()
    assert "owned" in shown


def test_a_message_of_two_lines_is_one_row_of_a_table(hostile_url: str) -> None:
    shown = answer(hostile_url, "prompt", "show", "house", "planner")
    assert sum(line.startswith(("1 ", "2 ")) for line in shown.splitlines()) == 2
    assert r"one\x1b]0;owned\x07\x9b31m\r\u202etxt\x08\ntwo" in shown


@pytest.mark.parametrize("command", ["show", "diff"])
def test_a_prompt_is_raw_in_a_pipe_and_safe_on_a_terminal(hostile_url: str, command: str) -> None:
    words = (
        ["show", "house", "planner", "--version", "1"] if command == "show" else ["diff", "house", "planner", "2", "1"]
    )
    arguments = [sys.executable, "-c", KAGED, "--url", hostile_url, "prompt", *words]
    piped = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    body = f"a\tb{HOSTILE}\nlast".encode()
    assert piped == body if command == "show" else b"+" + body.replace(b"\n", b"\n+") in piped

    ours, terminals = pty.openpty()
    done = subprocess.run(arguments, stdout=terminals, check=True, timeout=60)
    os.close(terminals)
    seen = b""
    try:
        while block := os.read(ours, 4096):
            seen += block
    except OSError:
        pass  # EIO: the other side is closed, and everything has been read
    os.close(ours)
    assert done.returncode == 0
    text = seen.decode().replace("\r\n", "\n")
    assert text.endswith("\n")
    assert text.replace("\n", "").replace("\t", "").isprintable()
    assert r"\x1b]0;owned\x07" in text


def test_a_name_that_the_terminal_cannot_show_is_escaped(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        Project.add("家", actor="operator:ana")
    done = run_kaged("--url", migrated_url, "project", "list", env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr
    assert r"\u5bb6" in done.stdout
    assert answer_json(migrated_url, "project", "list")[0]["name"] == "家"


def test_columns_are_aligned_under_wide_characters(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        for name in ("house", "家"):
            Prompt.edit(Project.add(name, actor="operator:ana"), "planner", "x", actor="operator:ana")
    lines = [line for line in answer(migrated_url, "prompt", "list").splitlines() if "planner" in line]
    assert len(lines) == 2
    ascii_line, wide_line = sorted(lines, key=lambda line: "家" in line)
    assert ascii_line.index("planner") == wide_line.index("planner") + 1


def test_times_are_in_the_zone_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XXX-5:30")
    time.tzset()
    try:
        assert local_time(1_795_507_803_999) == "2026-11-24 13:40:03"
        assert local_time(0) == "1970-01-01 05:30:00"
        assert local_time(2**80) == f"{2**80} ms"
        assert local_time(None) == "-"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_figures_are_in_the_unit_a_person_would_choose() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 5 << 20, 3 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    assert [duration(ms) for ms in (0, 59_999, 60_000, 3_600_000)] == ["0.0 s", "60.0 s", "1 min 00 s", "1 h 00 min"]


def test_visible_text_keeps_what_is_harmless() -> None:
    assert visible("Grüße, 世界 🎉 \\x1b") == "Grüße, 世界 🎉 \\x1b"
    assert visible("a\nb\tc", lines=True) == "a\nb\tc"
    assert visible("a\nb\u2028\udcff\x85") == r"a\nb\u2028\udcff\x85"
    assert not re.search("[\x00-\x1f\x7f-\x9f]", visible("".join(map(chr, range(0x300)))))
