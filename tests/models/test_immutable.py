"""Configs, prompt versions and moves of labels never change, whichever way somebody tries. Audit: see its own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peewee
import psycopg2
import pytest

from contents import contents
from kagedb import ImmutableError, KagedError, Project, ProjectConfig, Prompt, PromptLabelMove, PromptVersion
from kagedb.identity import new_ulid

if TYPE_CHECKING:
    from kagedb.models import Model
    from kagedb.storage import Storage
    from postgres_server import DatabaseServer

ANA = "operator:ana"

TABLES = {
    "project_config": (ProjectConfig, "message", "a project config is never changed or removed"),
    "prompt_version": (PromptVersion, "body", "a prompt version is never changed or removed"),
    "prompt_label_move": (PromptLabelMove, "actor", "the move of a label is never changed or removed"),
}
"""Each table to its model, a column to change, and what whoever tries is told."""


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kept(project: Project, storage: Storage, table: str) -> Callable[[], None]:
    """Two rows in each of the tables, and the check that nothing has changed since."""
    for body in ("one", "two"):
        version = Prompt.edit(project, "planner", body, actor=ANA)
        Prompt.label(project, "planner", "production", version, actor=ANA)
        project.configure(body, parsed={}, actor=ANA)
    before = contents(storage)

    def check() -> None:
        assert contents(storage) == before

    return check


def row_of(model: type[Model]) -> dict[str, Any]:
    return dict(model.select().order_by(model.id).first().__data__)


def peewee_ways(model: type[Model], column: str) -> dict[str, Callable[[], Any]]:
    """What somebody may write with Peewee, against the first row."""
    old = row_of(model)
    changed = {**old, column: "changed"}
    elsewhere = {**changed, "id": new_ulid()}
    unique = next(fields for fields, is_unique in model._meta.indexes if is_unique)

    def save(**options: Any) -> Any:
        instance = model.by_id(old["id"])
        setattr(instance, column, "changed")
        return instance.save(**options)

    return {
        "update": lambda: model.update({column: "changed"}).execute(),
        "update to the same": lambda: model.update({column: model._meta.fields[column]}).execute(),
        "update of the key": lambda: model.update(id=new_ulid()).where(model.id == old["id"]).execute(),
        "update returning": lambda: list(model.update({column: "changed"}).returning(model.id).execute()),
        "save": save,
        "save of one column": lambda: save(only=[column]),
        "bulk_update": lambda: model.bulk_update([model(**changed)], [column]),
        "set_by_id": lambda: model.set_by_id(old["id"], {column: "changed"}),
        "delete": lambda: model.delete().execute(),
        "delete one": lambda: model.delete().where(model.id == old["id"]).execute(),
        "delete_by_id": lambda: model.delete_by_id(old["id"]),
        "delete_instance": lambda: model.by_id(old["id"]).delete_instance(recursive=True),
        "upsert by id": lambda: (
            model.insert(**changed).on_conflict(conflict_target=[model.id], update={column: "changed"}).execute()
        ),
        "upsert by the unique key": lambda: (
            model.insert(**elsewhere)
            .on_conflict(conflict_target=[getattr(model, name) for name in unique], preserve=[getattr(model, column)])
            .execute()
        ),
    }


def test_nothing_that_peewee_offers_changes_a_row(kept: Callable[[], None], table: str) -> None:
    model, column, why = TABLES[table]
    for way, attempt in peewee_ways(model, column).items():
        with pytest.raises(ImmutableError) as caught:
            attempt()
        if "delete_instance" not in way:  # which begins with what refers to the row
            assert caught.value.message == why, way
        kept()


def test_inserting_over_a_row_changes_nothing(kept: Callable[[], None], table: str) -> None:
    """On these the engines have words of their own (only SQLite knows REPLACE), but the same row afterwards."""
    model, column, _ = TABLES[table]
    changed = {**row_of(model), column: "changed"}
    elsewhere = {**changed, "id": new_ulid()}
    for row in (changed, elsewhere):
        for insert in (
            lambda row=row: model.replace(**row).execute(),
            lambda row=row: model.replace_many([row]).execute(),
            lambda row=row: model.insert(**row).on_conflict_replace().execute(),
            lambda row=row: model.insert(**row).execute(),
            lambda row=row: model.create(**row),
            lambda row=row: model.put(**row),
        ):
            with pytest.raises((KagedError, peewee.PeeweeException, ValueError)):
                insert()
            kept()
        try:
            model.insert(**row).on_conflict_ignore().execute()
        except ImmutableError:
            pass  # SQLite's guard does not wait to see whether the row would be ignored
        kept()


def test_a_transaction_that_tried_is_undone_whole(kept: Callable[[], None], table: str, storage: Storage) -> None:
    model, column, _ = TABLES[table]
    with pytest.raises(ImmutableError), storage.transaction():
        Project.add("garden", actor=ANA)
        model.update({column: "changed"}).execute()
    kept()


SQL = {
    "update": "UPDATE {table} SET {column} = 'changed'",
    "delete": "DELETE FROM {table}",
}
SQLITE = {
    "or replace": "INSERT OR REPLACE INTO {table} SELECT {columns} FROM {table} WHERE id = '{id}'",
    "replace": "REPLACE INTO {table} SELECT {columns} FROM {table} WHERE id = '{id}'",
    "replace by the unique key": "REPLACE INTO {table} SELECT {elsewhere} FROM {table} WHERE id = '{id}'",
    "replace by rowid": "REPLACE INTO {table} (rowid, {names}) SELECT rowid, {moved} FROM {table} WHERE id = '{id}'",
    "replace by oid": "REPLACE INTO {table} (oid, {names}) SELECT rowid, {moved} FROM {table} WHERE id = '{id}'",
    "update or replace": "UPDATE OR REPLACE {table} SET id = '{id}'",
    "update or ignore": "UPDATE OR IGNORE {table} SET {column} = 'changed'",
    "upsert": "INSERT INTO {table} SELECT {columns} FROM {table} WHERE 1 ON CONFLICT DO UPDATE SET {column} = 'x'",
}
POSTGRES = {
    "truncate": "TRUNCATE {table} CASCADE",
    "truncate from above": "TRUNCATE project CASCADE",
    "only": "UPDATE ONLY {table} SET {column} = 'changed'",
    "merge": "MERGE INTO {table} t USING {table} s ON t.id = s.id WHEN MATCHED THEN UPDATE SET {column} = 'changed'",
    "with": "WITH gone AS (DELETE FROM {table} RETURNING *) SELECT count(*) FROM gone",
}


def written_out(text: str, table: str) -> str:
    model, column, _ = TABLES[table]
    names = [field.column_name for field in model._meta.sorted_fields]
    new = new_ulid()
    changed = {"id": "id", column: "'changed'"}
    columns = [changed.get(name, name) for name in names]
    elsewhere = [f"'{new}'" if name == "id" else value for name, value in zip(names, columns, strict=True)]
    # Another id and another unique key: nothing but the rowid is taken.
    counted = {"version", "revision"}
    moved = [f"{name} + 100" if name in counted else value for name, value in zip(names, elsewhere, strict=True)]
    return text.format(
        table=table,
        column=column,
        id=row_of(model)["id"],
        names=", ".join(names),
        columns=", ".join(columns),
        elsewhere=", ".join(elsewhere),
        moved=", ".join(moved),
    )


def try_sql(storage: Storage, ways: dict[str, str], kept: Callable[[], None], table: str) -> None:
    for way, text in ways.items():
        with pytest.raises(ImmutableError, match="never changed or removed"):
            storage.database.execute_sql(written_out(text, table))
            pytest.fail(f"{way} was let through")
        kept()


def test_sql_changes_no_row(kept: Callable[[], None], table: str, storage: Storage) -> None:
    try_sql(storage, SQL, kept, table)


@pytest.mark.sqlite_only
def test_the_words_of_sqlite_change_no_row(kept: Callable[[], None], table: str, storage: Storage) -> None:
    """REPLACE and its like are SQLite's alone: they delete rows without a DELETE."""
    try_sql(storage, SQLITE, kept, table)


