"""Root leaves no file of its own in a daemon's way, and nobody else gets at a store that is not theirs.

Where root runs the tests, programs here really become other users. Where somebody else does, what they are refused is
seen on a real store of root's instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kagedb
from commands import run_kaged
from kagedb import Project, schema

ROOT = os.geteuid() == 0
NUMBERED = 54_321
"""A user without a name."""
NOBODY = 65_534

OWNERS = [NOBODY, NUMBERED] if ROOT else [os.geteuid()]
"""Whose the stores of these tests are: other users' where root runs them, else the tester's own."""

BECOME = """
import os
from kagedb.cli import privileges, project, store
from kagedb.settings import load
privileges._import_what_is_needed(load(url={url!r}))
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
"""
"""Become another user for real, with everything imported: they need not be able to read this installation."""


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user can reach, which pytest's own are not."""
    place = Path(tempfile.mkdtemp(prefix="kaged-root-", dir="/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture(params=OWNERS)
def owner(request: pytest.FixtureRequest) -> int:
    uid: int = request.param
    return uid


@pytest.fixture
def their_place(open_place: Path, owner: int) -> Path:
    """Where a store of `owner` belongs: a directory that is theirs alone."""
    place = open_place / "home"
    place.mkdir(mode=0o700)
    os.chown(place, owner, owner if ROOT else -1)
    return place


@pytest.fixture
def their_url(their_place: Path, owner: int, sqlite_template: Path) -> str:
    """A store of `owner`, which was closed in good order."""
    store = their_place / "kaged.db"
    shutil.copy(sqlite_template, store)
    store.chmod(0o600)
    os.chown(store, owner, owner if ROOT else -1)
    return f"sqlite://{store}"


def owners(place: Path) -> set[int]:
    found = [place, *place.rglob("*")]
    return {path.lstat().st_uid for path in found}


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# Root on a store of somebody else.


@pytest.mark.parametrize("command", [["status"], ["project", "list"], ["migrate"], ["migrate", "--plan"], ["init"]])
def test_no_command_leaves_a_file_that_is_not_the_owners(
    their_url: str, their_place: Path, owner: int, command: list[str]
) -> None:
    done = run_kaged("--url", their_url, "-q", *command)
    succeeded(done)
    assert owners(their_place) == {owner}


@pytest.mark.parametrize("command", [["status"], ["project", "list"]])
def test_what_sqlite_leaves_beside_a_live_store_is_the_owners(
    their_url: str, their_place: Path, owner: int, command: list[str]
) -> None:
    succeeded(run_kaged("--url", their_url, "init"))
    for leftover in ("kaged.db-wal", "kaged.db-shm"):
        (their_place / leftover).unlink(missing_ok=True)
    succeeded(run_kaged("--url", their_url, "-q", *command))
    assert owners(their_place) == {owner}


def test_a_new_store_belongs_to_whose_directory_it_is_in(their_place: Path, owner: int) -> None:
    succeeded(run_kaged("--url", f"sqlite://{their_place}/kaged.db", "init"))
    assert owners(their_place) == {owner}
    assert (their_place / "kaged.db").exists()


def test_a_home_that_is_not_there_yet_belongs_to_whom_it_lies_below(their_place: Path, owner: int) -> None:
    done = run_kaged("--user", "init", env={"HOME": str(their_place)})
    succeeded(done)
    assert (their_place / ".local/share/kaged/kaged.db").exists()
    assert owners(their_place) == {owner}


@pytest.fixture
def one_more_script(open_place: Path) -> str:
    """Code for `run_kaged` that makes every store one migration behind."""
    scripts = open_place / "scripts"
    shutil.copytree(schema.directory(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "0002_more.py").write_text("def up(migrator, db):\n    pass\n")
    for engine in ("sqlite", "postgres"):
        known = scripts / "catalogue"
        shutil.copy(known / f"{schema.scripts()[-1].name}.{engine}.txt", known / f"0002_more.{engine}.txt")
    for path in (scripts, *scripts.rglob("*")):
        path.chmod(0o755)
    return f"from pathlib import Path\nfrom kagedb import schema\nschema.directory = lambda: Path({str(scripts)!r})"


def test_the_copy_before_a_migration_is_the_owners(
    their_url: str, their_place: Path, owner: int, one_more_script: str
) -> None:
    shown = succeeded(run_kaged("migrate", env={"KAGED_HOME": str(their_place)}, before=one_more_script))
    (copy,) = (their_place / "backups").glob("kaged-*")
    assert str(copy) in shown
    assert owners(their_place) == {owner}


def test_a_plan_says_where_the_owner_can_make_no_copy(their_url: str, open_place: Path, one_more_script: str) -> None:
    closed = open_place / "closed"
    closed.mkdir(mode=0o500)
    config = open_place / "config.toml"
    config.write_text(f'[backup]\ndirectory = "{closed}/backups"\n')
    arguments = ("--config", str(config), "--url", their_url, "migrate")
    planned = json.loads(succeeded(run_kaged(*arguments, "--plan", "--json", before=one_more_script)))
    assert planned["obstacles"] == [
        f"no copy can be made in {closed}/backups: name another place with backup.directory"
    ]
    done = run_kaged(*arguments, before=one_more_script)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2)


def test_the_operator_is_named_though_root_became_somebody_else(their_place: Path, owner: int) -> None:
    url = f"sqlite://{their_place}/kaged.db"
    succeeded(run_kaged("--url", url, "init", env={"SUDO_USER": "ana"}))
    read = f"import kagedb, sys\nwith kagedb.connect(url={url!r}, read_only=True):\n"
    read += "    print(kagedb.AuditEvent.select().first().actor)"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=60)
    assert succeeded(done) == "operator:ana\n"


def test_a_config_file_that_only_root_reads_is_still_read(their_place: Path, their_url: str, open_place: Path) -> None:
    config = open_place / "config.toml"
    config.write_text(f'[storage]\nurl = "{their_url}"\n')
    config.chmod(0o600)
    assert str(their_place / "kaged.db") in succeeded(run_kaged("--config", str(config), "status"))


def test_a_link_is_opened_as_whoever_made_it(their_place: Path, owner: int, open_place: Path) -> None:
    """Nobody may make root open, or put files beside, what they could not open themselves."""
    target = open_place / "roots"
    target.mkdir(mode=0o700)
    with kagedb.connect(url=f"sqlite://{target}/kaged.db"):
        Project.add("secret", actor="operator:ana")
    link = their_place / "kaged.db"
    link.symlink_to(target / "kaged.db")
    os.chown(link, owner, owner if ROOT else -1, follow_symlinks=False)
    before = sorted(os.listdir(target))
    done = run_kaged("--url", f"sqlite://{link}", "project", "list")
    if ROOT:
        assert sorted(os.listdir(target)) == before
        assert done.returncode == 1
        assert "belongs to the user root" in done.stderr
    else:
        assert "secret" in succeeded(done)


def test_root_becomes_the_user_whole(their_url: str, owner: int) -> None:
    told = (
        "import atexit, os\n"
        "@atexit.register\ndef tell():\n"
        "    print(os.getresuid(), os.getresgid(), os.getgroups(), os.environ.get('HOME'))"
    )
    shown = succeeded(run_kaged("--url", their_url, "-q", "project", "list", before=told))
    if not ROOT:
        assert shown.startswith(f"({owner}, {owner}, {owner})")
        return
    users, groups = f"({owner}, {owner}, {owner})", "[]"
    home = "None"
    if owner == NOBODY:
        import pwd

        account = pwd.getpwuid(owner)
        home, groups = account.pw_dir, str(os.getgrouplist(account.pw_name, account.pw_gid))
        assert f"({account.pw_gid}, {account.pw_gid}, {account.pw_gid})" in shown
    assert shown.startswith(users)
    assert shown.endswith(f" {groups} {home}\n")


def test_the_owner_need_not_be_able_to_read_the_installation(
    their_url: str, their_place: Path, owner: int, open_place: Path
) -> None:
    installed = open_place / "site"
    shutil.copytree(Path(kagedb.__file__).parent, installed / "kagedb")
    shutil.copytree(schema.directory(), installed / "kagedb" / "migrations")
    installed.chmod(0o700)
    env = {"PYTHONPATH": os.pathsep.join([str(installed), os.environ["PYTHONPATH"]]), "PYTHONSAFEPATH": "1"}
    here = f"import kagedb; assert kagedb.__file__.startswith({str(installed)!r}), kagedb.__file__"
    for command in (["status"], ["project", "list"], ["project", "list", "--json"]):
        succeeded(run_kaged("--url", their_url, "-q", *command, env=env, before=here))
    missing = run_kaged("--url", their_url, "project", "show", "\u202e", env=env, before=here)
    assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 2)
    for command in (["migrate", "--plan"], ["migrate"], ["init"]):
        done = run_kaged("--url", their_url, *command, env=env, before=here)
        if ROOT:
            assert done.returncode == 1
            assert "install kagedb where every user can read it" in done.stderr
        else:
            succeeded(done)
    assert owners(their_place) == {owner}


