"""Plugins' own tables in a copy of a store: made there by the plugin's own scripts, in that engine's types.

The ledger of each plugin keeps the text of its scripts. What no kept script made cannot be made elsewhere, and is
refused before anything is begun. The rows are carried over like all others (transfer.py).
"""

from __future__ import annotations

import hashlib
import re

from ..engines.archive import Contents, Table
from ..engines.engine import Engine
from ..errors import AlreadyExists, StateError
from ..models.plugin_tables import ledger_of, make_tables

INSTEAD = "let the plugin export them, uninstall it, copy, and install it again"

Scripts = dict[str, dict[str, str]]
"""Plugin to its scripts, name to text, in the order in which they were run."""


def kept_scripts(contents: Contents, own: set[str]) -> Scripts:
    """What made the tables of plugins; `own` are those of the store itself. Raises StateError for what none made."""
    names = sorted((row[0] for row in contents.raw("SELECT DISTINCT name FROM plugin").fetchall()), key=len)
    found: Scripts = {}
    tables = {table.name: table for table in contents.tables() if table.name not in own}
    for name in tables:
        # The longest: "a" and "a__b" may both be plugins.
        plugin = next((one for one in reversed(names) if name.startswith(f"p_{one}__")), None)
        if plugin is None:
            raise StateError(
                f"the table {name} is none of the store's and of no plugin, so that it is not carried over",
                "move it to a database of its own",
            )
        if plugin not in found:
            found[plugin] = _scripts(contents, tables.get(ledger_of(plugin)))
        texts = "".join(found[plugin].values())
        if name != ledger_of(plugin) and not re.search(rf"\b{re.escape(name)}\b", texts, re.IGNORECASE):
            raise StateError(
                f"the plugin {plugin!r} has a table that no script of its own made, so that it is not carried over:"
                f" {name}",
                INSTEAD,
            )
    return found


def _scripts(contents: Contents, ledger: Table | None) -> dict[str, str]:
    if ledger is None or not {"number", "script", "checksum", "source"} <= set(ledger.columns):
        return {}
    places = [ledger.columns.index(column) for column in ("number", "script", "checksum", "source")]
    rows = sorted(tuple(row[place] for place in places) for row in contents.rows(ledger))
    for _, name, checksum, source in rows:
        if hashlib.sha256(source.encode()).hexdigest() != checksum:
            raise StateError(f"the text of the script {name} in {ledger.name} is not what was run", INSTEAD)
    return {name: source for _, name, _, source in rows}


def require_granted(target: Engine, scripts: Scripts) -> None:
    """Raises StorageForbidden, with the SQL to run, where the place lacks what a plugin needs for tables."""
    for plugin in scripts:
        target.database.plugins.require_granted(plugin)


def make(target: Engine, scripts: Scripts) -> None:
    """The tables of plugins, in the place's transaction. Raises AlreadyExists, MigrationFailed."""
    for plugin, texts in scripts.items():
        if there := target.database.plugins.tables(plugin):
            raise AlreadyExists(
                f"{target.place} has tables of the plugin {plugin!r} already: {', '.join(there)}",
                "drop them there, or name another place",
            )
        make_tables(target.database, plugin, texts)
