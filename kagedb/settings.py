"""Deployment mode, paths and settings: where the data lives, and why there.

One table, the body of `Settings`, has every setting with its default, limits and help. `load` reads them from the
arguments, the environment and the config file; `require_parent` makes the default home. Nothing here opens a store.
"""

from __future__ import annotations

# pathlib, platformdirs and shlex are imported where they are needed: most starts need none of them.
import errno
import os
import stat
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from .config import Number, Setting, Text, checked_values, read_config
from .errors import SettingsError, StorageError, StorageForbidden
from .url import SQLITE_FORM, StorageURL, normal_path, printable

TYPE_CHECKING = False  # type checkers take it for true; importing `typing` for it costs 2.5 ms
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

MODES = ("user", "system")
FIRST_USER_UID = 1000
"""Accounts below it are the system's own (`UID_MIN` of login.defs(5))."""
DIRECTORY_MODE = 0o700

_HOUR_MS = 3_600_000
_MIB = 1024 * 1024


class _StoreURL(Setting):
    def __get__(self, settings: Settings, owner: type[Settings]) -> StorageURL:
        return settings._url


class _BackupDirectory(Setting):
    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and _is_absolute(value)

    def __get__(self, settings: Settings, owner: type[Settings]) -> Path:
        return settings._backup_directory


class _ProgramDirectory(Setting):
    """Empty where nothing is set: then PATH says where they are."""

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and _is_absolute(value)

    def __get__(self, settings: Settings, owner: type[Settings]) -> str:
        return str(settings.values.get(self.name, ""))


class Effective(NamedTuple):
    """One line of `kaged config`: a setting, its value as text that is safe to print, and where it was set."""

    name: str
    value: str
    origin: str


