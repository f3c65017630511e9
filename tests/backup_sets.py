"""Backup sets as the tests of backups see them: made by the command, and where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

from commands import answer_json, in_process
from kagedb.operations import backup_set
from kagedb.settings import load


def directory() -> Path:
    return Path(load(environ=dict(os.environ)).backup_directory)


def sets() -> list[backup_set.BackupSet]:
    return backup_set.sets_in(directory())


def back_up(url: str, *options: str) -> backup_set.BackupSet:
    made = answer_json(url, "backup", *options)
    return backup_set.BackupSet(Path(made["directory"]), made["sequence"])


def verdict(url: str, one: backup_set.BackupSet | str) -> list[str]:
    name = one if isinstance(one, str) else str(one.directory)
    result = in_process("--url", url, "verify", name, "--json")
    (found,) = json.loads(result.stdout)
    assert result.exit_code == (3 if found["wrong"] else 0)
    wrong: list[str] = found["wrong"]
    return wrong


def files(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}
