"""`kaged backup` makes sets that are whole, good and those of one moment, beside whatever else happens to the store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from commands import KAGED, answer_json, in_process, run_kaged
from contents import contents
from kagedb.engines import open_engine
from kagedb.engines.archive import Pace
from kagedb.engines.sqlite_archive import STEP_PAGES, _Guard
from kagedb.operations import backup_set, digests
from kagedb.operations.backup import Plan, make, ready
from kagedb.settings import load
from postgres_server import find_bin, oldest_bin
from programs import kill, start_python, tell, wait_for_line
from stored import add_more, fill

if TYPE_CHECKING:
    from conftest import Places

WRITER = """
import sys, time
import kagedb
from kagedb import AuditEvent
with kagedb.connect(url=sys.argv[1]):
    print("writing", flush=True)
    number = 0
    while True:
        AuditEvent.record("policy.decision", actor="agent:busy", body={"number": number, "filler": "x" * 300})
        number += 1
"""


@pytest.fixture
def filled_url(migrated_url: str) -> str:
    fill(migrated_url)
    return migrated_url


def directory() -> Path:
    return Path(load(environ=dict(os.environ)).backup_directory)


def sets() -> list[backup_set.BackupSet]:
    return backup_set.sets_in(directory())


def back_up(url: str, *options: str) -> backup_set.BackupSet:
    made = answer_json(url, "backup", *options)
    return backup_set.BackupSet(Path(made["directory"]), made["sequence"])


def verdict(url: str, one: backup_set.BackupSet | str) -> list[str]:
    name = one if isinstance(one, str) else str(one.directory)
    result = in_process("--url", url, "verify", name, "--json")
    (found,) = json.loads(result.stdout)
    assert result.exit_code == (3 if found["wrong"] else 0)
    wrong: list[str] = found["wrong"]
    return wrong


# What a set is.


def test_a_set_has_the_data_a_manifest_and_checksums_that_sha256sum_accepts(filled_url: str) -> None:
    one = back_up(filled_url)
    assert one.state == "verified"
    names = {path.name for path in one.directory.iterdir()}
    assert names == {one.manifest.file, "manifest.json", "SHA256SUMS", "verified.json"}
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=one.directory, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert one.directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in one.directory.iterdir()} == {0o600}


def test_the_manifest_says_what_is_in_the_store(filled_url: str) -> None:
    manifest = back_up(filled_url).manifest
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        rows = {name: len(found) for name, found in contents(storage).items()}
        seq, head = kagedb.AuditEvent.head()
        version = storage.standing.version if storage.standing else ""
    assert {name: facts.rows for name, facts in manifest.facts.items() if name in rows} == rows
    assert manifest.head == (seq, head.hex())
    assert manifest.schema == version
    assert all(len(facts.digest) == 64 for facts in manifest.facts.values())


@pytest.mark.sqlite_only
def test_the_file_of_a_set_opens_with_plain_sqlite_on_read_only_media(filled_url: str) -> None:
    one = back_up(filled_url)
    uri = f"file:{one.directory / one.manifest.file}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert connection.execute("SELECT COUNT(*) FROM run").fetchone() == (1,)
    connection.close()


def test_both_engines_give_the_same_digests(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, put into both as they are: what `run` has on one engine it has on the other."""
    found = {}
    for name in ("sqlite", "postgres"):
        url = places.migrated(name)
        with kagedb.connect(url=url) as storage, storage.transaction():
            for model, row in _ROWS:
                getattr(kagedb, model).create(**row)
        with kagedb.connect(url=url, read_only=True) as storage:
            plan = Plan()
            made = make(storage.engine, directory() / name, plan)
        facts = backup_set.BackupSet(Path(made.directory), 1).manifest.facts
        found[name] = {table: one.digest for table, one in facts.items() if table in ("project", "session", "plugin")}
    assert found["sqlite"] == found["postgres"]


_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("Project", {"id": "01M86BAEYYC6APM2DT018T6QH8", "created_at": 5, "name": "häuser", "archived_at": None}),
    ("Project", {"id": "01M86BAEYYC6APM2DT018T6QH9", "created_at": 5, "name": "zwei 😀", "archived_at": 7}),
    (
        "Plugin",
        {
            "id": "01M86BAEYYC6APM2DT018T6QJ0",
            "created_at": 5,
            "project": "01M86BAEYYC6APM2DT018T6QH8",
            "name": "lights",
            "version": "1",
            "manifest": {"a": [1, 2.5, None, "\\n"]},
            "enabled": True,
            "removed_at": None,
        },
    ),
]