# Root on stores that are root's, or the server's.


def test_the_testers_own_store_is_opened_as_the_tester(tmp_path: Path) -> None:
    succeeded(run_kaged("--url", f"sqlite://{tmp_path}/kaged.db", "init"))
    assert owners(tmp_path) == {os.geteuid()}


@pytest.mark.postgres_only
def test_on_postgres_the_owner_of_the_home_decides(url: str, their_place: Path, owner: int) -> None:
    """A server's store has no file whose owner could; backups and copies go into the home."""
    env = {"KAGED_HOME": str(their_place), "SUDO_USER": "ana"}
    told = "import atexit, os\natexit.register(lambda: print(os.getuid()))"
    if "host=/" in url and ROOT:
        # Whether that user can reach the server's socket is the server's affair; who asks it is ours.
        done = run_kaged("--url", url, "status", env=env, before=told)
        assert done.stdout.endswith(f"{owner}\n")
    else:
        assert succeeded(run_kaged("--url", url, "init", env=env, before=told)).endswith(f"{owner}\n")


# init in system mode.


def in_a_host(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `kaged --system init` with `root` as the whole file system, after `code`; for root alone."""
    before = f"""
import os, pwd
from kagedb.cli import privileges, store
from kagedb.settings import load
privileges._import_what_is_needed(load(mode="system"))
pwd.getpwall()  # whatever looks up names is loaded now
os.chroot({str(root)!r}); os.chdir("/")
{code}
"""
    return run_kaged("--system", "init", before=before, env={"HOME": "/root"})


@pytest.fixture
def host(open_place: Path) -> Path:
    """The root of a file system with /var/lib, accounts, and the migrations where they are here."""
    for directory in ("etc", "var/lib", "tmp", "root"):
        (open_place / directory).mkdir(parents=True)
    (open_place / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (open_place / "etc/group").write_text("root:x:0:\n")
    scripts = open_place / str(schema.directory()).lstrip("/")
    shutil.copytree(schema.directory(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    for path in open_place.rglob("*"):
        path.chmod(0o755)
    return open_place


@pytest.fixture
def host_with_user(host: Path) -> Path:
    with (host / "etc/passwd").open("a") as accounts:
        accounts.write(f"kaged:x:{NUMBERED}:{NUMBERED}::/var/lib/kaged:/usr/sbin/nologin\n")
    with (host / "etc/group").open("a") as groups:
        groups.write(f"kaged:x:{NUMBERED}:\n")
    return host


def refused_to_others() -> bool:
    """Where root does not run the tests: `--system init` is refused in two lines, and that is all there is to see."""
    if ROOT:
        return False
    done = run_kaged("--system", "init")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    return True


def test_init_makes_the_home_for_the_user_kaged(host_with_user: Path) -> None:
    if refused_to_others():
        return
    done = in_a_host(host_with_user, "")
    home = host_with_user / "var/lib/kaged"
    assert done.returncode == 0, done.stderr
    assert done.stdout == "made the store: /var/lib/kaged/kaged.db (system mode)\n"
    assert done.stderr == "/var/lib/kaged belongs to the user kaged\n"
    assert owners(home) == {NUMBERED}
    assert (home.stat().st_mode & 0o777, (home / "kaged.db").stat().st_mode & 0o777) == (0o700, 0o600)
    again = in_a_host(host_with_user, "")
    assert (again.returncode, again.stdout) == (
        0,
        "the store is there already: /var/lib/kaged/kaged.db (system mode)\n",
    )
    assert owners(home) == {NUMBERED}


def test_init_says_so_where_there_is_no_user_kaged(host: Path) -> None:
    if refused_to_others():
        return
    done = in_a_host(host, "")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "there is no user kaged on this host, so the store belongs to root\n"
    assert owners(host / "var/lib/kaged") == {0}


def test_init_gives_away_an_empty_home_and_no_store_of_roots(host_with_user: Path) -> None:
    if refused_to_others():
        return
    home = host_with_user / "var/lib/kaged"
    home.mkdir(mode=0o700)
    (home / "lost+found").mkdir(mode=0o700)
    assert in_a_host(host_with_user, "").returncode == 0
    assert (home / "kaged.db").stat().st_uid == NUMBERED
    for path in home.glob("kaged.db*"):
        os.chown(path, 0, 0)
    os.chown(home, 0, 0)
    done = in_a_host(host_with_user, "")
    assert (done.returncode, done.stdout[:26]) == (0, "the store is there already")
    assert "to change that: chown -R kaged: /var/lib/kaged" in done.stderr
    assert owners(home) == {0}


# Everybody else.


def test_another_user_is_told_whose_the_store_is_and_how_to_act_for_them(tmp_path: Path, sqlite_template: Path) -> None:
    if ROOT:
        store = tmp_path / "kaged.db"
        shutil.copy(sqlite_template, store)
        tmp_path.chmod(0o700)
        before = BECOME.format(url=f"sqlite://{store}", uid=NUMBERED)
    else:
        store, before = Path("/root/kaged.db"), ""
    for command in (["status"], ["project", "list"], ["init"], ["migrate"]):
        done = run_kaged("--url", f"sqlite://{store}", *command, env={"HOME": "/nonexistent"}, before=before)
        assert (done.returncode, done.stdout) == (1, "")
        what, hint = done.stderr.splitlines()
        assert what == f"kaged: the store {store} belongs to the user root"
        assert hint == "act as that user: sudo -u root kaged ..."


def test_a_directory_may_be_open_to_all_and_the_store_is_not(open_place: Path, sqlite_template: Path) -> None:
    store = open_place / "kaged.db"
    shutil.copy(sqlite_template, store)
    store.chmod(0o600 if ROOT else 0)
    before = BECOME.format(url=f"sqlite://{store}", uid=NUMBERED) if ROOT else ""
    done = run_kaged("--url", f"sqlite://{store}", "status", env={"HOME": "/nonexistent"}, before=before)
    assert done.returncode == 1
    assert "belongs to the user" in done.stderr
    assert sorted(os.listdir(open_place)) == ["kaged.db"]
