"""What every test has: a home of its own, one SQLite library, a real PostgreSQL, and stores on both engines.

`url` (an empty place), `migrated_url` (a store with this version's schema) and `storage` (that store, open) run a
test once an engine; `places` gives more of them. The server is made in postgres_server.py, programs in programs.py.
"""

from __future__ import annotations

import gc
import itertools
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Without bytecode each Python that the tests start would compile kagedb anew, which was up to a third of its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

SQLITE_LIBRARY = Path(__file__).parent / "sqlite_library"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SQLITE_LIBRARY), os.environ.get("PYTHONPATH")]))
runpy.run_path(str(SQLITE_LIBRARY / "sitecustomize.py"))  # before anything imports peewee, which chooses when imported

import peewee  # noqa: E402
import psycopg2  # noqa: E402

import programs  # noqa: E402
from places import Places, new_name, sqlite_url  # noqa: E402
from postgres_server import DatabaseServer, PostgresServer, find_bin, server_from_environment  # noqa: E402

if TYPE_CHECKING:
    from extra_scripts import ExtraScripts
    from kagedb.storage import Storage

ENGINES = {"sqlite": "postgres_only", "postgres": "sqlite_only"}
"""Each engine, and the marker of the tests that are not for it."""


def pytest_configure(config: pytest.Config) -> None:
    wanted, used = os.environ.get("KAGED_TEST_SQLITE", "stdlib"), peewee.sqlite3.__name__.partition(".")[0]
    if used != {"stdlib": "sqlite3", "pysqlite3": "pysqlite3"}.get(wanted):
        raise pytest.UsageError(
            f"KAGED_TEST_SQLITE={wanted}, but peewee took {used} {peewee.sqlite3.sqlite_version}; it may be `stdlib`, "
            "or `pysqlite3` where that is installed and not older than the standard library's"
        )


def pytest_report_header() -> str:
    try:
        server = server_from_environment()
        origin = server.bin_directory if isinstance(server, PostgresServer) else "KAGED_TEST_POSTGRES_URL"
        postgres = f"PostgreSQL {server.version} ({origin})"
    except psycopg2.OperationalError as error:
        raise pytest.UsageError(f"the server of KAGED_TEST_POSTGRES_URL does not answer: {error}") from None
    except RuntimeError as error:
        postgres = str(error)  # what the tests that need one will fail with
    return f"engines: SQLite {peewee.sqlite3.sqlite_version} ({peewee.sqlite3.__name__}), {postgres}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes an engine, itself or through a fixture, runs for each that it is for: nothing is skipped."""
    if "engine" in metafunc.fixturenames:
        engines = [name for name, other in ENGINES.items() if not metafunc.definition.get_closest_marker(other)]
        metafunc.parametrize("engine", engines, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # three thousand tests and their modules, through which each collection would go from now on


@pytest.fixture(scope="session", autouse=True)
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """New homes, one after the other; and nothing of whoever runs the tests is left in the environment."""
    directory = tmp_path_factory.mktemp("homes")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("XDG_", "PG", "KAGED_")) and not name.startswith("KAGED_TEST_"):
                patch.delenv(name)
        patch.setenv("KAGED_MODE", "user")
        patch.setenv("HOME", str(directory))
        yield (directory / str(number) for number in itertools.count(1))


@pytest.fixture(autouse=True)
def home(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The HOME of this test, empty, in per-user mode. Afterwards no store is open and no program runs."""
    place = next(homes)
    place.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(place))
    yield place
    programs.kill_all()
    storage = sys.modules.get("kagedb.storage")
    left_open = storage.current() if storage else None
    if left_open:
        left_open.close()
        pytest.fail("the test left its store open")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[DatabaseServer]:
    """The server of the run, with its pg_dump and pg_restore first in PATH. Tests do not stop it."""
    with server_from_environment() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(find_bin()), prepend=os.pathsep)
        yield server


@pytest.fixture(scope="session")
def _second_server() -> Iterator[PostgresServer]:
    with PostgresServer(find_bin()) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(find_bin()), prepend=os.pathsep)
        yield server


@pytest.fixture
def own_postgres_server(_second_server: PostgresServer) -> PostgresServer:
    """A running server that the test may stop, kill and restart."""
    if not _second_server.running:
        _second_server.start()
    return _second_server


@pytest.fixture
def postgres_database(postgres_server: DatabaseServer) -> Iterator[str]:
    """The name of an empty database on the server of the run."""
    name = new_name()
    postgres_server.create_database(name)
    yield name
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def sqlite_template(homes: Iterator[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with this version's schema, which nothing has open."""
    path = tmp_path_factory.mktemp("template") / "kaged.db"
    _migrate(sqlite_url(path))
    _require_whole(path)
    return path


@pytest.fixture(scope="session")
def postgres_template(homes: Iterator[Path], postgres_server: DatabaseServer) -> Iterator[str]:
    """The name of a database with this version's schema, to which nothing is connected."""
    name = new_name()
    postgres_server.create_database(name)
    _migrate(postgres_server.url(name))
    yield name
    postgres_server.drop_database(name)


@pytest.fixture
def places(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Places]:
    """Places for stores on an engine that the test names: a second store, or both engines at once."""
    places = Places(tmp_path, request)
    yield places
    places.clear()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """`sqlite` or `postgres`."""
    name: str = request.param
    return name


@pytest.fixture
def url(engine: str, places: Places) -> str:
    """The storage URL of a place where no store is yet."""
    return places.empty(engine)


@pytest.fixture
def migrated_url(engine: str, places: Places) -> str:
    """The storage URL of an empty store with this version's schema, which nobody has open."""
    return places.migrated(engine)


@pytest.fixture
def storage(migrated_url: str) -> Iterator[Storage]:
    """An open, empty store with this version's schema."""
    import kagedb

    with kagedb.connect(url=migrated_url) as store:
        yield store


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtraScripts:
    """A copy of the migration scripts, to which the test adds what the next versions will bring."""
    from extra_scripts import ExtraScripts

    return ExtraScripts(tmp_path / "scripts", monkeypatch)


@pytest.fixture(scope="session")
def sqlite_stored(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with something of everything in it, which nothing has open."""
    path = tmp_path_factory.mktemp("stored") / "kaged.db"
    shutil.copy(sqlite_template, path)
    _fill(sqlite_url(path))
    _require_whole(path)
    return path


@pytest.fixture(scope="session")
def postgres_stored(postgres_template: str, postgres_server: DatabaseServer) -> Iterator[str]:
    """The name of a database with something of everything in it, to which nothing is connected."""
    name = new_name()
    postgres_server.create_database(name, postgres_template)
    _fill(postgres_server.url(name))
    yield name
    postgres_server.drop_database(name)


@pytest.fixture
def stored_url(engine: str, places: Places, request: pytest.FixtureRequest) -> str:
    """The storage URL of a store with something of everything in it, which nobody has open."""
    return places.copy(engine, request.getfixturevalue(f"{engine}_stored"))


def _require_whole(path: Path) -> None:
    leftover = path.with_name(path.name + "-wal")
    assert not leftover.exists() or not leftover.stat().st_size, "a copy of the file alone would miss what the WAL has"


def _fill(url: str) -> None:
    import stored

    stored.fill(url)


def _migrate(url: str) -> None:
    import kagedb

    kagedb.connect(url=url).close()
