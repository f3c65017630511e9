"""kagedb: the storage of kaged, a self-hosted agent daemon. SQLite by default, PostgreSQL by one setting.

    storage = kagedb.connect()
    with storage.transaction():
        ...

Everything public is here; each part is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .errors import *  # noqa: F403
    from .fields import json_text as json_text
    from .models import *  # noqa: F403
    from .storage import Change as Change
    from .storage import Storage as Storage
    from .storage import connect as connect

_HOMES = {
    "storage": ("connect", "Storage", "Change"),
    "fields": ("json_text",),
    "models": (
        "AuditEvent",
        "AuditSeal",
        "Checkpoint",
        "Plugin",
        "Project",
        "ProjectConfig",
        "Prompt",
        "PromptLabel",
        "PromptLabelMove",
        "PromptVersion",
        "Run",
        "RunNode",
        "Session",
        "Transcript",
    ),
    "errors": (
        "AlreadyExists",
        "Conflict",
        "ImmutableError",
        "InvalidValue",
        "KagedError",
        "LimitExceeded",
        "MigrationFailed",
        "NotFound",
        "ReadOnlyStorage",
        "SchemaDrift",
        "SchemaError",
        "SchemaTooNew",
        "SchemaTooOld",
        "SettingsError",
        "StateError",
        "StorageBusy",
        "StorageClosed",
        "StorageCorrupt",
        "StorageError",
        "StorageForbidden",
        "StorageFull",
        "StorageInUse",
        "StorageNotFound",
        "StorageUnavailable",
        "TransactionError",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
