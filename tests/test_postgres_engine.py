"""PostgreSQL: one schema in a database that is shared with others, what its server may be like, and secrets."""

from __future__ import annotations

import contextlib
import logging
import secrets
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg2
import pytest

import kagedb
import programs
from kagedb import AuditEvent, Project
from kagedb.errors import KagedError, SettingsError, StorageForbidden, StorageNotFound
from kagedb.models.base import Counter
from postgres_proxy import Talker

if TYPE_CHECKING:
    from postgres_server import DatabaseServer

pytestmark = pytest.mark.postgres_only


def run(url: str, *statements: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def database_of(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


def configured(directory: Path, text: str) -> Path:
    config = directory / f"{secrets.token_hex(4)}.toml"
    config.write_text(text)
    config.chmod(0o600)
    return config


# Living with others.


def test_other_applications_in_the_same_database_are_not_disturbed(url: str) -> None:
    """Theirs have the names of our tables, and are in the search path of everybody but us."""
    run(
        url,
        "CREATE TABLE project (id int PRIMARY KEY, name text)",
        "INSERT INTO project VALUES (1, 'theirs')",
        "CREATE TABLE schema_migration (name text)",
        "INSERT INTO schema_migration VALUES ('0999_theirs')",
        "CREATE TABLE audit_event (seq int)",
        "CREATE SCHEMA other",
        "CREATE TABLE other.counter (name text)",
    )
    with kagedb.connect(url=url) as storage:
        Project.add("house", actor="operator:ana")
        assert "project" in storage.engine.tables() and len(storage.engine.tables()) > 10
    assert run(url, "SELECT id, name FROM public.project") == [(1, "theirs")]
    assert run(url, "SELECT name FROM kaged.project") == [("house",)]
    assert run(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(3,)]
    with kagedb.connect(url=url):
        Project.add("garden", actor="operator:ana")


def test_two_stores_in_one_database_know_nothing_of_each_other(url: str, tmp_path: Path) -> None:
    first, second = (configured(tmp_path, f'[storage]\nschema = "{name}"\n') for name in ("kaged_a", "kaged_b"))
    holder = """
import sys, kagedb
with kagedb.connect(url=sys.argv[1], config=sys.argv[2], exclusive=True) as storage:
    with storage.transaction():
        kagedb.Project.add("first", actor="operator:ana")
        print("holds", flush=True)
        input()
"""
    daemon = programs.start_python(holder, url, str(first))
    programs.wait_for_line(daemon, "holds")
    with kagedb.connect(url=url, config=second, exclusive=True) as storage:
        # Not kept waiting by the other's turn, nor by its ownership.
        Project.add("second", actor="operator:ana")
        assert storage.engine.owner() is None
        assert [project.name for project in Project.select()] == ["second"]
        catalogue = storage.engine.catalogue()
    daemon.communicate("\n", timeout=10)
    with kagedb.connect(url=url, config=first) as storage:
        assert [project.name for project in Project.select()] == ["first"]
        assert storage.engine.catalogue() == catalogue


def test_a_session_variable_of_the_url_does_not_move_the_search_path(migrated_url: str) -> None:
    with kagedb.connect(url=f"{migrated_url}&options=-c%20search_path%3Dpublic%20-c%20work_mem%3D7MB") as storage:
        assert storage.database.execute_sql("SHOW search_path").fetchone() == ("kaged",)
        assert storage.database.execute_sql("SHOW work_mem").fetchone() == ("7MB",), "the rest of the options is kept"
        Counter.put(name="a", value=0)


def test_writes_are_read_committed_whatever_the_server_prefers(migrated_url: str) -> None:
    database = database_of(migrated_url)
    run(
        migrated_url,
        f'ALTER DATABASE "{database}" SET default_transaction_isolation = serializable',
        f'ALTER DATABASE "{database}" SET default_transaction_read_only = on',
        f'ALTER DATABASE "{database}" SET search_path = public',
        f'ALTER DATABASE "{database}" SET client_encoding = latin1',
        f"ALTER DATABASE \"{database}\" SET bytea_output = 'escape'",
    )
    with kagedb.connect(url=migrated_url, exclusive=True) as storage:
        with storage.transaction():
            assert storage.database.execute_sql("SHOW transaction_isolation").fetchone() == ("read committed",)
            Project.add("дом 家", actor="operator:ana")
        Counter.put(name="alone", value=0)
        assert Project.named("дом 家")
        with storage.snapshot():
            assert storage.database.execute_sql("SHOW transaction_isolation").fetchone() == ("repeatable read",)
            assert AuditEvent.select().count() == 2
    with kagedb.connect(url=migrated_url, read_only=True) as storage:
        assert Project.named("дом 家")


def test_sessions_have_a_name_timeouts_and_keepalives(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url, exclusive=True) as storage:
        execute = storage.database.execute_sql
        assert execute("SHOW application_name").fetchone() == ("kaged",)
        assert execute("SHOW lock_timeout").fetchone() == ("5s",)
        sources = dict(
            execute("SELECT name, source FROM pg_settings WHERE name LIKE 'tcp%%' AND source = 'client'").fetchall()
        )
        assert {"tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"} <= set(
            sources
        )
        found = run(migrated_url, "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
        assert any(name.startswith("kaged ") and " pid " in name for (name,) in found)


# What is refused.


def test_a_role_that_may_not_make_the_schema_is_given_the_sql(url: str, postgres_server: DatabaseServer) -> None:
    database, role = database_of(url), f"kaged_test_{secrets.token_hex(4)}"
    admin = postgres_server.admin_url(database)
    run(admin, f'CREATE ROLE "{role}" LOGIN')
    try:
        theirs = url.replace("kaged@", f"{role}@", 1)
        with pytest.raises(StorageForbidden) as refusal:
            kagedb.connect(url=theirs)
        prefix = "let somebody who may run: "
        assert refusal.value.hint.startswith(prefix)
        run(admin, refusal.value.hint.removeprefix(prefix))
        with kagedb.connect(url=theirs):
            Counter.put(name="a", value=0)
    finally:
        run(admin, f'DROP OWNED BY "{role}" CASCADE', f'DROP ROLE "{role}"')


def test_a_role_that_may_not_use_an_existing_schema_is_given_the_sql(url: str, postgres_server: DatabaseServer) -> None:
    database, role = database_of(url), f"kaged_test_{secrets.token_hex(4)}"
    admin = postgres_server.admin_url(database)
    run(admin, f'CREATE ROLE "{role}" LOGIN', "CREATE SCHEMA kaged")
    try:
        theirs = url.replace("kaged@", f"{role}@", 1)
        with pytest.raises(StorageForbidden) as refusal:
            kagedb.connect(url=theirs)
        prefix = "let its owner run: "
        assert refusal.value.hint.startswith(prefix), refusal.value
        run(admin, refusal.value.hint.removeprefix(prefix))
        with kagedb.connect(url=theirs):
            Counter.put(name="a", value=0)
    finally:
        run(admin, f'DROP OWNED BY "{role}" CASCADE', f'DROP ROLE "{role}"')


def test_a_database_with_another_encoding_is_refused(postgres_server: DatabaseServer, url: str) -> None:
    name = f"kaged_test_{secrets.token_hex(6)}"
    run(url, f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(SettingsError, match="has the encoding LATIN1") as refusal:
            kagedb.connect(url=postgres_server.url(name))
        assert "UTF8" in refusal.value.hint
    finally:
        postgres_server.drop_database(name)


def test_a_store_that_is_not_there_is_not_made_without_being_asked(url: str) -> None:
    for options in ({"migrate": False}, {"read_only": True}):
        with pytest.raises(StorageNotFound, match="there is no store at"):
            kagedb.connect(url=url, **options)
    assert run(url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'kaged'") == [(0,)]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://kaged@/no_such_database?host={host}&port={port}", "does not exist"),
        ("postgresql://kaged@/{database}?host={host}&port={port}&no_such_option=1", "is not understood"),
        ("postgresql://no_such_role@/{database}?host={host}&port={port}", "does not exist"),
    ],
)
def test_a_url_that_leads_nowhere_is_a_setting_to_be_mended(migrated_url: str, url: str, says: str) -> None:
    parts = psycopg2.extensions.parse_dsn(migrated_url)
    full = url.format(host=parts["host"], port=parts["port"], database=parts["dbname"])
    with pytest.raises(SettingsError, match=says):
        kagedb.connect(url=full)


def test_without_psycopg2_a_postgres_url_names_the_extra(migrated_url: str) -> None:
    code = """
import sys
sys.modules["psycopg2"] = None
import kagedb
try:
    kagedb.connect(url=sys.argv[1])
except kagedb.SettingsError as error:
    print(error.message, "|", error.hint)
"""
    done = programs.run_python(code, migrated_url, fresh=True)
    assert "needs psycopg2, which is not installed | install the extra: pip install 'kagedb[postgres]'" in done.stdout


# Secrets.

SECRET = "s3cr3t/?@:% ü"


def everything_said(error: BaseException) -> str:
    """The error as text, its parts, its traceback, and all errors behind it."""
    said = []
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        said += [str(one), repr(one), *map(repr, one.args), *traceback.format_exception(one)]
        queue += [one.__cause__, one.__context__]
    return "\n".join(said)


@pytest.fixture
def secret_free(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.DEBUG)
    yield caplog
    assert SECRET not in caplog.text and "s3cr3t" not in caplog.text


REFUSALS = [
    "password authentication failed for user kaged",
    "no pg_hba.conf entry; you said: {}",
    "{} {}",
    "broken\n{}",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_password_is_in_no_error(refusal: str, tmp_path: Path, secret_free: Any) -> None:
    from urllib.parse import quote

    url = f"postgresql://kaged:{quote(SECRET, safe='')}@/kaged?host={tmp_path}&port=5432"
    with Talker(tmp_path, lambda password: refusal.format(password, password)):
        with pytest.raises(KagedError) as failure:
            kagedb.connect(url=url)
    said = everything_said(failure.value)
    assert SECRET not in said and "s3cr3t" not in said, said


def test_the_password_of_a_working_store_is_in_no_repr(migrated_url: str, secret_free: Any) -> None:
    from urllib.parse import quote

    url = migrated_url.replace("kaged@", f"kaged:{quote(SECRET, safe='')}@", 1)  # the server trusts its socket
    assert url != migrated_url
    with kagedb.connect(url=url, exclusive=True) as storage:
        Counter.put(name="a", value=0)
        engine: Any = storage.engine
        shown = [storage, storage.engine, storage.settings, storage.database, storage.engine.place, engine.server.url]
        shown += [storage.database.connect_params, storage.database.database, engine._locks.dsn]
        with storage.transaction():
            shown.append(storage.database.connection().dsn)
        with pytest.raises(Exception) as failure:
            storage.database.execute_sql("SELECT no_such")
        with pytest.raises(KagedError) as second:
            engine.server.connect(host="/nowhere")
    text = "".join(map(repr, shown)) + "".join(map(str, shown))
    assert "s3cr3t" not in text, text
    for error in (failure.value, second.value):
        assert "s3cr3t" not in everything_said(error)
