"""Migration scripts that do not exist yet, after a copy of the real ones: what the next versions will bring.

The `scripts` fixture is one such directory. Also the store that they are tried on, and where its copies are.

`PREAMBLE` makes a program (programs.py) use them too; its first argument is the directory.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType
from urllib.parse import unquote

import pytest

import kagedb
from kagedb import Project, Session, schema
from kagedb.settings import Settings

PREAMBLE = """
import sys
from pathlib import Path
from kagedb import schema
place = Path(sys.argv[1])
schema.directory = lambda: place
"""

MORE = 'db.ddl.run("CREATE TABLE more (id {ulid} NOT NULL PRIMARY KEY, note {text}) {strict}")'

CATALOGUE_TOOL = Path(__file__).parents[1] / "contrib" / "development" / "catalogue.py"


class ExtraScripts:
    """A directory of scripts that this process takes instead of the real one; at first it holds the same."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.last = schema.scripts()[-1].name
        shutil.copytree(schema.directory(), place, ignore=shutil.ignore_patterns("__pycache__"))
        patch.setattr(schema, "directory", lambda: place)

    def add(self, name: str, up: str) -> Path:
        """A script `name` whose `up(migrator, db)` is the code `up`, said to leave the catalogue as it was."""
        before = schema.scripts()[-1].name
        for engine in ("sqlite", "postgres"):
            shutil.copy(schema.catalogue_path(engine, before), schema.catalogue_path(engine, name))
        path = self.place / f"{name}.py"
        head = "import os, sys, time\n\nimport peewee\n\nfrom kagedb import fields\n\n\ndef up(migrator, db):\n"
        path.write_text(head + indent(dedent(up).strip(), "    ") + "\n")
        return path

    def learn(self, *urls: str) -> None:
        """Make the catalogue that all the scripts give the known one, by new stores at the empty places `urls`."""
        for url in urls:
            _tool().write_catalogue(url)


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catalogue_tool", CATALOGUE_TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(url: str) -> None:
    """Put a project and its two sessions, "one" and "two", into a store of this version."""
    with kagedb.connect(url=url):
        project = Project.add("house", actor="operator:ana")
        for title in ("one", "two"):
            Session.start(project, title=title, actor="operator:ana")


def copies(settings: Settings) -> list[Path]:
    """The copies that were made before migrations, finished or not."""
    backups = Path(settings.backup_directory)
    return sorted(backups.glob("kaged-*"))


def sqlite_path(url: str) -> Path:
    return Path(unquote(url.removeprefix("sqlite://")))
