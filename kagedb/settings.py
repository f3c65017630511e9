"""Deployment mode, paths and settings: where the data lives, and why there.

Which settings there are is one table, settings_table.py. `load` reads them from the arguments, the environment and the
config file; `require_parent` makes the default home. Nothing here opens a store.
"""

from __future__ import annotations

# pathlib, platformdirs and shlex are imported where they are needed: most starts need none of them.
import errno
import os
import stat
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from .config import Setting, checked_values, read_config
from .errors import SettingsError, StorageError, StorageForbidden
from .settings_table import SettingsTable
from .url import StorageURL, is_absolute, normal_path, printable

TYPE_CHECKING = False  # type checkers take it for true; importing `typing` for it costs 2.5 ms
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MODES = ("user", "system")
FIRST_USER_UID = 1000
"""Accounts below it are the system's own (`UID_MIN` of login.defs(5))."""
DIRECTORY_MODE = 0o700


class Effective(NamedTuple):
    """One line of `kaged config`: a setting, its value as text that is safe to print, and where it was set."""

    name: str
    value: str
    origin: str


class Settings(SettingsTable):
    """What is in force for one store: each setting by its attribute, with mode, home and config file. Made by `load`.

    Cannot be changed. Values are checked; numbers are in the unit of their name.
    """

    mode: str
    values: Mapping[str, int | str]
    """What the config file and the defaults give, by name; for what follows from the home, ask the attributes."""
    _config: str
    _given_url: StorageURL | None
    _origins: Mapping[str, str]
    _variables: Mapping[str, str]

    def __init__(
        self,
        mode: str,
        config_file: str,
        url: StorageURL | None,
        values: Mapping[str, int | str],
        origins: Mapping[str, str],
        environ: Mapping[str, str],
    ) -> None:
        """For `load`: `url` is None where the store is in the home, `values` is what the file and the defaults give."""
        # Not the whole environment: the URL in it has a password.
        variables = {name: environ.get(name, "") for name in ("KAGED_HOME", "XDG_DATA_HOME", "HOME")}
        self.__dict__.update(
            mode=mode,
            values=MappingProxyType(dict(values)),
            _config=config_file,
            _given_url=url,
            _origins=origins,
            _variables=variables,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"settings do not change, so {name} cannot be set; load them again")

    def __repr__(self) -> str:
        return f"Settings(mode={self.mode!r}, config_file={self._config!r})"

    def at(self, url: StorageURL) -> Settings:
        """The same settings for a store at another place."""
        return Settings(self.mode, self._config, url, self.values, self._origins, self._variables)

    @cached_property
    def home(self) -> Path:
        """The directory of the default database, the backups and the audit key. It need not be there yet."""
        from pathlib import Path

        return Path(self._home[0])

    @cached_property
    def config_file(self) -> Path:
        """The config file that was read, or that would be read if it were there."""
        from pathlib import Path

        return Path(self._config)

    def origin(self, name: str) -> str:
        """Where a setting (`storage.url`), `mode`, `home` or `config` was set: `--url`, a variable, a file, default."""
        return self._home[1] if name == "home" else self._origins.get(name, "default")

    def effective(self) -> list[Effective]:
        """Everything in force and where it was set, as `kaged config` prints it; no value holds a secret."""
        attributes = {"mode": "mode", "home": "home", "config": "config_file"}
        attributes |= {setting.name: setting.attribute for setting in SETTINGS}
        return [
            Effective(name, printable(str(getattr(self, attribute))), printable(self.origin(name)))
            for name, attribute in attributes.items()
        ]

    @cached_property
    def _home(self) -> tuple[str, str]:
        """Path and origin. Found when asked for: a store elsewhere needs no home, and an account may have none."""
        if given := _path_variable("KAGED_HOME", self._variables):
            return given, "KAGED_HOME"
        if self.mode == "system":
            return "/var/lib/kaged", "default"
        return _user_directory("XDG_DATA_HOME", ".local/share", self._variables)

    @cached_property
    def _url(self) -> StorageURL:
        return self._given_url or StorageURL.from_path(os.path.join(self._home[0], "kaged.db"))

    @cached_property
    def _backup_directory(self) -> Path:
        from pathlib import Path

        given = self.values.get("backup.directory")
        return self.home / "backups" if given is None else Path(normal_path(str(given)))


