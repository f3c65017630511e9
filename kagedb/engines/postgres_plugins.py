"""Plugins' own tables on PostgreSQL: in a schema of the plugin's own, touched as a role that may use nothing else.

The operator makes both. The role is taken for one statement and left again; it keeps a plugin from what is not its own
by mistake, not a program that is out to break in: SQL can ask for the session's first role again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import StorageForbidden
from .database import StoreDatabase
from .plugins import PluginTables, prefix, refusal

NAME_BYTES = 63
"""What PostgreSQL keeps of a name (NAMEDATALEN - 1)."""


class PostgresPluginTables(PluginTables):
    def __init__(self, database: StoreDatabase, schema: str) -> None:
        super().__init__(database)
        self.schema = schema
        self._granted: set[str] = set()

    def _role(self, plugin: str) -> str:
        """The name of both the plugin's role and its schema."""
        name = f"{self.schema}_p_{plugin}"
        if len(name) > NAME_BYTES:
            raise StorageForbidden(
                f"the role and schema of the plugin {plugin!r} would be named {name}, which PostgreSQL cuts off",
                "choose a shorter storage.schema",
            )
        return name

    @contextmanager
    def confine(self, plugin: str, *, changes_schema: bool) -> Iterator[None]:
        raw = self.database.raw
        role = self._role(plugin)
        self._require_grant(plugin, role)
        before = raw("SELECT current_setting('role')").fetchone()[0]
        raw(f'SET search_path = "{role}"; SET ROLE "{role}"')
        try:
            yield
        except StorageForbidden as error:
            raise refusal(plugin, error.message) from error
        now = raw("SELECT current_setting('role'), current_setting('search_path')").fetchone()
        if tuple(now) != (role, role):
            raise refusal(plugin, "to change its role or search_path")
        # Not LOCAL, in case that a statement was not either: what is said last is what stays after the commit.
        role_before = "NONE" if before == "none" else f'"{before}"'
        raw(f'SET ROLE {role_before}; SET search_path = "{self.schema}"')
        if changes_schema:
            self._check_schema(plugin, role)

    def _require_grant(self, plugin: str, role: str) -> None:
        if role in self._granted:
            return
        row = self.database.raw(
            "SELECT current_user::text, r.oid IS NOT NULL, pg_has_role(r.oid, 'MEMBER'), n.nspowner = r.oid,"
            " r.rolsuper OR pg_has_role(r.rolname, current_user, 'MEMBER')"
            " FROM (SELECT 1) one LEFT JOIN pg_roles r ON r.rolname = ? LEFT JOIN pg_namespace n ON n.nspname = ?",
            (role, role),
        ).fetchone()
        me, exists, member, owns, mighty = row
        # A role is one for all databases of the server, a schema is not.
        lacking = [] if exists else [f'CREATE ROLE "{role}" NOLOGIN;']
        lacking += [] if member else [f'GRANT "{role}" TO "{me}";']
        if owns is None:
            lacking.append(f'CREATE SCHEMA "{role}" AUTHORIZATION "{role}";')
        elif not owns:
            lacking.append(f'ALTER SCHEMA "{role}" OWNER TO "{role}";')
        if lacking:
            raise StorageForbidden(
                f"the plugin {plugin!r} has no role and schema of its own in the PostgreSQL database",
                f"let somebody who may run: {' '.join(lacking)}",
            )
        if mighty:
            raise StorageForbidden(
                f'the role "{role}" may do more than touch the tables of the plugin {plugin!r}',
                "make it an ordinary role that is a member of no other",
            )
        self._granted.add(role)

    def _check_schema(self, plugin: str, role: str) -> None:
        row = self.database.raw(
            "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE pg_get_userbyid(c.relowner) = ? AND n.nspname NOT LIKE 'pg\\_%'"
            " AND NOT (n.nspname = ? AND starts_with(c.relname, ?)) LIMIT 1",
            (role, role, prefix(plugin)),
        ).fetchone()
        if row is not None:
            raise refusal(plugin, row[0])

    def require_granted(self, plugin: str) -> None:
        self._require_grant(plugin, self._role(plugin))
        self.database.statement_done()

    def tables(self, plugin: str) -> list[str]:
        return [name for kind, name in self._objects(plugin) if kind == "r"]

    def _objects(self, plugin: str) -> list[tuple[str, str]]:
        """Kind (pg_class.relkind) and name of each table and view."""
        return list(
            self.database.raw(
                "SELECT c.relkind::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE n.nspname = ? AND c.relkind IN ('r', 'v') AND starts_with(c.relname, ?) ORDER BY c.relname",
                (f"{self.schema}_p_{plugin}", prefix(plugin)),
            ).fetchall()
        )

    def drop(self, plugin: str) -> None:
        objects = self._objects(plugin)
        if not objects:
            return
        with self.confine(plugin, changes_schema=True):
            for kind, name in objects:
                self.database.raw(f'DROP {"VIEW" if kind == "v" else "TABLE"} IF EXISTS "{name}" CASCADE')
