"""Peewee's migration runner, with what it lacks: one transaction for all scripts, and a history with checksums.

Imported only where scripts are pending: playhouse.migrations and what it brings cost 10 ms.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import peewee
from playhouse.migrations import Migration, Runner

from .engines.engine import HISTORY_TABLE
from .errors import MigrationFailed
from .fields import MillisField, TextField
from .identity import now_ms
from .models.base import TableMaker

if TYPE_CHECKING:
    from .schema import Script


NOT_EVERYWHERE = (
    "add_not_null",
    "drop_not_null",
    "add_column_default",
    "drop_column_default",
    "alter_column_type",
    "add_constraint",
    "drop_constraint",
    "add_unique",
    "add_foreign_key_constraint",
    "drop_foreign_key_constraint",
)
"""Peewee's operations for which SQLite has no statement, or only since 3.53. Before that Peewee rebuilds the table from
its text, which loses STRICT, checks and triggers without a word. Refused on both engines: a script fails on all hosts,
the author's first, or on none."""


class ScriptRunner(Runner):  # type: ignore[misc]
    """Runs the pending ones of `scripts` inside the caller's transaction and adds them to the history."""

    def __init__(self, database: Any, scripts: list[Script], applied: set[str], version: str) -> None:
        super().__init__(database, table_name=HISTORY_TABLE)
        self._scripts = {script.name: script for script in scripts}
        self._applied = applied
        self._version = version

        class History(peewee.Model):  # type: ignore[misc]
            name = TextField(primary_key=True)
            checksum = TextField()
            applied_at = MillisField()
            version = TextField()

            class Meta:
                table_name = HISTORY_TABLE
                schema_manager_class = TableMaker

        History._meta.set_database(database)
        self.History = History
        for name in NOT_EVERYWHERE:
            setattr(self.migrator, name, partial(_refuse, name))

    def migrations(self) -> list[Any]:
        return [
            Migration(index, script.name, str(script.path), None) for index, script in enumerate(self._scripts.values())
        ]

    def applied(self) -> dict[str, Any]:
        return dict.fromkeys(self._applied, True)

    def _run(self, name: str, module: Any, direction: str, fake: bool = False) -> None:
        # Peewee's own wraps each script in a transaction of its own; ours is around all of them.
        module.up(self.migrator, self.database)
        self.History.insert(
            name=name, checksum=self._scripts[name].checksum, applied_at=now_ms(), version=self._version
        ).execute()


def _refuse(name: str, table: str, *_: Any, **__: Any) -> None:
    raise MigrationFailed(f"a script asked for {name} on {table}, which not every engine has", "use db.ddl.reshape")
