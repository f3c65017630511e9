"""Engine-specific DDL from one source: column types, STRICT, and the triggers that guard what may never change.

Migration scripts write tables once, as SQL with `{ulid}`, `{integer}`, `{real}`, `{text}`, `{json}`, `{blob}`,
`{boolean}` for the column types and `{strict}` after the closing bracket, and guards once, as a condition over NEW and
OLD.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import MigrationFailed

if TYPE_CHECKING:
    from .database import StoreDatabase

REFUSAL = "kagedb: "
"""How the message of every guard begins, so that the engines can tell a guard's refusal from other constraints."""


class DDL:
    """What a migration script may do besides Peewee's native operations; one for each engine."""

    types: dict[str, str]
    same: str
    """The operator that is true for equal values and for two NULLs."""

    def __init__(self, database: StoreDatabase) -> None:
        self.database = database

    def run(self, *statements: str) -> None:
        """Run each statement with the engine's column types filled in; braces of its own are written double."""
        for statement in statements:
            self.database.raw(statement.format(**self.types))

    def reshape(self, table: str, *, body: str, columns: Mapping[str, str], alter: Iterable[str]) -> None:
        """Change a table in a way for which only PostgreSQL has statements: a type, a key, NOT NULL, a constraint.

        The change is written twice. SQLite gets a new table of that name: `body` is what follows `CREATE TABLE name`,
        and `columns` maps each column to be filled to an SQL expression over a row of the old table; every row, index,
        guard and view is carried over. (An index over a column that goes is dropped by the script before.) PostgreSQL
        runs the statements `alter`. The comparison with the known catalogues shows where the two do not agree.
        """
        raise NotImplementedError

    def guard(self, table: str, event: str, why: str, *, unless: str = "") -> None:
        """Refuse `event` (insert, update or delete) of a row of `table`, except where the SQL condition `unless` holds.

        `unless` may use NEW, OLD and the tables of the store, in words that both engines know. `why` is what the
        refused caller reads.
        """
        raise NotImplementedError

    def keep_forever(self, table: str, why: str, *, keys: Iterable[tuple[str, ...]]) -> None:
        """Rows of `table` can be inserted and never change or go, not by REPLACE or TRUNCATE either.

        `keys` are the columns of each unique key, the primary one included.
        """
        self.guard(table, "update", why)
        self.guard(table, "delete", why)
        self.no_replace(table, why, keys=keys)
        self.no_truncate(table, why)

    def no_replace(self, table: str, why: str, *, keys: Iterable[tuple[str, ...]]) -> None:
        """Close SQLite's way around UPDATE and DELETE triggers, REPLACE; PostgreSQL has none."""
        raise NotImplementedError

    def no_truncate(self, table: str, why: str) -> None:
        """Close PostgreSQL's way around DELETE triggers, TRUNCATE; SQLite has none."""
        raise NotImplementedError

    def unchanged(self, *columns: str) -> str:
        """The condition that NEW and OLD agree in `columns`, NULL or not."""
        return " AND ".join(f"NEW.{column} {self.same} OLD.{column}" for column in columns)

    def drop_guard(self, table: str, event: str) -> None:
        """Remove a guard, for a script that changes one."""
        raise NotImplementedError


def guard_name(table: str, event: str) -> str:
    return f"{table}_guard_{event}"


def _literal(why: str) -> str:
    """What a refused caller reads, as an SQL string."""
    return "'" + (REFUSAL + why).replace("'", "''") + "'"


