"""The units that `kaged systemd` writes are ones that systemd accepts, confined, and with the paths of this place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kagedb
from commands import commands, in_process
from kagedb.operations import systemd as units
from kagedb.settings import load

ANALYZE = shutil.which("systemd-analyze")

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not on this machine")

SOURCE = Path(__file__).parents[1] / "contrib" / "systemd"

EXPOSURE, EXPOSURE_SQLITE = 1.2, 0.6
"""What `systemd-analyze security` may say at most of a system unit."""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An executable where the system's units can see it."""
    monkeypatch.setattr(units, "HIDDEN", ("/nowhere",))
    return units.program()


def written(mode: str, root: Path, config: str = "") -> list[Path]:
    """The files that `install` writes in this mode for the store that `config` names."""
    file = root / "config.toml"
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(config)
    settings = load(mode=mode, config=file)
    files = units.unit_files(settings, root, units.program())
    units.install(files)
    return [one.path for one in files]


def analyze(paths: list[Path], *how: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    wanted = [str(path) for path in paths if path.suffix in (".service", ".timer")]
    wanted = [name.replace("kaged-failure@.", "kaged-failure@x.") for name in wanted]
    runtime.mkdir(exist_ok=True)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "SYSTEMD_UNIT_PATH": f"{paths[0].parent}:"}
    return subprocess.run(["systemd-analyze", *how, *wanted], capture_output=True, text=True, env=environment)


@needs_systemd
@pytest.mark.parametrize("mode", ["system", "user"])
def test_systemd_finds_nothing_wrong_with_the_units(mode: str, program: str, tmp_path: Path) -> None:
    paths = written(mode, tmp_path / "root")
    how = ["--user", "verify"] if mode == "user" else ["verify"]
    done = analyze(paths, *how, "--man=no", runtime=tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_systemd_finds_what_is_wrong_with_another(tmp_path: Path) -> None:
    """The control of the test before."""
    unit = tmp_path / "kaged-backup.service"
    unit.write_text("[Service]\nType=oneshot\nExecStart=/nowhere/kaged backup\nProtectSystm=yes\n")
    done = analyze([unit], "verify", "--man=no", runtime=tmp_path / "run")
    assert done.stderr


@needs_systemd
@pytest.mark.parametrize(
    ("url", "most"),
    [("sqlite:////var/lib/kaged/tests/kaged.db", EXPOSURE_SQLITE), ("postgresql://kaged@db/kaged", EXPOSURE)],
)
def test_the_system_units_are_confined(url: str, most: float, program: str, tmp_path: Path) -> None:
    paths = written("system", tmp_path / "root", f'[storage]\nurl = "{url}"\n')
    for path in paths:
        if path.suffix == ".service":
            done = subprocess.run(
                ["systemd-analyze", "security", "--offline=yes", str(path)], capture_output=True, text=True
            )
            found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout + done.stderr)
            assert found, done.stderr
            assert float(found[1]) <= most, path.name


def test_every_line_that_confines_has_its_reason() -> None:
    """Above it, or above the lines of its kind."""
    for path in SOURCE.glob("*/*.service"):
        section = path.read_text().partition("[Service]")[2]
        blocks = re.split(r"^(?=#)", section, flags=re.MULTILINE)
        unexplained = blocks[0] if not blocks[0].startswith("#") else ""
        names = re.findall(r"^(\w+)=", unexplained, re.MULTILINE)
        assert set(names) <= {"Type", "ExecStart", "Environment", "UMask"}, path


@pytest.mark.parametrize("mode", ["system", "user"])
def test_a_unit_runs_this_installations_program(mode: str, program: str, tmp_path: Path) -> None:
    for path in written(mode, tmp_path / "root"):
        for command in re.findall(r"^ExecStart=(\S+)", path.read_text(), re.MULTILINE):
            assert command == program or command.endswith("systemd-cat")
            assert os.access(command, os.X_OK)


def started(unit: str, mode: str) -> list[str]:
    """What a unit of contrib/systemd starts, without the program's path."""
    return re.findall(r"^ExecStart=/usr/bin/kaged (.+)$", (SOURCE / mode / unit).read_text(), re.MULTILINE)


@pytest.mark.parametrize("mode", ["system", "user"])
def test_a_maintenance_that_fails_keeps_no_check_from_being_made(mode: str) -> None:
    """A unit stops at its first command that fails, so what must run whatever happens is in a unit of its own."""
    assert started("kaged-maintenance.service", mode) == ["prune", "compact"]
    assert started("kaged-check.service", mode) == ["check"]
    assert started("kaged-verify.service", mode) == ["verify --all"]
    text = (SOURCE / mode / "kaged-maintenance.service").read_text()
    # Wanted, not required: a dependency that is required would fail with what it depends on.
    assert re.findall(r"^(Wants|Before)=(.+)$", text, re.MULTILINE) == [
        ("Wants", "kaged-check.service kaged-verify.service"),
        ("Before", "kaged-check.service kaged-verify.service"),
    ]
    for unit in (SOURCE / mode).glob("kaged-*.service"):
        assert not re.search(r"^(Requires|BindsTo|PartOf|Requisite)=", unit.read_text(), re.MULTILINE)
        assert unit.name.startswith("kaged-failure@") or "OnFailure=kaged-failure@%n.service" in unit.read_text()