def test_a_digest_tells_values_apart_that_look_alike() -> None:
    """NULL, nothing, a digit and its text; and where one value ends and the next begins."""

    class Rows:
        def __init__(self, *rows: tuple[Any, ...]) -> None:
            self._rows = rows

        def rows(self, table: Any) -> Any:
            return iter(self._rows)

    table = digests.Table("t", ("a", "b"), ("text", "text"), ("a",))
    rows: list[list[tuple[Any, ...]]] = [
        [("1", "")],
        [(1, "")],
        [("", "1")],
        [(None, "1")],
        [(b"1", "")],
        [("1", None)],
        [("1", ""), ("1", "")],
        [("n", "")],
        [("t1:1", "")],
        [(1.0, "")],
    ]
    found = {digests._digest(Rows(*each), table, []).digest for each in rows}  # type: ignore[arg-type]
    assert len(found) == len(rows)
    assert digests._digest(Rows((True, "")), table, []) == digests._digest(Rows((1, "")), table, [])  # type: ignore[arg-type]


# Other forms.


@pytest.mark.parametrize(
    "options", [["--format", "sql"], ["--compress", "gzip"], ["--format", "sql", "--compress", "zstd"]]
)
def test_every_form_is_verified_and_can_be_restored(
    filled_url: str, places: Places, engine: str, options: list[str]
) -> None:
    one = back_up(filled_url, *options)
    assert one.state == "verified"
    assert verdict(filled_url, one) == []
    other = places.empty(engine)
    done = answer_json(filled_url, "restore", one.name, "--to", other)
    assert done["kept"] == ""
    with kagedb.connect(url=other, read_only=True) as storage:
        restored = contents(storage)
    with kagedb.connect(url=filled_url, read_only=True) as storage:
        original = contents(storage)
    event = restored["audit_event"].pop()
    assert event[2] == "store.restored"
    assert restored == original


@pytest.mark.sqlite_only
def test_the_sql_of_a_set_is_a_dump_that_the_sqlite3_shell_loads(filled_url: str, tmp_path: Path) -> None:
    """Ends with COMMIT, begins with BEGIN: what `sqlite3 new.db < kaged.sql` needs."""
    one = back_up(filled_url, "--format", "sql")
    connection = sqlite3.connect(tmp_path / "again.db")
    connection.executescript((one.directory / "kaged.sql").read_text())
    assert connection.execute("SELECT COUNT(*) FROM prompt_version").fetchone() == (2,)
    connection.close()


@pytest.mark.postgres_only
def test_pg_restore_reads_the_file_of_a_set_without_kaged(filled_url: str) -> None:
    one = back_up(filled_url)
    program = str(find_bin() / "pg_restore")
    done = subprocess.run([program, "-f", "-", str(one.directory / "kaged.pgdump")], capture_output=True)
    assert done.returncode == 0
    assert b"COPY kaged.run " in done.stdout


def test_a_quick_set_is_unverified_until_it_is_verified(filled_url: str) -> None:
    one = back_up(filled_url, "--quick")
    assert one.state == "unverified"
    assert verdict(filled_url, one) == []
    assert one.state == "verified"


