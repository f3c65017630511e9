"""`kaged backup` makes sets that are whole, in every form, alike on both engines, and can be restored."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from backup_sets import back_up, directory, sets, verdict
from commands import KAGED, answer_json, in_process
from contents import contents
from kagedb.engines.copy_text import lines_of
from kagedb.operations import backup_set, digests
from kagedb.operations.backup import Plan, make
from postgres_server import find_bin
from programs import run_python

if TYPE_CHECKING:
    from conftest import Places

# What a set is.


def test_a_set_has_the_data_a_manifest_and_checksums_that_sha256sum_accepts(stored_url: str) -> None:
    one = back_up(stored_url)
    assert one.state == "verified"
    names = {path.name for path in one.directory.iterdir()}
    assert names == {one.manifest.file, "manifest.json", "SHA256SUMS", "verified.json"}
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=one.directory, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert one.directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in one.directory.iterdir()} == {0o600}


def test_the_manifest_says_what_is_in_the_store(stored_url: str) -> None:
    manifest = back_up(stored_url).manifest
    with kagedb.connect(url=stored_url, read_only=True) as storage:
        rows = {name: len(found) for name, found in contents(storage).items()}
        seq, head = kagedb.AuditEvent.head()
        version = storage.standing.version if storage.standing else ""
    assert {name: facts.rows for name, facts in manifest.facts.items() if name in rows} == rows
    assert manifest.head == (seq, head.hex())
    assert manifest.schema == version
    assert all(len(facts.digest) == 64 for facts in manifest.facts.values())


@pytest.mark.sqlite_only
def test_the_file_of_a_set_opens_with_plain_sqlite_on_read_only_media(stored_url: str) -> None:
    one = back_up(stored_url)
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
    """NULL, nothing and what looks like them; and where one value or row ends and the next begins."""

    class Rows:
        def __init__(self, *rows: tuple[Any, ...]) -> None:
            self._rows = rows

        def rows(self, table: Any) -> Any:
            return iter(self._rows)

        def lines(self, table: Any) -> Any:
            return lines_of(self._rows, table)

    keyed = digests.Table("t", ("a", "b"), ("text", "text"), ("a",))
    keyless = digests.Table("t", ("a", "b"), ("text", "text"), ())

    def digest(*rows: tuple[Any, ...], table: digests.Table = keyed) -> str:
        digesting = digests.Digesting(table, Rows(*rows))  # type: ignore[arg-type]
        assert b"".join(digesting.lines()).count(b"\n") == len(rows)
        return digesting.facts().digest

    found: list[tuple[Any, ...]] = [("1", ""), ("", "1"), (None, "1"), ("1", None), ("\\N", "1"), ("1", "\\N")]
    found += [
        ("1\t", ""),
        ("", "\t1"),
        ("1", "\n1\t"),
        ("1", "\\n1\\t"),
        (b"1", ""),
        (1.0, ""),
        ("1 ", ""),
    ]
    apart = {digest(row) for row in found} | {digest(("1", ""), ("1", "")), digest()}
    assert len(apart) == len(found) + 2
    assert digest((True, "")) == digest((1, "")), "SQLite has no booleans"
    one, other = ("1", ""), ("", "1")
    assert digest(one, other) != digest(other, one)
    assert digest(one, other, table=keyless) == digest(other, one, table=keyless), "nothing gives them an order"
    alike = [digest(*rows, table=keyless) for rows in ((), (one,), (one, one), (one, other), (one, one, other))]
    assert len(set(alike)) == 5


@pytest.mark.sqlite_only
def test_a_backup_writes_no_more_than_what_it_copies(stored_url: str) -> None:
    """On PostgreSQL the dump is compressed; the benchmark has both."""
    with kagedb.connect(url=stored_url) as storage:
        run = kagedb.Run.select().get()
        for number in range(6):
            run.attach(f"noise {number}", os.urandom(900_000))
        path = Path(storage.engine.place)
    size = path.stat().st_size
    program = f"import atexit\natexit.register(lambda: print(open('/proc/self/io').read()))\n{KAGED}"
    done = run_python(program, "--url", stored_url, "backup")
    assert done.returncode == 0, done.stderr
    written = int(done.stdout.rpartition("\nwrite_bytes: ")[2].split()[0])
    if not written:
        pytest.skip("a file system in memory counts nothing")
    assert 0.95 * size < written < 1.05 * size


# Other forms.


@pytest.mark.parametrize(
    "options", [["--format", "sql"], ["--compress", "gzip"], ["--format", "sql", "--compress", "zstd"]]
)
def test_every_form_is_verified_and_can_be_restored(
    stored_url: str, places: Places, engine: str, options: list[str]
) -> None:
    one = back_up(stored_url, *options)
    assert one.state == "verified"
    assert verdict(stored_url, one) == []
    other = places.empty(engine)
    done = answer_json(stored_url, "restore", one.name, "--to", other)
    assert done["kept"] == ""
    with kagedb.connect(url=other, read_only=True) as storage:
        restored = contents(storage)
    with kagedb.connect(url=stored_url, read_only=True) as storage:
        original = contents(storage)
    event = restored["audit_event"].pop()
    assert event[2] == "store.restored"
    assert restored == original


@pytest.mark.sqlite_only
def test_the_sql_of_a_set_is_a_dump_that_the_sqlite3_shell_loads(stored_url: str, tmp_path: Path) -> None:
    """Ends with COMMIT, begins with BEGIN: what `sqlite3 new.db < kaged.sql` needs."""
    one = back_up(stored_url, "--format", "sql")
    connection = sqlite3.connect(tmp_path / "again.db")
    connection.executescript((one.directory / "kaged.sql").read_text())
    assert connection.execute("SELECT COUNT(*) FROM prompt_version").fetchone() == (2,)
    connection.close()


@pytest.mark.postgres_only
def test_pg_restore_reads_the_file_of_a_set_without_kaged(stored_url: str) -> None:
    one = back_up(stored_url)
    program = str(find_bin() / "pg_restore")
    done = subprocess.run([program, "-f", "-", str(one.directory / "kaged.pgdump")], capture_output=True)
    assert done.returncode == 0
    assert b"COPY kaged.run " in done.stdout


def test_a_quick_set_is_unverified_until_it_is_verified(stored_url: str) -> None:
    one = back_up(stored_url, "--quick")
    assert one.state == "unverified"
    assert verdict(stored_url, one) == []
    assert one.state == "verified"


def test_one_file_holds_a_whole_set(stored_url: str, tmp_path: Path) -> None:
    target = tmp_path / "kaged.tar"
    answer_json(stored_url, "backup", "--output", str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "scratch" in path.name] == []
    assert verdict(stored_url, str(target)) == []
    command = [sys.executable, "-c", KAGED, "--url", stored_url]
    made = subprocess.run([*command, "backup", "--output", "-"], capture_output=True, check=True)
    done = subprocess.run([*command, "verify", "-"], input=made.stdout, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sets() == []


def test_a_tar_file_that_was_cut_off_is_damaged(stored_url: str, tmp_path: Path) -> None:
    target = tmp_path / "kaged.tar"
    answer_json(stored_url, "backup", "--output", str(target))
    os.truncate(target, target.stat().st_size // 2)
    result = in_process("--url", stored_url, "verify", str(target))
    assert result.exit_code == 3, result.output


def test_a_directory_can_be_named(stored_url: str, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    answer_json(stored_url, "backup", "--output", f"{place}/")
    assert len(backup_set.sets_in(place)) == 1
    assert sets() == []
