"""Engine-specific DDL from one source: column types, STRICT, and the triggers that guard what may never change.

Migration scripts write tables once, as SQL with `{ulid}`, `{integer}`, `{real}`, `{text}`, `{json}`, `{blob}`,
`{boolean}` for the column types and `{strict}` after the closing bracket; guards once, as a condition over NEW and OLD;
and views once, as a query with `{utc[column]}`, `{hex[column]}` and `{as_text[column]}` for what reads well of a time,
of bytes and of JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import MigrationFailed
from .engine import PLUGIN_TABLE

if TYPE_CHECKING:
    from .database import StoreDatabase

REFUSAL = "kagedb: "
"""How the message of every guard begins, so that the engines can tell a guard's refusal from other constraints."""


LAST_MILLISECOND = 253_402_300_799_999
"""The end of the year 9999: later ones, and those before 1970, stay numbers where times are shown as text."""

_IS_A_DATE = f"? BETWEEN 0 AND {LAST_MILLISECOND}"


class Word:
    """SQL around an expression: `{utc[run.started_at]}` in a statement is the word `utc` around that column."""

    def __init__(self, template: str) -> None:
        self.template = template

    def __getitem__(self, expression: str) -> str:
        return self.template.replace("?", expression)


class DDL:
    """What a migration script may do besides Peewee's native operations; one for each engine."""

    types: dict[str, str]
    words: dict[str, Word]
    same: str
    """The operator that is true for equal values and for two NULLs."""

    def __init__(self, database: StoreDatabase) -> None:
        self.database = database

    def run(self, *statements: str) -> None:
        """Run each statement with the engine's types and words filled in; braces of its own are written double."""
        for statement in statements:
            self.database.raw(statement.format(**self.types, **self.words))

    def views(self, queries: Mapping[str, str]) -> None:
        """Make views: name to the query that each stands for. They are part of the schema like tables.

        A query joins at least two tables: PostgreSQL lets nobody write through such a view, and all its versions say
        the query alike (before 16 they name the table before each column even where there is one).
        """
        for name, query in queries.items():
            self.run(f'CREATE VIEW "{name}" AS {query}')
            self._try_view(name)

    def drop_views(self, *names: str) -> None:
        """Remove views, for a script that makes them anew."""
        for name in names:
            self.database.raw(f'DROP VIEW "{name}"')

    @contextmanager
    def views_aside(self) -> Iterator[None]:
        """No view is there while the block lasts; afterwards each is made again as it was.

        For a script that changes what views stand on: neither engine drops or retypes a column under one. A view that
        shows a column that goes is dropped before, and made anew after the block.
        """
        kept = self._views()
        self.drop_views(*(name for name, _ in reversed(kept)))
        yield
        for name, statements in kept:
            for statement in statements:
                self.database.raw(statement)
            if not PLUGIN_TABLE.match(name):
                self._try_view(name)

    def _try_view(self, name: str) -> None:
        # SQLite makes a view of a column that is not there, and lets whoever asks it find out.
        self.database.raw(f'SELECT * FROM "{name}" LIMIT 0')  # noqa: S608

    def _views(self) -> list[tuple[str, list[str]]]:
        """Every view, oldest first, and the statements that make it."""
        raise NotImplementedError

    def reshape(self, table: str, *, body: str, columns: Mapping[str, str], alter: Iterable[str]) -> None:
        """Change a table in a way for which only PostgreSQL has statements: a type, a key, NOT NULL, a constraint.

        The change is written twice. SQLite gets a new table of that name: `body` is what follows `CREATE TABLE name`,
        and `columns` maps each column to be filled to an SQL expression over a row of the old table; every row, index,
        guard and view is carried over. (An index over a column that goes, or a view that shows it, is dropped by the
        script before.) PostgreSQL runs the statements `alter`, with the views aside. The comparison with the known
        catalogues shows where the two do not agree.
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
    # CAST: without it SQLite would compare a column of a view with the number 2026 as that, and all text is more.
    words = {  # noqa: RUF012
        "utc": Word(
            f"CAST(CASE WHEN {_IS_A_DATE} THEN strftime('%Y-%m-%d %H:%M:%fZ', ? / 1000.0, 'unixepoch')"
            " ELSE ? END AS TEXT)"
        ),
        "hex": Word("CAST(CASE WHEN ? IS NOT NULL THEN lower(hex(?)) END AS TEXT)"),
        "as_text": Word("?"),
        "listed": Word("CAST(group_concat(?, ', ') AS TEXT)"),
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
            " AND (type = 'trigger' OR (type = 'index' AND tbl_name = ?)) ORDER BY type, rowid",
            (table,),
        ).fetchall()
        for kind, name, _ in kept:
            if kind == "trigger":
                raw(f'DROP TRIGGER "{name}"')
        with self.views_aside():
            self._rebuild(table, body, columns)
        for _, _, text in kept:
            raw(text)

    def _rebuild(self, table: str, body: str, columns: Mapping[str, str]) -> None:
        raw = self.database.raw
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

    def _views(self) -> list[tuple[str, list[str]]]:
        rows = self.database.raw("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY rowid")
        return [(name, [text]) for name, text in rows.fetchall()]


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
    # Half a millisecond more: a product with an interval is rounded to what a float holds, and to_char cuts off. "C",
    # because what is made of numbers would sort by the rules of the database.
    words = {  # noqa: RUF012
        "utc": Word(
            f"(CASE WHEN {_IS_A_DATE} THEN to_char(TIMESTAMP 'epoch' + (? + 0.5) * INTERVAL '1 millisecond',"
            ' \'YYYY-MM-DD HH24:MI:SS.MS"Z"\') ELSE ?::text END) COLLATE "C"'
        ),
        "hex": Word("encode(?, 'hex') COLLATE \"C\""),
        "as_text": Word('?::text COLLATE "C"'),
        "listed": Word("string_agg(?, ', ')"),
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
        with self.views_aside():
            self.run(*alter)

    def _views(self) -> list[tuple[str, list[str]]]:
        made = self.database.raw(_VIEWS, (self.schema,)).fetchall()
        # What an operator let others read stays so: whose view it is does not change.
        granted = self.database.raw(_VIEW_GRANTS, (self.schema,)).fetchall()
        return [(name, [text, *(grant for view, grant in granted if view == name)]) for name, text in made]


_VIEWS = (
    "SELECT c.relname, 'CREATE VIEW ' || quote_ident(c.relname) || ' AS ' || pg_get_viewdef(c.oid) FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ? AND c.relkind = 'v' ORDER BY c.oid"
)
_VIEW_GRANTS = (
    "SELECT c.relname, 'GRANT ' || a.privilege_type || ' ON ' || quote_ident(c.relname) || ' TO '"
    " || CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END"
    " || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL aclexplode(c.relacl) a"
    " WHERE n.nspname = ? AND c.relkind = 'v' AND a.grantee <> c.relowner"
)
