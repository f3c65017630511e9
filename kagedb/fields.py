"""Peewee fields with one meaning and the right column type on each engine.

What one engine would take and the other refuse (NUL, lone surrogates, NaN, integers beyond 64 bits) is refused here,
before any SQL, alike on both. The engines map the `field_type` names below to column types (`COLUMN_TYPES`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import peewee

from .errors import InvalidValue, LimitExceeded
from .identity import is_ulid

INTEGER_MIN = -(2**63)
INTEGER_MAX = 2**63 - 1

NAME_CHARACTERS = 200
"""Longest name of a project, prompt, label, plugin, agent or attachment: 4 bytes a character still fit PostgreSQL's
2,704-byte index entries, beside a key."""
TITLE_CHARACTERS = 1_000
"""Longest one-line text: titles, messages, reasons, errors are cut by nobody, so they are bounded."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What would break a line, or be taken as a command by the terminal that shows it."""
_OUTSIDE_PATHS = re.compile('["\\\\\x00-\x1f]')
"""What JSON text writes as an escape, and so what SQLite's paths, which compare with the text, cannot say."""

# json.dumps would make a new encoder for every value, json.loads look for white space that no text made here has.
_to_json = {
    sort_keys: json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys).encode
    for sort_keys in (False, True)
}
_scan_json = json.JSONDecoder().raw_decode


def _from_json(text: str) -> Any:
    try:
        value, end = _scan_json(text)
    except ValueError:
        return json.loads(text)
    return value if end == len(text) else json.loads(text)


class Limits(NamedTuple):
    """How large a stored value may be; the settings `limits.*`."""

    json_bytes: int = 1_048_576
    json_depth: int = 64
    text_bytes: int = 1_048_576
    state_bytes: int = 16_777_216
    attachment_bytes: int = 67_108_864
    plugin_bytes: int = 4_194_304
    plugin_keys: int = 10_000

    @classmethod
    def of(cls, settings: Any) -> Limits:
        """The limits that the settings give."""
        return cls(*(getattr(settings, name) for name in cls._fields))


class _Checked(peewee.Field):  # type: ignore[misc]
    """A field that checks what is written or compared and says which column refused it."""

    stored: type | None = None
    """The type in which a driver gives what `python_value` has to decode; None where there is nothing to decode."""

    def db_value(self, value: Any) -> Any:
        return value if value is None else self.check(value)

    def python_value(self, value: Any) -> Any:
        return value

    def check(self, value: Any) -> Any:
        raise NotImplementedError

    def refuse(self, why: str, hint: str = "") -> InvalidValue:
        return InvalidValue(f"{self.label} {why}", hint)

    @property
    def label(self) -> str:
        model = getattr(self, "model", None)
        return f"{model._meta.table_name}.{self.name}" if model is not None else "the value"

    @property
    def limits(self) -> Limits:
        database = self.model._meta.database
        limits = getattr(database, "limits", None)
        return limits if limits is not None else Limits()


class UlidField(_Checked):
    """A ULID in canonical form."""

    field_type = "ULID"

    def check(self, value: Any) -> str:
        if not is_ulid(value):
            raise self.refuse(
                f"takes a ULID, not {_shown(value)}", "a ULID is 26 characters, like 01JAB3C4D5E6F7G8H9JKMNPQRS"
            )
        return str(value)


