"""`kaged restore` leaves the old store or the new one, keeps the old, and says so in the audit log."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from backup_sets import files
from commands import answer, answer_json, in_process, run_kaged
from contents import contents
from kagedb import AuditEvent, Project
from kagedb.operations import backup_set
from kagedb.settings import load
from killing import CALLS, Killer, can_trace, spread
from programs import start_python, tell, wait_for_line
from stored import add_more

if TYPE_CHECKING:
    from conftest import Places

HOLDER = """
import sys
import kagedb
with kagedb.connect(url=sys.argv[1], read_only=len(sys.argv) > 2):
    print("open", flush=True)
    input()
"""


@pytest.fixture
def changed_url(stored_url: str) -> str:
    """A store that has one set, and has gone on since."""
    answer_json(stored_url, "backup")
    with kagedb.connect(url=stored_url):
        Project.add("garden", actor="operator:ana")
        add_more(3)
    return stored_url


def names(url: str) -> set[str]:
    with kagedb.connect(url=url, read_only=True):
        return {project.name for project in Project.select()}


def last_event(url: str) -> tuple[str, dict[str, Any]]:
    with kagedb.connect(url=url, read_only=True):
        event = AuditEvent.select().order_by(AuditEvent.seq.desc()).get()
        return event.kind, json.loads(event.body)


def test_what_was_backed_up_is_back_and_an_event_says_so(changed_url: str) -> None:
    with kagedb.connect(url=changed_url, read_only=True):
        seq, head = AuditEvent.head()
    done = answer_json(changed_url, "restore", "--latest")
    assert names(changed_url) == {"house"}
    kind, body = last_event(changed_url)
    assert kind == "store.restored"
    assert body["replaced"] == {"seq": seq, "hash": head.hex()}
    assert body["set"] == done["name"]
    assert done["replaced"] == [seq, head.hex()]
    assert answer_json(changed_url, "audit", "verify")["result"] == "holds"


def test_a_restored_store_can_be_written_and_backed_up(changed_url: str) -> None:
    answer_json(changed_url, "restore", "--latest")
    with kagedb.connect(url=changed_url):
        Project.add("attic", actor="operator:ana")
    assert answer_json(changed_url, "backup")["verified"]


@pytest.mark.sqlite_only
def test_the_old_store_is_kept_whole_beside_the_new_one(changed_url: str) -> None:
    """On PostgreSQL it is a schema: the next test."""
    done = answer_json(changed_url, "restore", "--latest")
    assert Path(done["kept"]).parent == Path(changed_url.removeprefix("sqlite://")).parent
    assert Path(done["kept"]).stat().st_mode & 0o777 == 0o600
    assert names(f"sqlite://{done['kept']}") == {"house", "garden"}


@pytest.mark.postgres_only
def test_the_old_schema_is_kept_under_another_name(changed_url: str, tmp_path: Path) -> None:
    """On SQLite it is a file: the test before."""
    import psycopg2

    done = answer_json(changed_url, "restore", "--latest")
    connection = psycopg2.connect(changed_url)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT name FROM {done['kept']}.project ORDER BY name")
        assert cursor.fetchall() == [("garden",), ("house",)]
    connection.close()


def test_two_restores_in_a_second_keep_both_old_stores(changed_url: str) -> None:
    first = answer_json(changed_url, "restore", "1")
    second = answer_json(changed_url, "restore", "1")
    third = answer_json(changed_url, "restore", "1")
    assert len({first["kept"], second["kept"], third["kept"]}) == 3


def test_a_restore_into_an_empty_place_makes_the_same_store(changed_url: str, places: Places, engine: str) -> None:
    other = places.empty(engine)
    done = answer_json(changed_url, "restore", "--latest", "--to", other)
    assert done["kept"] == "" and done["replaced"] is None
    assert names(other) == {"house"}
    assert names(changed_url) == {"house", "garden"}
    with kagedb.connect(url=other):
        assert kagedb.schema.drift(kagedb.storage.current().engine) == []  # type: ignore[union-attr]


@pytest.mark.parametrize("how", [[], ["read"]], ids=["writing", "reading"])
def test_a_store_that_anybody_has_open_is_refused(changed_url: str, how: list[str]) -> None:
    holder = start_python(HOLDER, changed_url, *how)
    wait_for_line(holder, "open")
    result = in_process("--url", changed_url, "restore", "--latest")
    assert result.exit_code == 75, result.output
    assert "is open in" in result.output
    tell(holder)
    holder.wait()
    answer_json(changed_url, "restore", "--latest")


def test_a_store_open_in_the_same_process_is_refused(changed_url: str) -> None:
    from kagedb.operations.restore import restore

    with kagedb.connect(url=changed_url) as storage:
        with pytest.raises(kagedb.StorageError, match="this process has a store open"):
            restore(storage.settings, None, sets=Path(storage.settings.backup_directory), actor="operator:ana")


def test_a_set_of_the_other_engine_is_refused(changed_url: str, places: Places, engine: str) -> None:
    other = places.empty("sqlite" if engine == "postgres" else "postgres")
    result = in_process("--url", changed_url, "restore", "1", "--to", other)
    assert result.exit_code == 2
    assert "is of a store on" in result.output


def test_a_set_of_a_newer_schema_is_refused(changed_url: str) -> None:
    one = the_set(changed_url)
    manifest = one.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    document.update(schema="9999_later", kagedb="9.0.0")
    manifest.write_text(json.dumps(document))
    backup_set.write_sums(one.directory, one.manifest.sha256, one.manifest.file)
    result = in_process("--url", changed_url, "restore", "1")
    assert result.exit_code == 1
    assert "install kagedb 9.0.0 or newer" in result.output
    assert names(changed_url) == {"house", "garden"}


def the_set(url: str) -> backup_set.BackupSet:
    (one,) = backup_set.sets_in(Path(load(url=url).backup_directory))
    return one


def test_a_damaged_set_changes_nothing(changed_url: str) -> None:
    one = the_set(changed_url)
    file = one.directory / one.manifest.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = _listing(changed_url)
    assert in_process("--url", changed_url, "restore", "1").exit_code == 3
    # Even where the checksums were made to fit.
    backup_set.write_sums(one.directory, backup_set.file_sum(file), file.name)
    assert in_process("--url", changed_url, "restore", "1").exit_code == 3
    assert names(changed_url) == {"house", "garden"}
    assert _listing(changed_url) == before


def _listing(url: str) -> set[str]:
    path = Path(url.removeprefix("sqlite://"))
    return {entry.name for entry in path.parent.iterdir() if "before" in entry.name} if path.exists() else set()


def test_the_latest_is_the_newest_verified_one(changed_url: str) -> None:
    newer = answer_json(changed_url, "backup")
    quick = answer_json(changed_url, "backup", "--quick")
    backup_set.mark_suspect(Path(newer["directory"]), ["odd"])
    done = answer_json(changed_url, "restore", "--latest")
    assert done["sequence"] == 1
    assert quick["sequence"] == 3


def test_the_latest_of_several_stores_has_to_be_named(changed_url: str, places: Places, engine: str) -> None:
    other, empty = places.empty(engine), places.empty(engine)
    kagedb.connect(url=other).close()
    answer_json(other, "backup")
    result = in_process("--url", changed_url, "restore", "--latest", "--to", empty)
    assert result.exit_code == 2
    assert "sets of several stores" in result.output
    answer_json(changed_url, "restore", "--latest")
    assert names(changed_url) == {"house"}


@pytest.mark.parametrize("arguments", [[], ["1", "--latest"]])
def test_one_of_set_and_latest_is_wanted(changed_url: str, arguments: list[str]) -> None:
    assert in_process("--url", changed_url, "restore", *arguments).exit_code == 2


# SQLite: files beside the target.


@pytest.mark.sqlite_only
def test_a_stale_log_beside_the_target_does_no_harm(changed_url: str) -> None:
    """A hot log of the old store is kept with it, and is not the new one's."""
    path = Path(changed_url.removeprefix("sqlite://"))
    holder = start_python(HOLDER, changed_url)
    wait_for_line(holder, "open")
    with kagedb.connect(url=changed_url):
        add_more(5)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    wal = path.with_name("kaged.db-wal")
    assert wal.stat().st_size > 0, "the log is not hot"
    done = answer_json(changed_url, "restore", "--latest")
    assert names(changed_url) == {"house"}
    assert not wal.exists() or wal.stat().st_size == 0 or wal.stat().st_ino != 0
    assert answer_json(changed_url, "audit", "verify")["result"] == "holds"
    with kagedb.connect(url=f"sqlite://{done['kept']}", read_only=True):
        assert AuditEvent.head()[0] == done["replaced"][0]