class Settings:
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

    url = _StoreURL("storage.url", None, "a storage URL", "where the store lives", f'"{SQLITE_FORM}"')
    schema = Text(
        "storage.schema",
        "kaged",
        r"(?!pg_|(?:public|information_schema)$)[a-z_][a-z0-9_]{0,62}",
        "a PostgreSQL name of kaged's own: a-z, 0-9 and _, at most 63, not public, information_schema or pg_...",
        "the PostgreSQL schema that holds every table of kaged",
    )
    busy_timeout_ms = Number(
        "storage.busy_timeout_ms", 5000, range(1, _HOUR_MS + 1), "ms", "how long a write waits for other writers"
    )
    slow_transaction_ms = Number(
        "storage.slow_transaction_ms",
        500,
        range(_HOUR_MS + 1),
        "ms",
        "a write transaction held longer is logged as a warning; 0 never warns",
    )
    page_size = Number(
        "sqlite.page_size",
        2048,
        (1024, 2048, 4096, 8192),
        "bytes",
        "page of the database file: smaller ones wear flash less; takes effect when a store is made",
    )
    cache_kib = Number(
        "sqlite.cache_kib", 2000, range(64, 1_000_001), "KiB", "page cache that each connection may fill"
    )
    wal_autocheckpoint_kib = Number(
        "sqlite.wal_autocheckpoint_kib",
        4096,
        range(256, 262_145),
        "KiB",
        "size of the write-ahead log from which it is moved into the database",
    )
    journal_size_limit_kib = Number(
        "sqlite.journal_size_limit_kib",
        16_384,
        range(1_048_577),
        "KiB",
        "what the write-ahead log is cut back to after it had to grow",
    )
    pool_size = Number("postgres.pool_size", 4, range(1, 101), "connections", "most connections open at once")
    connect_timeout_s = Number(
        "postgres.connect_timeout_s", 10, range(2, 601), "s", "how long a connection may take to open"
    )
    json_bytes = Number("limits.json_bytes", _MIB, range(1024, 256 * _MIB + 1), "bytes", "largest JSON value")
    json_depth = Number("limits.json_depth", 64, range(1, 201), "levels", "deepest nesting of a JSON value")
    text_bytes = Number("limits.text_bytes", _MIB, range(1024, 256 * _MIB + 1), "bytes", "largest text, in UTF-8")
    state_bytes = Number(
        "limits.state_bytes",
        16 * _MIB,
        range(1024, 1024 * _MIB + 1),
        "bytes",
        "largest state of a checkpoint, with its byte strings",
    )
    attachment_bytes = Number(
        "limits.attachment_bytes", 64 * _MIB, range(1024, 1024 * _MIB + 1), "bytes", "largest attachment of a run"
    )
    plugin_bytes = Number(
        "limits.plugin_bytes", 4 * _MIB, range(1024, 1024 * _MIB + 1), "bytes", "keys and values of one plugin's state"
    )
    plugin_keys = Number("limits.plugin_keys", 10_000, range(1, 1_000_001), "keys", "keys of one plugin's state")
    transcript_session_bytes = Number(
        "transcripts.session_bytes",
        64 * _MIB,
        range(_MIB, 1024 * 1024 * _MIB + 1),
        "bytes",
        "what the transcripts of a session may take in the store, compressed; beyond it the oldest output is dropped",
    )
    retention_transcripts_days = Number(
        "retention.transcripts_days", 90, range(36_501), "days", "how long a closed transcript is kept; 0 for ever"
    )
    retention_transcripts_mib = Number(
        "retention.transcripts_mib",
        2048,
        range(1024 * _MIB + 1),
        "MiB",
        "what all transcripts may take, compressed: beyond it the oldest closed ones go; 0 sets no limit",
    )
    retention_runs_days = Number(
        "retention.runs_days",
        180,
        range(36_501),
        "days",
        "how long input, output and attachments of a finished run are kept; 0 for ever",
    )
    retention_runs_mib = Number(
        "retention.runs_mib",
        2048,
        range(1024 * _MIB + 1),
        "MiB",
        "what inputs, outputs and attachments may take: beyond it the oldest runs are emptied; 0 sets no limit",
    )
    retention_checkpoints_days = Number(
        "retention.checkpoints_days", 30, range(36_501), "days", "how long a checkpoint is kept; 0 for ever"
    )
    retention_checkpoints_mib = Number(
        "retention.checkpoints_mib",
        1024,
        range(1024 * _MIB + 1),
        "MiB",
        "what the states of checkpoints may take: beyond it the oldest go; 0 sets no limit",
    )
    retention_checkpoints_keep = Number(
        "retention.checkpoints_keep",
        20,
        range(1_000_001),
        "checkpoints",
        "how many of a session's newest checkpoints stay, whatever their age and size",
    )
    retention_sessions_days = Number(
        "retention.sessions_days",
        365,
        range(36_501),
        "days",
        "how long an ended session is kept with its runs, transcripts and checkpoints; 0 for ever",
    )
    retention_sessions_mib = Number(
        "retention.sessions_mib",
        0,
        range(1024 * _MIB + 1),
        "MiB",
        "what runs and transcripts of all sessions may take: beyond it the oldest ended sessions go; 0 sets no limit",
    )
    retention_audit_days = Number(
        "retention.audit_days", 0, range(36_501), "days", "how long sealed audit events are kept; 0 for ever"
    )
    retention_audit_mib = Number(
        "retention.audit_mib",
        0,
        range(1024 * _MIB + 1),
        "MiB",
        "what the bodies of audit events may take: beyond it the oldest sealed ones go; 0 sets no limit",
    )
    backup_directory = _BackupDirectory(
        "backup.directory", None, "an absolute path", "where backup sets are kept", '"/path/to/backups"'
    )
    backup_max_age_hours = Number(
        "backup.max_age_hours",
        48,
        range(100_001),
        "hours",
        "`kaged check` fails when the newest verified backup set is older; 0 never fails",
    )
    backup_wal_limit_mib = Number(
        "backup.wal_limit_mib",
        64,
        range(8, 65_537),
        "MiB",
        "growth of SQLite's write-ahead log above which a backup hurries; at twice that it, or a copy, gives up",
    )
    backup_pg_bin = _ProgramDirectory(
        "backup.pg_bin",
        None,
        "an absolute path",
        "the directory of pg_dump and pg_restore",
        '"/usr/lib/postgresql/18/bin"',
    )

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


SETTINGS = tuple(value for value in vars(Settings).values() if isinstance(value, Setting))
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
    if _is_absolute(base := environ.get(variable, "")):
        return normal_path(f"{base}/kaged"), variable
    if _is_absolute(base := environ.get("HOME", "")):
        return normal_path(f"{base}/{below_home}/kaged"), "default"
    # Only here platformdirs, which finds the home of an account without HOME: it knows no environment but the
    # process's own, takes relative paths before 4.11.8, and costs a start 16 ms.
    from platformdirs.unix import Unix

    try:
        path = Unix("kaged").user_data_dir if variable == "XDG_DATA_HOME" else Unix("kaged").user_config_dir
    except RuntimeError:
        path = ""
    if not _is_absolute(path):
        raise SettingsError(
            f"neither {variable} nor HOME is an absolute path, and the account has no home",
            "set HOME, or KAGED_HOME and KAGED_CONFIG, or use --system",
        )
    return normal_path(path), "default"


def _path_variable(name: str, environ: Mapping[str, str]) -> str:
    """The path in a variable of kaged's own, or nothing."""
    value = environ.get(name, "")
    if value and not _is_absolute(value):
        raise SettingsError(f"{name} is not an absolute path", f"set it to one (~ is not expanded), or unset {name}")
    return normal_path(value) if value else ""


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and "\0" not in path


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
