"""ULIDs and milliseconds that never run backwards.

One clock and one ULID sequence a process. A host without a clock chip may wake up in the past: what is made here
stays above everything this process has made before and above the floor it was given (the newest row of the store).
"""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

ULID_PATTERN = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
"""The canonical form of the ULID specification: 26 characters of Crockford's base 32, upper case, at most 128 bits."""

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS = 80
# The top bit of a fresh random part is left clear, so that counting up within a millisecond has room for 2**79 more.
_FRESH_BITS = _RANDOM_BITS - 1

_lock = threading.Lock()
_last_ms = 0
_ulid_ms = -1
_ulid_random = 0
_ulid_class: Any = None


def now_ms() -> int:
    """The time as integer Unix milliseconds (UTC), never less than an answer before it in this process."""
    global _last_ms
    with _lock:
        _last_ms = max(time.time_ns() // 1_000_000, _last_ms)
        return _last_ms


def new_ulid() -> str:
    """A new ULID, 26 characters, greater than every one made before it in this process."""
    global _last_ms, _ulid_ms, _ulid_random, _ulid_class
    with _lock:
        if _ulid_class is None:
            from ulid import ULID as _ulid_class  # 50 ms and 8 MiB: paid by whoever makes an id, not by every import

        _last_ms = max(time.time_ns() // 1_000_000, _last_ms)
        if _ulid_ms == _last_ms and _ulid_random + 1 < 1 << _RANDOM_BITS:
            _ulid_random += 1
        else:
            if _ulid_ms == _last_ms:
                _last_ms += 1
            _ulid_ms = _last_ms
            _ulid_random = int.from_bytes(os.urandom(10), "big") & ((1 << _FRESH_BITS) - 1)
        return str(_ulid_class(_ulid_ms.to_bytes(6, "big") + _ulid_random.to_bytes(10, "big")))


def raise_floor(ms: int) -> None:
    """Make every later time and ULID of this process at least `ms` (Unix milliseconds)."""
    global _last_ms
    with _lock:
        _last_ms = max(_last_ms, ms)


def clock_is_behind() -> bool:
    """Whether the host's clock stands before what was made or floored here: deleting by age must then refuse."""
    with _lock:
        return time.time_ns() // 1_000_000 < _last_ms


def is_ulid(text: object) -> bool:
    """Whether `text` is a ULID in canonical form."""
    return isinstance(text, str) and ULID_PATTERN.fullmatch(text) is not None


def ulid_ms(ulid: str) -> int:
    """The time in a ULID, in Unix milliseconds."""
    value = 0
    for character in ulid[:10]:
        value = value << 5 | _ALPHABET.index(character)
    return value


def _forget_sequence_after_fork() -> None:
    # Parent and child would count up from the same random part; and another thread may have held the lock.
    global _lock, _ulid_ms
    _lock = threading.Lock()
    _ulid_ms = -1


os.register_at_fork(after_in_child=_forget_sequence_after_fork)
