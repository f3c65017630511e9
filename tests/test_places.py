"""What the file system says about the place of a store: network mounts, modes, whose it is."""

from __future__ import annotations

import os
import resource
import signal
import stat
from pathlib import Path

import pytest

import kagedb
from kagedb.engines import places
from kagedb.engines.places import file_system_of, make_private_file, refuse_network_file_system, room_is_out
from kagedb.errors import StorageError, StorageNotFound

MOUNTS = """\
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:5 / /proc rw - proc proc rw
30 22 0:40 / {place}/net rw,relatime shared:9 master:2 - nfs4 server:/export rw,vers=4.2
31 22 0:41 / {place}/with\\040space rw - cifs //host/share rw
32 30 0:42 / {place}/net/local rw - tmpfs tmpfs rw
33 22 0:43 / {place}/twice rw - nfs4 server:/old rw
34 22 0:44 / {place}/twice rw - xfs /dev/sdb1 rw
35 22 0:45 / {place}/network rw - btrfs /dev/sdc1 rw
a line that says nothing
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    for name in ("net/local/deep", "with space", "twice", "network", "plain"):
        (tmp_path / name).mkdir(parents=True)
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS.format(place=tmp_path))
    return file


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("plain", "ext4"),
        ("net", "nfs4"),
        ("network", "btrfs"),
        ("with space", "cifs"),
        ("net/local", "tmpfs"),
        ("net/local/deep", "tmpfs"),
        ("twice", "xfs"),
    ],
)
def test_the_innermost_and_latest_mount_decides(tmp_path: Path, mounts: Path, directory: str, kind: str) -> None:
    assert file_system_of(tmp_path / directory, mounts) == kind


def test_links_are_followed_to_where_the_store_really_is(tmp_path: Path, mounts: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "net")
    assert file_system_of(tmp_path / "link", mounts) == "nfs4"


def test_where_the_kernel_does_not_say_nothing_is_refused(tmp_path: Path) -> None:
    assert file_system_of(tmp_path, tmp_path / "no such file") == ""


@pytest.mark.parametrize("kind", sorted(places.NETWORK_FILE_SYSTEMS))
def test_a_store_on_a_network_file_system_is_refused_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(places, "file_system_of", lambda directory: kind)
    with pytest.raises(StorageError, match=f"network file system \\({kind}\\)") as refusal:
        refuse_network_file_system(tmp_path / "kaged.db")
    assert "PostgreSQL" in refusal.value.hint
    with pytest.raises(StorageError, match="network file system"):
        kagedb.connect(url=f"sqlite://{tmp_path}/kaged.db")
    assert list(tmp_path.iterdir()) == []


def test_a_private_file_is_private_and_never_taken_over(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert make_private_file(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    (tmp_path / "a").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not make_private_file(tmp_path / "a") and not make_private_file(tmp_path / "link")
    assert (tmp_path / "a").read_text() == "kept" and not (tmp_path / "nowhere").exists()


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageNotFound, match="is a directory"):
        kagedb.connect(url=f"sqlite://{tmp_path}")


def test_a_limit_on_file_sizes_leaves_no_room(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    assert not room_is_out(str(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, limits[1]))
        assert room_is_out(str(path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        assert not room_is_out(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == [path], "the probe is gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else; what users see is the same refusal")
def test_who_may_read_but_not_write_is_told_and_can_read(sqlite_template: Path, tmp_path: Path) -> None:
    import programs

    place = Path("/tmp") / f"kaged-test-{os.getpid()}"
    place.mkdir(mode=0o755)
    try:
        (place / "kaged.db").write_bytes(sqlite_template.read_bytes())
        (place / "kaged.db").chmod(0o644)
        code = """
import os, sys, kagedb
import kagedb.engines.sqlite, kagedb.migrations, kagedb.storage
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    kagedb.connect(url=sys.argv[1])
except kagedb.StorageForbidden as error:
    print("refused:", error)
with kagedb.connect(url=sys.argv[1], read_only=True) as storage:
    print("read:", len(storage.engine.tables()))
"""
        done = programs.run_python(code, f"sqlite://{place}/kaged.db", env={"HOME": str(place)})
        assert "refused:" in done.stdout and "read:" in done.stdout, done.stdout + done.stderr
        assert {path.name for path in place.iterdir()} == {"kaged.db"}
    finally:
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