@pytest.mark.parametrize("mode", ["system", "user"])
def test_a_unit_starts_commands_that_are_there(mode: str) -> None:
    known = {words[0] for words in commands()}
    for unit in (SOURCE / mode).glob("kaged-*.service"):
        for command in started(unit.name, mode):
            assert command.split()[0] in known


@pytest.mark.parametrize("mode", ["system", "user"])
def test_what_takes_turns_to_write_is_not_slowed_down(mode: str) -> None:
    text = (SOURCE / mode / "kaged-maintenance.service").read_text()
    assert not re.search(r"^(IOSchedulingClass=idle|CPUSchedulingPolicy=|Nice=[1-9])", text, re.MULTILINE)


def test_only_what_needs_the_server_gets_to_the_network(program: str, tmp_path: Path) -> None:
    paths = written("system", tmp_path / "root", '[storage]\nurl = "postgresql://kaged@db/kaged"\n')
    opened = {path.parent.name for path in paths if path.name == "server.conf"}
    assert opened == {"kaged-backup.service.d", "kaged-maintenance.service.d", "kaged-check.service.d"}
    paths = written("system", tmp_path / "other", '[storage]\nurl = "sqlite:////var/lib/kaged/kaged.db"\n')
    assert not [path for path in paths if path.name == "server.conf"]


def test_the_system_units_run_as_the_daemons_own_user(program: str, tmp_path: Path) -> None:
    texts = [path.read_text() for path in written("system", tmp_path) if path.name == "kaged-backup.service"]
    assert "\nUser=kaged\n" in texts[0]


def test_a_store_elsewhere_can_be_written_by_the_units(program: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    config = f'[storage]\nurl = "sqlite://{store}/kaged.db"\n[backup]\ndirectory = "/mnt/nas/kaged"\n'
    paths = written("system", tmp_path / "root", config)
    (drop_in,) = [path for path in paths if path.match("kaged-backup.service.d/place.conf")]
    assert f"ReadWritePaths=/mnt/nas/kaged {store}\n" in drop_in.read_text()
    assert f"Environment=KAGED_CONFIG={tmp_path}/root/config.toml\n" in drop_in.read_text()


def test_a_path_with_odd_characters_is_quoted() -> None:
    assert units._quoted("/opt/a b/50%") == '"/opt/a b/50%%"'
    assert units._quoted("/opt/kaged/bin/kaged") == "/opt/kaged/bin/kaged"


def test_a_program_that_the_units_could_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kagedb.SettingsError, match="below a home"):
        units.unit_files(load(mode="system"), tmp_path, "/home/ana/.local/bin/kaged")


def test_a_url_of_this_session_alone_is_refused() -> None:
    result = in_process("--url", "sqlite:////srv/kaged.db", "systemd", "show", "--user")
    assert result.exit_code == 2
    assert "storage.url" in result.output


def test_what_is_installed_is_what_is_shown_and_goes_again(home: Path) -> None:
    shown = json.loads(in_process("systemd", "show", "--user", "--json").stdout)
    result = in_process("systemd", "install", "--user")
    assert result.exit_code == 0, result.output
    directory = home / ".config/systemd/user"
    assert {str(path) for path in directory.rglob("*") if path.is_file()} == {one["path"] for one in shown}
    assert all(Path(one["path"]).read_text() == one["text"] for one in shown)
    assert "systemctl --user enable --now kaged-backup.timer" in result.output
    own = directory / "kaged-backup.service.d" / "mine.conf"
    own.parent.mkdir()
    own.write_text("[Service]\nNice=19\n")
    assert in_process("systemd", "uninstall", "--user").exit_code == 0
    assert [path for path in directory.rglob("*") if path.is_file()] == [own]


def test_lingering_is_told_where_it_is_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "lingers", lambda: False)
    assert "loginctl enable-linger" in in_process("systemd", "install", "--user").output
    monkeypatch.setattr(units, "lingers", lambda: True)
    assert "loginctl enable-linger" not in in_process("systemd", "install", "--user").output


@pytest.mark.parametrize(("program", "kind"), [("systemd-sysusers", "sysusers.d"), ("systemd-tmpfiles", "tmpfiles.d")])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make users and their directories, even below a root")
def test_the_user_and_the_directory_are_made_below_a_root(program: str, kind: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not on this machine")
    for each in ("sysusers.d", "tmpfiles.d"):
        (tmp_path / "etc" / each).mkdir(parents=True)
        shutil.copy(SOURCE / each / "kaged.conf", tmp_path / "etc" / each)
    command = ["systemd-sysusers", f"--root={tmp_path}", "kaged.conf"]
    subprocess.run(command, check=True, capture_output=True)
    assert "kaged:" in (tmp_path / "etc/passwd").read_text()
    if program == "systemd-tmpfiles":
        done = subprocess.run([program, f"--root={tmp_path}", "--create", "kaged.conf"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "var/lib/kaged").stat().st_mode & 0o777 == 0o700
