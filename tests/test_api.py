"""The public face, and the shape of the house: what may import what, and who may know which engine it is."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import kagedb
from kagedb import errors, models
from programs import run_python

PACKAGE = Path(kagedb.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)

FLOORS = [
    {"errors", "identity"},
    {"fields", "url"},
    {"config"},
    {"settings_table"},
    {"settings"},
    {"audit_key"},
    {"models", "engines"},
    {"schema"},
    {"storage"},
    {"formats"},
    {"operations"},
    {"cli"},
]
"""The lowest first. A room (a module, or a folder of them) imports from rooms on lower floors, and from itself."""

ONE_ROOM = {"migrating": "schema", "__main__": "cli"}
"""The parts of another room that have a file of their own."""

ENGINE_NAMES = ("sqlite", "postgres", "psycopg")
MAY_NAME_ENGINES = {
    "url.py": "reads and writes the URLs that choose an engine",
    "settings_table.py": "the names of the settings for one engine",
    "config.py": "an example of a section of the config file",
    "cli/__init__.py": "the help of --url",
    "cli/copy.py": "the help of --to",
    "cli/salvage.py": "the help of --to",
}
"""What speaks of an engine by name without asking which one it is."""


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(module: str) -> str:
    first = module.partition(".")[0]
    return ONE_ROOM.get(first, first)


def floor_of(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"{room} stands on no floor: say in FLOORS where it belongs")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Each import of kagedb's own: its line and the room. Those inside functions and for type checkers count too."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "kagedb":
                    yield node.lineno, room_of(alias.name.partition(".")[2])
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = package[: len(package) - node.level + 1]
                module = ".".join([*above, *filter(None, [node.module])])
            elif node.module and node.module.partition(".")[0] == "kagedb":
                module = node.module.partition(".")[2]
            else:
                continue
            for alias in node.names:
                if module or alias.name != "__version__":
                    yield node.lineno, room_of(module or alias.name)


def engines_named(path: Path) -> Iterator[tuple[int, str]]:
    """Each name or text of the program with an engine in it, and its line; not those of docstrings and comments."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if id(node) not in docstrings:
            for _, value in ast.iter_fields(node):
                if isinstance(value, str) and any(word in value.lower() for word in ENGINE_NAMES):
                    yield getattr(node, "lineno", 0), value


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in kagedb.__all__:
        thing = getattr(kagedb, name)
        if name != "__version__":
            assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__, f"{name} has no docstring"
            assert thing.__module__.partition(".")[0] == "kagedb"
    assert set(kagedb.__all__) <= set(dir(kagedb))


def test_every_public_method_says_what_it_does() -> None:
    silent = []
    for name in kagedb.__all__:
        thing = getattr(kagedb, name)
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                spoken = isinstance(value, classmethod | staticmethod | property) or inspect.isfunction(value)
                if spoken and not method.startswith("_") and not inspect.getdoc(getattr(thing, method)):
                    silent.append(f"{name}.{method}")
    assert silent == []


def test_a_star_import_brings_what_is_public_and_no_more() -> None:
    names: dict[str, object] = {}
    exec("from kagedb import *", names)
    assert set(names) - {"__builtins__"} == set(kagedb.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kagedb' has no attribute 'Projekt'"):
        kagedb.Projekt  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'Projekt'"):
        exec("from kagedb import Projekt")


def test_every_error_is_public() -> None:
    defined = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}
    assert defined == {name for name in kagedb.__all__ if getattr(kagedb, name) in vars(errors).values()}
    assert all(issubclass(getattr(errors, name), kagedb.KagedError) for name in defined)


