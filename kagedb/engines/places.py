"""What the file system says about the place of a SQLite store: whose it is, whether it can be written, its kind.

Also makes files and directories that are private whatever the umask. Never opens a database file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import StorageError, StorageForbidden

# fmt: off
NETWORK_FILE_SYSTEMS = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.davfs2", "fuse.glusterfs", "fuse.rclone",
    "fuse.s3fs", "fuse.sshfs", "fuse.vmhgfs-fuse", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
    "nfs4", "ocfs2", "orangefs", "prl_fs", "smb2", "smb3", "smbfs", "vboxsf", "vmhgfs",
})
# fmt: on
"""File systems where two hosts, or a host and its guest, do not share the memory that a WAL needs."""

PROBE_BYTES = 65_536
"""What is written to see whether there is room: as much as the largest page of SQLite."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_system_of(directory: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system of `directory` as the kernel names it (proc_pid_mountinfo(5)); "" where unknown."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real = os.path.realpath(directory)
    best, kind = "", ""
    for line in lines:
        fields, _, after = line.partition(" - ")
        parts = fields.split(" ")
        if len(parts) < 5 or not after:
            continue
        point = parts[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        # A later line for the same point is mounted over an earlier one.
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, after.split(" ")[0]
    return kind


def refuse_network_file_system(path: Path) -> None:
    """Raises StorageError where `path` lies on a network file system."""
    kind = file_system_of(path.parent)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StorageError(
            f"{path} is on a network file system ({kind}), where SQLite's WAL can lose data",
            "keep the store on a local disk, or use PostgreSQL (storage.url = postgresql://...)",
        )


def make_private_file(path: Path) -> bool:
    """Make an empty file of mode 0600; False where it exists. Never opens an existing one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    return True


def sync_file(path: Path) -> None:
    """Make a file's bytes durable. Not for a database file that this process has open through SQLite."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def room_is_out(path: str) -> bool:
    """Whether a write to the database at `path` fails for want of room: the disk, a quota, or a limit on file sizes."""
    import resource

    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [os.path.getsize(part) for part in (path, path + "-wal") if os.path.exists(part)]
    if largest != resource.RLIM_INFINITY and max(sizes, default=0) + PROBE_BYTES > largest:
        return True
    probe = f"{path}.room-{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return error.errno in _NO_ROOM
    try:
        if os.write(descriptor, bytes(PROBE_BYTES)) < PROBE_BYTES:
            return True
        os.fsync(descriptor)
    except OSError as error:
        return error.errno in _NO_ROOM
    finally:
        os.close(descriptor)
        os.unlink(probe)
    return False


def writable(directory: Path) -> bool:
    """Whether files can be made in `directory` by this process."""
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=True)


def owner_name(path: Path) -> str:
    """The name (or number) of the user a path belongs to."""
    import pwd

    uid = os.stat(path).st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def refuse_foreign(path: Path) -> None:
    """Raises StorageForbidden, saying whose store it is, where this process may not use `path` (or its directory)."""
    for place in (path.parent, path):
        try:
            entry = os.stat(place)
        except FileNotFoundError:
            return
        except PermissionError:
            raise _foreign(place.parent, path) from None
        wanted = os.R_OK | os.X_OK if stat.S_ISDIR(entry.st_mode) else os.R_OK
        if not os.access(place, wanted, effective_ids=True):
            raise _foreign(place, path)


def _foreign(place: Path, store: Path) -> StorageForbidden:
    while True:
        try:
            owner = owner_name(place)
            break
        except PermissionError:
            place = place.parent
    return StorageForbidden(
        f"the store {store} belongs to the user {owner}", f"act as that user: sudo -u {owner} kaged ..."
    )
