"""Programs that start at once, or are killed while they bring a store to its schema, leave one whole schema."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kagedb
from extra_scripts import PREAMBLE, ExtraScripts, copies, fill, sqlite_path
from kagedb import AuditEvent, schema
from kagedb.errors import StorageInUse
from kagedb.operations import backup_set
from kagedb.settings import load
from programs import kill, run_python, start_python, tell, wait_for_line

if TYPE_CHECKING:
    from places import Places

STARTERS = 8

MORE = """
db.ddl.run("CREATE TABLE more (id {ulid} NOT NULL PRIMARY KEY, note {text}) {strict}")
db.ddl.run("INSERT INTO more (id) SELECT id FROM session")
"""
PAUSE = """
if os.environ.get("PAUSE") == "in a script":
    print("paused", flush=True)
    input()
"""

STARTER = (
    PREAMBLE
    + """
import kagedb
from kagedb import AuditEvent
print("ready", flush=True)
input()
_, _, url, config, how = [*sys.argv, "", ""][:5]
with kagedb.connect(url=url, config=config or None, read_only=how == "reads") as storage:
    print("did" if storage.standing.pending else "found", AuditEvent.select().count(), flush=True)
    input()
"""
)

# Stops before or after a function, named as module:name, so that the program can be killed right there.
KILLED = (
    PREAMBLE
    + """
import importlib, os, time
import kagedb
point = os.environ["PAUSE"]
if ":" in point:
    when, module, name = point.split(":")
    owner = importlib.import_module(module)
    *parts, name = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    def pause():
        print("paused", flush=True)
        time.sleep(600)
    def paused(*arguments, **options):
        if when == "before":
            pause()
        result = real(*arguments, **options)
        if when == "after":
            pause()
        return result
    setattr(owner, name, paused)
kagedb.connect(url=sys.argv[2])
"""
)

ENGINE_CLASS = {"sqlite": "kagedb.engines.sqlite:SqliteEngine", "postgres": "kagedb.engines.postgres:PostgresEngine"}

HOLDER = """
import sys
import kagedb
with kagedb.connect(url=sys.argv[1], **eval(sys.argv[2])):
    print("open", flush=True)
    input()
