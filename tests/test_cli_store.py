"""`kaged init`, `status`, `migrate` and `config`, on new, current, older and busy stores."""

from __future__ import annotations

import json
import os
import pwd
import stat
from pathlib import Path

import pytest

import kagedb
from commands import answer, answer_json, in_process, run_kaged
from extra_scripts import ExtraScripts
from kagedb import AuditEvent, Project, Session
from programs import start_python, wait_for_line

OPEN_AND_WAIT = """
import sys, kagedb
storage = kagedb.connect(url=sys.argv[1], exclusive=sys.argv[2] == "exclusive")
print("open", flush=True)
input()
"""
MORE = 'db.ddl.run("CREATE TABLE more (id {ulid} NOT NULL PRIMARY KEY, note {text}) {strict}")'


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtraScripts:
    return ExtraScripts(tmp_path / "scripts", monkeypatch)


@pytest.fixture
def old_url(engine: str, migrated_url: str, scripts: ExtraScripts, places: object) -> str:
    """A store with a project in it that is one migration behind."""
    with kagedb.connect(url=migrated_url):
        Project.add("house", actor="operator:ana")
    script = scripts.add("0002_more", MORE)
    script.write_text(f'"""Room for more.\n\nAnd why.\n"""\n{script.read_text()}')
    scripts.learn(places.empty(engine))  # type: ignore[attr-defined]
    return migrated_url


def actors(url: str, kind: str) -> list[str]:
    with kagedb.connect(url=url, read_only=True):
        return [event.actor for event in AuditEvent.select().where(AuditEvent.kind == kind)]


# init


def test_init_makes_the_store_in_the_home_and_says_where_and_in_which_mode(home: Path) -> None:
    place = home / ".local/share/kaged/kaged.db"
    done = run_kaged("--user", "init")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"made the store: {place} (user mode)\n"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_init_again_is_harmless(url: str) -> None:
    assert answer(url, "init").startswith("made the store: ")
    with kagedb.connect(url=url):
        Project.add("house", actor="operator:ana")
    assert answer(url, "init").startswith("the store is there already: ")
    assert [row["name"] for row in answer_json(url, "project", "list")] == ["house"]


def test_init_beside_the_daemon_is_harmless(migrated_url: str) -> None:
    daemon = start_python(OPEN_AND_WAIT, migrated_url, "exclusive")
    wait_for_line(daemon, "open")
    assert answer(migrated_url, "init").startswith("the store is there already: ")


def test_init_is_put_down_to_who_is_at_the_keyboard(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    answer(url, "init")
    assert actors(url, "store.created") == [f"operator:{pwd.getpwuid(os.getuid()).pw_name}"]


def test_init_through_sudo_is_put_down_to_who_called_sudo(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "ana")
    answer(url, "init")
    assert actors(url, "store.created") == ["operator:ana"]


def test_init_does_not_make_the_directory_of_a_mistyped_path(tmp_path: Path) -> None:
    done = run_kaged("--url", f"sqlite://{tmp_path}/mistyped/kaged.db", "init")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)
    assert os.listdir(tmp_path) == []


# status


def test_status_says_where_and_how_the_store_is(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url) as storage:
        project = Project.add("house", actor="operator:ana")
        session = Session.start(project, title="night", actor="operator:ana")
        place = storage.engine.place
    lines = answer(migrated_url, "status").splitlines()
    said = {line[:10].strip(): line[12:] for line in lines if line[:1] != " "}
    assert said["store"] == place
    assert said["mode"] == "user"
    assert said["schema"].endswith("(current)")
    assert said["owner"] == "no daemon"
    assert {"            project 1", "            session 1"} <= set(lines)
    found = answer_json(migrated_url, "status")
    assert found["rows"]["session"] == 1
    assert found["newest_at"] >= session.created_at
    assert found["pending"] == []
    assert all(isinstance(size, int) for size in found["bytes_by_part"].values())


def test_status_beside_the_daemon_names_it(migrated_url: str) -> None:
    daemon = start_python(OPEN_AND_WAIT, migrated_url, "exclusive")
    wait_for_line(daemon, "open")
    owner = answer_json(migrated_url, "status")["owner"]
    assert str(daemon.pid) in f"{owner['pid']} {owner['description']}"
    assert str(daemon.pid) in answer(migrated_url, "status")


@pytest.mark.postgres_only
def test_status_shows_no_secret(migrated_url: str) -> None:
    """A password in a URL is PostgreSQL's alone."""
    for more in ([], ["--json"], ["-v"]):
        done = run_kaged(
            *[o for o in more if o == "-v"], "--url", f"{migrated_url}&password=hunter2", "status", *more[:1]
        )
        assert "hunter2" not in done.stdout + done.stderr


