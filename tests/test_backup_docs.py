"""Every procedure of docs/backup.md is run as it is written, on a store with something in it.

Places that are a machine's own are moved: `/mnt/nas`, root's paths. `sudo`, `systemctl` and `loginctl` do nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

import kagedb
from kagedb import Run
from postgres_server import find_bin
from stored import fill

if TYPE_CHECKING:
    from conftest import Places

PAGE = Path(__file__).parents[1] / "docs" / "backup.md"

STUBS = {"systemctl": "exit 0", "loginctl": "exit 0", "sudo": 'exec "$@"'}

RSYNC = """import shutil, sys
source, target = [word for word in sys.argv[1:] if "/" in word]
shutil.copytree(source, target, dirs_exist_ok=True)
"""
"""Where the real one is not installed: it puts the same files there."""


def sections() -> dict[str, str]:
    return dict(re.findall(r"^#+ (.+?)\n(.*?)(?=^#+ |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def blocks(title: str, language: str = "sh") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", sections()[title], re.MULTILINE | re.DOTALL)


class Machine:
    """A home, a directory for what is mounted, and programs in PATH; `run` gives what a block prints."""

    def __init__(self, place: Path) -> None:
        self.home, self.nas, self.system = place / "home", place / "nas", place / "system"
        for directory in (self.home, self.nas, self.nas / "direct", self.system):
            directory.mkdir(parents=True, mode=0o700)
        self.programs = place / "bin"
        self.programs.mkdir()
        for name, body in STUBS.items():
            self._program(name, f"#!/bin/sh\n{body}\n")
        self._program("kaged", f"#!{sys.executable}\nfrom kagedb.cli import main\nmain()\n")
        if shutil.which("rsync") is None:
            self._program("rsync", f"#!{sys.executable}\n{RSYNC}")
        self.environment = {**os.environ, "HOME": str(self.home)}
        self.environment["PATH"] = f"{self.programs}:{os.environ['PATH']}"

    def _program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    @property
    def url(self) -> str:
        return f"sqlite://{self.home}/.local/share/kaged/kaged.db"

    def fill(self) -> None:
        (self.home / ".local/share/kaged").mkdir(parents=True, mode=0o700)
        fill(self.url)

    def run(self, block: str, **environment: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.replace("/mnt/nas", str(self.nas))],
            cwd=self.home,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "first")
    machine.fill()
    return machine


def runs(url: str) -> int:
    with kagedb.connect(url=url, read_only=True):
        return Run.select().count()


def test_every_block_of_the_page_is_run_by_a_test_here() -> None:
    run = {title for title in sections() if f'blocks("{title}"' in Path(__file__).read_text()}
    assert {title for title, text in sections().items() if "```sh" in text} == run


def test_a_first_backup(machine: Machine) -> None:
    first, units = blocks("Backup and restore")
    said = machine.run(first)
    assert "verified" in said and "is good" in said
    assert "enable --now kaged-backup.timer kaged-maintenance.timer" in machine.run(units)


def test_restoring(machine: Machine) -> None:
    (block,) = blocks("Restore")
    machine.run("kaged backup")
    with kagedb.connect(url=machine.url):
        kagedb.Project.add("garden", actor="operator:ana")
    machine.run(block)
    with kagedb.connect(url=machine.url, read_only=True):
        assert [project.name for project in kagedb.Project.select()] == ["house"]


def test_copies_elsewhere_and_a_new_machine(machine: Machine, tmp_path: Path) -> None:
    synced, direct, one_file = blocks("Backups on another disk or machine")
    (machine.nas / "kaged").mkdir()
    machine.run(synced)
    machine.run(direct)
    assert "is good" in machine.run(one_file)
    (again,) = blocks("A new machine")
    other = Machine(tmp_path / "second")
    shutil.copytree(machine.nas, other.nas, dirs_exist_ok=True)
    other.run(again)
    assert runs(other.url) == 1


def test_moving_a_system_wide_installation(machine: Machine, tmp_path: Path) -> None:
    old, new = blocks("Moving a system-wide installation")
    store = {"KAGED_HOME": str(machine.system)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGED_HOME", str(machine.system))
        fill(f"sqlite://{machine.system}/kaged.db")
    machine.run(old, **store)
    other = Machine(tmp_path / "second")
    shutil.copy(machine.home / "kaged.tar", other.home)
    other.run(new, KAGED_HOME=str(other.system))
    assert runs(f"sqlite://{other.system}/kaged.db") == 1


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the sqlite3 program is not on this machine")
def test_by_hand_on_sqlite(machine: Machine) -> None:
    dump, copy = blocks("By hand")
    machine.run(dump)
    assert runs(f"sqlite://{machine.home}/again.db") == 1
    said = machine.run(copy)
    assert "0|" in said and "run 1" in said
    assert runs(f"sqlite://{machine.home}/copy.db") == 1


def test_by_hand_on_postgresql(machine: Machine, places: Places) -> None:
    url = places.migrated("postgres")
    fill(url)
    parts = urlsplit(url)
    (block,) = blocks("By hand", "sh postgres")
    query = parse_qs(parts.query)
    machine.run(
        block,
        PATH=f"{find_bin()}:{machine.environment['PATH']}",
        PGHOST=query["host"][0] if "host" in query else parts.hostname or "",
        PGPORT=query["port"][0] if "port" in query else str(parts.port or 5432),
        PGUSER=parts.username or "",
        PGPASSWORD=parts.password or "",
        PGDATABASE=parts.path.lstrip("/"),
    )
    assert (machine.home / "kaged.pgdump").stat().st_size > 1000


def test_every_check_has_a_line_on_what_to_do() -> None:
    from kagedb.operations import checking

    listed = re.findall(r"^\| ([a-z, -]+?) \| ", sections()["When a check fails"], re.MULTILINE)
    assert {name for line in listed[1:] for name in line.split(", ")} == set(checking._CHECKS)
