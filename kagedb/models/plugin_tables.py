"""Tables of a plugin's own: scripts that make and change them, with a ledger, and a handle that can touch only those.

How an engine keeps a statement to them is in kagedb/engines/*_plugins.py; docs/plugin-authors.md says what authors may
rely on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peewee

from ..errors import InvalidValue, KagedError, MigrationFailed, SchemaDrift, SchemaTooNew, StorageError
from ..identity import now_ms
from .base import bound_store
from .plugin import Plugin

_BEGINNING = re.compile(r"(?:\s+|--[^\n]*(?:\n|\Z)|/\*.*?\*/|[;(])*", re.DOTALL)
_ALLOWED = re.compile(
    r"(?:SELECT|VALUES|WITH|EXPLAIN|INSERT|REPLACE|UPDATE|DELETE"
    r"|(?P<schema>CREATE\s+(?:TABLE|INDEX|UNIQUE\s+INDEX|VIEW)|ALTER\s+TABLE|DROP\s+(?:TABLE|INDEX|VIEW)))\b",
    re.IGNORECASE,
)
_READING = re.compile(r"(?:SELECT|VALUES)\b", re.IGNORECASE)
_SCRIPT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Result:
    """What a statement gave: its rows, the names of their columns, and how many rows it changed."""

    rows: list[tuple[Any, ...]]
    columns: list[str]
    rowcount: int

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class PluginDatabase:
    """What `plugin.database()` gives: statements that can touch the plugin's own tables and nothing else."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin

    def __repr__(self) -> str:
        return f"<database of plugin:{self.plugin.id}>"

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Result:
        """Run one statement, with `?` for each parameter; a transaction of its own, or part of the one around it.

        Takes what reads and changes rows, and CREATE, ALTER and DROP of tables, indexes and views. Raises
        StorageForbidden for what is not the plugin's, InvalidValue for another kind of statement, StateError where the
        plugin is uninstalled.
        """
        statement = _Statement(sql)
        database = bound_store().database
        if statement.reads and (not database.in_transaction() or database._state.snapshot):
            level = database.snapshot()
        else:
            level = database.atomic()
        with level:
            self.plugin.state._require_installed()
            return statement.run(database, self.plugin.name, parameters)

    @contextmanager
    def transaction(self) -> Iterator[PluginDatabase]:
        """Several statements as one: all of them or none. The plugin's state may be changed in it as well."""
        with bound_store().transaction():
            yield self

    def tables(self) -> list[str]:
        """The names of the plugin's tables, in order."""
        database = bound_store().database
        found: list[str] = database.plugins.tables(self.plugin.name)
        database.statement_done()
        return found

    def migrate(self, scripts: Mapping[str, str]) -> list[str]:
        """Run the scripts that have not been run yet, in their order and one transaction; the names of those.

        A script is SQL in which `{integer}`, `{real}`, `{text}`, `{json}`, `{blob}`, `{boolean}` and `{ulid}` stand for
        the engine's types and `{strict}` comes after a table's closing bracket; braces of its own are written double.
        Raises MigrationFailed, and then nothing has changed; SchemaDrift where a script is not what was run under its
        name; SchemaTooNew where scripts were run that are not among these.
        """
        for name in scripts:
            if not _SCRIPT_NAME.fullmatch(name):
                raise InvalidValue(f"the script name {name[:60]!r} is not usable", "write it like 0001_readings")
        ledger = ledger_of(self.plugin.name)
        with bound_store().transaction():
            applied = self._ledger(ledger)
            pending = self._pending(scripts, applied)
            types = bound_store().database.ddl.types
            if pending and not applied:
                self.execute(_ledger_statement(self.plugin.name).format(**types))
            for number, name in enumerate(pending, len(applied) + 1):
                try:
                    for statement in bound_store().database.split(scripts[name]):
                        self.execute(statement.format(**types))
                except (KagedError, peewee.PeeweeException, LookupError, ValueError) as error:
                    raise self._failed(name, error) from error
                self.execute(
                    f"INSERT INTO {ledger} (script, number, checksum, source, applied_at) VALUES (?, ?, ?, ?, ?)",  # noqa: S608
                    (name, number, _checksum(scripts[name]), scripts[name], now_ms()),
                )
        return pending

    def _failed(self, name: str, error: Exception) -> Exception:
        if isinstance(error, StorageError) and not isinstance(error, MigrationFailed) and error.exit_status != 1:
            return error  # the store is busy, away or damaged: no fault of the script
        text = error.message if isinstance(error, KagedError) else str(error) or repr(error)
        hint = error.hint if isinstance(error, KagedError) else "mend the script, and migrate again"
        shown = " ".join(text.split())
        return MigrationFailed(
            f"the script {name} of the plugin {self.plugin.name!r} failed, and its tables are as they were: {shown}",
            hint,
        )

    def _ledger(self, ledger: str) -> dict[str, str]:
        """Name and checksum of the scripts that were run."""
        if ledger not in self.tables():
            return {}
        return dict(self.execute(f"SELECT script, checksum FROM {ledger}").rows)  # noqa: S608

    def _pending(self, scripts: Mapping[str, str], applied: dict[str, str]) -> list[str]:
        plugin = self.plugin.name
        unknown = sorted(set(applied) - set(scripts))
        if unknown:
            raise SchemaTooNew(
                f"the tables of the plugin {plugin!r} were made by a newer version: {', '.join(unknown)[:200]}",
                "use that version of the plugin",
            )
        names = list(scripts)
        done = [name for name in names if name in applied]
        for name in done:
            if applied[name] != _checksum(scripts[name]):
                raise SchemaDrift(
                    f"the script {name} of the plugin {plugin!r} is not what was run under that name",
                    "leave scripts as they were released, and write a new one",
                )
        if names[: len(done)] != done:
            raise SchemaDrift(
                f"a new script of the plugin {plugin!r} comes before {done[-1]}, which was run", "put it at the end"
            )
        return names[len(done) :]


