"""What an operator's query is to an engine: a text of SQL that may only read, its parameters, and its answer.

That it only reads is the engine's doing (sqlite_query.py, postgres_query.py), never a judgement of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidValue, ReadOnlyStorage
from .statements import QUOTED

_PLACE = re.compile(rf"{QUOTED.pattern}|(?<![:\w]):(?P<name>[A-Za-z_]\w*)|\?", QUOTED.flags)


@dataclass(frozen=True, slots=True)
class Answer:
    """The columns of a query by name, and its rows, which can be read once; values as the driver gives them."""

    columns: tuple[str, ...]
    rows: Iterator[Sequence[Any]]


def fill_in(sql: str, named: Mapping[str, str], positional: Sequence[str], literal: Callable[[str], str]) -> str:
    """`sql` with `:name` and `?` replaced by `literal` of their values, outside quotes and comments.

    Raises InvalidValue where a value is missing or left over, and for what cannot be text on either engine.
    """
    left = list(positional)
    unused = set(named)

    def value(found: re.Match[str]) -> str:
        if found[0] == "?":
            if not left:
                raise missing("?")
            return literal(left.pop(0))
        name = found["name"]
        if name is None:
            return found[0]
        if name not in named:
            raise missing(f":{name}")
        unused.discard(name)
        return literal(named[name])

    filled = _PLACE.sub(value, sql)
    if left or unused:
        raise InvalidValue(
            f"the query has no place for the value of {', '.join(sorted(unused)) or left[0]!r}",
            "write :NAME where --param NAME=VALUE belongs, and ? for each value after the query",
        )
    try:
        filled.encode()
    except UnicodeEncodeError:
        raise InvalidValue("the query is not UTF-8", "check how it was typed or read") from None
    if "\0" in filled:
        raise InvalidValue("the query has a NUL in it", "take it out")
    return filled


def missing(place: str) -> InvalidValue:
    return InvalidValue(
        f"the query has a {place} for which there is no value",
        "give --param NAME=VALUE for each :NAME, and a value after the query for each ?",
    )


def refused(why: str) -> ReadOnlyStorage:
    return ReadOnlyStorage(f"a query can only read: {why}", "what changes the store is a command: kaged --help")


def wrong(why: str) -> InvalidValue:
    return InvalidValue(f"the query cannot be answered: {why}", "tables and columns are shown by: kaged query --schema")
