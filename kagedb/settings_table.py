"""The table of settings: each with its default, its limits and its help, in the order in which they are shown.

What a setting is, and how a config file is read, is config.py; what is in force, and why, is settings.py.
"""

from __future__ import annotations

from .config import Number, Setting, Text
from .url import SQLITE_FORM, StorageURL, is_absolute

TYPE_CHECKING = False  # type checkers take it for true; importing `typing` for it costs 2.5 ms
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

_HOUR_MS = 3_600_000
_MIB = 1024 * 1024


class _StoreURL(Setting):
    def __get__(self, settings: Any, owner: type) -> StorageURL:
        url: StorageURL = settings._url
        return url


class _BackupDirectory(Setting):
    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and is_absolute(value)

    def __get__(self, settings: Any, owner: type) -> Path:
        directory: Path = settings._backup_directory
        return directory


class _ProgramDirectory(Setting):
    """Empty where nothing is set: then PATH says where they are."""

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and is_absolute(value)

    def __get__(self, settings: Any, owner: type) -> str:
        return str(settings.values.get(self.name, ""))


class SettingsTable:
    """Every setting there is, section by section; its value by its attribute on `kagedb.settings.Settings`."""

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