class SqliteDDL(DDL):
    types = {  # noqa: RUF012
        "ulid": "TEXT",
        "integer": "INTEGER",
        "real": "REAL",
        "text": "TEXT",
        "json": "TEXT",
        "blob": "BLOB",
        "boolean": "INTEGER",
        "strict": "STRICT",
    }
    same = "IS"

    def guard(self, table: str, event: str, why: str, *, unless: str = "") -> None:
        # COALESCE: a condition that is NULL has not been met.
        when = f" WHEN NOT COALESCE(({unless}), 0)" if unless else ""
        self.database.raw(
            f'CREATE TRIGGER "{guard_name(table, event)}" BEFORE {event.upper()} ON "{table}"{when} '
            f"BEGIN SELECT RAISE(ABORT, {_literal(why)}); END"
        )

    def no_replace(self, table: str, why: str, *, keys: Iterable[tuple[str, ...]]) -> None:
        # REPLACE deletes the old row without firing DELETE triggers (unless recursive_triggers is on, which another
        # program's connection need not have), but BEFORE INSERT fires first. The rowid is a key too, that an INSERT
        # may name; where it does not, NEW.rowid is -1.
        taken = " OR ".join(
            "(" + " AND ".join(f'"{column}" = NEW."{column}"' for column in columns) + ")"
            for columns in (*keys, ("rowid",))
        )
        self.guard(table, "insert", why, unless=f'NOT EXISTS (SELECT 1 FROM "{table}" WHERE {taken})')  # noqa: S608

    def no_truncate(self, table: str, why: str) -> None:
        pass

    def drop_guard(self, table: str, event: str) -> None:
        self.database.raw(f'DROP TRIGGER "{guard_name(table, event)}"')

    def reshape(self, table: str, *, body: str, columns: Mapping[str, str], alter: Iterable[str]) -> None:
        # The procedure of sqlite.org/lang_altertable.html section 7. Foreign keys are off and checked at the end by
        # whoever began the transaction; with them on, the DROP below would delete what refers to the table.
        raw = self.database.raw
        if raw("PRAGMA foreign_keys").fetchone()[0]:
            raise MigrationFailed(f"{table} cannot be reshaped outside a migration", "put it into a script")
        # Triggers and views of other tables may name this one too, and would not let it be renamed into place.
        kept = raw(
            "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
            " AND (type IN ('trigger', 'view') OR (type = 'index' AND tbl_name = ?)) ORDER BY rowid",
            (table,),
        ).fetchall()
        for kind, name, _ in kept:
            if kind == "trigger":
                raw(f'DROP TRIGGER "{name}"')
        for kind, name, _ in kept:
            if kind == "view":
                raw(f'DROP VIEW "{name}"')
        rows = raw(f'SELECT COUNT(*) FROM "{table}"').fetchone()[0]  # noqa: S608
        self.run(f'CREATE TABLE "kaged_new_{table}" {body}')
        names = ", ".join(f'"{column}"' for column in columns)
        values = ", ".join(columns.values())
        raw(f'INSERT INTO "kaged_new_{table}" ({names}) SELECT {values} FROM "{table}"')  # noqa: S608
        copied = raw(f'SELECT COUNT(*) FROM "kaged_new_{table}"').fetchone()[0]  # noqa: S608
        if copied != rows:
            raise MigrationFailed(f"{copied} of the {rows} rows of {table} reached its new shape", "report it")
        raw(f'DROP TABLE "{table}"')
        raw(f'ALTER TABLE "kaged_new_{table}" RENAME TO "{table}"')
        for kind in ("index", "view", "trigger"):
            for found, _, text in kept:
                if found == kind:
                    raw(text)


class PostgresDDL(DDL):
    types = {  # noqa: RUF012
        "ulid": 'TEXT COLLATE "C"',
        "integer": "BIGINT",
        "real": "DOUBLE PRECISION",
        "text": 'TEXT COLLATE "C"',
        "json": "JSON",
        "blob": "BYTEA",
        "boolean": "BOOLEAN",
        "strict": "",
    }
    same = "IS NOT DISTINCT FROM"

    def __init__(self, database: StoreDatabase, schema: str) -> None:
        super().__init__(database)
        self.schema = schema

    def guard(self, table: str, event: str, why: str, *, unless: str = "") -> None:
        self._trigger(table, event, "ROW", why, unless)

    def no_replace(self, table: str, why: str, *, keys: Iterable[tuple[str, ...]]) -> None:
        pass

    def no_truncate(self, table: str, why: str) -> None:
        self._trigger(table, "truncate", "STATEMENT", why, "")

    def _trigger(self, table: str, event: str, level: str, why: str, unless: str) -> None:
        name = guard_name(table, event)
        row = {"insert": "NEW", "update": "NEW", "delete": "OLD", "truncate": "NULL"}[event]
        refuse = f"RAISE EXCEPTION USING MESSAGE = {_literal(why)}, ERRCODE = 'integrity_constraint_violation';"
        body = f"IF NOT COALESCE(({unless}), FALSE) THEN {refuse} END IF; RETURN {row};" if unless else refuse
        # The path is pinned: a session with another one must not make the condition look at other tables. ALWAYS:
        # session_replication_role = replica switches ordinary triggers off.
        self.database.raw(
            f'CREATE FUNCTION "{name}"() RETURNS trigger LANGUAGE plpgsql SET search_path = "{self.schema}" '
            f"AS $kagedb$ BEGIN {body} END $kagedb$"
        )
        self.database.raw(
            f'CREATE TRIGGER "{name}" BEFORE {event.upper()} ON "{table}" FOR EACH {level} EXECUTE FUNCTION "{name}"()'
        )
        self.database.raw(f'ALTER TABLE "{table}" ENABLE ALWAYS TRIGGER "{name}"')

    def drop_guard(self, table: str, event: str) -> None:
        self.database.raw(f'DROP TRIGGER "{guard_name(table, event)}" ON "{table}"')
        self.database.raw(f'DROP FUNCTION "{guard_name(table, event)}"()')

    def reshape(self, table: str, *, body: str, columns: Mapping[str, str], alter: Iterable[str]) -> None:
        self.run(*alter)
