"""The key that seals of the audit log are authenticated with, where the operator asked for one.

The key moves forward by hashing at each seal and only the current one is kept, in `<home>/audit.key`: whoever takes
the files later cannot make MACs for earlier seals. The operator keeps the first key elsewhere; every later one follows
from it. (The scheme of systemd's forward secure sealing, without its windows of time.)
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from .errors import InvalidValue, StateError, StorageError
from .settings import make_directory, sync_directory

KEY_BYTES = 32
_STEP = b"kaged.audit.key.1"
_PRINTED = re.compile(r"kaged-audit-key-1:(\d{1,18}):([0-9a-f]{64})")


class SealKey(NamedTuple):
    """The key of the seal number `n`. Its `repr` does not show it."""

    n: int
    secret: bytes

    def __repr__(self) -> str:
        return f"<SealKey for seal {self.n}>"

    def at(self, n: int) -> SealKey:
        """The key of a seal at or after this one. Raises ValueError for an earlier one: there is no way back."""
        if n < self.n:
            raise ValueError(f"the key of seal {n} cannot be had from that of seal {self.n}")
        secret = self.secret
        for _ in range(n - self.n):
            secret = hashlib.sha256(_STEP + secret).digest()
        return SealKey(n, secret)

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA-256 of a seal's parts."""
        return hmac.digest(self.secret, message, "sha256")

    def printed(self) -> str:
        """The form in which the operator keeps the first key: with the number of the seal it begins at."""
        return f"kaged-audit-key-1:{self.n}:{self.secret.hex()}"


def parse_keys(text: str, origin: str) -> list[SealKey]:
    """The first keys in a file, one a line, in the order of their seals. Raises InvalidValue."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found = _PRINTED.fullmatch(line.strip())
            if found is None:
                raise InvalidValue(
                    f"line {number} of {origin} is not an audit key", "it is what kaged audit key --new printed"
                )
            keys.append(SealKey(int(found[1]), bytes.fromhex(found[2])))
    if not keys:
        raise InvalidValue(f"{origin} holds no audit key", "put in it what kaged audit key --new printed")
    return sorted(keys, key=lambda key: key.n)


class KeyFile:
    """The file with the current key, 0600, replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> SealKey | None:
        """The current key; None where the operator never asked for one. Raises StorageError where it is unreadable."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(
                f"the audit key {self.path} cannot be read: {error}", "mend its owner and mode"
            ) from None
        try:
            found = json.loads(text)
            key = SealKey(int(found["seal"]), bytes.fromhex(found["key"]))
        except (ValueError, KeyError, TypeError):
            key = SealKey(0, b"")
        if len(key.secret) != KEY_BYTES or key.n < 1:
            # From None: the text of a decoding error quotes the file.
            raise StorageError(
                f"the audit key {self.path} is damaged", "move it away and make a new one: kaged audit key --new"
            ) from None
        return key

    def make(self, n: int, *, replace: bool) -> SealKey:
        """A new key that begins at the seal `n`. Raises StateError where there is one, unless `replace`."""
        key = SealKey(n, os.urandom(KEY_BYTES))
        make_directory(self.path.parent)
        with self._locked():
            self.refuse_replacing(replace)
            self._write(key)
        return key

    def refuse_replacing(self, replace: bool) -> None:
        """Raises StateError where there is a key, unless `replace`."""
        if self.path.exists() and not replace:
            raise StateError(
                f"there is an audit key already: {self.path}",
                "to begin a new one, add --replace; keep the old first key",
            )

    def advance(self, n: int) -> None:
        """Forget every key before that of the seal `n`."""
        with self._locked():
            key = self.load()
            if key is not None and key.n < n:
                self._write(key.at(n))

    def _write(self, key: SealKey) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"seal": key.n, "key": key.secret.hex()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, self.path)
        sync_directory(self.path.parent)

    def _locked(self) -> _Locked:
        return _Locked(self.path.parent)


class _Locked:
    """One process at a time changes the key: two that seal must not put an older one back."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