class IntegerField(_Checked):
    """A signed 64-bit integer."""

    field_type = "INTEGER64"

    def check(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(f"takes an integer, not {_shown(value)}")
        if not INTEGER_MIN <= value <= INTEGER_MAX:
            raise self.refuse("takes an integer of at most 64 bits", "keep larger numbers as text")
        return value


class MillisField(IntegerField):
    """Unix milliseconds, UTC."""


class TextField(_Checked):
    """Text that both engines take. `max_length` is in characters; `one_line` refuses control characters too."""

    field_type = "PLAIN_TEXT"

    def __init__(self, *args: Any, max_length: int = 0, one_line: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_length = max_length
        self.one_line = one_line

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse(f"takes text, not {_shown(value)}")
        if not value.isascii() or "\x00" in value:  # to make the label costs more than to look
            check_text(value, self.label)
        if self.one_line and _CONTROL.search(value):
            raise self.refuse("takes one line without control characters")
        if self.max_length:
            if len(value) > self.max_length:
                raise LimitExceeded(
                    f"{self.label} has {len(value):,} characters; the limit is {self.max_length:,}", "shorten it"
                )
        elif len(value) * 4 > self.limits.text_bytes and len(value.encode()) > self.limits.text_bytes:
            raise LimitExceeded(
                f"{self.label} has {len(value.encode()):,} bytes; the limit is {self.limits.text_bytes:,}",
                "raise limits.text_bytes in the config, or keep it outside the store",
            )
        return value

    # Peewee's TextField has `+` for concatenation; comparison operators are enough here.


class NameField(TextField):
    """A name that people type: one line, 1 to 200 characters, no white space around it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, max_length=NAME_CHARACTERS, one_line=True, **kwargs)

    def check(self, value: Any) -> str:
        text = super().check(value)
        if not text or text != text.strip():
            raise self.refuse("takes a name that is not empty and has no white space around it")
        return text


class JSONField(_Checked):
    """A JSON value, stored as compact text exactly as it was made here; keys keep their order.

    Values are checked before they are written (`encode_json`). Python's None is SQL's NULL where the column takes
    that, else JSON's null. A comparison other than with None raises InvalidValue: PostgreSQL has none for JSON.
    """

    field_type = "JSON_TEXT"
    stored = str

    def db_value(self, value: Any) -> Any:
        return None if value is None and self.null else self.check(value)

    def check_object(self, value: Any) -> str:
        """`check` for a column that holds JSON objects alone."""
        if not isinstance(value, dict):
            raise self.refuse(f"takes a JSON object, not {_shown(value)}", "pass a dict")
        return self.check(value)

    def check(self, value: Any) -> str:
        return encode_json(value, self.label, self.limits)

    def python_value(self, value: Any) -> Any:
        return value if value is None else _from_json(value)


def _json_operator(name: str) -> Callable[..., Any]:
    plain = getattr(peewee.Field, name)

    def compare(self: JSONField, *others: Any) -> Any:
        if others == (None,) and name in ("__eq__", "__ne__"):
            return plain(self, None)
        raise InvalidValue(
            f"{self.label} is JSON and cannot be compared", f'compare a part of it: json_text({self.name}, "key")'
        )

    return compare


_ORDERINGS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__lshift__", "in_", "not_in", "between")
_PATTERNS = ("__mod__", "__pow__", "like", "ilike", "contains", "startswith", "endswith", "regexp", "iregexp")

for _name in (*_ORDERINGS, *_PATTERNS):
    setattr(JSONField, _name, _json_operator(_name))
JSONField.__hash__ = peewee.Field.__hash__  # type: ignore[method-assign]


class BlobField(peewee.BlobField):  # type: ignore[misc]
    """Bytes; always `bytes` in Python (psycopg2 gives a memoryview)."""

    stored = memoryview

    def db_value(self, value: Any) -> Any:
        if value is not None and not isinstance(value, bytes | bytearray | memoryview):
            raise InvalidValue(f"{self.model._meta.table_name}.{self.name} takes bytes, not {_shown(value)}")
        return super().db_value(bytes(value) if value is not None else None)

    def python_value(self, value: Any) -> bytes | None:
        return value if value is None or isinstance(value, bytes) else bytes(value)


class BooleanField(peewee.BooleanField):  # type: ignore[misc]
    """True or False, nothing that merely looks like it."""

    stored = int  # by SQLite

    def db_value(self, value: Any) -> bool | None:
        if value is not None and not isinstance(value, bool):
            raise InvalidValue(f"{self.model._meta.table_name}.{self.name} takes true or false, not {_shown(value)}")
        return value


def check_text(value: str, label: str) -> None:
    """Refuse what PostgreSQL cannot store and SQLite would: NUL and lone surrogates.

    Raises InvalidValue naming `label`.
    """
    if "\x00" in value:
        raise InvalidValue(f"{label} holds a NUL character", "keep bytes with NUL as an attachment (run.attach)")
    if not value.isascii():  # which costs nothing: Python knows it of every string
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidValue(
                f"{label} holds a lone surrogate at character {error.start}",
                "decode bytes with errors='replace', or keep them as an attachment",
            ) from None


def encode_json(value: Any, label: str, limits: Limits, *, sort_keys: bool = False) -> str:
    """The compact JSON text of `value`, checked.

    Takes dicts with string keys, lists, tuples (which become arrays), strings, booleans, None, integers of at most 64
    bits and finite floats. Raises InvalidValue for anything else, LimitExceeded beyond `limits`; both name `label`.
    """
    _check_json(value, label, limits.json_depth)
    text = _to_json[sort_keys](value)
    if len(text) * 4 > limits.json_bytes:
        size = len(text.encode())
        if size > limits.json_bytes:
            raise LimitExceeded(
                f"{label} has {size:,} bytes of JSON; the limit is {limits.json_bytes:,}",
                "raise limits.json_bytes in the config, or keep the large part as an attachment",
            )
    return text


def _check_json(value: Any, label: str, depth_left: int) -> None:
    kind = type(value)
    if kind is str:
        check_text(value, label)
    elif kind is dict:
        if depth_left <= 0:
            raise LimitExceeded(f"{label} is nested too deeply", "raise limits.json_depth in the config, or flatten it")
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidValue(f"{label} has the key {_shown(key)}", "keys of a JSON object are text")
            check_text(key, label)
            _check_json(item, label, depth_left - 1)
    elif kind is list or kind is tuple:
        if depth_left <= 0:
            raise LimitExceeded(f"{label} is nested too deeply", "raise limits.json_depth in the config, or flatten it")
        for item in value:
            _check_json(item, label, depth_left - 1)
    elif value is None or kind is bool:
        pass
    elif kind is int:
        if not INTEGER_MIN <= value <= INTEGER_MAX:
            raise InvalidValue(f"{label} holds an integer beyond 64 bits", "keep larger numbers as text")
    elif kind is float:
        if value != value or value in (float("inf"), float("-inf")):
            raise InvalidValue(f"{label} holds {value}, which JSON cannot hold", "use null or text instead")
    else:
        raise InvalidValue(
            f"{label} holds {_shown(value)}, which JSON cannot hold",
            "use dicts, lists, text, numbers, booleans and None",
        )


class JsonText(peewee.ColumnBase):  # type: ignore[misc]
    """A scalar inside a JSON column, as text, in a query; made by `json_text`."""

    def __init__(self, field: Any, keys: tuple[str | int, ...]) -> None:
        super().__init__()
        self.field = field
        self.keys = keys

    def __sql__(self, ctx: Any) -> Any:
        return ctx.sql(self.field.model._meta.database.json_text(self.field, self.keys))


def _text_operator(name: str) -> Callable[..., Any]:
    plain = getattr(peewee.ColumnBase, name)

    def compare(self: JsonText, *others: Any) -> Any:
        for other in others:
            for one in other if isinstance(other, list | tuple | set | frozenset) else (other,):
                if one is not None and not isinstance(one, str | peewee.Node):
                    raise InvalidValue(
                        f"json_text gives text and was compared with {_shown(one)}",
                        'compare with text, like "5" or "true"',
                    )
                if isinstance(one, str):
                    check_text(one, "the text that json_text was compared with")
        return plain(self, *others)

    return compare


for _name in (*_ORDERINGS, *_PATTERNS):
    setattr(JsonText, _name, _text_operator(_name))
JsonText.__hash__ = peewee.ColumnBase.__hash__  # type: ignore[method-assign]


def json_text(field: Any, *keys: str | int) -> JsonText:
    """What stands at `keys` inside a JSON column, as text, alike on both engines.

    A string comes without quotes; a number, true or false as written; NULL for null, an object, an array, or nothing
    there. A text key goes into an object, an integer (from 0) into an array. Comparison and order are those of text.
    Raises InvalidValue for a key with a quote, a backslash or a control character, which SQLite's paths cannot say.
    """
    if not isinstance(getattr(field, "field", field), JSONField):  # an alias of a model has aliases of its fields
        raise InvalidValue(f"json_text looks into JSON columns, not into {_shown(field)}", "name one, like Run.input")
    if not keys:
        raise InvalidValue("json_text needs at least one key", 'write json_text(Run.input, "task")')
    for key in keys:
        if isinstance(key, bool) or not isinstance(key, str | int) or (isinstance(key, int) and not 0 <= key < 2**31):
            raise InvalidValue(f"json_text takes text keys and indexes from 0, not {_shown(key)}")
        if isinstance(key, str):
            check_text(key, "a key of json_text")
            if _OUTSIDE_PATHS.search(key):
                raise InvalidValue(f"json_text cannot look up the key {_shown(key)}", "filter such keys in Python")
    return JsonText(field, keys)


def _shown(value: object) -> str:
    """`value` for an error message: short, on one line, with its type where that is the trouble."""
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    return f"{text} ({type(value).__name__})"
