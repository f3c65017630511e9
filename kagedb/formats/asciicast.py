"""asciicast, versions 2 and 3: the recordings that asciinema's players, servers and converters take and give.

docs.asciinema.org/manual/asciicast/ v2 and v3. Both are lines of JSON in UTF-8: a header, then `[time, code, data]`;
version 2 counts the seconds from the beginning, version 3 from the event before. What is not UTF-8 becomes U+FFFD: the
raw export keeps it.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidValue
from ..fields import TITLE_CHARACTERS
from ..models.segment import Event, Gap, Mark, Output, Resize

VERSIONS = (2, 3)
MEDIA_SUFFIX = ".cast"

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029]")
_GAP = "gap: {} bytes of output are missing"
_GAP_LABEL = re.compile(r"gap: ([0-9]{1,18}) bytes of output are missing")
_KEPT = ("o", "r", "m", "x")
_LONGEST_SECONDS = 2**31
"""Seconds of a recording; a larger number is a mistake."""


@dataclass(slots=True)
class Header:
    """What a recording says of itself. Empty or None where it says nothing; `exit_status` version 3 alone can say."""

    columns: int
    rows: int
    started_at: int | None = None
    """Unix milliseconds, of which the formats keep the seconds."""
    title: str = ""
    command: str = ""
    exit_status: int | None = None


@dataclass(slots=True)
class Cast:
    """A recording that is being read: `events` can be gone through once, and what they skipped is known afterwards."""

    header: Header
    events: Iterator[Event]
    skipped: dict[str, int] = field(default_factory=dict)
    """Event codes that are not kept (`i`, keys that were pressed, and unknown ones) and how many there were."""
    cut_off: bool = False
    """Whether the last line was incomplete, as a recorder that was killed leaves it; it is not among the events."""


def write(header: Header, events: Iterable[Event], version: int) -> Iterator[str]:
    """The lines of a recording in that version, each with its line end."""
    yield _dump(_header(header, version))
    last_ms = 0
    for at_ms, code, data in _texts(events):
        seconds = (at_ms - last_ms if version == 3 else at_ms) / 1000
        last_ms = at_ms
        yield _dump([seconds, code, data])
    if version == 3 and header.exit_status is not None:
        yield _dump([0.0, "x", str(header.exit_status)])


def _header(header: Header, version: int) -> dict[str, Any]:
    document: dict[str, Any] = {"version": version}
    if version == 3:
        document["term"] = {"cols": header.columns, "rows": header.rows}
    else:
        document.update(width=header.columns, height=header.rows)
    if header.started_at is not None:
        document["timestamp"] = header.started_at // 1000
    if header.command:
        document["command"] = header.command
    if header.title:
        document["title"] = header.title
    return document


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # JSON lets these through; a terminal that shows the file would obey some of them.
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _texts(events: Iterable[Event]) -> Iterator[tuple[int, str, str]]:
    """Each event as time, code and text. A character whose bytes came in two events belongs to the later one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at_ms = 0
    for event in events:
        at_ms = event.at_ms
        if isinstance(event, Output):
            if text := decoder.decode(event.data):
                yield at_ms, "o", text
        elif isinstance(event, Resize):
            yield at_ms, "r", f"{event.columns}x{event.rows}"
        elif isinstance(event, Mark):
            yield at_ms, "m", event.label
        else:
            if text := decoder.decode(b"", final=True):
                yield at_ms, "o", text
            yield at_ms, "m", _GAP.format(event.lost_bytes)
    if text := decoder.decode(b"", final=True):
        yield at_ms, "o", text