@pytest.mark.postgres_only
def test_the_words_of_postgres_change_no_row(kept: Callable[[], None], table: str, storage: Storage) -> None:
    """TRUNCATE and MERGE are PostgreSQL's alone."""
    version = storage.database.execute_sql("SHOW server_version_num").fetchone()[0]
    ways = {way: text for way, text in POSTGRES.items() if way != "merge" or int(version) >= 150000}
    try_sql(storage, ways, kept, table)


@pytest.mark.sqlite_only
def test_another_program_with_foreign_keys_off_changes_no_row(
    kept: Callable[[], None], table: str, storage: Storage
) -> None:
    """A connection as the sqlite3 shell makes it: none of our settings, so the guards have to be in the file."""
    with peewee.sqlite3.connect(storage.engine.place, isolation_level=None) as shell:
        for text in (*SQL.values(), *SQLITE.values()):
            with pytest.raises(peewee.sqlite3.IntegrityError, match=r"kagedb: .* is never changed or removed"):
                shell.execute(written_out(text, table))
    shell.close()
    kept()


@pytest.mark.postgres_only
def test_a_superuser_who_switches_triggers_off_for_a_session_changes_no_row(
    kept: Callable[[], None], table: str, storage: Storage, postgres_server: DatabaseServer
) -> None:
    """`session_replication_role = replica` is what loaders of dumps use; SQLite has no such thing."""
    database = storage.database.execute_sql("SELECT current_database()").fetchone()[0]
    shell = psycopg2.connect(postgres_server.admin_url(database))
    try:
        shell.autocommit = True
        with shell.cursor() as cursor:
            cursor.execute("SET search_path = kaged")
            cursor.execute("SET session_replication_role = replica")
            for text in (*SQL.values(), POSTGRES["truncate"]):
                with pytest.raises(psycopg2.IntegrityError, match=r"kagedb: .* is never changed or removed"):
                    cursor.execute(written_out(text, table))
    finally:
        shell.close()
    kept()


def test_a_row_that_the_store_does_not_have_is_not_saved_by_an_update(storage: Storage, project: Project) -> None:
    """Peewee's `save` of a model with a key is an UPDATE; without this it would report success and store nothing."""
    with pytest.raises(LookupError, match=r"is not in the store; make new rows with create\(\)"):
        Project(id=new_ulid(), name="garden").save()
    assert Project.select().count() == 1
    assert Project(name="garden").save(force_insert=True)
    loaded = Project.named("garden")
    loaded.name = "yard"
    loaded.save()
    assert Project.named("yard").id == loaded.id