SETTINGS = tuple(value for value in vars(SettingsTable).values() if isinstance(value, Setting))
"""The table: every setting there is, section by section."""


def load(
    *,
    url: str | None = None,
    mode: str | None = None,
    config: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    euid: int | None = None,
) -> Settings:
    """Find out what is in force. An argument wins over the environment, that over the config file, that over defaults.

    `url`, `mode` (`user` or `system`) and `config` (a file, which must be there) are the command line's options of
    these names; an empty variable counts as unset. `euid` is the account to decide the mode for, by default the
    process's own. Raises SettingsError.
    """
    mode, mode_origin = _mode(mode, environ, os.geteuid() if euid is None else euid)
    _path_variable("KAGED_HOME", environ)  # a wrong one is told at once, not when the home is first needed
    config_file, config_origin, required = _config_file(config, mode, environ)
    document = read_config(config_file, config_origin, required)
    origins = {"mode": mode_origin, "config": config_origin if document is not None else f"{config_origin}, not there"}
    values = {setting.name: setting.default for setting in SETTINGS if setting.default is not None}
    for name, value in checked_values(document or {}, config_file, SETTINGS):
        values[name] = value
        origins[name] = config_file
    in_file = values.pop("storage.url", None)
    given_url = None
    if url is not None:
        given_url = StorageURL.parse(url, "--url")
        origins["storage.url"] = "--url"
    elif variable := environ.get("KAGED_DATABASE_URL"):
        given_url = StorageURL.parse(variable, "KAGED_DATABASE_URL")
        origins["storage.url"] = "KAGED_DATABASE_URL"
    elif in_file is not None:
        given_url = StorageURL.parse(str(in_file), f"storage.url in {printable(config_file)}")
    return Settings(mode, config_file, given_url, values, origins, environ)


# Where things are.


def _mode(argument: str | None, environ: Mapping[str, str], euid: int) -> tuple[str, str]:
    """The deployment mode and its origin."""
    if argument is not None:
        if argument not in MODES:
            raise SettingsError(f"{argument!r} is not a deployment mode", "the modes are user and system")
        return argument, f"--{argument}"
    if variable := environ.get("KAGED_MODE"):
        if variable not in MODES:
            raise SettingsError(f"KAGED_MODE is {variable!r}", "set it to user or system, or unset it")
        return variable, "KAGED_MODE"
    if euid < FIRST_USER_UID:
        return "system", f"root or system account (uid {euid})"
    return "user", f"ordinary account (uid {euid})"


def _config_file(
    argument: str | os.PathLike[str] | None, mode: str, environ: Mapping[str, str]
) -> tuple[str, str, bool]:
    """The path of the config file, its origin, and whether it must be there."""
    if argument is not None:
        path = os.fsdecode(argument)
        if not path or "\0" in path:
            raise SettingsError("--config names no file", "give the path of a config file, or leave the option out")
        return os.path.abspath(path), "--config", True
    if given := _path_variable("KAGED_CONFIG", environ):
        return given, "KAGED_CONFIG", True
    if mode == "system":
        return "/etc/kaged/config.toml", "default", False
    directory, origin = _user_directory("XDG_CONFIG_HOME", ".config", environ)
    return f"{directory}/config.toml", origin, False