@pytest.mark.sqlite_only
@pytest.mark.parametrize("damage", ["empty", "garbage", "missing", "missing, with a log"])
def test_a_store_that_cannot_be_opened_can_be_replaced(changed_url: str, damage: str) -> None:
    path = Path(changed_url.removeprefix("sqlite://"))
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"garbage" * 1000)
    else:
        path.unlink()
        if damage != "missing":
            path.with_name("kaged.db-wal").write_bytes(b"x" * 5000)
    done = answer_json(changed_url, "restore", "1")
    assert names(changed_url) == {"house"}
    assert done["replaced"] is None
    if damage == "garbage":
        assert Path(done["kept"]).read_bytes() == b"garbage" * 1000
    if damage == "missing, with a log":
        assert Path(done["kept"] + "-wal").read_bytes() == b"x" * 5000


# Killed at any step.


def _restore_killed_at(killer: Killer, url: str, limit: int) -> int:
    took = killer.run_to_step(limit, "--url", url, "restore", "1")
    # Only where there is something to say.
    note = Path(url.removeprefix("sqlite://") + ".restore")
    said = run_kaged("--url", url, "status").stderr if note.exists() else ""
    assert not note.exists()
    found = names(url)
    assert found in ({"house"}, {"house", "garden"}), limit
    kind, _ = last_event(url)
    assert (kind == "store.restored") == (found == {"house"})
    assert answer_json(url, "audit", "verify")["result"] == "holds"
    if url.startswith("sqlite"):
        path = Path(url.removeprefix("sqlite://"))
        left = {entry.name for entry in path.parent.iterdir()} - {
            "kaged.db",
            "kaged.db.lock",
            "kaged.db-wal",
            "kaged.db-shm",
            # A note that was not in force yet; the next writer removes it.
            "kaged.db.restore.new",
        }
        assert not [name for name in left if not name.startswith("kaged.db.before-restore-")], f"{limit}: {left}"
        if "was cut off" in said:
            assert ("has the restored store" in said) == (found == {"house"})
    if found == {"house"}:
        with kagedb.connect(url=url):
            Project.add("garden", actor="operator:ana")
            add_more(3)
    return took


