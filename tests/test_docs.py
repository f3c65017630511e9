"""The documentation says what is there: its code runs, its commands print what it shows, its tables are complete."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest

import kagedb
from kagedb import errors
from kagedb.config import Setting
from kagedb.settings import SETTINGS, load
from postgres_server import PostgresServer
from programs import run_python

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
OPERATORS, AUTHORS, SETTINGS_PAGE, README = (
    DOCS / "operators.md",
    DOCS / "daemon-authors.md",
    DOCS / "settings.md",
    PROJECT / "README.md",
)


def pages(name: str = "page") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a page in one language: the number of their first line, and their text."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        yield page.read_text()[: found.start(1)].count("\n") + 1, found.group(1)


def the_block(page: Path, language: str, word: str) -> str:
    """The one block of a page that has `word` in it."""
    (text,) = [text for _, text in blocks(page, language) if word in text]
    return text


# Code.


def program_of(page: Path) -> str:
    """The Python blocks of a page, each line where it stands on the page, so that a traceback names it.

    `expression  # -> value` is checked.
    """
    lines = [""] * page.read_text().count("\n")
    lines[0] = "def _is(found, told): assert found == told, f'it gives {found!r}'"
    for first, text in blocks(page, "python"):
        for number, line in enumerate(text.splitlines(), first - 1):
            lines[number] = re.sub(r"^(\S.*?)  # -> (.+)$", r"_is((\1), (\2))", line)
    return "\n".join(lines)


def run_page(page: Path, url: str, directory: Path) -> None:
    """Run the Python of a page on the store at `url`; it must do what the page says, and say nothing beside it."""
    program, config = directory / page.with_suffix(".py").name, directory / "page.toml"
    program.write_text(program_of(page))
    assert "_is(" in program.read_text().partition("\n")[2], "nothing on the page is checked"
    config.touch(mode=0o600)
    config.write_text("[storage]\nslow_transaction_ms = 0\n")  # a machine that does other things too would be told of
    done = run_python(program, env={"KAGED_DATABASE_URL": url, "KAGED_CONFIG": str(config)})
    assert (done.returncode, done.stderr) == (0, ""), f"line numbers are those of {page.name}"


@pytest.mark.parametrize("page", [AUTHORS, README], ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom_and_gives_what_it_says(
    page: Path, url: str, tmp_path: Path
) -> None:
    run_page(page, url, tmp_path)


def test_a_wrong_value_on_a_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nnumbers = [1]\nnumbers  # -> [2]\n```\n")
    done = run_python(program_of(page))
    assert done.returncode == 1
    assert "line 5" in done.stderr
    assert "it gives [1]" in done.stderr


def test_the_config_files_shown_are_accepted(tmp_path: Path) -> None:
    found = [text for page in PAGES for _, text in blocks(page, "toml")]
    assert found
    for text in found:
        tomllib.loads(text)
        file = tmp_path / "config.toml"
        file.write_text(text)
        load(config=file, environ={"HOME": str(tmp_path)}, euid=1000)


@pytest.mark.postgres_only
def test_the_sql_for_postgresql_makes_places_that_the_url_shown_opens(
    engine: str, own_postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """The SQL is PostgreSQL's own; run by the superuser, with other names: the tests have a role `kaged` already."""
    server = own_postgres_server
    of_its_own, shared = (
        [statement for statement in text.replace("kaged", "docs").split(";") if statement.strip()]
        for _, text in blocks(OPERATORS, "sql")
    )
    (shown,) = [tomllib.loads(text) for _, text in blocks(OPERATORS, "toml")]
    url = urlsplit(shown["storage"]["url"].replace("kaged", "docs"))
    assert url.scheme == "postgresql"
    host = urlsplit(server.url("docs")).query

    def connect(database: str, config: str) -> kagedb.Storage:
        file = tmp_path / "config.toml"
        file.write_text(config)
        account = url.netloc.rpartition("@")[0]
        return kagedb.connect(f"postgresql://{account}@/{database}?{host}", config=file)

    for statement in of_its_own:
        server.execute(statement, url=server.admin_url("postgres"))
    with connect("docs", "") as storage:
        assert "schema kaged" in storage.engine.place

    server.execute("CREATE DATABASE house", url=server.admin_url("postgres"))
    with pytest.raises(kagedb.StorageForbidden, match='CREATE SCHEMA "docs" AUTHORIZATION "docs"'):
        connect("house", '[storage]\nschema = "docs"\n')
    for statement in shared:
        server.execute(statement, url=server.admin_url("house"))
    connect("house", '[storage]\nschema = "docs"\n').close()


# The command line.


