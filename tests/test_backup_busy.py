"""A backup beside whatever else happens: writers, other backups, full disks, a server that dies, SIGTERM."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from backup_sets import back_up, directory, files, sets, verdict
from commands import answer_json, in_process, run_kaged
from kagedb.engines import resting, syncing
from kagedb.engines.archive import Pace
from kagedb.engines.postgres_archive import REST_BYTES
from kagedb.engines.sqlite_archive import STEP_PAGES, _Guard
from kagedb.engines.syncing import PIECE_BYTES, SYNC_BYTES, Sending
from kagedb.operations import backup_set
from kagedb.operations.backup import Plan, make, ready
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


# Beside a busy store.


def test_a_backup_beside_a_writer_is_of_one_moment(stored_url: str, places: Places, engine: str) -> None:
    writer = start_python(WRITER, stored_url)
    wait_for_line(writer, "writing")
    time.sleep(0.3)
    one = back_up(stored_url)
    assert writer.poll() is None
    kill(writer)
    with kagedb.connect(url=stored_url, read_only=True):
        assert one.manifest.head is not None
        assert kagedb.AuditEvent.head()[0] > one.manifest.head[0]
    assert verdict(stored_url, one) == []
    answer_json(stored_url, "restore", one.name, "--to", places.empty(engine))


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
def test_a_copy_slower_than_the_writers_gives_up_cleanly(stored_url: str) -> None:
    """PostgreSQL's log is the server's own trouble."""
    with kagedb.connect(url=stored_url) as storage:
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
    with Sending(wal) as sending:
        guard = _Guard(tmp_path / "kaged.db", 2048, Pace(wal_bytes=100, bytes_per_second=1), sending)
        guard.step(0, 500, 1000)
        assert len(slept) == 1, "it slept until the log had grown, and then went on"
        guard.step(0, 400, 1000)
        assert len(slept) == 1
        wal.write_bytes(bytes(250))
        with pytest.raises(kagedb.StorageBusy, match="too slow"):
            guard.step(0, 300, 1000)


def test_no_commit_waits_behind_the_sync_of_a_whole_copy(stored_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way to the disk at any time is a piece of the copy, whatever its size."""
    _add_noise(stored_url)
    sent = _watch_sending(monkeypatch)
    one = back_up(stored_url)
    whole = -(-one.manifest.bytes // PIECE_BYTES)
    assert [offset for _, offset in sent[:whole]] == [number * PIECE_BYTES for number in range(whole)]
    assert sent[whole] == ("durable", one.manifest.bytes)
    assert {what for what, _ in sent[:whole]} == {"sent"}


def test_a_copy_never_runs_far_ahead_of_the_disk(stored_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with little memory sends what lies there by itself, all at once."""
    _add_noise(stored_url)
    lead = 1024 * 1024
    real = os.sysconf
    pages = lead * syncing.LEAD_PART // real("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else real(name))
    written: list[int] = []
    monkeypatch.setattr(Sending, "written", _watched(Sending.written, written))
    sent = _watch_sending(monkeypatch)
    one = back_up(stored_url)
    early = sent[: next(place for place, (_, offset) in enumerate(sent) if place and offset == 0)]
    assert len(early) * PIECE_BYTES >= one.manifest.bytes - lead - STEP_PAGES * 4096
    assert written and max(written) <= lead


def test_a_disk_that_fails_while_it_is_written_to_leaves_no_set(
    stored_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of a failed write it says once."""

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(sync_file_range=_Refusing(errno.EIO)))
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 1
    assert "no backup can be written in" in result.output and "Input/output error" in result.output
    assert not list(directory().glob("kaged-*"))


def test_a_disk_that_keeps_other_bytes_than_were_written_makes_the_set_suspect(
    stored_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagedb.operations import backup

    real = backup.send

    def kept(path: Path, *arguments: Any) -> str:
        written = real(path, *arguments)
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        return written

    monkeypatch.setattr(backup, "send", kept)
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 3
    assert "the disk gives back another" in result.output
    assert [one.state for one in sets()] == [backup_set.SUSPECT_STATE]


def test_work_rests_for_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rested = [100.0], [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        rested.append(seconds)

    monkeypatch.setattr(resting, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    rests = resting.Rests()
    for worked, rest in (0.0004, 0), (0.0004, 0.0008), (0.003, 0.003), (7, resting.LONGEST_REST_SECONDS), (0.0001, 0):
        now[0] += worked
        before = len(rested)
        rests.rest()
        assert sum(rested[before:]) == pytest.approx(rest)


@pytest.mark.postgres_only
def test_the_dump_the_digests_and_the_reading_back_rest_all_along(
    stored_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they would keep every processor of a small host from the daemon and its server."""
    _add_noise(stored_url)
    resting_in: Counter[str] = Counter()
    monkeypatch.setattr(resting.Rests, "rest", lambda _: resting_in.update([inspect.stack()[1].function]))
    one = back_up(stored_url)
    assert resting_in["_save"] >= one.manifest.bytes // REST_BYTES // 2
    assert resting_in["_resting"] >= 6 and resting_in["add"] >= 6 and resting_in["_batches"] > 1


@pytest.mark.sqlite_only
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_that_syncs_whole_files_alone_is_served_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (synced.append(descriptor), real(descriptor))[1])
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(sync_file_range=_Refusing(number)))
    file = tmp_path / "copy"
    file.write_bytes(os.urandom(3 * SYNC_BYTES))
    assert syncing.send(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    step = -(-SYNC_BYTES // PIECE_BYTES) * PIECE_BYTES
    assert len(synced) == file.stat().st_size // step + 1


class _Refusing:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, *_: int) -> int:
        import ctypes

        ctypes.set_errno(self.number)
        return -1


def _add_noise(url: str) -> None:
    with kagedb.connect(url=url):
        run = kagedb.Run.select().get()
        for number in range(6):
            run.attach(f"noise {number}", os.urandom(900_000))


def _watch_sending(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each piece with its offset, and each time that a whole file was made durable with its size, as they come."""
    sent: list[tuple[str, int]] = []
    real_send, real_sync = syncing._Pieces.send, os.fdatasync

    def watched(pieces: syncing._Pieces, descriptor: int, offset: int, length: int) -> None:
        real_send(pieces, descriptor, offset, length)
        sent.append(("sent", offset))

    def durable(descriptor: int) -> None:
        real_sync(descriptor)
        sent.append(("durable", os.fstat(descriptor).st_size))

    monkeypatch.setattr(syncing._Pieces, "send", watched)
    monkeypatch.setattr(os, "fdatasync", durable)
    return sent


def _watched(written: Any, ahead: list[int]) -> Any:
    def watched(sending: Sending, size: int, *, hurry: bool = False) -> None:
        written(sending, size, hurry=hurry)
        ahead.append(size - sending._sent)

    return watched


def test_a_second_backup_at_once_is_busy_and_leaves_the_first_alone(stored_url: str) -> None:
    ready(directory())
    holder = start_python(
        "import sys; from pathlib import Path; from kagedb.operations import backup_set\n"
        "with backup_set.lock(Path(sys.argv[1])):\n    print('held', flush=True); input()",
        str(directory()),
    )
    wait_for_line(holder, "held")
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 75
    assert f"process {holder.pid} is at work" in result.output
    assert sets() == []


# What goes wrong.


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_leaves_no_set_and_the_earlier_ones_untouched(
    stored_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        monkeypatch.setattr("kagedb.operations.backup._require_room", lambda *_: None)
        with kagedb.connect(url=stored_url, read_only=True) as storage:
            first = make(storage.engine, place, Plan())
            before = files(Path(first.directory))
            for _ in range(8):
                try:
                    make(storage.engine, place, Plan())
                except kagedb.StorageFull as error:
                    assert str(place) in error.message
                    break
            else:
                pytest.fail("the disk was never full")
            assert not backup_set.unfinished_in(place)
            assert files(Path(first.directory)) == before
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_too_little_room_is_refused_before_anything_is_written(
    stored_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 1
    assert "has 100 bytes free; a backup of this store may need" in result.output
    assert not list(directory().glob("kaged-*"))


def test_a_target_that_is_no_directory_is_told(stored_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = in_process("--url", stored_url, "backup", "--output", str(tmp_path / "file" / "more") + "/")
    assert result.exit_code == 2
    assert "is not a directory" in result.output or "cannot be" in result.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount something read-only")
def test_a_read_only_target_is_told(stored_url: str, tmp_path: Path) -> None:
    place = tmp_path / "frozen"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        result = in_process("--url", stored_url, "backup", "--output", f"{place}/")
        assert result.exit_code == 1
        assert f"nothing can be written in {place}: Read-only file system" in result.output
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_target_that_vanishes_meanwhile_is_told(
    stored_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is pulled: what is at its place afterwards is an empty directory, or none."""
    from kagedb.operations import backup

    place, real = tmp_path / "stick", backup._look

    def pulled(*arguments: Any) -> Any:
        found = real(*arguments)
        shutil.rmtree(place)
        return found

    monkeypatch.setattr(backup, "_look", pulled)
    result = in_process("--url", stored_url, "backup", "--output", f"{place}/")
    assert result.exit_code in (1, 3), result.output
    assert "internal error" not in result.output
    assert not place.exists() or not list(place.glob("kaged-*"))


def test_what_a_killed_backup_left_is_removed_by_the_next(stored_url: str) -> None:
    ready(directory())
    (directory() / "kaged-000007-20260101T000000Z.part").mkdir()
    (directory() / "kaged-000003-20260101T000000Z.removed").mkdir()
    (directory() / ".kaged-scratch-4194304-x").mkdir()
    one = back_up(stored_url)
    assert one.sequence == 8 or one.sequence == 1
    assert {path.name for path in directory().iterdir()} == {".lock", one.name}


def test_sets_are_ordered_by_their_sequence_and_not_by_the_clock(
    stored_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = back_up(stored_url)
    monkeypatch.setattr(backup_set, "name_of", lambda sequence, at: f"kaged-{sequence:06}-20200101T000000Z")
    second = back_up(stored_url)
    assert [one.name for one in sets()] == [first.name, second.name]
    assert "2020" in second.name


@pytest.mark.postgres_only
def test_a_pg_dump_older_than_the_server_is_refused_naming_both_versions(
    stored_url: str, tmp_path: Path, postgres_server: Any
) -> None:
    older = oldest_bin()
    if older is None or postgres_server.version.startswith("15"):
        pytest.skip("there is no older pg_dump on this machine")
    config = tmp_path / "config.toml"
    config.write_text(f'[backup]\npg_bin = "{older}"\n')
    result = in_process("--url", stored_url, "--config", str(config), "backup")
    assert result.exit_code == 2
    assert "pg_dump 15." in result.output and "PostgreSQL 18" in result.output and "backup.pg_bin" in result.output
    assert not list(directory().glob("kaged-*"))


@pytest.mark.postgres_only
def test_the_password_is_in_no_argument_of_pg_dump(stored_url: str, tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    real = find_bin()
    for program in ("pg_dump", "pg_restore"):
        script = fake / program
        script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\nexec {real}/{program} "$@"\n')
        script.chmod(0o755)
    config = tmp_path / "config.toml"
    config.write_text(f'[backup]\npg_bin = "{fake}"\n')
    url = stored_url.replace("kaged@", "kaged:hunter2@")
    result = in_process("--url", url, "--config", str(config), "backup")
    assert result.exit_code == 0, result.output
    said = (tmp_path / "arguments").read_text()
    assert "--snapshot=" in said
    assert "hunter2" not in said


@pytest.mark.postgres_only
def test_a_server_killed_in_the_middle_leaves_no_set(own_postgres_server: Any) -> None:
    """In the middle of the rows: more than pipes hold of them is still to come, and the rate lets it come slowly."""
    server = own_postgres_server
    server.create_database("doomed")
    url = server.url("doomed")
    fill(url)
    with kagedb.connect(url=url):
        run = kagedb.Run.select().get()
        for number in range(3):
            run.attach(f"noise {number}", os.urandom(700_000))
    backup = start_python("from kagedb.cli import main; main()", "--url", url, "backup", "--limit-rate", "0.2")
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in directory().glob("*.part/kaged.pgdump")):
        assert backup.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    server.kill()
    assert backup.wait(30) == 75
    assert not list(directory().glob("kaged-*"))
    server.start()


def test_sigterm_tidies_within_a_second(stored_url: str) -> None:
    backup = start_python(
        "import time\nfrom kagedb.operations import backup\nreal = backup._look\n"
        "def slow(*arguments):\n    print('looking', flush=True)\n    time.sleep(60)\n"
        "backup._look = slow\nfrom kagedb.cli import main\nmain()",
        "--url",
        stored_url,
        "backup",
    )
    wait_for_line(backup, "looking")
    began = time.monotonic()
    backup.terminate()
    assert backup.wait(10) == 130
    assert time.monotonic() - began < 1
    assert not list(directory().glob("kaged-*"))


@pytest.mark.sqlite_only
def test_the_process_that_makes_a_backup_opens_the_database_through_sqlite_alone(stored_url: str) -> None:
    """Closing any other descriptor would drop SQLite's locks."""
    done = run_kaged("--url", stored_url, "backup", before=_WATCH.format(path=stored_url.removeprefix("sqlite://")))
    assert (done.returncode, done.stderr) == (0, "")


_WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("open", "os.open") and arguments and str(arguments[0]) == {path!r}:
        print("opened", arguments, file=sys.stderr)
sys.addaudithook(watch)
"""
