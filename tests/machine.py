"""A machine of its own for the pages of the documentation whose procedures are run as they are written.

Places that are a machine's own are moved: `/mnt/nas`, root's paths. `sudo`, `systemctl` and `loginctl` do nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from postgres_server import find_bin
from stored import fill

DOCS = Path(__file__).parents[1] / "docs"

STUBS = {"systemctl": "exit 0", "loginctl": "exit 0", "sudo": 'exec "$@"'}

RSYNC = """import shutil, sys
source, target = [word for word in sys.argv[1:] if "/" in word]
shutil.copytree(source, target, dirs_exist_ok=True)
"""
"""Where the real one is not installed: it puts the same files there."""


class Page:
    """A page of docs/, by its headings."""

    def __init__(self, name: str) -> None:
        self.text = (DOCS / name).read_text()

    @property
    def sections(self) -> dict[str, str]:
        return dict(re.findall(r"^#+ (.+?)\n(.*?)(?=^#+ |\Z)", self.text, re.MULTILINE | re.DOTALL))

    def blocks(self, title: str, language: str = "sh") -> list[str]:
        """The fenced blocks of a section, in their order; those in a list are brought to the margin."""
        found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", self.sections[title], re.MULTILINE | re.DOTALL)
        return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]

    def require_all_run(self, test: Path) -> None:
        """Every section with a block for a shell is named in `test`."""
        run = {title for title in self.sections if f'blocks("{title}"' in test.read_text()}
        assert {title for title, text in self.sections.items() if "```sh" in text} == run


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

    @property
    def path_with_postgres(self) -> str:
        """PATH with pg_dump and pg_restore."""
        return f"{find_bin()}:{self.environment['PATH']}"

    def fill(self, url: str = "") -> None:
        """Put something of everything into the store at `url`, or into that of this machine, which is made."""
        if not url:
            (self.home / ".local/share/kaged").mkdir(parents=True, mode=0o700)
        fill(url or self.url)

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
