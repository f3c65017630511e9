"""Where the data lives and why: mode, paths, config file, precedence, and which directories are made."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kagedb.config import CONFIG_BYTES, Number, Text
from kagedb.errors import KagedError, SettingsError, StorageForbidden
from kagedb.settings import SETTINGS, Settings, load, make_directory, require_parent

ANA, DAEMON, ROOT, NOBODY = 1000, 999, 0, 65534  # uids


def loaded(environ: dict[str, str] | None = None, **arguments: object) -> Settings:
    """Settings of an ordinary account whose home is /home/ana and has nothing in it."""
    return load(environ={"HOME": "/home/ana"} | (environ or {}), **({"euid": ANA} | arguments))  # type: ignore[arg-type]


def configured(path: Path, text: str | bytes, **arguments: object) -> Settings:
    """Settings with a config file that holds `text`."""
    file = path / "config.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return loaded(config=file, **arguments)


# Mode.


@pytest.mark.parametrize(
    ("argument", "variable", "euid", "mode", "origin"),
    [
        (None, None, ROOT, "system", "root or system account (uid 0)"),
        (None, None, DAEMON, "system", "root or system account (uid 999)"),
        (None, None, ANA, "user", "ordinary account (uid 1000)"),
        (None, "", ANA, "user", "ordinary account (uid 1000)"),
        (None, "user", ROOT, "user", "KAGED_MODE"),
        (None, "system", ANA, "system", "KAGED_MODE"),
        ("user", "system", ROOT, "user", "--user"),
        ("system", "user", ANA, "system", "--system"),
        ("system", "nonsense", ANA, "system", "--system"),
    ],
)
def test_the_mode_is_the_option_then_the_variable_then_the_account(
    argument: str | None, variable: str | None, euid: int, mode: str, origin: str
) -> None:
    settings = loaded({} if variable is None else {"KAGED_MODE": variable}, mode=argument, euid=euid)
    assert (settings.mode, settings.origin("mode")) == (mode, origin)


def test_without_a_uid_the_account_is_that_of_the_process() -> None:
    settings = load(environ={"HOME": "/home/ana"}, config=None if os.geteuid() else "/dev/null")
    assert settings.mode == ("system" if os.geteuid() < 1000 else "user")


@pytest.mark.parametrize("value", ["User", "root", " user", "0"])
def test_an_unknown_mode_is_an_error_that_names_the_variable_and_both_modes(value: str) -> None:
    with pytest.raises(SettingsError, match=f"KAGED_MODE is '{value}'; set it to user or system"):
        loaded({"KAGED_MODE": value})
    with pytest.raises(SettingsError, match="not a deployment mode; the modes are user and system"):
        loaded(mode=value)
    with pytest.raises(SettingsError, match="not a deployment mode"):
        loaded(mode="")


# Paths.


@pytest.mark.parametrize(
    ("environ", "mode", "home", "config"),
    [
        ({}, "user", "/home/ana/.local/share/kaged", "/home/ana/.config/kaged/config.toml"),
        ({}, "system", "/var/lib/kaged", "/etc/kaged/config.toml"),
        ({"XDG_DATA_HOME": "/data"}, "user", "/data/kaged", "/home/ana/.config/kaged/config.toml"),
        ({"XDG_CONFIG_HOME": "/conf/"}, "user", "/home/ana/.local/share/kaged", "/conf/kaged/config.toml"),
        ({"XDG_DATA_HOME": "/data", "XDG_CONFIG_HOME": "/conf"}, "system", "/var/lib/kaged", "/etc/kaged/config.toml"),
        ({"KAGED_HOME": "/srv/k"}, "user", "/srv/k", "/home/ana/.config/kaged/config.toml"),
        ({"KAGED_HOME": "/srv//./k/"}, "system", "/srv/k", "/etc/kaged/config.toml"),
        ({"KAGED_HOME": "", "KAGED_CONFIG": ""}, "system", "/var/lib/kaged", "/etc/kaged/config.toml"),
    ],
)
def test_each_mode_has_its_places(environ: dict[str, str], mode: str, home: str, config: str) -> None:
    settings = loaded(environ, mode=mode)
    assert (str(settings.home), str(settings.config_file)) == (home, config)
    assert settings.url.path == f"{home}/kaged.db"
    assert str(settings.backup_directory) == f"{home}/backups"


@pytest.mark.parametrize("value", ["", "data", "./data", "~/data", "\0/data"])
def test_a_relative_xdg_directory_is_ignored_as_the_specification_says(value: str) -> None:
    settings = loaded({"XDG_DATA_HOME": value, "XDG_CONFIG_HOME": value})
    assert str(settings.home) == "/home/ana/.local/share/kaged"
    assert str(settings.config_file) == "/home/ana/.config/kaged/config.toml"
    assert settings.origin("home") == "default"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_home_the_account_database_says_where_the_user_lives(
    home: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import pwd

    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    settings = load(environ={} if home is None else {"HOME": home}, mode="user", config="/dev/null")
    assert settings.home == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local/share/kaged"


def test_an_account_without_any_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="set HOME, or KAGED_HOME and KAGED_CONFIG, or use --system"):
        load(environ={}, mode="user")
    elsewhere = load(environ={}, mode="user", url="postgresql://h/d", config="/dev/null")
    assert elsewhere.url.dsn == "postgresql://h/d", "who needs no home needs no HOME"
    assert str(load(environ={"KAGED_HOME": "/srv/k"}, mode="user", config="/dev/null").home) == "/srv/k"


@pytest.mark.parametrize("name", ["KAGED_HOME", "KAGED_CONFIG"])
@pytest.mark.parametrize("value", ["kaged", "./kaged", "~/kaged", " /srv/kaged", "/srv\0"])
def test_a_path_variable_must_be_absolute(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is not an absolute path; .*unset {name}"):
        loaded({name: value}, url="postgresql://h/d")


# Which URL.


def test_the_url_is_the_options_then_the_variables_then_the_configs_then_the_modes(tmp_path: Path) -> None:
    config = '[storage]\nurl = "sqlite:////from/config.db"'
    environ = {"KAGED_DATABASE_URL": "sqlite:////from/variable.db", "HOME": "/home/ana"}
    for arguments, path, origin in (
        ({"url": "sqlite:////from/option.db", "environ": environ}, "/from/option.db", "--url"),
        ({"environ": environ}, "/from/variable.db", "KAGED_DATABASE_URL"),
        ({"environ": environ | {"KAGED_DATABASE_URL": ""}}, "/from/config.db", str(tmp_path / "config.toml")),
    ):
        settings = configured(tmp_path, config, **arguments)
        assert (settings.url.path, settings.origin("storage.url")) == (path, origin)
    settings = configured(tmp_path, "")
    assert (settings.url.path, settings.origin("storage.url")) == ("/home/ana/.local/share/kaged/kaged.db", "default")


def test_the_home_follows_the_mode_wherever_the_store_is() -> None:
    settings = loaded(url="postgresql://h/d", mode="system")
    assert (str(settings.home), str(settings.backup_directory)) == ("/var/lib/kaged", "/var/lib/kaged/backups")


@pytest.mark.parametrize(
    ("arguments", "origin"),
    [
        ({"url": "mysql://ana:hunter22@h/d"}, "--url"),
        ({"url": ""}, "--url"),
        ({"environ": {"KAGED_DATABASE_URL": "mysql://ana:hunter22@h/d"}}, "KAGED_DATABASE_URL"),
        ({"environ": {"KAGED_DATABASE_URL": " "}}, "KAGED_DATABASE_URL"),
        ({"text": '[storage]\nurl = "mysql://ana:hunter22@h/d"'}, r"storage\.url in .*/config\.toml"),
        ({"text": '[storage]\nurl = ""'}, r"storage\.url in .*/config\.toml"),
    ],
)
def test_a_wrong_url_is_told_where_it_was_read(tmp_path: Path, arguments: dict[str, object], origin: str) -> None:
    text = str(arguments.pop("text", ""))
    with pytest.raises(SettingsError, match=f"^{origin} ") as caught:
        configured(tmp_path, text, **arguments)
    assert "hunter22" not in repr(caught.value)


# The config file.


VALUES = """
[storage]
url = "postgres://ana:hunter22@h/d"
schema = "house_1"
busy_timeout_ms = 1
slow_transaction_ms = 0
[sqlite]
page_size = 8192
cache_kib = 64
wal_autocheckpoint_kib = 262_144
journal_size_limit_kib = 0
[postgres]
pool_size = 100
connect_timeout_s = 2
[limits]
json_bytes = 1024
json_depth = 200
text_bytes = 268_435_456
state_bytes = 1024
attachment_bytes = 1024
plugin_bytes = 1024
plugin_keys = 1
[transcripts]
session_bytes = 1_048_576
[retention]
transcripts_days = 1
transcripts_mib = 0
runs_days = 36_500
runs_mib = 1_073_741_824
checkpoints_days = 0
checkpoints_mib = 1
checkpoints_keep = 0
sessions_days = 0
sessions_mib = 1
audit_days = 1
audit_mib = 1
[backup]
directory = "/srv//backups/"
max_age_hours = 0
wal_limit_mib = 8
pg_bin = "/opt/pg/bin"
"""


def test_every_setting_can_be_set(tmp_path: Path) -> None:
    settings = configured(tmp_path, VALUES)
    assert settings.url.dsn == "postgresql://ana:hunter22@h/d"
    assert settings.schema == "house_1"
    assert (settings.busy_timeout_ms, settings.slow_transaction_ms) == (1, 0)
    assert (settings.page_size, settings.cache_kib) == (8192, 64)
    assert (settings.wal_autocheckpoint_kib, settings.journal_size_limit_kib) == (262_144, 0)
    assert (settings.pool_size, settings.connect_timeout_s) == (100, 2)
    assert (settings.json_bytes, settings.json_depth, settings.text_bytes) == (1024, 200, 268_435_456)
    assert (settings.state_bytes, settings.attachment_bytes) == (1024, 1024)
    assert (settings.plugin_bytes, settings.plugin_keys) == (1024, 1)
    assert settings.transcript_session_bytes == 1_048_576
    assert (settings.retention_transcripts_days, settings.retention_transcripts_mib) == (1, 0)
    assert (settings.retention_runs_days, settings.retention_runs_mib) == (36_500, 1024 * 1024 * 1024)
    assert (settings.retention_checkpoints_days, settings.retention_checkpoints_mib) == (0, 1)
    assert (settings.retention_checkpoints_keep, settings.retention_sessions_days) == (0, 0)
    assert (settings.retention_sessions_mib, settings.retention_audit_days, settings.retention_audit_mib) == (1, 1, 1)
    assert settings.backup_directory == Path("/srv/backups")
    assert (settings.backup_max_age_hours, settings.backup_wal_limit_mib) == (0, 8)
    assert settings.backup_pg_bin == "/opt/pg/bin"
    assert {one.origin for one in settings.effective()[3:]} == {str(tmp_path / "config.toml")}


def test_the_defaults_are_those_of_the_table() -> None:
    settings = loaded()
    assert {
        setting.name: getattr(settings, setting.attribute) for setting in SETTINGS if setting.default is not None
    } == {
        "storage.schema": "kaged",
        "storage.busy_timeout_ms": 5000,
        "storage.slow_transaction_ms": 500,
        "sqlite.page_size": 2048,
        "sqlite.cache_kib": 2000,
        "sqlite.wal_autocheckpoint_kib": 4096,
        "sqlite.journal_size_limit_kib": 16_384,
        "postgres.pool_size": 4,
        "postgres.connect_timeout_s": 10,
        "limits.json_bytes": 1_048_576,
        "limits.json_depth": 64,
        "limits.text_bytes": 1_048_576,
        "limits.state_bytes": 16 * 1_048_576,
        "limits.attachment_bytes": 64 * 1_048_576,
        "limits.plugin_bytes": 4 * 1_048_576,
        "limits.plugin_keys": 10_000,
        "transcripts.session_bytes": 64 * 1_048_576,
        "retention.transcripts_days": 90,
        "retention.transcripts_mib": 2048,
        "retention.runs_days": 180,
        "retention.runs_mib": 2048,
        "retention.checkpoints_days": 30,
        "retention.checkpoints_mib": 1024,
        "retention.checkpoints_keep": 20,
        "retention.sessions_days": 365,
        "retention.sessions_mib": 0,
        "retention.audit_days": 0,
        "retention.audit_mib": 0,
        "backup.max_age_hours": 48,
        "backup.wal_limit_mib": 64,
    }


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_has_help_and_an_example_that_is_valid(setting: Settings, tmp_path: Path) -> None:
    assert setting.help
    assert setting.form
    section, key = setting.name.split(".")
    configured(tmp_path, f"[{section}]\n{key} = {setting.example}")
    if isinstance(setting, Number | Text):
        assert setting.accepts(setting.default)


WRONG_VALUES = [
    ("storage", "busy_timeout_ms", '"5000"', "is a string, not a whole number from 1 to 3600000 (ms)"),
    ("storage", "busy_timeout_ms", "true", "is true, not a whole number"),
    ("storage", "busy_timeout_ms", "5000.0", "is a number with a fraction, not a whole number"),
    ("storage", "busy_timeout_ms", "nan", "is a number with a fraction"),
    ("storage", "busy_timeout_ms", "[5000]", "is an array, not a whole number"),
    ("storage", "busy_timeout_ms", "{ ms = 5000 }", "is a table, not a whole number"),
    ("storage", "busy_timeout_ms", "2030-01-01", "is a date or time, not a whole number"),
    ("storage", "busy_timeout_ms", "0", "is 0, not a whole number from 1 to 3600000 (ms)"),
    ("storage", "busy_timeout_ms", "3600001", "is 3600001, not a whole number from 1 to 3600000 (ms)"),
    ("storage", "busy_timeout_ms", "-5", "is -5, not"),
    ("storage", "busy_timeout_ms", "0x" + "f" * 5000, "is a number beyond 64 bits, not"),
    ("storage", "slow_transaction_ms", "-1", "is -1, not a whole number from 0"),
    ("storage", "url", "5", "is 5, not a storage URL"),
    ("storage", "url", "false", "is false, not a storage URL"),
    ("storage", "schema", '"Kaged"', "is not a PostgreSQL name"),
    ("storage", "schema", '"public"', "is not a PostgreSQL name"),
    ("storage", "schema", '"information_schema"', "is not a PostgreSQL name"),
    ("storage", "schema", '"pg_kaged"', "is not a PostgreSQL name"),
    ("storage", "schema", '"1kaged"', "is not a PostgreSQL name"),
    ("storage", "schema", '"a;drop"', "is not a PostgreSQL name"),
    ("storage", "schema", '"kaged\\n"', "is not a PostgreSQL name"),
    ("storage", "schema", '"дом"', "is not a PostgreSQL name"),
    ("storage", "schema", '""', "is not a PostgreSQL name"),
    ("storage", "schema", f'"{"a" * 64}"', "is not a PostgreSQL name"),
    ("storage", "schema", "5", "is 5, not a PostgreSQL name"),
    ("sqlite", "page_size", "4095", "is 4095, not one of 1024, 2048, 4096, 8192 (bytes)"),
    ("sqlite", "page_size", "true", "is true, not one of"),
    ("sqlite", "cache_kib", "63", "is 63, not a whole number from 64 to 1000000 (KiB)"),
    ("sqlite", "wal_autocheckpoint_kib", "255", "from 256 to 262144 (KiB)"),
    ("sqlite", "journal_size_limit_kib", "1048577", "from 0 to 1048576 (KiB)"),
    ("postgres", "pool_size", "0", "from 1 to 100 (connections)"),
    ("postgres", "connect_timeout_s", "1", "from 2 to 600 (s)"),
    ("limits", "json_bytes", "1023", "from 1024 to 268435456 (bytes)"),
    ("limits", "json_depth", "201", "from 1 to 200 (levels)"),
    ("limits", "text_bytes", "268435457", "from 1024 to 268435456 (bytes)"),
    ("backup", "directory", '"backups"', "is not an absolute path"),
    ("backup", "directory", '"~/backups"', "is not an absolute path"),
    ("backup", "directory", '"/srv\\u0000"', "is not an absolute path"),
    ("backup", "directory", "true", "is true, not an absolute path"),
]


@pytest.mark.parametrize(("section", "key", "value", "problem"), WRONG_VALUES)
def test_a_wrong_value_is_told_with_its_setting_its_file_and_the_right_form(
    tmp_path: Path, section: str, key: str, value: str, problem: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        configured(tmp_path, f"[{section}]\n{key} = {value}")
    assert caught.value.message.startswith(f"{section}.{key} in {tmp_path}/config.toml is ")
    assert problem in caught.value.message
    assert f"write {key} = " in caught.value.hint
    assert caught.value.hint.endswith(f"below [{section}]")


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("[storage]\nbusy_timeout = 5", "unknown setting storage.busy_timeout", "busy_timeout_ms below [storage]"),
        ("[sqlite]\npagesize = 5", "unknown setting sqlite.pagesize", "page_size below [sqlite]"),
        ("[sqlite]\nbusy_timeout_ms = 5", "unknown setting sqlite.busy_timeout_ms", "busy_timeout_ms below [storage]"),
        ('url = "sqlite:////a"', "unknown setting url", "url below [storage]"),
        ('"storage.url" = "sqlite:////a"', "unknown setting storage.url", "url below [storage]"),
        ("[postgresql]\npool_size = 5", "unknown section postgresql", "[postgres]"),
        ("[Storage]\nurl = 5", "unknown section Storage", "[storage]"),
        ("[zebra]", "unknown section zebra", "`kaged config` lists"),
        ("zebra = 1", "unknown setting zebra", "`kaged config` lists"),
        ('["a\\u001bb"]', "unknown section a\\x1bb", "`kaged config` lists"),
        ("storage = 5", "storage in {file} is 5, not a section", "write [storage]"),
        ('storage = "sqlite:////a"', "storage in {file} is a string, not a section", "write [storage]"),
        ("[[storage]]\nschema = 'a'", "storage in {file} is an array, not a section", "write [storage]"),
    ],
)
def test_what_is_unknown_is_told_with_what_was_probably_meant(
    tmp_path: Path, text: str, problem: str, hint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        configured(tmp_path, text)
    file = str(tmp_path / "config.toml")
    assert file in caught.value.message
    assert problem.format(file=file) in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[storage\n", "is not TOML: .*line 1"),
        (b"[sqlite]\npage_size = 2048\npage_size = 4096\n", "is not TOML: .*line 3"),
        (b'[storage]\nurl = "sqlite:////a"\nschema = "\xff"', r"is not UTF-8 \(at line 3\)"),
        (b"a = " + b"[" * 100_000, "is nested too deeply"),
        (b"a = " + b"9" * 5000, "is not TOML"),
        (b"a = 2030-99-99", "is not TOML"),
        (b"#" * (CONFIG_BYTES + 1), "has more than 1048576 bytes"),
        (b"SQLite format 3\0", "is not TOML"),
    ],
)
def test_a_file_that_is_no_config_is_told_by_name_and_line(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(SettingsError, match=rf"{tmp_path}/config\.toml \(--config\) {problem}"):
        configured(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        b'url = "postgres://ana:hunter22@h/d',
        b"url = postgres://ana:hunter22@h/d",
        b'[storage]\nurl = "postgres://ana:hunter22@h/d" \xff',
        b'[storage]\nschema = "postgres://ana:hunter22@h/d"',
        b'[sqlite]\npage_size = "postgres://ana:hunter22@h/d"',
        b'storage = "postgres://ana:hunter22@h/d"',
        b'[storage]\ndatabase = "postgres://ana:hunter22@h/d"',
        b'[storage]\nurl = ["postgres://ana:hunter22@h/d"]',
        b'[storage]\nurl = "postgres:ana:hunter22@h/d"',
        b'[storage]\nurl = "postgres://ana:hunter22@h/d\\u0001"',
    ],
)
def test_no_error_about_a_config_file_shows_a_password(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SettingsError) as caught:
        configured(tmp_path, content)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter22" not in f"{error} {error!r} {vars(error)}"
        error = error.__cause__ or error.__context__


toml_text = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "[storage]",
                "[sqlite]",
                "\n",
                "url",
                "page_size",
                " = ",
                "2048",
                '"',
                "'",
                "'''",
                "[[",
                "{",
                "1e9",
                "\\u0000",
                "\xff",
            ]
        ),
        max_size=14,
    ).map(lambda words: "".join(words).encode("latin-1")),
)


@given(content=toml_text)
@example(content=b"[storage]\r\nurl = 'sqlite:////a'\r\n")
@example(content=b"\xef\xbb\xbf[storage]")
def test_any_file_is_a_config_or_a_settings_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        settings = configured(tmp_path_factory.getbasetemp(), content)
    except SettingsError as error:
        assert str(error).isprintable()
    else:
        assert len(settings.effective()) == len(SETTINGS) + 3


def test_the_default_config_file_may_be_missing_and_a_named_one_may_not(tmp_path: Path) -> None:
    nowhere = tmp_path / "none.toml"
    assert loaded({"HOME": str(tmp_path)}).origin("config") == "default, not there"
    with pytest.raises(SettingsError, match=rf"{nowhere} \(--config\) is not there"):
        loaded(config=nowhere)
    with pytest.raises(SettingsError, match=rf"{nowhere} \(KAGED_CONFIG\) is not there"):
        loaded({"KAGED_CONFIG": str(nowhere)})
    with pytest.raises(SettingsError, match="--config names no file"):
        loaded(config="")


def test_a_default_config_file_that_is_a_link_to_nothing_is_not_taken_for_missing(tmp_path: Path) -> None:
    (tmp_path / "kaged").mkdir()
    (tmp_path / "kaged/config.toml").symlink_to(tmp_path / "unmounted/config.toml")
    with pytest.raises(SettingsError, match=r"\(XDG_CONFIG_HOME\) is not there"):
        loaded({"XDG_CONFIG_HOME": str(tmp_path)})


@pytest.mark.parametrize("argument", ["--config", "KAGED_CONFIG", "default"])
def test_a_directory_is_no_config_file(tmp_path: Path, argument: str) -> None:
    directory = tmp_path / "kaged/config.toml"
    directory.mkdir(parents=True)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        if argument == "--config":
            loaded(config=directory)
        elif argument == "KAGED_CONFIG":
            loaded({"KAGED_CONFIG": str(directory)})
        else:
            loaded({"XDG_CONFIG_HOME": str(tmp_path)})


def test_a_config_directory_that_is_a_file_is_not_taken_for_a_missing_config(tmp_path: Path) -> None:
    (tmp_path / "kaged").touch()
    with pytest.raises(SettingsError, match="cannot be read: Not a directory"):
        loaded({"XDG_CONFIG_HOME": str(tmp_path)})


def test_the_option_wins_over_the_variable_and_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.toml").write_text("[sqlite]\npage_size = 4096")
    settings = loaded({"KAGED_CONFIG": "/nowhere.toml"}, config="here.toml")
    assert (settings.page_size, settings.config_file) == (4096, tmp_path / "here.toml")
    assert settings.origin("sqlite.page_size") == str(tmp_path / "here.toml")


# What `kaged config` prints.


def test_effective_says_everything_and_where_it_was_set_but_no_secret(tmp_path: Path) -> None:
    settings = configured(
        tmp_path,
        "[sqlite]\npage_size = 4096",
        environ={"KAGED_HOME": "/srv/k\n", "KAGED_DATABASE_URL": "postgres://ana:hunter22@h/d"},
    )
    rows = {row.name: (row.value, row.origin) for row in settings.effective()}
    assert list(rows) == ["mode", "home", "config", *(setting.name for setting in SETTINGS)]
    assert rows["mode"] == ("user", "ordinary account (uid 1000)")
    assert rows["home"] == ("/srv/k\\n", "KAGED_HOME")
    assert rows["config"] == (f"{tmp_path}/config.toml", "--config")
    assert rows["storage.url"] == ("postgresql://ana:***@h/d", "KAGED_DATABASE_URL")
    assert rows["sqlite.page_size"] == ("4096", f"{tmp_path}/config.toml")
    assert rows["sqlite.cache_kib"] == ("2000", "default")
    assert rows["backup.directory"] == ("/srv/k\\n/backups", "default")


def test_settings_show_no_secret_and_do_not_change() -> None:
    settings = loaded({"KAGED_DATABASE_URL": "postgres://ana:hunter22@h/d"})
    assert "hunter22" not in f"{settings} {settings!r} {vars(settings)}"
    with pytest.raises(AttributeError, match="settings do not change"):
        settings.page_size = 4096  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.values["sqlite.page_size"] = 4096  # type: ignore[index]


def test_the_environment_is_read_once() -> None:
    environ = {"HOME": "/home/ana"}
    settings = load(environ=environ, euid=ANA)
    environ |= {"HOME": "/home/ben", "KAGED_HOME": "/srv/k"}
    assert str(settings.home) == "/home/ana/.local/share/kaged"


def test_importing_settings_imports_little_else() -> None:
    heavy = {"peewee", "click", "psycopg2", "platformdirs", "tomllib", "pathlib", "difflib", "ulid"}
    code = (
        "import sys; before = set(sys.modules); import kagedb.settings as s;"
        "s.load(mode='system', config=None, environ={'KAGED_HOME': '/srv/k'}).url;"
        "print(*set(sys.modules) - before)"
    )
    # -S: the site's own start-up imports some of them.
    packages = [path for path in sys.path if path]
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *packages])},
    )
    assert not heavy & set(run.stdout.split())


# Directories.


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_the_default_home_is_made_private_whatever_the_umask(
    tmp_path: Path, umask: Callable[[int], int], mask: int
) -> None:
    settings = loaded({"HOME": str(tmp_path)})
    umask(mask)
    assert require_parent(settings) is True
    assert require_parent(settings) is False
    assert settings.home == tmp_path / ".local/share/kaged"
    assert [mode_of(tmp_path / level) for level in (".local", ".local/share", ".local/share/kaged")] == [0o700] * 3


def test_a_directory_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    home = tmp_path / ".local/share/kaged"
    home.mkdir(parents=True)
    home.chmod(0o750)
    assert require_parent(loaded({"HOME": str(tmp_path)})) is False
    assert mode_of(home) == 0o750


def test_a_url_that_names_the_default_home_makes_it_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/.local//share/kaged/other.db"
    assert require_parent(loaded({"HOME": str(tmp_path)}, url=url)) is True


@pytest.mark.parametrize(
    ("environ", "arguments", "directory", "origin", "command"),
    [
        ({"KAGED_HOME": "{tmp}/k"}, {}, "{tmp}/k", "KAGED_HOME", "mkdir -m 700 {tmp}/k"),
        ({"KAGED_HOME": "{tmp}/a b/k"}, {}, "{tmp}/a b/k", "KAGED_HOME", "mkdir -p -m 700 '{tmp}/a b/k'"),
        ({}, {"url": "sqlite:///{tmp}/mistpyed/kaged.db"}, "{tmp}/mistpyed", "--url", "mkdir -m 700 {tmp}/mistpyed"),
        (
            {"KAGED_DATABASE_URL": "sqlite:///{tmp}/x/kaged.db"},
            {},
            "{tmp}/x",
            "KAGED_DATABASE_URL",
            "mkdir -m 700 {tmp}/x",
        ),
        (
            {},
            {"url": "sqlite:///{tmp}/.local/share/kaged/below/kaged.db"},
            "{tmp}/.local/share/kaged/below",
            "--url",
            "mkdir -p -m 700 {tmp}/.local/share/kaged/below",
        ),
    ],
)
def test_any_other_missing_directory_is_an_error_and_is_not_made(
    tmp_path: Path,
    environ: dict[str, str],
    arguments: dict[str, str],
    directory: str,
    origin: str,
    command: str,
) -> None:
    place = str(tmp_path)
    settings = loaded(
        {"HOME": place} | {name: value.format(tmp=place) for name, value in environ.items()},
        **{name: value.format(tmp=place) for name, value in arguments.items()},
    )
    with pytest.raises(SettingsError) as caught:
        require_parent(settings)
    assert caught.value.message == f"the store's directory {directory.format(tmp=place)} is not there ({origin})"
    assert caught.value.hint.endswith(command.format(tmp=place))
    assert not list(tmp_path.iterdir())


def test_a_store_on_a_server_needs_no_directory(tmp_path: Path) -> None:
    assert require_parent(loaded({"HOME": str(tmp_path)}, url="postgresql://h/d")) is False
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_the_way", [".local", ".local/share", ".local/share/kaged"])
def test_a_file_in_the_way_of_the_home_is_named_and_left_alone(tmp_path: Path, in_the_way: str) -> None:
    file = tmp_path / in_the_way
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(SettingsError, match="ot a directory"):
        require_parent(loaded({"HOME": str(tmp_path)}))
    assert file.read_text() == "mine"


def test_a_link_to_nothing_is_not_filled(tmp_path: Path) -> None:
    (tmp_path / ".local/share").mkdir(parents=True)
    (tmp_path / ".local/share/kaged").symlink_to(tmp_path / "unmounted")
    with pytest.raises(SettingsError, match="is a link to nothing"):
        require_parent(loaded({"HOME": str(tmp_path)}))
    assert not (tmp_path / "unmounted").exists()


def test_a_link_to_a_directory_is_a_home(tmp_path: Path) -> None:
    (tmp_path / ".local/share").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / ".local/share/kaged").symlink_to(tmp_path / "disk")
    assert require_parent(loaded({"HOME": str(tmp_path)})) is False


def test_a_name_too_long_is_an_error_of_kaged() -> None:
    with pytest.raises(KagedError, match="File name too long"):
        require_parent(loaded(url=f"sqlite:////{'a' * 300}/kaged.db"))


def as_somebody_else(function: Callable[..., object], *arguments: object, mask: int = 0o022) -> multiprocessing.Process:
    """A process that is not root's and exits 0 if `function` returns, 3 if it may not, else 1."""

    def run() -> None:
        os.umask(mask)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            function(*arguments)
        except StorageForbidden:
            os._exit(3)
        os._exit(0)

    return multiprocessing.get_context("fork").Process(target=run)


@pytest.fixture
def their_place() -> Iterator[Path]:
    """A directory of the account that `as_somebody_else` takes; pytest's own are closed to it."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def test_a_place_that_may_not_be_reached_or_written_is_forbidden_and_not_missing(their_place: Path) -> None:
    for name, mode in (("unwritable", 0o555), ("closed", 0o000)):
        (their_place / name).mkdir()
        (their_place / name).chmod(mode)
    for place, status in (("unwritable/kaged", 3), ("closed/kaged", 3), ("free/kaged", 0)):
        process = as_somebody_else(make_directory, their_place / place)
        process.start()
        process.join()
        assert process.exitcode == status, place


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_several_processes_may_make_the_home_at_once(their_place: Path, mask: int) -> None:
    for turn in range(10):
        home = their_place / str(turn) / "share/kaged"
        processes = [as_somebody_else(make_directory, home, mask=mask) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 6
        assert {mode_of(level) for level in (home, home.parent, home.parent.parent)} == {0o700}