def read(lines: Iterable[bytes], name: str) -> Cast:
    """A recording of either version out of its lines, which are read as its events are; `name` is what errors call it.

    Raises InvalidValue where it is not one, here or later, with the line.
    """
    numbered = enumerate(lines, 1)
    _, first = next(numbered, (1, b""))
    document = _parse(first, name, 1)
    if not isinstance(document, dict) or "version" not in document:
        raise _refuse(name, 1, "is not the header of an asciicast")
    version = document["version"]
    if version not in VERSIONS:
        raise InvalidValue(
            f"{name} is an asciicast of version {version!r:.20}", "versions 2 and 3 are read: asciinema convert"
        )
    terminal = _member(document, "term", dict, name) if version == 3 else document
    header = Header(
        columns=_side(terminal, "cols" if version == 3 else "width", name),
        rows=_side(terminal, "rows" if version == 3 else "height", name),
        started_at=_started_at(document, name),
        title=_line(_member(document, "title", str, name)),
        command=_line(_member(document, "command", str, name)),
    )
    cast = Cast(header, iter(()))
    cast.events = _events(cast, numbered, version, name)
    return cast


def _events(cast: Cast, numbered: Iterator[tuple[int, bytes]], version: int, name: str) -> Iterator[Event]:
    clock = 0.0
    # Whether a line is the last one is known once there is no other.
    following = itertools.chain(numbered, [(0, b"")])
    number, line = next(following)
    while number:
        next_number, next_line = next(following)
        if line.strip() and not line.startswith(b"#"):
            try:
                event = _parse(line, name, number)
            except InvalidValue:
                if next_number or line.endswith(b"\n"):
                    raise
                cast.cut_off = True
                return
            seconds, code, data = _checked(event, name, number)
            clock = clock + seconds if version == 3 else max(clock, seconds)
            if not clock < _LONGEST_SECONDS:
                raise _refuse(name, number, "is at an impossible time")
            found = _event(round(clock * 1000), code, data, name, number)
            if found is not None:
                yield found
            elif code == "x":
                cast.header.exit_status = _exit_status(data)
            else:
                cast.skipped[code] = cast.skipped.get(code, 0) + 1
        number, line = next_number, next_line


def _event(at_ms: int, code: str, data: str, name: str, number: int) -> Event | None:
    if code == "o":
        return Output(at_ms, data.encode("utf-8", "replace"))
    if code == "r":
        size = _SIZE.fullmatch(data)
        if size is None or max(map(int, size.groups())) >= 65_536:
            raise _refuse(name, number, "has no size like 80x24")
        return Resize(at_ms, int(size[1]), int(size[2]))
    if code == "m":
        gap = _GAP_LABEL.fullmatch(data)
        return Gap(at_ms, int(gap[1])) if gap else Mark(at_ms, _label(data))
    return None


def _parse(line: bytes, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise _refuse(name, number, "is not JSON in UTF-8") from None


def _checked(event: Any, name: str, number: int) -> tuple[float, str, str]:
    if not isinstance(event, list) or len(event) != 3:
        raise _refuse(name, number, "is not an event: [time, code, data]")
    seconds, code, data = event
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < _LONGEST_SECONDS:
        raise _refuse(name, number, "has no time in seconds")
    if not isinstance(code, str):
        raise _refuse(name, number, "has no event code")
    if not isinstance(data, str):
        if code in _KEPT:
            raise _refuse(name, number, "has data that is not text")
        data = ""  # of a code that is skipped
    return float(seconds), code, data


def _member(document: dict[str, Any], key: str, kind: type, name: str) -> Any:
    """What the header says under `key`; empty where that is missing or null."""
    value = document.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise _refuse(name, 1, f"has no {key} of the right kind")
    return value


def _side(where: dict[str, Any], key: str, name: str) -> int:
    value = where.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65_536:
        raise _refuse(name, 1, f"has no {key} from 1 to 65535")
    return value


def _started_at(document: dict[str, Any], name: str) -> int | None:
    value = document.get("timestamp")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise _refuse(name, 1, "has no timestamp in seconds")
    return int(value * 1000)


def _exit_status(data: str) -> int | None:
    return int(data) if re.fullmatch(r"-?[0-9]{1,9}", data) else None


def _label(text: str) -> str:
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()[:TITLE_CHARACTERS]


def _line(text: str) -> str:
    """Text of a file that anybody may have written, as a title or label."""
    return "".join(character if character.isprintable() else " " for character in text)[:TITLE_CHARACTERS].strip()


def _refuse(name: str, number: int, why: str) -> InvalidValue:
    return InvalidValue(f"line {number} of {name} {why}", "give a recording of asciinema, or an export of kaged")