"""


@pytest.fixture
def behind_url(scripts: ExtraScripts, migrated_url: str, url: str) -> str:
    """A store with two sessions that lacks two scripts; `url` stays for a store that learned their catalogue."""
    fill(migrated_url)
    scripts.add("9001_more", MORE)
    scripts.add("9002_pause", PAUSE)
    scripts.learn(url)
    return migrated_url


def start_all(scripts: ExtraScripts, url: str) -> list[str]:
    """The answers of starters that all begin at the same moment; each keeps its store open until all have theirs."""
    starters = [start_python(STARTER, str(scripts.place), url) for _ in range(STARTERS)]
    for starter in starters:
        wait_for_line(starter, "ready")
    for starter in starters:
        tell(starter)
    answers = [wait_for_line(starter, "") for starter in starters]
    for starter in starters:
        tell(starter)
    assert [starter.wait(30) for starter in starters] == [0] * STARTERS
    return answers


def test_of_eight_that_start_on_nothing_one_makes_the_store_and_all_open_it(
    scripts: ExtraScripts, places: Places, engine: str
) -> None:
    url = places.empty(engine)
    answers = start_all(scripts, url)
    assert sorted(answers) == ["did 1", *["found 1"] * (STARTERS - 1)]
    with kagedb.connect(url=url) as storage:
        assert schema.drift(storage.engine) == []
        assert [event.kind for event in AuditEvent.select()] == ["store.created"]


def test_of_eight_that_start_on_an_old_store_one_migrates_and_all_open_it(
    scripts: ExtraScripts, behind_url: str
) -> None:
    answers = start_all(scripts, behind_url)
    assert sorted(answer.split()[0] for answer in answers) == ["did", *["found"] * (STARTERS - 1)]
    with kagedb.connect(url=behind_url) as storage:
        assert schema.drift(storage.engine) == []
        assert [event.kind for event in AuditEvent.select()].count("store.migrated") == 1
        assert storage.database.execute_sql("SELECT COUNT(*) FROM more").fetchone() == (2,)
        assert len(copies(storage.settings)) == 1


@pytest.fixture
def impatient(tmp_path: Path) -> str:
    """A config with which a writer waits for others a fifth of a second."""
    config = tmp_path / "impatient.toml"
    config.write_text("[storage]\nbusy_timeout_ms = 200\n")
    config.chmod(0o600)
    return str(config)


def test_a_migration_is_waited_for_longer_than_other_writers(
    scripts: ExtraScripts, behind_url: str, impatient: str
) -> None:
    first = start_python(STARTER, str(scripts.place), behind_url, env={"PAUSE": "in a script"})
    tell(first)
    wait_for_line(first, "paused")
    second = start_python(STARTER, str(scripts.place), behind_url, impatient)
    reader = start_python(STARTER, str(scripts.place), behind_url, impatient, "reads")
    tell(second)
    tell(reader)
    time.sleep(1)
    assert (second.poll(), reader.poll()) == (None, None)
    tell(first)
    wait_for_line(first, "did")
    wait_for_line(second, "found")
    wait_for_line(reader, "found")


def test_the_next_in_line_goes_on_when_the_first_is_killed(scripts: ExtraScripts, behind_url: str) -> None:
    first = start_python(STARTER, str(scripts.place), behind_url, env={"PAUSE": "in a script"})
    tell(first)
    wait_for_line(first, "paused")
    second = start_python(STARTER, str(scripts.place), behind_url)
    tell(second)
    wait_for_line(second, "ready")
    time.sleep(0.3)
    kill(first)
    wait_for_line(second, "did")


def kill_at(point: str, scripts: ExtraScripts, url: str) -> None:
    program = start_python(KILLED, str(scripts.place), url, env={"PAUSE": point})
    wait_for_line(program, "paused")
    kill(program)


MIGRATION_POINTS = {
    "waiting in line": ("before:{engine}.exclude", False),
    "before the copy": ("before:{engine}.archiver", False),
    "after the copy": ("after:kagedb.operations.backup_set:mark_verified", False),
    "before the first script": ("before:{engine}.change_schema", False),
    "in a script": ("in a script", False),
    "after the scripts": ("after:kagedb.schema:drift", False),
    "before the commit": ("before:{engine}.database_class.commit_write", False),
    "after the commit": ("after:{engine}.change_schema", True),
    "before others are let in": ("before:{engine}.readmit", True),
}


@pytest.mark.parametrize("point", MIGRATION_POINTS)
def test_a_starter_killed_while_it_migrates_leaves_the_old_schema_or_the_new(
    scripts: ExtraScripts, behind_url: str, engine: str, point: str
) -> None:
    where, committed = MIGRATION_POINTS[point]
    kill_at(named_point(where, engine), scripts, behind_url)
    before = "9002_pause" if committed else scripts.last
    with kagedb.connect(url=behind_url, read_only=True) as storage:
        assert schema.look(storage.engine).version == before
        assert schema.drift(storage.engine, before) == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM session").fetchone() == (2,)
    with kagedb.connect(url=behind_url) as storage:
        assert schema.drift(storage.engine) == []
        assert storage.database.execute_sql("SELECT COUNT(*) FROM more").fetchone() == (2,)
        assert [event.kind for event in AuditEvent.select()].count("store.migrated") == 1
        if storage.engine.name == "sqlite":
            assert storage.database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
    (copy,) = copies(load(url=behind_url))
    assert committed or not copy.name.endswith(".part")


def test_the_copy_of_one_that_was_killed_after_the_commit_is_kept(
    scripts: ExtraScripts, behind_url: str, places: Places, engine: str
) -> None:
    kill_at(named_point("after:{engine}.change_schema", engine), scripts, behind_url)
    scripts.add("9003_nothing", "pass")
    kagedb.connect(url=behind_url).close()
    found = backup_set.sets_in(Path(load(url=behind_url).backup_directory))
    assert [one.manifest.before for one in found] == ["9001_more", "9003_nothing"]
    assert [one.directory for one in found] == copies(load(url=behind_url)), "one has no name yet"


def test_the_unfinished_copy_of_another_store_is_left_alone(
    scripts: ExtraScripts, behind_url: str, places: Places, engine: str
) -> None:
    other = places.migrated(engine)
    kill_at(named_point("after:kagedb.operations.backup_set:mark_verified", engine), scripts, other)
    (unfinished,) = copies(load(url=other))
    kagedb.connect(url=behind_url).close()
    assert unfinished.exists() and unfinished.name.endswith(".part")
    kagedb.connect(url=other).close()
    assert not unfinished.exists()


@pytest.mark.slow
def test_starters_killed_at_any_moment_leave_the_old_schema_or_the_new(
    scripts: ExtraScripts, behind_url: str, places: Places, engine: str
) -> None:
    """The long form of the tests by points: 40 moments of a start, on an old store and on none."""
    moments = random.Random(1)
    for _ in range(20):
        for url in (behind_url, places.empty(engine)):
            program = start_python(STARTER, str(scripts.place), url)
            wait_for_line(program, "ready")
            tell(program)
            time.sleep(moments.uniform(0, 0.25))
            kill(program)
            if url == behind_url:
                with kagedb.connect(url=url, read_only=True) as storage:
                    assert schema.drift(storage.engine, schema.look(storage.engine).version) == []
            else:
                expect_a_whole_new_store(url)


@pytest.mark.parametrize(
    "point",
    [
        "waiting in line",
        "before the first script",
        "in a script",
        "after the scripts",
        "before the commit",
        "after the commit",
    ],
)
def test_a_starter_killed_while_it_makes_the_store_leaves_nothing_or_all(
    scripts: ExtraScripts, behind_url: str, places: Places, engine: str, point: str
) -> None:
    url = places.empty(engine)
    kill_at(named_point(MIGRATION_POINTS[point][0], engine), scripts, url)
    expect_a_whole_new_store(url)


@pytest.mark.sqlite_only
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_starter_killed_at_the_rename_of_a_new_store_leaves_nothing_or_all(
    scripts: ExtraScripts, places: Places, engine: str, when: str
) -> None:
    """SQLite alone: its new store is a file made aside."""
    url = places.empty(engine)
    path = sqlite_path(url)
    kill_at(f"{when}:os:rename", scripts, url)
    assert path.exists() == (when == "after")
    expect_a_whole_new_store(url)
    assert sorted(entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")) == []


def expect_a_whole_new_store(url: str) -> None:
    with kagedb.connect(url=url) as storage:
        assert schema.drift(storage.engine) == []
        assert [event.kind for event in AuditEvent.select()] == ["store.created"]


def named_point(point: str, engine: str) -> str:
    """With the engine's own class in place of `{engine}`, and the class of its database for `.database_class`."""
    module, _, name = ENGINE_CLASS[engine].partition(":")
    if ".database_class" in point:
        module = module + "_database"
        name = name.replace("Engine", "StoreDatabase")
        point = point.replace(".database_class", "")
    return point.replace("{engine}", f"{module}:{name}")


