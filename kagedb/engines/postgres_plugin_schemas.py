"""The schemas of plugins while a backup set is brought back: laid aside with the store's own, and given to their roles.

All of it inside the one transaction of the restore, so that whatever is refused here has changed nothing. How a plugin
is kept to its schema is in postgres_plugins.py, how the store's own schema is exchanged in postgres_archive.py.
"""

from __future__ import annotations

import hashlib
import re

from ..errors import StorageForbidden
from .postgres_contents import Ask, plugin_schemas
from .postgres_plugins import NAME_BYTES
from .sqlite_contents import quoted

_CREATED = re.compile(r'^CREATE SCHEMA "?(\w+)"?;$', re.MULTILINE)

# Sequences that belong to a column change hands with their table; somebody else's table stays his.
_RELATIONS = (
    "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = to_regnamespace(?)"
    " AND pg_has_role(c.relowner, 'USAGE') AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')"
    " AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE c.relkind = 'S' AND d.classid = 'pg_class'::regclass"
    " AND d.objid = c.oid AND d.deptype IN ('a', 'i')) ORDER BY 1"
)


class PluginSchemas:
    """Those of the store in `schema`, and those that a set brings."""

    def __init__(self, ask: Ask, schema: str) -> None:
        self._ask = ask
        self._schema = schema
        self._before: list[str] = []
        self.brought: list[str] = []

    def move_aside(self, kept: str) -> None:
        """Rename what is there, as a part of the old store `kept`; it belongs to the storage role from then on.

        A role that has tables outside of its schema could make no more.
        """
        for name, used in plugin_schemas(self._ask, self._schema).items():
            role = self._require_role(name, "the store")
            self._before.append(name)
            if used:
                aside = self._aside(kept, name)
                self._ask(f'ALTER SCHEMA "{name}" RENAME TO "{aside}"')
                self._own(aside, role)
            else:
                self._ask(f'DROP SCHEMA "{name}"')

    def require_roles(self, sql: str) -> None:
        """Look at a piece of a dump before it is run. Raises StorageForbidden where it has tables of a missing role."""
        for name in _CREATED.findall(sql):
            if name.startswith(f"{self._schema}_p_"):
                self._require_role(name, "the set")
                self.brought.append(name)

    def give_back(self) -> None:
        """Plugins that the set knows have their tables, and those that it does not know an empty schema."""
        for name in self.brought:
            self._own(name, name)
        for name in self._before:
            if name not in self.brought:
                self._ask(f'CREATE SCHEMA "{name}" AUTHORIZATION "{name}"')

    def _require_role(self, name: str, whose: str) -> str:
        """Raises StorageForbidden, else gives the name of the storage role."""
        there, granted, me = self._ask(
            "SELECT r.oid IS NOT NULL, COALESCE(pg_has_role(r.oid, 'MEMBER'), FALSE), current_user::text"
            " FROM (SELECT 1) one LEFT JOIN pg_roles r ON r.rolname = ?",
            (name,),
        ).fetchone()
        if not granted:
            plugin = name.removeprefix(f"{self._schema}_p_")
            make = "" if there else f'CREATE ROLE "{name}" NOLOGIN; '
            how = "may not be used" if there else "is not there"
            raise StorageForbidden(
                f"{whose} has tables of the plugin {plugin!r}, whose role {how}; nothing was changed",
                f'let somebody who may run: {make}GRANT "{name}" TO "{me}";',
            )
        return str(me)

    def _own(self, schema: str, role: str) -> None:
        # First the schema: who is given a table must be allowed to make one there.
        self._ask(f'ALTER SCHEMA "{schema}" OWNER TO "{role}"')
        for (name,) in self._ask(_RELATIONS, (quoted(schema),)).fetchall():
            self._ask(f'ALTER TABLE "{schema}".{quoted(name)} OWNER TO "{role}"')

    def _aside(self, kept: str, name: str) -> str:
        aside = kept + name.removeprefix(self._schema)
        if len(aside) <= NAME_BYTES:
            return aside
        digest = hashlib.sha256(aside.encode()).hexdigest()[:8]
        return f"{aside[: NAME_BYTES - 9]}_{digest}"
