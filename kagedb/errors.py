"""Every error a caller can meet, on one page.

Each says what happened, to what, and what mends it: `message` and `hint`. `exit_status` is what `kaged` ends
with when the error reaches it (docs/operators.md lists them). Nothing here imports anything.
"""

from __future__ import annotations

EXIT_FAILED = 1
"""It failed, or a check found something wrong."""
EXIT_USAGE = 2
"""Wrong usage or settings."""
EXIT_DAMAGED = 3
"""A damaged store or backup set."""
EXIT_UNKNOWN = 4
"""It cannot be told."""
EXIT_BUSY = 75
"""Busy or away; try again (EX_TEMPFAIL of sysexits.h, which systemd and mail agents know)."""


class KagedError(Exception):
    """The base of all errors of kagedb.

    `message` is one sentence: what happened, to what. `hint`, where there is one, is the command or setting that
    mends it. Neither ever holds a secret.
    """

    exit_status = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


# Settings and values.


class SettingsError(KagedError):
    """A setting, URL or argument is missing, unknown, mistyped or contradicts another."""

    exit_status = EXIT_USAGE


class InvalidValue(KagedError, ValueError):
    """A value cannot be stored, alike on both engines: wrong type, NUL, lone surrogate, NaN, beyond 64 bits."""

    exit_status = EXIT_USAGE


class LimitExceeded(InvalidValue):
    """A value is larger than a limit allows; the message names the limit and the setting that raises it."""


# What a verb can answer.


class NotFound(KagedError, LookupError):
    """The project, prompt, session or other thing that was named is not in the store."""


class AlreadyExists(KagedError):
    """The name is taken."""


class Conflict(KagedError):
    """A compare-and-set lost: the thing has another revision than the caller expected."""


class StateError(KagedError):
    """The thing is in a state that does not allow the verb: a finished run, an ended session."""


class ImmutableError(KagedError):
    """A write that would change what may never change: an audit event, a prompt version, a config."""


# The open store.


class StorageError(KagedError):
    """The store, not the call, is the trouble."""


class StorageNotFound(StorageError):
    """There is no store at the place that was named."""


class StorageForbidden(StorageError):
    """The store belongs to somebody else, or a permission is missing."""


class StorageInUse(StorageError):
    """Somebody else holds the store: another daemon, or an open store in the way of migrate or restore."""

    exit_status = EXIT_BUSY


class StorageBusy(StorageError):
    """Other writers held the store longer than `storage.busy_timeout_ms`."""

    exit_status = EXIT_BUSY


class StorageUnavailable(StorageError):
    """The database server cannot be reached, or went away during the call."""

    exit_status = EXIT_BUSY


class StorageFull(StorageError):
    """The disk is full (or a quota is reached); nothing of the transaction was kept."""


class StorageCorrupt(StorageError):
    """The file is damaged, or is not a kaged store at all."""

    exit_status = EXIT_DAMAGED


class StorageClosed(StorageError):
    """No store is open, or it was closed."""


class ReadOnlyStorage(StorageError):
    """A write to a store that was opened to be read."""


class TransactionError(StorageError):
    """A transaction was used in a way that could mix or lose writes; nothing was written."""


# Schema.


class SchemaError(StorageError):
    """The schema of the store and this program do not fit together."""


class SchemaTooNew(SchemaError):
    """The store was migrated by a newer kagedb."""


class SchemaTooOld(SchemaError):
    """The store has migrations pending, and this call may not apply them."""


class SchemaDrift(SchemaError):
    """The catalogue is not what the migrations give, or an applied script was edited since."""


class MigrationFailed(SchemaError):
    """A migration failed; the store is as it was."""
