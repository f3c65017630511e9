"""Whether a backup set is good: its checksums, and then its contents read back from its own bytes and compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..engines import open_reader
from ..engines.archive import Contents, RowHashes
from ..errors import EXIT_DAMAGED, StorageCorrupt, StorageError
from ..settings import Settings
from . import backup_set, packing
from .backup_set import BackupSet, Manifest
from .digests import Examined, Progress, differences, examine, tables
from .inspecting import Inspecting
from .scratch import scratch


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying a set found; it is good where `wrong` is empty."""

    name: str
    sequence: int
    rows: int
    bytes: int
    wrong: list[str]


def verify(settings: Settings, one: BackupSet, progress: Progress | None = None) -> Verdict:
    """Check a set, and note the outcome in it where its directory can be written.

    Whichever engine it is of. Raises SettingsError where a program is missing, StorageError where it cannot be told.
    """
    try:
        manifest = one.manifest
        wrong = wrong_sums(one.directory, manifest)
        if not wrong:
            wrong = wrong_contents(settings, one.directory, manifest, progress)
        verdict = Verdict(one.name, one.sequence, manifest.rows, manifest.bytes, wrong)
    except StorageError as error:
        if error.exit_status != EXIT_DAMAGED:
            raise
        verdict = Verdict(one.name, one.sequence, 0, 0, [error.message])
    if os.access(one.directory, os.W_OK):
        if verdict.wrong:
            backup_set.mark_suspect(one.directory, verdict.wrong)
        else:
            backup_set.mark_verified(one.directory)
    return verdict


def wrong_sums(directory: Path, manifest: Manifest) -> list[str]:
    sums = backup_set.read_sums(directory)
    if sums.keys() != {manifest.file, backup_set.MANIFEST} or "/" in manifest.file:
        return [f"{backup_set.SUMS} does not name the files of the set"]
    wrong = []
    for file, known in sums.items():
        try:
            found = backup_set.file_sum(directory / file)
        except FileNotFoundError:
            wrong.append(f"{file} is missing")
            continue
        except OSError as error:
            wrong.append(f"{file} cannot be read: {error.strerror}")
            continue
        if found != known or (file == manifest.file and found != manifest.sha256):
            wrong.append(f"{file} is not what its checksum says")
    return wrong


def wrong_contents(
    settings: Settings, directory: Path, manifest: Manifest, progress: Progress | None = None
) -> list[str]:
    inspecting = Inspecting(len(manifest.facts), progress)
    try:
        with read_back(settings, directory, manifest, inspecting) as state:
            found = examine(state, progress) if isinstance(state, Contents) else inspecting.examined(state)
    except StorageCorrupt as error:
        return [error.message]
    return found.wrong or compare(manifest, found)


def compare(manifest: Manifest, found: Examined) -> list[str]:
    wrong = differences(manifest.facts, found.facts)
    if manifest.head != found.head:
        wrong.append("the newest audit event is not the one of the manifest")
    return wrong


@contextmanager
def data_file(directory: Path, manifest: Manifest, place: Path) -> Iterator[Path]:
    """The data file of a set as the engine wrote it."""
    path = directory / manifest.file
    if not manifest.compression:
        yield path
        return
    made = packing.decompress(path, manifest.compression, place)
    try:
        yield made
    finally:
        made.unlink()


@contextmanager
def read_back(
    settings: Settings, directory: Path, manifest: Manifest, inspecting: Inspecting
) -> Iterator[Contents | RowHashes]:
    """What is in a set, from its own bytes. Rows that are in no order have been inspected then."""
    with scratch(directory.parent) as place, data_file(directory, manifest, place) as path:
        reader = open_reader(manifest.engine, settings, inspecting.looks)
        with reader.reading(path, manifest.form, tables(manifest.facts), place) as state:
            yield state
