"""A backup set: a directory `kaged-<sequence>-<UTC stamp>` with a data file, `manifest.json` and `SHA256SUMS`.

What a set is called, what is in its manifest, which sets there are and how each of them stands. How one is made is in
backup.py, how one is verified in verifying.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .. import schema
from ..engines.engine import Engine
from ..engines.locks import LockFile
from ..errors import InvalidValue, NotFound, StorageBusy, StorageCorrupt, StorageError, StorageForbidden
from ..identity import now_ms
from ..settings import sync_directory
from . import digests
from .digests import Facts

FORMAT = 1

UNFINISHED = ".part"
"""Ends the name of a set that is being made, or whose making was cut off."""

REMOVED = ".removed"
"""Ends the name of a set that is being removed, or whose removal was cut off."""

MANIFEST, SUMS, VERIFIED, SUSPECT = "manifest.json", "SHA256SUMS", "verified.json", "suspect.json"

READ_BYTES = 1 << 17
"""Read and hashed at a time: the hashing runs beside other threads from 2 KiB on, and memory is short."""

UNVERIFIED_STATE, VERIFIED_STATE, SUSPECT_STATE = "unverified", "verified", "suspect"

_NAME = re.compile(r"kaged-(\d{6,12})-(\d{8}T\d{6}Z)")
_LOCK = ".lock"
_LOCK_BYTE = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a set says of itself; all of it from the one moment that was copied. Times in Unix milliseconds."""

    sequence: int
    created_at: int
    engine: str
    library: str
    kagedb: str
    form: str
    compression: str
    """"" or the name of the program that reads it: gzip, zstd."""
    file: str
    bytes: int
    sha256: str
    store: str
    """Which store it is of, wherever that is: two sets of one store have the same."""
    place: str
    schema: str
    before: str
    """The migration before which it was made; "" for an ordinary one."""
    newest_at: int
    """When the newest row of the store was made."""
    head: tuple[int, str] | None
    facts: dict[str, Facts]

    @property
    def rows(self) -> int:
        return sum(facts.rows for facts in self.facts.values())

    def text(self) -> str:
        document = {"format": FORMAT, **{name: getattr(self, name) for name in self.__slots__}}
        document["facts"] = digests.plain(self.facts)
        document["head"] = list(self.head) if self.head else None
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises StorageCorrupt where it is none, StorageError where it is one of a newer kaged."""
        try:
            document = json.loads(path.read_bytes())
            if document.pop("format") != FORMAT:
                raise StorageError(f"{path} is of a newer kaged", "install the kagedb that made it, or a newer one")
            document["facts"] = digests.from_plain(document["facts"])
            document["head"] = (int(document["head"][0]), str(document["head"][1])) if document["head"] else None
            return cls(**document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageCorrupt(f"{path} is missing or damaged", "use another set: kaged backups") from error


@dataclass(frozen=True, slots=True)
class BackupSet:
    """A set that is there; `directory` has its name."""

    directory: Path
    sequence: int

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def manifest(self) -> Manifest:
        """Raises StorageCorrupt."""
        return Manifest.read(self.directory / MANIFEST)

    @property
    def state(self) -> str:
        if (self.directory / SUSPECT).exists():
            return SUSPECT_STATE
        return VERIFIED_STATE if (self.directory / VERIFIED).exists() else UNVERIFIED_STATE

    @property
    def verified_at(self) -> int | None:
        try:
            return int(json.loads((self.directory / VERIFIED).read_bytes())["at"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def wrong(self) -> list[str]:
        """Why it is suspect."""
        try:
            return [str(line) for line in json.loads((self.directory / SUSPECT).read_bytes())["wrong"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `kaged backups`; what the manifest says is None where it cannot be read."""

    sequence: int
    name: str
    state: str
    created_at: int | None
    verified_at: int | None
    bytes: int | None
    rows: int | None
    engine: str | None
    form: str | None
    schema: str | None
    before: str | None
    wrong: list[str]


def name_of(sequence: int, at_ms: int) -> str:
    return f"kaged-{sequence:06}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(at_ms // 1000))}"


def sets_in(directory: Path) -> list[BackupSet]:
    """The complete sets, in the order in which they were made, which is that of their sequence and not of the clock."""
    found = []
    for path in _entries(directory):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(BackupSet(path, int(match[1])))
    return sorted(found, key=lambda one: (one.sequence, one.name))


def unfinished_in(directory: Path) -> list[Path]:
    return _ending(directory, UNFINISHED)


def removed_in(directory: Path) -> list[Path]:
    return _ending(directory, REMOVED)


def _ending(directory: Path, suffix: str) -> list[Path]:
    return [
        path
        for path in _entries(directory)
        if path.name.endswith(suffix) and _NAME.fullmatch(path.name.removesuffix(suffix))
    ]


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageForbidden(
            f"{directory} cannot be read: {error.strerror}", "act as the user who owns the store, or mend its mode"
        ) from error


def next_sequence(directory: Path) -> int:
    numbers = [int(match[1]) for path in _entries(directory) if (match := _NAME.match(path.name))]
    return max(numbers, default=0) + 1