def test_what_the_package_calls_a_model_is_the_one_of_its_models() -> None:
    for name in kagedb.__all__:
        if inspect.isclass(getattr(kagedb, name)) and issubclass(getattr(kagedb, name), models.Model):
            assert name in models.__all__ and getattr(models, name) is getattr(kagedb, name)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("kagedb", ("peewee", "click", "ulid", "sqlite3", "psycopg2", "logging")),
        ("kagedb.errors", ("peewee", "click", "ulid", "sqlite3", "psycopg2", "logging")),
        ("kagedb.models", ("click", "ulid", "playhouse.migrations")),
        ("kagedb.cli", ("peewee", "ulid", "sqlite3", "psycopg2")),
    ],
)
def test_importing_brings_nothing_heavy_with_it(module: str, heavy: tuple[str, ...]) -> None:
    done = run_python(f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])", fresh=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_engine_that_is_not_used_is_not_imported(migrated_url: str, engine: str) -> None:
    other = {"sqlite": "postgres", "postgres": "sqlite"}[engine]
    done = run_python(
        "import sys, kagedb\n"
        "with kagedb.connect(sys.argv[1]): pass\n"
        f"print([name for name in sys.modules if name.startswith('kagedb.engines.{other}')])",
        migrated_url,
        fresh=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


NOT_FOR_A_START = (  # noqa: SIM905
    """
    asyncio bz2 click ctypes difflib lzma platformdirs playhouse.migrations shlex shutil subprocess tempfile tomllib
    ulid zlib kagedb.audit_key kagedb.cli kagedb.formats kagedb.migrating kagedb.operations
    kagedb.engines.archive kagedb.engines.plugins kagedb.engines.query kagedb.engines.sqlite_contents
    kagedb.engines.sqlite_archive kagedb.engines.sqlite_plugins kagedb.engines.sqlite_query
    kagedb.engines.postgres_archive kagedb.engines.postgres_plugins kagedb.engines.postgres_query
    kagedb.engines.postgres_reading kagedb.engines.resting kagedb.engines.syncing
    kagedb.models.backlog kagedb.models.flusher kagedb.models.plain kagedb.models.recorder kagedb.models.segment
    kagedb.models.plugin_state kagedb.models.plugin_tables kagedb.models.write_behind
    kagedb.models.state_diff kagedb.models.state_tree
    """
).split()
"""Modules that some verb needs, and a command that notes one event does not: each costs every start a millisecond."""


def test_opening_a_store_for_one_event_imports_nothing_that_it_does_not_use(migrated_url: str) -> None:
    done = run_python(
        "import sys; before = set(sys.modules)\n"
        "import peewee; before |= set(sys.modules)\n"  # with what its drivers bring
        "import kagedb\n"
        "with kagedb.connect(sys.argv[1]):\n"
        "    kagedb.AuditEvent.record('policy.decision', actor='agent:planner', body={'allowed': True})\n"
        f"print(sorted(({set(NOT_FOR_A_START)} & set(sys.modules)) - before))",
        migrated_url,
        fresh=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_a_start_does_without_is_there_for_those_who_need_it() -> None:
    assert [name for name in NOT_FOR_A_START if importlib.util.find_spec(name) is None] == []


def test_imports_go_down_only() -> None:
    upwards = []
    for path in SOURCES:
        room = room_of(name_of(path).partition("/")[0].removesuffix(".py"))
        if room != "__init__":  # the public face names what is on all floors; the next test is about it
            upwards += [
                f"{name_of(path)} line {line} imports {other}"
                for line, other in imported_rooms(path)
                if other != room and floor_of(other) >= floor_of(room)
            ]
    assert upwards == []


def test_the_public_face_imports_nothing_until_it_is_asked() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    own = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert own == []


def test_only_the_engines_know_which_engine_it_is() -> None:
    """Comments and docstrings may explain why both engines need something; names and texts of the program may not."""
    named = []
    for path in SOURCES:
        if not name_of(path).startswith("engines/") and name_of(path) not in MAY_NAME_ENGINES:
            named += [f"{name_of(path)} line {line}: {text}" for line, text in engines_named(path)]
    assert named == []


def test_what_may_name_the_engines_still_does() -> None:
    for name in MAY_NAME_ENGINES:
        text = (PACKAGE / name).read_text().lower()
        assert any(word in text for word in ENGINE_NAMES), f"{name} needs no exception any more"


def test_every_file_says_what_lives_in_it() -> None:
    assert [name_of(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))] == []
