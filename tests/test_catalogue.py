"""The schema that the scripts give is the one of the models and the known one, on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kagedb
from kagedb import Storage, schema
from kagedb.engines import open_engine
from kagedb.engines.engine import HISTORY_TABLE, Engine
from kagedb.models import Model
from kagedb.models.base import bind
from kagedb.settings import load
from postgres_server import PostgresServer, find_bin, oldest_bin

KEPT_FOR_EVER = ("project_config", "prompt_label_move", "prompt_version")
GUARDS = {
    "sqlite": {
        **{table: {"insert", "update", "delete"} for table in KEPT_FOR_EVER},
        "audit_event": {"insert", "update", "delete"},
        "audit_seal": {"insert", "update", "delete"},
        "transcript_chunk": {"update"},
    },
    "postgres": {
        **{table: {"update", "delete", "truncate"} for table in KEPT_FOR_EVER},
        "audit_event": {"insert", "update", "delete", "truncate"},
        "audit_seal": {"insert", "update", "delete", "truncate"},
        "transcript_chunk": {"update"},
    },
}
"""Table and events, by engine: REPLACE is SQLite's way around the other guards, TRUNCATE is PostgreSQL's."""


def catalogue(url: str) -> list[str]:
    with kagedb.connect(url=url, read_only=True) as storage:
        return storage.engine.catalogue()


@pytest.fixture
def from_models(url: str) -> Iterator[Engine]:
    """A store that Peewee made from the models; nothing of the scripts is in it."""
    settings = load(url=url)
    engine = open_engine(settings)
    try:
        engine.open(create=True)
        bind(Storage(engine, settings))
        engine.change_schema(lambda: engine.database.create_tables(Model.all()))
        yield engine
    finally:
        bind(None)
        engine.close()


def test_the_scripts_give_the_schema_of_the_models(from_models: Engine, migrated_url: str) -> None:
    made = from_models.catalogue()
    from_models.close()
    scripted = [
        line
        for line in catalogue(migrated_url)
        if HISTORY_TABLE not in line and not line.startswith(("trigger ", "view "))
    ]
    assert scripted == made
    for start in ("table ", "column ", "index on "):
        assert any(line.startswith(start) for line in made)
    assert sum(line.startswith(("foreign key ", "constraint ")) for line in made) > 20


def test_the_guards_are_the_ones_that_are_meant_to_be_there(migrated_url: str, engine: str) -> None:
    found: dict[str, set[str]] = {}
    for line in catalogue(migrated_url):
        if line.startswith("trigger "):
            name, _, rest = line.removeprefix("trigger ").partition(" on ")
            table = rest.partition(" enabled ")[0].partition(":")[0]
            assert name.startswith(f"{table}_guard_")
            found.setdefault(table, set()).add(name.removeprefix(f"{table}_guard_"))
            assert engine == "sqlite" or f"on {table} enabled always:" in line
    assert found == GUARDS[engine]


def test_every_table_is_strict_on_sqlite_and_every_text_sorts_by_bytes_on_postgres(
    migrated_url: str, engine: str
) -> None:
    lines = catalogue(migrated_url)
    if engine == "sqlite":
        assert all(line.endswith(" STRICT") for line in lines if line.startswith("table "))
    else:
        texts = [line for line in lines if line.startswith("column ") and " text" in line]
        assert texts and all('COLLATE "C"' in line for line in texts)


def test_the_known_catalogue_is_what_the_scripts_give(storage: Storage) -> None:
    newest = schema.scripts()[-1].name
    assert storage.engine.catalogue() == schema.known_catalogue(storage.engine, newest)
    assert schema.drift(storage.engine) == []


def test_a_fingerprint_is_the_same_for_two_stores_and_another_after_a_change(storage: Storage) -> None:
    newest = schema.known_catalogue(storage.engine, schema.scripts()[-1].name)
    before = schema.fingerprint(storage.engine.catalogue())
    assert before == schema.fingerprint(newest)
    storage.database.execute_sql("CREATE INDEX more ON run (agent)")
    assert schema.fingerprint(storage.engine.catalogue()) != before


def test_plugin_tables_and_what_hangs_on_them_are_not_part_of_the_schema(storage: Storage) -> None:
    ask = storage.database.execute_sql
    ask("CREATE TABLE p_weather__town (id TEXT PRIMARY KEY, rain BIGINT NOT NULL DEFAULT 0 CHECK (rain >= 0))")
    ask("CREATE INDEX p_weather__town_rain ON p_weather__town (rain)")
    ask("CREATE VIEW p_weather__wet AS SELECT id FROM p_weather__town WHERE rain > 0")
    with storage.transaction():
        storage.database.ddl.guard("p_weather__town", "delete", "towns stay")
    assert schema.drift(storage.engine) == []
    assert not any(name.startswith("p_") for name in storage.engine.tables())


@pytest.mark.postgres_only
def test_the_name_of_the_postgres_schema_is_not_part_of_the_catalogue(url: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[storage]\nschema = "kaged_2"\n')
    config.chmod(0o600)
    with kagedb.connect(url=url, config=config) as storage:
        assert storage.engine.place.endswith("(schema kaged_2)")
        assert schema.drift(storage.engine) == []


@pytest.mark.postgres_only
def test_the_oldest_supported_server_and_one_that_sorts_as_people_do_give_the_same_catalogue() -> None:
    """Debian's server can sort as people do, with ICU; the one of the wheel cannot."""
    oldest = oldest_bin()
    with PostgresServer(oldest or find_bin()) as server:
        server.create_database("plain")
        server.create_database("sorted", "template0", "LOCALE_PROVIDER icu ICU_LOCALE 'en'" if oldest else "")
        for name in ("plain", "sorted"):
            with kagedb.connect(url=server.url(name)) as storage:
                newest = schema.scripts()[-1].name
                assert storage.engine.catalogue() == schema.known_catalogue(storage.engine, newest)