def listed(one: BackupSet) -> Listed:
    try:
        manifest = one.manifest
    except StorageError as error:
        wrong = [*one.wrong, error.message]
        return Listed(one.sequence, one.name, SUSPECT_STATE, None, None, None, None, None, None, None, None, wrong)
    return Listed(
        one.sequence,
        one.name,
        one.state,
        manifest.created_at,
        one.verified_at,
        manifest.bytes,
        manifest.rows,
        manifest.engine,
        manifest.form,
        manifest.schema,
        manifest.before or None,
        one.wrong,
    )


def named(directory: Path, text: str) -> BackupSet:
    """The set that an operator means: a path, a name in `directory`, or a sequence number. Raises NotFound."""
    if "/" in text:
        path = Path(os.path.abspath(text))
        match = _NAME.fullmatch(path.name)
        if path.is_dir():
            return BackupSet(path, int(match[1]) if match else BackupSet(path, 0).manifest.sequence)
        raise NotFound(f"there is no backup set {text}", "see what there is with: kaged backups")
    found = [one for one in sets_in(directory) if one.name == text or str(one.sequence) == text.lstrip("0")]
    if len(found) > 1:
        raise InvalidValue(f"{text} is the number of {len(found)} sets in {directory}", "give the whole name")
    if not found:
        raise NotFound(f"there is no backup set {text} in {directory}", "see what there is with: kaged backups")
    return found[0]


def newest_verified(directory: Path, engine: str, store: str = "") -> BackupSet | None:
    """The newest good set of this engine, and of this store where that is known. Raises InvalidValue where it is not,
    and there are sets of several."""
    good = []
    for one in sets_in(directory):
        if one.state != VERIFIED_STATE:
            continue
        try:
            manifest = one.manifest
        except StorageError:
            continue
        if manifest.engine == engine and store in ("", manifest.store):
            good.append((one, manifest.store))
    if len({of for _, of in good}) > 1:
        raise InvalidValue(f"{directory} has sets of several stores", "name the one: kaged backups")
    return good[-1][0] if good else None


def store_id(engine: Engine) -> str:
    """The same for a store wherever it is, and another for every other: when its first migration was applied."""
    history = schema.look(engine).applied
    return id_of(history[0].name, history[0].applied_at) if history else ""


def id_of(name: str, applied_at: int) -> str:
    """The same from the first line of a history."""
    return hashlib.sha256(f"{name} {applied_at}".encode()).hexdigest()[:16]


# Files.


def file_sum(path: Path) -> str:
    """SHA-256 in hex, read from the disk as far as that can be had. Not for a database that is open.

    Rests after each piece for as long as that took, and lets the kernel read nothing beyond it: a disk that is asked
    for megabytes ahead keeps the daemon's commits waiting until they are there.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_RANDOM):
            os.posix_fadvise(file.fileno(), 0, 0, advice)
        began = time.monotonic()
        while data := file.read(READ_BYTES):
            digest.update(data)
            time.sleep(time.monotonic() - began)
            began = time.monotonic()
    return digest.hexdigest()


def write_synced(path: Path, text: str) -> None:
    """A new private file, on disk when this returns; in place of an old one, whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with open(draft, "x", opener=_private, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, path)
    sync_directory(path.parent)


def write_sums(directory: Path, data_sum: str, file: str) -> None:
    lines = f"{data_sum}  {file}\n{file_sum(directory / MANIFEST)}  {MANIFEST}\n"
    write_synced(directory / SUMS, lines)


def read_sums(directory: Path) -> dict[str, str]:
    """File to SHA-256, as `sha256sum` writes them. Raises StorageCorrupt."""
    try:
        lines = (directory / SUMS).read_text().splitlines()
        return {line[66:]: line[:64] for line in lines if line}
    except (OSError, ValueError) as error:
        raise StorageCorrupt(f"{directory / SUMS} is missing or damaged", "use another set: kaged backups") from error


def mark_verified(directory: Path) -> None:
    write_synced(directory / VERIFIED, json.dumps({"at": now_ms()}) + "\n")
    if (directory / SUSPECT).exists():
        (directory / SUSPECT).unlink()
        sync_directory(directory)


def mark_suspect(directory: Path, wrong: list[str]) -> None:
    write_synced(directory / SUSPECT, json.dumps({"at": now_ms(), "wrong": wrong}) + "\n")


@contextmanager
def lock(directory: Path, patience_seconds: float = 0.0) -> Iterator[None]:
    """One program at a time that changes what is in a directory of sets. Raises StorageBusy."""
    try:
        file = LockFile.open(directory / _LOCK, create=True)
    except OSError as error:
        kind = StorageForbidden if isinstance(error, PermissionError) else StorageError
        raise kind(
            f"nothing can be written in {directory}: {error.strerror}", "mend that, or name another: backup.directory"
        ) from error
    assert file is not None
    try:
        if not file.lock(_LOCK_BYTE, patience_seconds):
            holder = file.holder(_LOCK_BYTE)
            who = f"process {holder}" if holder else "another process"
            raise StorageBusy(f"{who} is at work on the backups in {directory}", "try again when it is done")
        yield
    finally:
        file.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
