"""The systemd units of contrib/systemd, with the paths of this installation and store; written and removed as files.

Nothing here starts, stops or enables anything: that is systemctl's, and the operator's.
"""

from __future__ import annotations

import importlib.resources
import os
import pwd
import re
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from ..errors import SettingsError, StorageError, StorageForbidden
from ..settings import Settings, sync_directory

PLACEHOLDER = "/usr/bin/kaged"
"""What stands in contrib/systemd where this installation's program belongs."""

TIMERS = ("kaged-backup.timer", "kaged-maintenance.timer")
AT_THE_STORE = ("kaged-backup", "kaged-maintenance", "kaged-check")
"""The services that need the store, and with it the server where it is on one."""
SERVICES = (*AT_THE_STORE, "kaged-verify")

SYSTEM_HOME = Path("/var/lib/kaged")
SERVICE_USER = "kaged"

HIDDEN = ("/home", "/root", "/run/user")
"""What ProtectHome= keeps from a unit."""

OURS = "# Written by `kaged systemd install`. Changes belong into a drop-in: systemctl edit"

_SAFE = re.compile(r"[\w./@:+,=-]+")


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A file as it is, or would be, on this host."""

    path: Path
    text: str


def program() -> str:
    """The path of this installation's `kaged`. Raises SettingsError."""
    beside = os.path.join(sysconfig.get_path("scripts"), "kaged")
    found = beside if os.access(beside, os.X_OK) else shutil.which("kaged")
    if found is None:
        raise SettingsError("the program kaged of this installation is not there", "install kagedb with pip or pipx")
    return os.path.abspath(found)


def unit_files(settings: Settings, root: Path, kaged: str) -> list[UnitFile]:
    """Every file for the mode in `settings`; below `root` in system mode, in the user's own directory else.

    Raises SettingsError where the units could not do their work there.
    """
    _refuse_what_units_cannot_see(settings, kaged)
    source = importlib.resources.files("kagedb.systemd")
    units = _directory(settings, root)
    files = []
    for entry in _sorted(source / settings.mode):
        if entry.is_file():
            text = entry.read_text().replace(PLACEHOLDER, _quoted(kaged))
            files.append(UnitFile(units / entry.name, f"{OURS}\n{text}"))
    if settings.mode == "system" and settings.url.path is None:
        text = (source / "server.conf").read_text()
        files += [UnitFile(units / f"{name}.service.d" / "server.conf", f"{OURS}\n{text}") for name in AT_THE_STORE]
    place = _place(settings)
    if place:
        files += [UnitFile(units / f"{name}.service.d" / "place.conf", f"{OURS}\n{place}") for name in SERVICES]
    if settings.mode == "system":
        for kind in ("sysusers.d", "tmpfiles.d"):
            text = (source / kind / "kaged.conf").read_text()
            files.append(UnitFile(root / "etc" / kind / "kaged.conf", f"{OURS}\n{text}"))
    return files


def install(files: list[UnitFile]) -> None:
    """Write the files, with the directories they need. Raises StorageForbidden, StorageError."""
    for file in files:
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            draft = file.path.with_name(f".{file.path.name}.new")
            draft.write_text(file.text)
            draft.chmod(0o644)
            os.rename(draft, file.path)
            sync_directory(file.path.parent)
        except OSError as error:
            raise _unwritable(file.path, error) from error


def uninstall(settings: Settings, root: Path) -> list[Path]:
    """Remove what `install` writes, whatever it wrote it for; drop-ins of the operator's stay. Gives what was there."""
    units, source = _directory(settings, root), importlib.resources.files("kagedb.systemd")
    wanted = [units / entry.name for entry in _sorted(source / settings.mode) if entry.is_file()]
    wanted += [units / f"{name}.service.d" / file for name in SERVICES for file in ("place.conf", "server.conf")]
    if settings.mode == "system":
        wanted += [root / "etc" / kind / "kaged.conf" for kind in ("sysusers.d", "tmpfiles.d")]
    removed = []
    for path in wanted:
        try:
            if path.read_text().startswith(OURS):
                path.unlink()
                removed.append(path)
                if path.parent.name.endswith(".d") and path.parent.parent == units and not any(path.parent.iterdir()):
                    path.parent.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from error
    return removed


def lingers() -> bool:
    """Whether this user's timers run while nobody is logged in (loginctl(1), enable-linger)."""
    return Path("/var/lib/systemd/linger", pwd.getpwuid(os.getuid()).pw_name).exists()


def _refuse_what_units_cannot_see(settings: Settings, kaged: str) -> None:
    if settings.origin("storage.url") in ("--url", "KAGED_DATABASE_URL"):
        raise SettingsError(
            "a unit knows neither --url nor KAGED_DATABASE_URL of this session",
            f"put storage.url into {settings.config_file}",
        )
    if settings.mode == "system" and kaged.startswith(tuple(f"{place}/" for place in HIDDEN)):
        raise SettingsError(
            f"{kaged} is below a home, which the system's units do not see",
            "install kagedb where every user can read it, such as /opt/kaged",
        )


def _directory(settings: Settings, root: Path) -> Path:
    if settings.mode == "system":
        return root / "etc/systemd/system"
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # XDG Base Directory Specification: a relative one is ignored.
    return Path(base if base.startswith("/") else os.path.join(Path.home(), ".config")) / "systemd/user"


def _place(settings: Settings) -> str:
    """A drop-in for what is not where a unit expects it; "" where all of it is."""
    lines = []
    for variable, name in (("KAGED_HOME", "home"), ("KAGED_CONFIG", "config")):
        value = settings.home if name == "home" else settings.config_file
        if settings.origin(name).startswith((variable, f"--{name}")):
            lines.append(f"Environment={_quoted(f'{variable}={value}')}")
    if settings.mode == "system":
        store = Path(settings.url.path).parent if settings.url.path else None
        places = [place for place in (store, Path(settings.backup_directory)) if place is not None]
        outside = sorted({os.fspath(place) for place in places if SYSTEM_HOME not in (place, *place.parents)})
        if outside:
            lines.append(f"ReadWritePaths={' '.join(map(_quoted, outside))}")
            if any(place.startswith(tuple(f"{hidden}/" for hidden in HIDDEN)) for place in outside):
                lines.append("ProtectHome=no")
        owner = _owner(settings)
        if owner:
            lines += [f"User={owner}", "Group="]
    return "[Service]\n" + "\n".join(lines) + "\n" if lines else ""


def _owner(settings: Settings) -> str:
    """The user whom the store belongs to, where it is there and not the usual one's."""
    try:
        uid = os.stat(settings.url.path or settings.home).st_uid
    except OSError:
        return ""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return "" if name == SERVICE_USER else name


def _quoted(text: str) -> str:
    """As systemd.service(5) reads it back: percents doubled, anything unusual in quotes."""
    text = text.replace("%", "%%")
    if _SAFE.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _sorted(directory: Traversable) -> list[Traversable]:
    return sorted(directory.iterdir(), key=lambda entry: entry.name)


def _unwritable(path: Path, error: OSError) -> StorageError:
    kind = StorageForbidden if isinstance(error, PermissionError) else StorageError
    return kind(f"{path} cannot be written: {error.strerror}", "run it with sudo for --system, or use --user")