def test_a_restore_killed_at_a_step_leaves_the_old_store_or_the_new(changed_url: str) -> None:
    killer = Killer()
    whole = _restore_killed_at(killer, changed_url, 10**9)
    assert whole > 5
    # The exchange is at the end.
    for limit in sorted({1, whole // 2, *range(max(1, whole - 8), whole + 1, 2)}):
        _restore_killed_at(killer, changed_url, limit)


@pytest.mark.slow
def test_a_restore_killed_at_every_step_leaves_the_old_store_or_the_new(changed_url: str) -> None:
    killer = Killer()
    for limit in range(1, _restore_killed_at(killer, changed_url, 10**9) + 1):
        _restore_killed_at(killer, changed_url, limit)


def _backup_killed_at(killer: Killer, url: str, limit: int, first: backup_set.BackupSet) -> int:
    before = files(first.directory)
    took = killer.run_to_step(limit, "--url", url, "backup")
    for one in backup_set.sets_in(first.directory.parent):
        if one.name != first.name:
            assert one.state == "verified"
            result = in_process("--url", url, "verify", one.name)
            assert result.exit_code == 0, f"{limit}: {result.output}"
            shutil.rmtree(one.directory)
    assert files(first.directory) == before
    return took


def test_a_backup_killed_at_a_step_lists_only_complete_sets(changed_url: str) -> None:
    first, killer = the_set(changed_url), Killer()
    whole = _backup_killed_at(killer, changed_url, 10**9, first)
    for limit in sorted({1, whole // 2, *range(whole - 4, whole + 1)}):
        _backup_killed_at(killer, changed_url, limit, first)


@pytest.mark.slow
def test_a_backup_killed_at_every_step_lists_only_complete_sets(changed_url: str) -> None:
    first, killer = the_set(changed_url), Killer()
    for limit in range(1, _backup_killed_at(killer, changed_url, 10**9, first) + 1):
        _backup_killed_at(killer, changed_url, limit, first)


class Struck:
    """A store with a set, which is backed up or restored while something kills that, again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.path = Path(url.removeprefix("sqlite://"))
        self.first = the_set(url)
        self.killer = Killer()
        self.arguments = {"backup": ("--url", url, "backup"), "restore": ("--url", url, "restore", "1")}

    def look(self, verb: str, point: str) -> None:
        """That what is there is whole; then make it as it was."""
        (self._look_at_sets if verb == "backup" else self._look_at_store)(point)

    def _look_at_sets(self, point: str) -> None:
        for one in backup_set.sets_in(self.first.directory.parent):
            if one.name != self.first.name:
                result = in_process("--url", self.url, "verify", one.name)
                assert result.exit_code == 0, f"{point}: {result.output}"
                shutil.rmtree(one.directory)

    def _look_at_store(self, point: str) -> None:
        # By a writer, as a daemon is: it finishes what was cut off.
        with kagedb.connect(url=self.url):
            found = {project.name for project in Project.select()}
            assert found in ({"house"}, {"house", "garden"}), point
            event = AuditEvent.select().order_by(AuditEvent.seq.desc()).get()
            assert (event.kind == "store.restored") == (found == {"house"}), point
            if found == {"house"}:
                Project.add("garden", actor="operator:ana")
        assert answer_json(self.url, "audit", "verify")["result"] == "holds", point
        for path in self.path.parent.glob(f"{self.path.name}.before-restore-*"):
            path.unlink()
        left = {path.name for path in self.path.parent.iterdir() if path.is_file()}
        assert left <= {self.path.name + suffix for suffix in ("", "-wal", "-shm", ".lock")}, point


@pytest.mark.sqlite_only
@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_sigkill_at_a_call_to_the_system_leaves_only_what_is_whole(changed_url: str, verb: str) -> None:
    """SQLite's own writes too. PostgreSQL's are its own."""
    struck = Struck(changed_url)
    before = files(struck.first.directory)
    calls = struck.killer.calls(*struck.arguments[verb])
    struck.look(verb, "none")
    for call in ("fsync", "rename", "pwrite64", "write"):
        for number in spread(calls[call], 3):
            assert struck.killer.run(*struck.arguments[verb], call=call, number=number), f"{call} {number}"
            struck.look(verb, f"{call} {number}")
    assert files(struck.first.directory) == before


@pytest.mark.slow
@pytest.mark.sqlite_only
@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_sigkill_at_every_call_to_the_system_leaves_only_what_is_whole(changed_url: str, verb: str) -> None:
    struck = Struck(changed_url)
    before = files(struck.first.directory)
    points = 0
    for call in CALLS:
        number = 1
        while struck.killer.run(*struck.arguments[verb], call=call, number=number):
            struck.look(verb, f"{call} {number}")
            number += 1
        struck.look(verb, f"{call} {number}")
        points += number - 1
    assert points > 50
    assert files(struck.first.directory) == before


@pytest.mark.sqlite_only
def test_a_note_of_a_restore_that_was_cut_off_is_removed_by_the_next_writer(changed_url: str) -> None:
    draft = Path(changed_url.removeprefix("sqlite://") + ".restore.new")
    draft.write_text("prepa")
    assert names(changed_url) == {"house", "garden"}
    assert draft.exists(), "a reader changes nothing"
    kagedb.connect(url=changed_url).close()
    assert not draft.exists()


@pytest.mark.sqlite_only
def test_a_daemon_that_starts_during_a_restore_waits_and_opens_the_new_store(changed_url: str) -> None:
    """PostgreSQL's readers see one schema or the other in any case."""
    restorer = start_python(
        "import sys\nfrom kagedb.engines import sqlite_archive\nreal = sqlite_archive._exchange\n"
        "def slow(*arguments):\n    print('exchanging', flush=True); input(); real(*arguments)\n"
        "sqlite_archive._exchange = slow\nfrom kagedb.cli import main\nmain()",
        "--url",
        changed_url,
        "restore",
        "1",
    )
    wait_for_line(restorer, "exchanging")
    starter = start_python(HOLDER, changed_url)
    with pytest.raises(AssertionError):
        wait_for_line(starter, "open", timeout=1)
    tell(restorer)
    wait_for_line(starter, "open")
    assert names(changed_url) == {"house"}
    tell(starter)


def test_a_set_of_another_machine_is_restored_by_its_path(changed_url: str, places: Places, engine: str) -> None:
    one = the_set(changed_url)
    carried = Path(os.environ["HOME"]) / "carried"
    shutil.copytree(one.directory, carried)
    other = places.empty(engine)
    answer(changed_url, "restore", str(carried), "--to", other)
    with kagedb.connect(url=other, read_only=True) as storage:
        assert len(contents(storage)["run"]) == 1