def test_an_older_store_can_be_looked_at_and_the_verbs_name_the_command(old_url: str) -> None:
    found = answer_json(old_url, "status")
    assert found["pending"] == ["0002_more"]
    assert found["rows"]["project"] == 1
    assert found["newest_at"] is not None
    assert "1 pending, run: kaged migrate" in answer(old_url, "status")
    for command in (["project", "list"], ["session", "list"], ["prompt", "show", "house", "planner"]):
        refused = in_process("--url", old_url, *command)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr.splitlines()[1] == "start the daemon, or run: kaged migrate"


# migrate


def test_a_plan_says_what_would_be_done_and_changes_nothing(old_url: str, home: Path) -> None:
    before = answer_json(old_url, "status")
    found = answer_json(old_url, "migrate", "--plan")
    assert found["pending"] == [{"name": "0002_more", "summary": "Room for more."}]
    assert found["copy_directory"] == str(home / ".local/share/kaged/backups")
    assert found["copy_bytes"] > 0
    assert found["free_bytes"] > 0
    assert found["obstacles"] == []
    shown = answer(old_url, "migrate", "--plan")
    assert "0002_more  Room for more." in shown
    assert found["copy_directory"] in shown
    assert answer_json(old_url, "status") == before
    assert not (home / ".local/share/kaged").exists()


def test_migrate_says_what_was_applied_and_where_the_copy_is(old_url: str) -> None:
    done = answer_json(old_url, "migrate")
    assert (done["from"], done["to"], done["applied"]) == ("0001_initial", "0002_more", ["0002_more"])
    assert os.listdir(done["copy"])
    assert "more" in answer_json(old_url, "status")["rows"]
    assert actors(old_url, "store.migrated") == [f"operator:{pwd.getpwuid(os.getuid()).pw_name}"]


def test_migrate_and_init_show_the_copy_to_people_too(old_url: str) -> None:
    shown = answer(old_url, "migrate")
    (copy,) = [line.split()[1] for line in shown.splitlines() if line.startswith("copy")]
    assert Path(copy).is_dir()


def test_init_migrates_an_older_store_and_says_so(old_url: str) -> None:
    shown = answer(old_url, "init").splitlines()
    assert shown[0].startswith("migrated the store: ")
    assert Path(shown[1].partition(": ")[2]).is_dir()


def test_migrating_a_current_store_is_nothing_to_do(migrated_url: str) -> None:
    for plan in ([], ["--plan"]):
        assert answer(migrated_url, "migrate", *plan).startswith("nothing to do: ")
    done = answer_json(migrated_url, "migrate")
    assert (done["applied"], done["copy"]) == ([], None)
    assert actors(migrated_url, "store.migrated") == []


@pytest.mark.parametrize("how", ["exclusive", "shared"])
def test_migrate_ends_with_75_where_somebody_has_the_store_open(
    migrated_url: str, scripts: ExtraScripts, how: str
) -> None:
    holder = start_python(OPEN_AND_WAIT, migrated_url, how)
    wait_for_line(holder, "open")
    scripts.add("0002_more", MORE)
    result = in_process("--url", migrated_url, "migrate")
    assert (result.exit_code, result.stdout) == (75, "")
    assert str(holder.pid) in result.stderr
    assert "stop the daemon" in result.stderr
    planned = answer_json(migrated_url, "migrate", "--plan")
    assert any(str(holder.pid) in obstacle for obstacle in planned["obstacles"]) is (how == "exclusive")


def test_a_migration_that_fails_is_told_in_two_lines(migrated_url: str, scripts: ExtraScripts) -> None:
    scripts.add("0002_broken", 'raise ValueError("two\\nlines")')
    result = in_process("--url", migrated_url, "migrate")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 2)
    assert answer_json(migrated_url, "status")["pending"] == ["0002_broken"]


# config


def test_config_shows_every_setting_and_its_origin(home: Path) -> None:
    file = home / "other.toml"
    file.write_text("[limits]\njson_depth = 7\n")
    done = run_kaged("--config", str(file), "config", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["limits.json_depth"] == {"name": "limits.json_depth", "value": "7", "origin": str(file)}
    assert rows["storage.url"]["value"] == f"sqlite:///{home}/.local/share/kaged/kaged.db"
    lines = run_kaged("--config", str(file), "config").stdout.splitlines()
    assert lines[0].split() == ["NAME", "VALUE", "ORIGIN"]
    assert len(lines) == len(rows) + 1
    assert not (home / ".local").exists()


def test_config_hides_the_password_of_the_url() -> None:
    done = run_kaged("config", env={"KAGED_DATABASE_URL": "postgresql://ana:hunter2@localhost/kaged"})
    assert done.returncode == 0
    assert "KAGED_DATABASE_URL" in done.stdout
    assert "hunter2" not in done.stdout