def _user_directory(variable: str, below_home: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """kaged's directory below `$variable`, else below the user's home, and its origin.

    XDG Base Directory Specification: a relative path in a variable is invalid and ignored.
    """
    if is_absolute(base := environ.get(variable, "")):
        return normal_path(f"{base}/kaged"), variable
    if is_absolute(base := environ.get("HOME", "")):
        return normal_path(f"{base}/{below_home}/kaged"), "default"
    # Only here platformdirs, which finds the home of an account without HOME: it knows no environment but the
    # process's own, takes relative paths before 4.11.8, and costs a start 16 ms.
    from platformdirs.unix import Unix

    try:
        path = Unix("kaged").user_data_dir if variable == "XDG_DATA_HOME" else Unix("kaged").user_config_dir
    except RuntimeError:
        path = ""
    if not is_absolute(path):
        raise SettingsError(
            f"neither {variable} nor HOME is an absolute path, and the account has no home",
            "set HOME, or KAGED_HOME and KAGED_CONFIG, or use --system",
        )
    return normal_path(path), "default"


def _path_variable(name: str, environ: Mapping[str, str]) -> str:
    """The path in a variable of kaged's own, or nothing."""
    value = environ.get(name, "")
    if value and not is_absolute(value):
        raise SettingsError(f"{name} is not an absolute path", f"set it to one (~ is not expanded), or unset {name}")
    return normal_path(value) if value else ""


# Directories.


def require_parent(settings: Settings) -> bool:
    """See that the directory of an SQLite store is there, and make it where it is the mode's own default home.

    Any other missing directory is an error: a mistyped path must not become an empty store. True if it was made;
    False if it was there, and for a store on PostgreSQL. Raises SettingsError, StorageForbidden or StorageError.
    """
    if settings.url.path is None:
        return False
    parent = os.path.dirname(settings.url.path)
    if _is_directory(parent):
        return False
    home_origin = settings.origin("home")
    if home_origin != "KAGED_HOME" and parent == os.fspath(settings.home):
        return make_directory(parent)
    import shlex

    origin = settings.origin("storage.url")
    ancestors = "" if _is_directory(os.path.dirname(parent)) else "-p "
    raise SettingsError(
        f"the store's directory {printable(parent)} is not there"
        f" ({printable(home_origin if origin == 'default' else origin)})",
        f"name the right one, or make it: mkdir {ancestors}-m 700 {printable(shlex.quote(parent))}",
    )


def make_directory(path: str | os.PathLike[str]) -> bool:
    """Make an absolute directory and those above it that are missing, each 0700 whatever the umask, and on disk.

    Several processes may do it at once. True if any was missing. Raises SettingsError where something that is no
    directory is in the way, else StorageForbidden or StorageError.
    """
    level = os.fspath(path)
    missing = []
    while not _is_directory(level):
        missing.append(level)
        level = os.path.dirname(level)
    for level in reversed(missing):
        try:
            try:
                os.mkdir(level, DIRECTORY_MODE)
            except FileExistsError:
                # Another process was faster and sets the mode.
                if not _is_directory(level):
                    raise
            else:
                os.chmod(level, DIRECTORY_MODE)  # the umask may have taken the owner's bits
            sync_directory(os.path.dirname(level))
        except OSError as error:
            raise _unreachable(level, "made", error) from error
    return bool(missing)


def _is_directory(path: str) -> bool:
    """Whether it is there; an error where something else is, or where it cannot be told."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise SettingsError(f"{printable(path)} is a link to nothing", "make what it points to") from None
        return False
    except OSError as error:
        raise _unreachable(path, "reached", error) from error
    if not stat.S_ISDIR(mode):
        raise SettingsError(f"{printable(path)} is not a directory", "name another place, or move it away")
    return True


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make new entries and renames inside a directory durable: a power cut loses them until it is synced (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreachable(path: str, what: str, error: OSError) -> SettingsError | StorageError:
    message = f"the directory {printable(path)} cannot be {what}: {error.strerror}"
    if isinstance(error, PermissionError):
        return StorageForbidden(message, "act as the user who owns the store, or name another place")
    if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return SettingsError(message, "name another place")
    return StorageError(message)
