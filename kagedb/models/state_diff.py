"""What differs between two states. Knows of no tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ADDED, REMOVED, CHANGED = "added", "removed", "changed"


@dataclass(frozen=True, slots=True)
class Difference:
    """One change. `path` is a JSON Pointer (RFC 6901) into the state, or one into the byte strings after "binaries:".

    `change` is "added", "removed" or "changed"; `before` and `after` are None where there is nothing.
    """

    path: str
    change: str
    before: Any = None
    after: Any = None


def differences(before: Any, after: Any, path: str = "") -> Iterator[Difference]:
    """The changes from one value to the other, in the order of the values.

    1, 1.0 and true are three values, and the order of keys is no difference. Of a list, what is alike at its beginning
    and end is set aside; what is left is compared place by place.
    """
    if type(before) is dict and type(after) is dict:
        for key, value in before.items():
            if key in after:
                yield from differences(value, after[key], _below(path, key))
            else:
                yield Difference(_below(path, key), REMOVED, before=value)
        for key, value in after.items():
            if key not in before:
                yield Difference(_below(path, key), ADDED, after=value)
    elif type(before) is list and type(after) is list:
        yield from _list_differences(before, after, path)
    elif _text(before) != _text(after):
        yield Difference(path, CHANGED, before, after)


def _list_differences(before: list[Any], after: list[Any], path: str) -> Iterator[Difference]:
    old, new = [_text(item) for item in before], [_text(item) for item in after]
    shorter = min(len(old), len(new))
    start = 0
    while start < shorter and old[start] == new[start]:
        start += 1
    end = 0
    while end < shorter - start and old[-1 - end] == new[-1 - end]:
        end += 1
    paired = shorter - start - end
    for at in range(start, start + paired):
        yield from differences(before[at], after[at], _below(path, at))
    for at in range(start + paired, len(before) - end):
        yield Difference(_below(path, at), REMOVED, before=before[at])
    for at in range(start + paired, len(after) - end):
        yield Difference(_below(path, at), ADDED, after=after[at])


def _below(path: str, key: str | int) -> str:
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _text(value: Any) -> str | bytes:
    return value if isinstance(value, bytes) else json.dumps(value, sort_keys=True)
