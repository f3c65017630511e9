"""Directories for what is thrown away again: sets that are unpacked, read back, or on their way into one file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"\.kaged-scratch-(\d+)-.*")


@contextmanager
def scratch(near: Path) -> Iterator[Path]:
    """An empty private directory: in `near`, whose disk has room for a store, or where temporary files go."""
    writable = near.is_dir() and os.access(near, os.W_OK | os.X_OK)
    place = Path(tempfile.mkdtemp(prefix=f".kaged-scratch-{os.getpid()}-", dir=near if writable else None))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def reap(directory: Path) -> None:
    """Remove what killed processes have left in `directory`."""
    for path in directory.iterdir():
        left_by = _NAME.fullmatch(path.name)
        if left_by and not os.path.exists(f"/proc/{left_by[1]}"):
            shutil.rmtree(path, ignore_errors=True)
