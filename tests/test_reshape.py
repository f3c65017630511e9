"""`db.ddl.reshape` changes what ALTER TABLE of SQLite cannot, and loses no row, reference, index, guard or view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import kagedb
from extra_scripts import ExtraScripts
from kagedb import schema
from kagedb.errors import ImmutableError, MigrationFailed

if TYPE_CHECKING:
    from places import Places

FAMILY = """
db.ddl.run(
    "CREATE TABLE parent (id {ulid} NOT NULL PRIMARY KEY, name {text}, boss {ulid},"
    " FOREIGN KEY (boss) REFERENCES parent (id)) {strict}",
    "CREATE TABLE child (id {ulid} NOT NULL PRIMARY KEY, parent {ulid} NOT NULL,"
    " FOREIGN KEY (parent) REFERENCES parent (id) ON DELETE CASCADE) {strict}",
    "CREATE TABLE other (id {ulid} NOT NULL PRIMARY KEY) {strict}",
    "CREATE INDEX parent_name ON parent (name)",
    "CREATE VIEW named AS SELECT id FROM parent WHERE name IS NOT NULL",
    "INSERT INTO parent (id, name, boss) VALUES ('a', '1', NULL), ('b', NULL, 'a'), ('c', '3', 'b')",
    "INSERT INTO child (id, parent) VALUES ('x', 'a'), ('y', 'b'), ('z', 'c')",
)
db.ddl.guard("parent", "delete", "a parent isn't removed")
db.ddl.guard("other", "insert", "another has a parent", unless="EXISTS (SELECT 1 FROM parent WHERE id = NEW.id)")
"""

RESHAPE = """
db.ddl.reshape(
    "parent",
    body="(id {ulid} NOT NULL PRIMARY KEY, name {integer} NOT NULL, boss {ulid},"
    " FOREIGN KEY (boss) REFERENCES parent (id)) {strict}",
    columns={"id": "id", "name": "CAST(COALESCE(name, '0') AS INTEGER)", "boss": "boss"},
    alter=[
        "UPDATE parent SET name = '0' WHERE name IS NULL",
        "ALTER TABLE parent ALTER COLUMN name TYPE {integer} USING name::bigint",
        "ALTER TABLE parent ALTER COLUMN name SET NOT NULL",
    ],
)
"""


@pytest.fixture
def family_url(scripts: ExtraScripts, migrated_url: str, url: str) -> str:
    scripts.add("9001_family", FAMILY)
    scripts.learn(url)
    kagedb.connect(url=migrated_url).close()
    return migrated_url


def test_a_reshaped_parent_keeps_its_children_index_guards_and_views(
    scripts: ExtraScripts, family_url: str, places: Places, engine: str
) -> None:
    scripts.add("9002_reshape", RESHAPE)
    scripts.learn(places.empty(engine))  # type: ignore[attr-defined]
    with kagedb.connect(url=family_url) as storage:
        ask = storage.database.execute_sql
        assert ask("SELECT id, name, boss FROM parent ORDER BY id").fetchall() == [
            ("a", 1, None),
            ("b", 0, "a"),
            ("c", 3, "b"),
        ]
        assert ask("SELECT id, parent FROM child ORDER BY id").fetchall() == [("x", "a"), ("y", "b"), ("z", "c")]
        assert ask("SELECT COUNT(*) FROM named").fetchone() == (3,)
        with pytest.raises(ImmutableError, match="a parent isn't removed"):
            ask("DELETE FROM parent WHERE id = 'a'")
        with pytest.raises(ImmutableError, match="another has a parent"):
            ask("INSERT INTO other (id) VALUES ('nobody')")
        ask("INSERT INTO other (id) VALUES ('a')")
        found = storage.engine.catalogue()
        before = schema.known_catalogue(storage.engine, "9001_family")
        assert set(before) ^ set(found) == {
            line for line in (*before, *found) if line.startswith("column parent.name ")
        }


@pytest.mark.sqlite_only
def test_a_reshape_that_loses_rows_is_undone(scripts: ExtraScripts, family_url: str) -> None:
    """SQLite alone: PostgreSQL's ALTER TABLE moves no rows."""
    scripts.add(
        "9002_loses",
        """
        db.ddl.reshape(
            "parent",
            body="(id {ulid} NOT NULL PRIMARY KEY ON CONFLICT REPLACE, name {text}, boss {ulid}) {strict}",
            columns={"id": "'same'", "name": "name", "boss": "boss"},
            alter=[],
        )
        """,
    )
    with pytest.raises(MigrationFailed, match="1 of the 3 rows of parent reached its new shape"):
        kagedb.connect(url=family_url)
    with kagedb.connect(url=family_url, read_only=True) as storage:
        assert schema.drift(storage.engine, "9001_family") == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM child").fetchone() == (3,)


def test_a_reshape_that_drops_what_children_refer_to_is_undone(scripts: ExtraScripts, family_url: str) -> None:
    scripts.add(
        "9002_drops",
        """
        db.ddl.reshape(
            "parent",
            body="(id {ulid} NOT NULL PRIMARY KEY, name {text}, boss {ulid},"
            " FOREIGN KEY (boss) REFERENCES parent (id)) {strict}",
            columns={"id": "id || '!'", "name": "name", "boss": "boss"},
            alter=["UPDATE parent SET id = id || '!'"],
        )
        """,
    )
    with pytest.raises(MigrationFailed, match=r"dangling references: .*child|violates foreign key"):
        kagedb.connect(url=family_url)
    with kagedb.connect(url=family_url, read_only=True) as storage:
        assert schema.drift(storage.engine, "9001_family") == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM child").fetchone() == (3,)


@pytest.mark.sqlite_only
def test_a_reshape_outside_a_migration_is_refused(family_url: str) -> None:
    """SQLite alone: there, with foreign keys on, it would delete the rows of children."""
    with kagedb.connect(url=family_url) as storage, storage.transaction():
        with pytest.raises(MigrationFailed, match="cannot be reshaped outside a migration"):
            storage.database.ddl.reshape("parent", body="(id {ulid}) {strict}", columns={"id": "id"}, alter=[])
        assert storage.database.execute_sql("SELECT COUNT(*) FROM child").fetchone() == (3,)


def test_a_guard_is_replaced_by_a_script(scripts: ExtraScripts, family_url: str, places: Places, engine: str) -> None:
    scripts.add(
        "9002_softer",
        """
        db.ddl.drop_guard("parent", "delete")
        db.ddl.guard("parent", "delete", "the first parent isn't removed", unless="OLD.id <> 'a'")
        """,
    )
    scripts.learn(places.empty(engine))  # type: ignore[attr-defined]
    with kagedb.connect(url=family_url) as storage:
        with pytest.raises(ImmutableError, match="the first parent isn't removed"):
            storage.database.execute_sql("DELETE FROM parent WHERE id = 'a'")
        storage.database.execute_sql("DELETE FROM parent WHERE id = 'c'")
        assert storage.database.execute_sql("SELECT id FROM child ORDER BY id").fetchall() == [("x",), ("y",)]