def commands(
    group: click.Command | None = None, words: tuple[str, ...] = ("kaged",)
) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its full name: `kaged project list`."""
    from kagedb.cli import kaged

    group = group or kaged
    if not isinstance(group, click.Group):
        yield " ".join(words), group
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        yield from commands(command, (*words, name))


def options(command: click.Command) -> set[str]:
    """The long options of a command, without --help."""
    return {
        option
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and option != "--help"
    }


def described() -> dict[str, str]:
    """Each command that a table of the pages describes, and its row."""
    rows = [row for page in PAGES for row in re.findall(r"^\| `kaged .*$", page.read_text(), re.MULTILINE)]
    return {re.match(r"\| `(kaged(?: [a-z][a-z-]*)*)", row).group(1): row for row in rows}  # type: ignore[union-attr]


def test_every_command_is_described_and_no_other() -> None:
    assert sorted(described()) == sorted(name for name, _ in commands())


def test_every_option_is_described_with_its_command_and_no_other() -> None:
    rows = described()
    for name, command in commands():
        assert set(re.findall(r"--[a-z][a-z-]*", rows[name])) == options(command), name


def test_the_options_of_all_commands_are_described() -> None:
    from kagedb.cli import kaged

    missing = {option for option in options(kaged) if f"`{option}" not in OPERATORS.read_text()}
    assert not missing


def test_every_command_and_option_has_help() -> None:
    for name, command in commands():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]}"


def test_no_page_and_no_error_names_a_command_that_is_not_there() -> None:
    known = {name for name, _ in commands()}
    known |= {name.rpartition(" ")[0] for name in known}
    named = re.compile(r"`kaged((?: [a-z]+)+)|(?:with|run): kaged((?: [a-z]+)+)")
    found = 0
    for place in [*PAGES, *(PROJECT / "kagedb").rglob("*.py")]:
        for words in named.findall(place.read_text()):
            words = ["kaged", *"".join(words).split()]
            found += 1
            assert any(" ".join(words[:length]) in known for length in (2, 3)), f"{place.name}: {' '.join(words)}"
    assert found > 50, "the pattern finds them no more"


VARIABLE_PARTS = (
    (r"\b[0-7][0-9A-HJKMNP-TV-Z]{25}\b", "ULID"),
    (r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:Z|[+-]\d\d:?\d\d)?", "TIME"),
    (r"\b[\d.,]+ (?:bytes|B|KiB|MiB|GiB)\b", "SIZE"),
    (r"\bSQLite [\d.]+ \([^)]*\)", "SQLITE"),
    (r"\b\d+\.\d+\.\d+(?:\.dev\d+)?\b", "VERSION"),
    (r"\b(?:pid|process) \d+\b", "PROCESS"),
    (r"\b\d+\.\d s\b", "SECONDS"),
    (r"^warning: SQLite .*\n", ""),
    (r"^(mode +user +)(?:ordinary account.*|KAGED_MODE)$", r"\1ORIGIN"),
    (r" +", " "),
)
"""What differs from host to host and time to time in what a command prints."""


def same_everywhere(text: str) -> list[str]:
    for pattern, name in VARIABLE_PARTS:
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return [line.strip() for line in text.strip().splitlines()]


def test_the_commands_print_what_the_page_shows(home: Path) -> None:
    """On the default store of one account, in the order of the page; an id in a command stands for the session's."""
    program = str(Path(sys.executable).with_name("kaged"))
    assert run_python(DOCS / "examples" / "daemon.py").returncode == 0
    with kagedb.connect(read_only=True):
        session = kagedb.Session.get().id
    assert list(blocks(OPERATORS, "console"))
    for line, text in blocks(OPERATORS, "console"):
        for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, shown = step.partition("\n")
            words = shlex.split(re.sub(*VARIABLE_PARTS[0], command).replace("ULID", session))
            done = subprocess.run(
                [program if words[0] == "kaged" else words[0], *words[1:]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                timeout=60,
            )
            printed = done.stdout.replace(str(home), "/home/ana")
            assert same_everywhere(printed) == same_everywhere(shown), f"operators.md:{line}: {command}\n{printed}"


@pytest.mark.sqlite_only
def test_every_file_beside_the_database_is_described_and_no_other(engine: str, home: Path) -> None:
    """On PostgreSQL there is none."""
    store = home / ".local/share/kaged"
    with kagedb.connect(exclusive=True):
        kagedb.Project.add("house", actor="operator:ana")
        found = {path.name for path in store.iterdir()}
    shown = set(re.findall(r"^\| `([.a-z-]*kaged\.db[.a-z-]*)` \|", OPERATORS.read_text(), re.MULTILINE))
    assert shown == found | {".kaged.db.new"}  # which is there only while a store is made


# Settings.


HOME_DEFAULTS = {"storage.url": "`<home>/kaged.db`", "backup.directory": "`<home>/backups`", "backup.pg_bin": "by PATH"}
"""What is no value in the table of the program: it follows from the home, or from PATH."""


def setting_row(setting: Setting) -> str:
    default = HOME_DEFAULTS.get(setting.name, f"`{setting.default}`")
    return f"| `{setting.name}` | {default} | {setting.form} | {setting.help} |"


def test_every_setting_is_described_as_the_program_knows_it_and_no_other() -> None:
    """Where this fails, the rows wanted are in the message: copy them."""
    shown = re.findall(r"^\| `[a-z]+\.[a-z_]+` \|.*$", SETTINGS_PAGE.read_text(), re.MULTILINE)
    wanted = [setting_row(setting) for setting in SETTINGS]
    assert shown == wanted, "\n".join(wanted)


def test_every_variable_of_the_environment_that_is_read_is_described_and_no_other() -> None:
    read = {
        name
        for file in (PROJECT / "kagedb").rglob("*.py")
        for name in re.findall(r"\bKAGED_[A-Z_]+\b|\bXDG_[A-Z_]+\b", file.read_text())
    }
    assert set(re.findall(r"^\| `((?:KAGED|XDG)_[A-Z_]+)` \|", SETTINGS_PAGE.read_text(), re.MULTILINE)) == read


# Errors and verbs.


def error_classes() -> list[type[errors.KagedError]]:
    found = [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.KagedError)
    ]
    return [error for error in found if error is not errors.KagedError]