class _Statement:
    """One statement of a plugin. Raises InvalidValue for a kind that it may not run."""

    def __init__(self, sql: str) -> None:
        beginning = _BEGINNING.match(sql)
        text = sql[beginning.end() :] if beginning else sql
        allowed = _ALLOWED.match(text)
        if allowed is None or "set_config" in sql.lower():
            raise InvalidValue(
                f"a plugin cannot run the statement {' '.join(text.split())[:60]!r}",
                "it can read and change rows, and create, alter and drop tables, indexes and views",
            )
        self.sql = sql
        self.reads = _READING.match(text) is not None
        self._changes_schema = allowed["schema"] is not None

    def run(self, database: Any, plugin: str, parameters: Sequence[Any] = ()) -> Result:
        """Inside a transaction or snapshot of the database."""
        with database.plugins.confine(plugin, changes_schema=self._changes_schema):
            cursor = database.execute_sql(database.dialect(self.sql), tuple(parameters))
            rows = [tuple(map(_plain, row)) for row in cursor.fetchall()] if cursor.description else []
            columns = [column[0] for column in cursor.description or ()]
            return Result(rows, columns, cursor.rowcount)


def ledger_of(plugin: str) -> str:
    """The name of the table that notes which scripts of the plugin were run, and their text."""
    return f"p_{plugin}__migration"


def make_tables(database: Any, plugin: str, scripts: Mapping[str, str]) -> None:
    """Make a plugin's tables in another store than the open one, by the scripts that were run in this one.

    Inside a transaction of that store; the ledger stays empty. Raises MigrationFailed where its engine does not take a
    script, StorageForbidden where the operator has to grant something.
    """
    types = database.ddl.types
    _Statement(_ledger_statement(plugin).format(**types)).run(database, plugin)
    for name, source in scripts.items():
        try:
            for statement in database.split(source):
                _Statement(statement.format(**types)).run(database, plugin)
        except (KagedError, peewee.PeeweeException, LookupError, ValueError) as error:
            shown = " ".join((error.message if isinstance(error, KagedError) else str(error)).split())
            raise MigrationFailed(
                f"the script {name} of the plugin {plugin!r} does not run there: {shown}",
                "let the plugin export its tables, uninstall it, copy, and install it again",
            ) from error


def _ledger_statement(plugin: str) -> str:
    # The texts, so that a copy of the store on another engine can be given the same tables in that engine's types.
    return (
        f"CREATE TABLE IF NOT EXISTS {ledger_of(plugin)} (script {{text}} NOT NULL PRIMARY KEY,"
        " number {integer} NOT NULL, checksum {text} NOT NULL, source {text} NOT NULL, applied_at {integer} NOT NULL)"
        " {strict}"
    )


def drop_tables(plugin: Plugin) -> list[str]:
    """Drop the tables of a plugin that no project has any more; their names. Inside the caller's transaction."""
    others = Plugin.select().where(
        (Plugin.name == plugin.name) & (Plugin.id != plugin.id) & Plugin.removed_at.is_null()
    )
    if others.exists():
        return []
    plugins = bound_store().database.plugins
    gone: list[str] = plugins.tables(plugin.name)
    if gone:
        plugins.drop(plugin.name)
    return gone


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


def _checksum(script: str) -> str:
    return hashlib.sha256(script.encode()).hexdigest()
