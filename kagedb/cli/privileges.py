"""Who runs `kaged`, and root's way not to leave files of its own in a daemon's home: it becomes the store's owner.

What other users are told about a store that is not theirs is in engines/places.py.
"""

from __future__ import annotations

import importlib
import os
import pwd
from typing import TYPE_CHECKING

from ..engines import MODULES_IMPORTED_LATER as ENGINE_MODULES_IMPORTED_LATER
from ..errors import StorageForbidden
from ..settings import make_directory

if TYPE_CHECKING:
    from ..settings import Settings

SERVICE_USER = "kaged"
"""Whom the system-wide daemon runs as; contrib/systemd makes the account."""

_IMPORTED_LATER = (
    "csv",
    "ctypes",
    "difflib",
    "encodings.unicode_escape",
    "json",
    "kagedb.audit_key",
    "kagedb.formats.asciicast",
    "kagedb.migrating",
    "kagedb.models.plain",
    "kagedb.models.recorder",
    "kagedb.models.segment",
    "kagedb.models.state_diff",
    "kagedb.models.state_tree",
    "kagedb.operations.audit_verify",
    "kagedb.operations.backup",
    "kagedb.operations.checking",
    "kagedb.operations.compacting",
    "kagedb.operations.health",
    "kagedb.operations.query",
    "kagedb.operations.record",
    "kagedb.operations.replay",
    "kagedb.operations.restore",
    "kagedb.operations.retention",
    "kagedb.operations.salvage",
    "kagedb.operations.transfer",
    "shlex",
    "shutil",
    "tempfile",
    "traceback",
    "ulid",
)
"""What is otherwise imported when it is needed: the owner may not be able to read root's installation."""


def login_name() -> str:
    """The name of the person at the keyboard, through sudo too. Ask before `become_owner`."""
    if through_sudo := os.environ.get("SUDO_USER"):
        return through_sudo
    return user_name(os.getuid())


def user_name(uid: int) -> str:
    """The name of an account; where it has none, its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def become_owner(settings: Settings, *, scripts: bool = False) -> None:
    """Where root is about to open a store that belongs to another user, go on as that user, for good.

    `scripts` says that the migration scripts will be read. Raises StorageForbidden where root may not, or the user
    could not go on.
    """
    if os.geteuid() != 0:
        return
    home = os.fspath(settings.home)  # found out now: it may follow from an environment that is root's
    place = settings.url.path or home
    owner = _owner(place)
    if owner.st_uid == 0:
        return
    directory = _import_what_is_needed(settings)
    _become(owner, place)
    if scripts and not os.access(directory, os.R_OK | os.X_OK):
        raise StorageForbidden(
            f"the migrations in {directory} cannot be read by {user_name(owner.st_uid)}, to whom the store belongs",
            "install kagedb where every user can read it",
        )


def require_own_store(settings: Settings) -> None:
    """For a command that acts for who runs it: where root would have to become the store's owner, refuse.

    Raises StorageForbidden.
    """
    if os.geteuid() != 0:
        return
    place = settings.url.path or os.fspath(settings.home)
    owner = _owner(place)
    if owner.st_uid != 0:
        name = user_name(owner.st_uid)
        raise StorageForbidden(
            f"the store {place} belongs to the user {name}, and nothing is run as somebody else",
            f"act as that user: sudo -u {name} kaged ...",
        )


def prepare_home(settings: Settings) -> str:
    """For `init` by root in system mode: make the home, and give it to the user `kaged` where that user exists.

    Gives a sentence for the operator, or nothing where nothing is to be said.
    """
    if os.geteuid() != 0 or settings.mode != "system":
        return ""
    home, path = os.fspath(settings.home), settings.url.path
    if path is not None and os.path.dirname(path) != home:
        return ""
    try:
        account = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        # Without a file in it the home is not needed yet.
        return f"there is no user {SERVICE_USER} on this host, so the store belongs to root" if path else ""
    if settings.origin("home") == "default":
        make_directory(home)
    if not os.path.isdir(home) or os.stat(home).st_uid != 0:
        return ""
    # A file system of its own has a lost+found.
    if set(os.listdir(home)) - {"lost+found"}:
        return (
            f"{home} belongs to root, not to the user {SERVICE_USER}; to change that: chown -R {SERVICE_USER}: {home}"
        )
    os.chown(home, account.pw_uid, account.pw_gid)
    return f"{home} belongs to the user {SERVICE_USER}"


def _owner(place: str) -> os.stat_result:
    """Whose `place` is, or would be: the nearest directory above it decides where it is not there.

    A link belongs to whoever made it: what it points to may be anybody's.
    """
    while True:
        try:
            found = os.lstat(place)
            return found if found.st_uid != 0 else os.stat(place)
        except OSError:
            place = os.path.dirname(place)


def _import_what_is_needed(settings: Settings) -> str:
    """Gives the directory of the migration scripts; their list is kept."""
    from .. import schema
    from ..engines import open_engine

    for name in (*_IMPORTED_LATER, *ENGINE_MODULES_IMPORTED_LATER):
        importlib.import_module(name)
    open_engine(settings, read_only=True).archiver()  # touches nothing, and has imported the engine and its driver
    schema.keep_scripts()
    return os.fspath(schema.directory())


def _become(owner: os.stat_result, place: str) -> None:
    try:
        account = pwd.getpwuid(owner.st_uid)
    except KeyError:
        account = None
    try:
        if account is not None:
            os.initgroups(account.pw_name, account.pw_gid)
            os.setgid(account.pw_gid)
        else:
            os.setgroups([])
            os.setgid(owner.st_gid or owner.st_uid)
        os.setuid(owner.st_uid)
    except PermissionError:
        name = user_name(owner.st_uid)
        raise StorageForbidden(
            f"the store {place} belongs to the user {name}, and this root may not become that user",
            f"act as that user: sudo -u {name} kaged ...",
        ) from None
    # libpq looks for passwords and certificates there.
    os.environ.pop("HOME", None)
    if account is not None:
        os.environ.update(HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)
