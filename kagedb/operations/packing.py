"""A set's data file compressed, and a whole set as one file: gzip and zstd by what is there, tar by Python."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import IO

from ..engines.places import make_private_file
from ..engines.syncing import Sending
from ..errors import InvalidValue, SettingsError, StorageCorrupt, StorageError, StorageFull
from ..settings import sync_directory

GZIP, ZSTD = "gzip", "zstd"
SUFFIXES = {GZIP: ".gz", ZSTD: ".zst"}

LOOK_SECONDS = 0.05
"""Between two looks at how far a program is ahead of the disk."""

_LEVELS = {GZIP: "-6", ZSTD: "-3"}
"""The programs' own defaults; of a 500 MB store they made 72 % in 16 s and 64 % in 2 s where it was measured."""


def require_program(compression: str) -> None:
    """Raises SettingsError where the program is not there; before anything is begun."""
    if compression and shutil.which(compression) is None:
        raise SettingsError(f"{compression} is not in PATH", f"install it, or leave --compress {compression} out")


def compress(path: Path, compression: str) -> Path:
    """Put a compressed file in the place of `path`; gives its name, which has a suffix more."""
    target = path.with_name(path.name + SUFFIXES[compression])
    make_private_file(target)
    with open(target, "r+b") as file, Sending(target) as sending:
        _run([compression, _LEVELS[compression], "-c", str(path)], file, sending)
    path.unlink()
    return target


def decompress(path: Path, compression: str, directory: Path) -> Path:
    """The data file as it was, in `directory`. Raises StorageCorrupt where it is damaged or ends too early."""
    require_program(compression)
    target = directory / path.name.removesuffix(SUFFIXES[compression])
    make_private_file(target)
    try:
        with open(target, "wb") as file:
            _run([compression, "-d", "-c", str(path)], file)
    except StorageError as error:
        if "No space left" in error.message:
            raise
        raise StorageCorrupt(
            f"{path} cannot be decompressed: {error.message}", "use another set: kaged backups"
        ) from error
    return target


def _run(command: list[str], output: IO[bytes], sending: Sending | None = None) -> None:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE)
    try:
        while True:
            try:
                _, said = child.communicate(timeout=LOOK_SECONDS if sending else None)
                break
            except subprocess.TimeoutExpired:
                if sending is not None:
                    sending.written(os.fstat(output.fileno()).st_size)
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        raise StorageError(f"{command[0]} ended with {child.returncode}: {lines[-1] if lines else 'it said nothing'}")


def pack(directory: Path, file: IO[bytes]) -> None:
    """A set as a tar file, its directory in it."""
    with tarfile.open(fileobj=file, mode="w|") as archive:
        archive.add(directory, arcname=directory.name)


def pack_file(directory: Path, target: Path) -> None:
    """A set as the tar file `target`, which is whole or as it was. Raises StorageError."""
    part = target.with_name(target.name + ".part")
    try:
        part.unlink(missing_ok=True)
        make_private_file(part)
        with open(part, "wb") as file:
            pack(directory, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, target)
        sync_directory(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{target} cannot be written: {error.strerror}", "name another place with --output") from error


def unpack(file: IO[bytes], place: Path) -> Path:
    """The directory of a set that came as one tar file, in the empty directory `place`.

    Raises StorageCorrupt where the file is cut off or damaged, InvalidValue where it is something else.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            archive.extractall(place, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise StorageCorrupt(f"the tar file is damaged or cut off: {error}", "use another one") from error
    found = [path for path in place.iterdir() if path.is_dir()]
    if len(found) != 1:
        raise InvalidValue("the file is not a backup set", "it is what kaged backup --output FILE writes")
    return found[0]