def test_one_file_holds_a_whole_set(filled_url: str, tmp_path: Path) -> None:
    target = tmp_path / "kaged.tar"
    answer_json(filled_url, "backup", "--output", str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "scratch" in path.name] == []
    assert verdict(filled_url, str(target)) == []
    command = [sys.executable, "-c", KAGED, "--url", filled_url]
    made = subprocess.run([*command, "backup", "--output", "-"], capture_output=True, check=True)
    done = subprocess.run([*command, "verify", "-"], input=made.stdout, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sets() == []


def test_a_tar_file_that_was_cut_off_is_damaged(filled_url: str, tmp_path: Path) -> None:
    target = tmp_path / "kaged.tar"
    answer_json(filled_url, "backup", "--output", str(target))
    os.truncate(target, target.stat().st_size // 2)
    result = in_process("--url", filled_url, "verify", str(target))
    assert result.exit_code == 3, result.output


def test_a_directory_can_be_named(filled_url: str, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    answer_json(filled_url, "backup", "--output", f"{place}/")
    assert len(backup_set.sets_in(place)) == 1
    assert sets() == []


# Beside a busy store.


def test_a_backup_beside_a_writer_is_of_one_moment(filled_url: str, places: Places, engine: str) -> None:
    writer = start_python(WRITER, filled_url)
    wait_for_line(writer, "writing")
    time.sleep(0.3)
    one = back_up(filled_url)
    assert writer.poll() is None
    kill(writer)
    with kagedb.connect(url=filled_url, read_only=True):
        assert one.manifest.head is not None
        assert kagedb.AuditEvent.head()[0] > one.manifest.head[0]
    assert verdict(filled_url, one) == []
    answer_json(filled_url, "restore", one.name, "--to", places.empty(engine))


@pytest.mark.sqlite_only
def test_a_copy_that_is_not_pinned_starts_over_for_ever(migrated_url: str, tmp_path: Path) -> None:
    """The control of the next test: SQLite's backup begins again whenever somebody else has written."""
    steps = _steps_of_a_copy(migrated_url, tmp_path, pinned=False)
    assert steps.count(max(steps)) > 1, "it did not begin again"


@pytest.mark.sqlite_only
def test_a_pinned_copy_never_starts_over(migrated_url: str, tmp_path: Path) -> None:
    steps = _steps_of_a_copy(migrated_url, tmp_path, pinned=True)
    assert steps == sorted(set(steps), reverse=True)


def _steps_of_a_copy(url: str, tmp_path: Path, *, pinned: bool) -> list[int]:
    """The pages remaining after each step of a copy, while something is written after each of the first few."""
    steps: list[int] = []
    with kagedb.connect(url=url) as storage:
        with storage.transaction():
            for _ in range(3 * STEP_PAGES):
                kagedb.AuditEvent.record("policy.decision", actor="agent:a", body={"filler": "x" * 3000})
        # The pages are to be in the file, as they mostly are.
        storage.close()
    path = url.removeprefix("sqlite://")
    writer = start_python(_WRITES_WHEN_TOLD, url)
    wait_for_line(writer, "ready")
    source = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    if pinned:
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM sqlite_master").fetchone()
    target = sqlite3.connect(tmp_path / "copy.db")

    def step(status: int, remaining: int, total: int) -> None:
        if len(steps) < 5 and remaining:
            tell(writer)
            wait_for_line(writer, "wrote")
        steps.append(remaining)
        assert len(steps) < 100

    source.backup(target, pages=STEP_PAGES, progress=step)
    target.close()
    source.close()
    return steps


_WRITES_WHEN_TOLD = """
import sys
import kagedb
from kagedb import AuditEvent
with kagedb.connect(url=sys.argv[1]):
    print("ready", flush=True)
    while True:
        input()
        AuditEvent.record("policy.decision", actor="agent:b", body={})
        print("wrote", flush=True)
"""


@pytest.mark.sqlite_only
def test_a_copy_slower_than_the_writers_gives_up_cleanly(filled_url: str) -> None:
    """PostgreSQL's log is the server's own trouble."""
    with kagedb.connect(url=filled_url) as storage:
        ready(directory())

        def progress(done: int, whole: int) -> None:
            with storage.transaction():
                add_more(20)

        target = directory() / "copy"
        pace = Pace(wal_bytes=1024, progress=progress)
        with pytest.raises(kagedb.StorageBusy, match="too slow for what is being written"):
            with storage.engine.archiver().copy(target, "copy", pace, packed=False):
                pass


def test_the_throttle_is_lifted_while_the_log_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a byte a second each step would take hours."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        wal.write_bytes(bytes(150))

    monkeypatch.setattr("kagedb.engines.sqlite_archive.time.sleep", sleep)
    wal = tmp_path / "kaged.db-wal"
    wal.write_bytes(bytes(50))
    guard = _Guard(wal, 2048, Pace(wal_bytes=100, bytes_per_second=1))
    guard.step(0, 500, 1000)
    assert len(slept) == 1, "it slept until the log had grown, and then went on"
    guard.step(0, 400, 1000)
    assert len(slept) == 1
    wal.write_bytes(bytes(250))
    with pytest.raises(kagedb.StorageBusy, match="too slow"):
        guard.step(0, 300, 1000)


def test_a_second_backup_at_once_is_busy_and_leaves_the_first_alone(filled_url: str) -> None:
    ready(directory())
    holder = start_python(
        "import sys; from pathlib import Path; from kagedb.operations import backup_set\n"
        "with backup_set.lock(Path(sys.argv[1])):\n    print('held', flush=True); input()",
        str(directory()),
    )
    wait_for_line(holder, "held")
    result = in_process("--url", filled_url, "backup")
    assert result.exit_code == 75
    assert f"process {holder.pid} is at work" in result.output
    assert sets() == []


# What goes wrong.


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_leaves_no_set_and_the_earlier_ones_untouched(
    filled_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        monkeypatch.setattr("kagedb.operations.backup._require_room", lambda *_: None)
        with kagedb.connect(url=filled_url, read_only=True) as storage:
            first = make(storage.engine, place, Plan())
            before = _files(Path(first.directory))
            for _ in range(8):
                try:
                    make(storage.engine, place, Plan())
                except kagedb.StorageFull as error:
                    assert str(place) in error.message
                    break
            else:
                pytest.fail("the disk was never full")
            assert not backup_set.unfinished_in(place)
            assert _files(Path(first.directory)) == before
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_too_little_room_is_refused_before_anything_is_written(
    filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    result = in_process("--url", filled_url, "backup")
    assert result.exit_code == 1
    assert "has 100 bytes free; a backup of this store may need" in result.output
    assert not list(directory().glob("kaged-*"))


def test_a_target_that_is_no_directory_is_told(filled_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = in_process("--url", filled_url, "backup", "--output", str(tmp_path / "file" / "more") + "/")
    assert result.exit_code == 2
    assert "is not a directory" in result.output or "cannot be" in result.output


def test_what_a_killed_backup_left_is_removed_by_the_next(filled_url: str) -> None:
    ready(directory())
    (directory() / "kaged-000007-20260101T000000Z.part").mkdir()
    (directory() / "kaged-000003-20260101T000000Z.removed").mkdir()
    (directory() / ".kaged-scratch-4194304-x").mkdir()
    one = back_up(filled_url)
    assert one.sequence == 8 or one.sequence == 1
    assert {path.name for path in directory().iterdir()} == {".lock", one.name}


def test_sets_are_ordered_by_their_sequence_and_not_by_the_clock(
    filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = back_up(filled_url)
    monkeypatch.setattr(backup_set, "name_of", lambda sequence, at: f"kaged-{sequence:06}-20200101T000000Z")
    second = back_up(filled_url)
    assert [one.name for one in sets()] == [first.name, second.name]
    assert "2020" in second.name


@pytest.mark.postgres_only
def test_a_pg_dump_older_than_the_server_is_refused_naming_both_versions(
    filled_url: str, tmp_path: Path, postgres_server: Any
) -> None:
    older = oldest_bin()
    if older is None or postgres_server.version.startswith("15"):
        pytest.skip("there is no older pg_dump on this machine")
    config = tmp_path / "config.toml"
    config.write_text(f'[backup]\npg_bin = "{older}"\n')
    result = in_process("--url", filled_url, "--config", str(config), "backup")
    assert result.exit_code == 2
    assert "pg_dump 15." in result.output and "PostgreSQL 18" in result.output and "backup.pg_bin" in result.output
    assert not list(directory().glob("kaged-*"))


@pytest.mark.postgres_only
def test_the_password_is_in_no_argument_of_pg_dump(filled_url: str, tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    real = find_bin()
    for program in ("pg_dump", "pg_restore"):
        script = fake / program
        script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\nexec {real}/{program} "$@"\n')
        script.chmod(0o755)
    config = tmp_path / "config.toml"
    config.write_text(f'[backup]\npg_bin = "{fake}"\n')
    url = filled_url.replace("kaged@", "kaged:hunter2@")
    result = in_process("--url", url, "--config", str(config), "backup")
    assert result.exit_code == 0, result.output
    said = (tmp_path / "arguments").read_text()
    assert "--snapshot=" in said
    assert "hunter2" not in said


@pytest.mark.postgres_only
def test_a_server_killed_in_the_middle_leaves_no_set(own_postgres_server: Any) -> None:
    """The dump is stopped while it reads: a table is locked until the server is gone."""
    server = own_postgres_server
    server.create_database("doomed")
    url = server.url("doomed")
    fill(url)
    import psycopg2

    lock = psycopg2.connect(url)
    lock.cursor().execute("LOCK TABLE kaged.run IN ACCESS EXCLUSIVE MODE")
    backup = start_python("from kagedb.cli import main; main()", "--url", url, "backup")
    deadline = time.monotonic() + 20
    while not list(directory().glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    server.kill()
    assert backup.wait(30) in (1, 75)
    assert not list(directory().glob("kaged-*"))
    server.start()


def test_sigterm_tidies_within_a_second(filled_url: str) -> None:
    backup = start_python(
        "import time\nfrom kagedb.operations import backup\nreal = backup._look\n"
        "def slow(*arguments):\n    print('looking', flush=True)\n    time.sleep(60)\n"
        "backup._look = slow\nfrom kagedb.cli import main\nmain()",
        "--url",
        filled_url,
        "backup",
    )
    wait_for_line(backup, "looking")
    began = time.monotonic()
    backup.terminate()
    assert backup.wait(10) == 130
    assert time.monotonic() - began < 1
    assert not list(directory().glob("kaged-*"))


@pytest.mark.sqlite_only
def test_the_process_that_makes_a_backup_opens_the_database_through_sqlite_alone(filled_url: str) -> None:
    """Closing any other descriptor would drop SQLite's locks."""
    done = run_kaged("--url", filled_url, "backup", before=_WATCH.format(path=filled_url.removeprefix("sqlite://")))
    assert (done.returncode, done.stderr) == (0, "")


_WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("open", "os.open") and arguments and str(arguments[0]) == {path!r}:
        print("opened", arguments, file=sys.stderr)
sys.addaudithook(watch)
"""


# Damage.


def _sqlite_path(url: str) -> Path:
    return Path(url.removeprefix("sqlite://"))


def _files(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def _page_of(path: Path, sql: str) -> int:
    connection = sqlite3.connect(path)
    (page,) = connection.execute(sql).fetchone()
    connection.close()
    return int(page)


CORRUPTIONS = [
    "a zeroed page",
    "garbage in an index",
    "a broken page header",
    "a bit in a prompt",
    "a bit in a blob",
    "a bit in an event",
]


@pytest.mark.sqlite_only
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_no_set_of_a_damaged_store_is_blessed(filled_url: str, kind: str) -> None:
    """SQLite alone: its file can be reached. Six kinds of damage to one page, and six are found."""
    path = _sqlite_path(filled_url)
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    if kind.startswith("a bit in"):
        wanted = {"prompt": b"'quietly'", "blob": hashlib.sha256, "event": b'{"number":7}'}[kind.rpartition(" ")[2]]
        if callable(wanted):
            connection = sqlite3.connect(path)
            (blob,) = connection.execute("SELECT data FROM blob ORDER BY length(data) DESC LIMIT 1").fetchone()
            connection.close()
            wanted = bytes(blob[40:80])
        at = data.index(wanted) + 5
        assert data.count(wanted) >= 1
        data[at] ^= 1
    else:
        name = {
            "a zeroed page": "audit_event",
            "garbage in an index": "audit_event_subject",
            "a broken page header": "run",
        }[kind]
        page = _page_of(path, f"SELECT rootpage FROM sqlite_master WHERE name = '{name}'")
        start = (page - 1) * size
        if kind == "a zeroed page":
            data[start : start + size] = bytes(size)
        elif kind == "garbage in an index":
            data[start + size - 40 : start + size - 20] = bytes(range(20))
        else:
            data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    result = in_process("--url", filled_url, "backup")
    assert result.exit_code == 3, result.output
    assert [one.state for one in sets()] in ([], ["suspect"])
    assert in_process("--url", filled_url, "restore", "--latest").exit_code == 1


def test_a_bit_of_a_set_that_flips_is_found_and_the_set_kept(filled_url: str) -> None:
    one = back_up(filled_url)
    file = one.directory / one.manifest.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert verdict(filled_url, one) == [f"{file.name} is not what its checksum says"]
    assert one.state == "suspect"
    assert in_process("--url", filled_url, "verify", "--all").exit_code == 3


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "data"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut off"])
def test_a_set_with_a_file_missing_or_cut_off_is_damaged(filled_url: str, name: str, how: str) -> None:
    one = back_up(filled_url)
    file = one.directory / (one.manifest.file if name == "data" else name)
    if how == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if how == "empty" else file.stat().st_size - 9)
    assert verdict(filled_url, one)
    assert one.state == "suspect"
    listed = answer_json(filled_url, "backups")
    assert [row["state"] for row in listed] == ["suspect"]


def test_contents_that_differ_are_found_where_checksums_are_not(filled_url: str) -> None:
    """Somebody makes the sums fit: the digests of the manifest still tell."""
    one = back_up(filled_url)
    manifest = one.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    document["facts"]["run"]["digest"] = "0" * 64
    document["facts"]["session"]["rows"] = 7
    manifest.write_text(json.dumps(document))
    backup_set.write_sums(one.directory, one.manifest.sha256, one.manifest.file)
    assert verdict(filled_url, one) == [
        "run has other contents than the manifest says",
        "session has 1 rows, the manifest says 7",
    ]


def test_a_set_that_is_found_good_again_is_no_longer_suspect(filled_url: str) -> None:
    one = back_up(filled_url)
    backup_set.mark_suspect(one.directory, ["it looked odd"])
    assert verdict(filled_url, one) == []
    assert one.state == "verified"


def test_verifying_needs_no_store(filled_url: str, places: Places, engine: str) -> None:
    one = back_up(filled_url)
    nowhere = "sqlite:///nowhere/at/all.db" if engine == "sqlite" else "postgresql://nobody@127.0.0.1:1/nothing"
    assert verdict(nowhere, one) == []


# Retention.


def test_keep_leaves_the_newest(filled_url: str) -> None:
    names = [back_up(filled_url).name for _ in range(3)]
    made = answer_json(filled_url, "backup", "--keep", "2")
    assert made["removed"] == names[:2]
    assert [one.name for one in sets()] == [names[2], made["name"]]


def test_a_quick_set_removes_nothing_and_suspect_sets_stay(filled_url: str) -> None:
    first, second = back_up(filled_url), back_up(filled_url)
    backup_set.mark_suspect(first.directory, ["odd"])
    made = answer_json(filled_url, "backup", "--quick", "--keep", "1")
    assert made["removed"] == [] and made["notes"]
    made = answer_json(filled_url, "backup", "--keep", "1")
    assert made["removed"][0] == second.name and len(made["removed"]) == 2
    assert [one.name for one in sets()] == [first.name, made["name"]]


def test_the_last_good_sets_stay_however_old(filled_url: str) -> None:
    old = [back_up(filled_url) for _ in range(4)]
    for one in old:
        manifest = one.directory / "manifest.json"
        document = json.loads(manifest.read_text())
        document["created_at"] -= 90 * 86_400_000
        manifest.write_text(json.dumps(document))
    made = answer_json(filled_url, "backup", "--keep-days", "30")
    assert made["removed"] == [one.name for one in old[:2]]


def test_nothing_is_removed_by_age_while_the_clock_is_before_the_store(
    filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        back_up(filled_url)
    real = time.time_ns
    monkeypatch.setattr("kagedb.operations.backup.time.time_ns", lambda: real() - 365 * 86_400 * 10**9)
    made = answer_json(filled_url, "backup", "--keep-days", "1")
    assert made["removed"] == []
    assert "the clock of this host is before" in made["notes"][0]
    assert len(sets()) == 6


def test_sets_of_another_store_are_not_counted_or_removed(filled_url: str, places: Places, engine: str) -> None:
    other = places.empty(engine)
    kagedb.connect(url=other).close()
    theirs = back_up(other)
    mine = back_up(filled_url)
    made = answer_json(filled_url, "backup", "--keep", "1")
    assert made["removed"] == [mine.name]
    assert theirs.directory.exists()


def test_the_directory_itself_is_locked_for_the_time_of_a_backup_only(filled_url: str) -> None:
    back_up(filled_url)
    with backup_set.lock(directory()):
        pass


def test_an_engine_opened_to_be_read_is_enough(filled_url: str) -> None:
    engine = open_engine(load(url=filled_url), read_only=True)
    engine.open(create=False)
    made = make(engine, directory(), Plan())
    engine.close()
    assert made.verified