@pytest.mark.parametrize("options", [{}, {"read_only": True}, {"exclusive": True}, {"migrate": False}], ids=str)
def test_a_store_that_is_open_elsewhere_is_not_migrated(
    scripts: ExtraScripts, migrated_url: str, url: str, options: dict[str, bool]
) -> None:
    holder = start_python(HOLDER, migrated_url, repr(options))
    wait_for_line(holder, "open")
    scripts.add("9001_more", MORE)
    scripts.learn(url)
    with pytest.raises(StorageInUse, match=rf"is open in .*\b{holder.pid}\b") as caught:
        kagedb.connect(url=migrated_url)
    assert caught.value.exit_status == 75
    assert "stop" in caught.value.hint
    assert copies(load(url=migrated_url)) == []
    tell(holder)
    assert holder.wait(30) == 0
    with kagedb.connect(url=migrated_url) as storage:
        assert "more" in storage.engine.tables()


@pytest.mark.parametrize("options", [{}, {"read_only": True}, {"exclusive": True}], ids=str)
def test_a_store_that_is_open_elsewhere_is_not_given_for_replacing(migrated_url: str, options: dict[str, bool]) -> None:
    holder = start_python(HOLDER, migrated_url, repr(options))
    wait_for_line(holder, "open")
    with kagedb.connect(url=migrated_url) as storage:
        with pytest.raises(StorageInUse, match=rf"is open in .*\b{holder.pid}\b"):
            storage.engine.exclude()
        tell(holder)
        assert holder.wait(30) == 0
        storage.engine.exclude()
        storage.engine.readmit()


def test_a_store_that_is_being_replaced_is_not_opened(migrated_url: str, impatient: str) -> None:
    code = """
import sys, kagedb
from kagedb.errors import StorageInUse
from kagedb.operations import backup_set
try:
    kagedb.connect(url=sys.argv[1], config=sys.argv[2], read_only=sys.argv[3] == "reads").close()
except StorageInUse as error:
    print("in use:", error)
"""
    with kagedb.connect(url=migrated_url) as storage:
        storage.engine.exclude()
        for how in ("reads", "writes"):
            said = run_python(code, migrated_url, impatient, how).stdout
            assert said.startswith("in use: ") and "replac" in said, said
        storage.engine.readmit()
        assert run_python(code, migrated_url, impatient, "writes").stdout == ""