def test_every_error_is_described_with_its_exit_status_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", AUTHORS.read_text(), re.MULTILINE)
    assert dict(rows) == {error.__name__: str(error.exit_status) for error in error_classes()}


def test_every_exit_status_is_described_and_no_other() -> None:
    known = {0, *(value for name, value in vars(errors).items() if name.startswith("EXIT_"))}
    shown = re.findall(r"^\| (\d+) \|", OPERATORS.read_text(), re.MULTILINE)
    assert sorted(map(int, shown)) == sorted(known)


def verbs() -> Iterator[str]:
    """Every public method of the public models and of the store."""
    for name in kagedb.__all__:
        thing = getattr(kagedb, name)
        if inspect.isclass(thing) and thing.__module__.startswith(("kagedb.models", "kagedb.storage")):
            for method, value in vars(thing).items():
                if not method.startswith("_") and inspect.isfunction(getattr(value, "__func__", value)):
                    yield f"{name}.{method}"


FOR_THE_VERBS = {
    "AuditEvent.append",
    "AuditEvent.redact",
    "AuditSeal.close",
    "AuditSeal.close_all",
    "AuditSeal.close_in_passing",
    "Project.require_active",
    "ProjectConfig.append",
    "ProjectConfig.newest",
    "PromptLabel.move",
    "PromptLabel.named",
    "PromptVersion.append",
    "RunNode.forest",
    "Storage.before_close",
    "Storage.notify",
    "Storage.seal_key_file",
    "Storage.seal_mac",
    "Transcript.drop_oldest",
    "Transcript.stored_bytes",
}
"""What verbs and commands call in each other, and a daemon does not."""


def test_every_verb_is_described() -> None:
    page = AUTHORS.read_text()
    missing = []
    for verb in sorted(set(verbs()) - FOR_THE_VERBS):
        method = verb.partition(".")[2]
        if not re.search(rf"\b{method}\(|`(?:\w+\.)?{method}`", page):
            missing.append(verb)
    assert not missing, "describe it, or list it in FOR_THE_VERBS"


def test_no_method_is_kept_from_the_page_that_is_not_there() -> None:
    assert set(verbs()) >= FOR_THE_VERBS


# Pages.


@pages()
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name) if name else page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_every_page_is_reached_from_the_readme() -> None:
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        waiting += [page.parent / name for name in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]*)?\)", page.read_text())]
    assert {page.resolve() for page in PAGES} <= seen


@pages()
def test_a_page_speaks_of_no_machine(page: Path) -> None:
    for place in (str(PROJECT), os.path.dirname(sys.executable), "/tmp/", "/root"):
        assert place not in page.read_text()


# The README's commands.


def readme_commands() -> list[str]:
    """The lines to paste: the first makes and shows a store, the second runs the tests."""
    return [text.strip() for _, text in blocks(README, "sh")]


def test_each_command_of_the_readme_is_one_line() -> None:
    first, second, *_ = readme_commands()
    assert "\n" not in first
    assert "docs/examples/daemon.py" in first
    assert first.endswith("kaged status")
    assert "\n" not in second
    assert second.endswith("-m pytest")


def test_every_change_has_to_pass_the_second_command() -> None:
    assert readme_commands()[1] in (PROJECT / ".ci" / "run").read_text()


def test_what_the_first_command_runs_works_in_an_empty_home(home: Path) -> None:
    """With this interpreter in the place of the virtual environment that the command makes."""
    _, _, rest = readme_commands()[0].partition(" install ")
    bin_directory = os.path.dirname(sys.executable)
    steps = [step.strip().replace(".venv/bin", bin_directory) for step in rest.split("&&")[1:]]
    assert len(steps) == 2
    for step in steps:
        done = subprocess.run(shlex.split(step), cwd=PROJECT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert str(home / ".local/share/kaged/kaged.db") in done.stdout


@pytest.mark.slow
def test_the_first_command_works_in_a_fresh_clone_and_an_empty_home(tmp_path: Path, home: Path) -> None:
    """Needs the network, or pip's settings for an index that is there."""
    clone = tmp_path / "clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=60).stdout
    for name in files.rstrip("\0").split("\0"):
        if (PROJECT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, clone / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        ["bash", "-c", readme_commands()[0]], cwd=clone, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert str(home / ".local/share/kaged/kaged.db") in done.stdout
