"""Migration scripts that do not exist yet, after a copy of the real ones: what the next versions will bring.

`PREAMBLE` makes a program (programs.py) use them too; its first argument is the directory.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType

import pytest

from kagedb import schema

PREAMBLE = """
import sys
from pathlib import Path
from kagedb import schema
place = Path(sys.argv[1])
schema.directory = lambda: place
"""

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
