"""The config file: what kinds of settings there are, and how a file is read into checked values.

Which settings there are is settings_table.py; what wins over the file is `kagedb.settings`.
"""

from __future__ import annotations

# tomllib and difflib are imported where they are needed: many a host has no config file, most files no slip.
import os
import re

from .errors import SettingsError
from .url import printable

TYPE_CHECKING = False  # type checkers take it for true; importing `typing` for it costs 2.5 ms
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from typing import Any

CONFIG_BYTES = 1024 * 1024
"""More than any config file has; a database named by mistake is not read into memory."""


class Setting:
    """A setting as the config file knows it: `name` is `section.key`, `form` says in words what it must be.

    `default` is None where it follows from the home, `example` is a value as it is written in TOML. The table is the
    body of `SettingsTable`: `attribute` is the setting's name there, and its value's on an instance of `Settings`.
    """

    kind: type = str

    def __init__(self, name: str, default: int | str | None, form: str, help: str, example: str) -> None:
        self.name = name
        self.default = default
        self.form = form
        self.help = help
        self.example = example

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.attribute = attribute

    def accepts(self, value: Any) -> bool:
        """Whether a value out of a TOML document is one for this setting."""
        return type(value) is self.kind  # not isinstance, to which true is an int


class Number(Setting):
    """A whole number out of `allowed`, in `unit`."""

    kind = int

    def __init__(self, name: str, default: int, allowed: Sequence[int], unit: str, help: str) -> None:
        if isinstance(allowed, range):
            form = f"a whole number from {allowed[0]} to {allowed[-1]}"
        else:
            form = f"one of {', '.join(map(str, allowed))}"
        super().__init__(name, default, f"{form} ({unit})", help, str(default))
        self.allowed = allowed

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and value in self.allowed

    def __get__(self, settings: Any, owner: type) -> int:
        value: int = settings.values[self.name]
        return value


class Text(Setting):
    """A string that `pattern` matches from end to end."""

    def __init__(self, name: str, default: str, pattern: str, form: str, help: str) -> None:
        super().__init__(name, default, form, help, f'"{default}"')
        self.pattern = pattern

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and re.fullmatch(self.pattern, value) is not None

    def __get__(self, settings: Any, owner: type) -> str:
        value: str = settings.values[self.name]
        return value


def read_config(path: str, origin: str, required: bool) -> dict[str, Any] | None:
    """The TOML document in the file `path`, which `origin` named; None where it is not there and not required.

    Raises SettingsError, with the line where TOML is wrong. Nothing out of the file is quoted.
    """
    shown = f"the config file {printable(path)} ({origin})"
    try:
        with open(path, "rb") as file:
            data = file.read(CONFIG_BYTES + 1)
    except FileNotFoundError:
        if not required and not os.path.islink(path):
            return None
        raise SettingsError(f"{shown} is not there", "make it, or name another with --config") from None
    except OSError as error:
        raise SettingsError(
            f"{shown} cannot be read: {error.strerror}", "let this account read it, or name another with --config"
        ) from error
    if len(data) > CONFIG_BYTES:
        raise SettingsError(f"{shown} has more than {CONFIG_BYTES} bytes", "name the right file with --config")
    import tomllib

    # Raised outside the handlers, whose exceptions hold the file's text and with it, perhaps, a password.
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8 (at line {line})"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:
        problem = f"is not TOML: {printable(str(error))}"
    raise SettingsError(f"{shown} {problem}", "a section is written [sqlite], a setting below it page_size = 2048")


def checked_values(document: dict[str, Any], path: str, table: Collection[Setting]) -> Iterator[tuple[str, int | str]]:
    """Each setting of a document that `read_config` gave and its value. Raises SettingsError at the first wrong one."""
    file = printable(path)
    settings = {setting.name: setting for setting in table}
    sections = {name.partition(".")[0] for name in settings}
    for section, values in document.items():
        if section not in sections:
            what, known = ("section", sections) if isinstance(values, dict) else ("setting", settings)
            raise SettingsError(f"{file} has the unknown {what} {printable(section)}", _meant(section, known))
        if not isinstance(values, dict):
            raise SettingsError(f"{section} in {file} is {_kind(values)}, not a section", f"write [{section}]")
        for key, value in values.items():
            name = f"{section}.{key}"
            setting = settings.get(name)
            if setting is None:
                raise SettingsError(f"{file} has the unknown setting {printable(name)}", _meant(name, settings))
            if not setting.accepts(value):
                kind = "" if type(value) is str and setting.kind is str else f"{_kind(value)}, "
                raise SettingsError(
                    f"{name} in {file} is {kind}not {setting.form}",
                    f"write {key} = {setting.example} below [{section}]",
                )
            yield name, value


def _meant(name: str, known: Collection[str]) -> str:
    """A hint: the section or setting that an unknown one was probably meant to be."""
    from difflib import get_close_matches

    key = name.rpartition(".")[2]
    elsewhere = [other for other in known if other.endswith(f".{key}")]
    for meant in elsewhere or get_close_matches(name, known, 1):
        section, _, key = meant.partition(".")
        return f"perhaps {key} below [{section}] is meant" if key else f"perhaps [{section}] is meant"
    return "`kaged config` lists the settings there are"


def _kind(value: object) -> str:
    """What a TOML value is, in words. A string is never quoted: a URL and its password may stand in the wrong place."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 2**63 else "a number beyond 64 bits"
    kinds = {str: "a string", float: "a number with a fraction", list: "an array", dict: "a table"}
    return kinds.get(type(value), "a date or time")
