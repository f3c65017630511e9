"""PostgreSQL: a server that goes away and comes back under a running store costs what is in flight, nothing else."""

from __future__ import annotations

import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kagedb
from kagedb import AuditEvent
from kagedb.errors import EXIT_BUSY, StorageUnavailable
from kagedb.models.base import Counter
from postgres_proxy import Proxy

if TYPE_CHECKING:
    from kagedb.storage import Storage
    from postgres_server import PostgresServer

pytestmark = pytest.mark.postgres_only


@pytest.fixture
def server(own_postgres_server: PostgresServer) -> PostgresServer:
    return own_postgres_server


@pytest.fixture
def fragile_url(server: PostgresServer) -> Iterator[str]:
    """A new database on a server that may be stopped."""
    name = f"kaged_test_{secrets.token_hex(6)}"
    server.create_database(name)
    yield server.url(name)
    if not server.running:
        server.start()
    server.drop_database(name)


@pytest.fixture
def fragile(fragile_url: str) -> Iterator[Storage]:
    with kagedb.connect(url=fragile_url, exclusive=True) as storage:
        yield storage


def names() -> set[str]:
    return {row.name for row in Counter.select()} - {"owner_epoch", "transcript"}


def test_the_next_call_after_a_restart_works(server: PostgresServer, fragile: Storage) -> None:
    for number, mode in enumerate(("fast", "immediate")):
        Counter.put(name=f"before {number}", value=0)
        server.stop(mode)
        server.start()
        if number:
            assert f"before {number}" in names(), "a read"
        with fragile.transaction():
            Counter.put(name=f"after {number}", value=0)
        AuditEvent.record("test.written", actor="operator:ana")
    assert names() == {f"{when} {number}" for when in ("before", "after") for number in (0, 1)}


def test_without_a_server_every_call_says_so_and_the_store_recovers(server: PostgresServer, fragile: Storage) -> None:
    Counter.put(name="before", value=0)
    server.stop()
    calls: list[Callable[[], Any]] = [
        names,
        lambda: Counter.put(name="lost", value=0),
        lambda: fragile.transaction().__enter__(),
        lambda: fragile.snapshot().__enter__(),
        fragile.engine.owner,
        lambda: fragile.engine.figures(),
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(StorageUnavailable) as refusal:
                call()
            assert refusal.value.exit_status == EXIT_BUSY == 75
    server.start()
    assert names() == {"before"}
    Counter.put(name="after", value=0)
    with fragile.snapshot():
        assert names() == {"before", "after"}


def test_the_transaction_in_flight_is_lost_whole(server: PostgresServer, fragile: Storage) -> None:
    with pytest.raises(StorageUnavailable), fragile.transaction():
        Counter.put(name="first", value=0)
        server.stop("immediate")
        server.start()
        Counter.put(name="second", value=0)
    with pytest.raises(StorageUnavailable), fragile.transaction():
        Counter.put(name="first", value=0)
        server.stop("fast")
        with fragile.transaction():
            pass
    server.start()
    with pytest.raises(StorageUnavailable), fragile.snapshot():
        names()
        server.stop("fast")
        server.start()
        names()
    assert names() == set()


def test_a_commit_that_finds_no_server_is_not_known(server: PostgresServer, fragile: Storage) -> None:
    with pytest.raises(StorageUnavailable, match="is not known") as refusal, fragile.transaction():
        Counter.put(name="first", value=0)
        server.kill()
    assert "read it back" in refusal.value.hint
    server.start()
    Counter.put(name="after", value=0)
    assert names() == {"after"}


def test_a_commit_whose_answer_is_lost_is_not_known(migrated_url: str, tmp_path: Path) -> None:
    """The server has committed, and the line is cut before it can say so."""
    place = tmp_path / "p"
    place.mkdir()
    armed = threading.Event()

    def answer(kind: bytes, body: bytes) -> bytes:
        if armed.is_set() and kind == b"C" and body.startswith(b"COMMIT"):
            armed.clear()
            raise ConnectionError
        return body

    with Proxy(place, migrated_url, answer=answer) as proxy, kagedb.connect(url=proxy.url) as storage:
        with pytest.raises(StorageUnavailable, match="is not known"), storage.transaction():
            Counter.put(name="saved", value=0)
            armed.set()
        assert names() == {"saved"}


def test_a_store_cannot_be_opened_without_its_server(server: PostgresServer, fragile_url: str) -> None:
    server.stop()
    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        kagedb.connect(url=fragile_url)
    server.start()
    kagedb.connect(url=fragile_url).close()


def test_subscribers_hear_nothing_of_what_the_server_lost(server: PostgresServer, fragile: Storage) -> None:
    heard: list[Any] = []
    fragile.subscribe(heard.append)
    with pytest.raises(StorageUnavailable), fragile.transaction():
        AuditEvent.record("test.written", actor="operator:ana")
        server.kill()
    server.start()
    assert heard == []
    AuditEvent.record("test.written", actor="operator:ana")
    assert len(heard) == 1


# A pooler that hands the session on to whoever is next.


def test_a_pooler_that_drops_the_sessions_options_is_refused_with_the_reason(migrated_url: str, tmp_path: Path) -> None:
    place = tmp_path / "p"
    place.mkdir()

    def drop(parameters: dict[str, str]) -> None:
        parameters.pop("options", None)

    with Proxy(place, migrated_url, startup=drop) as proxy:
        with pytest.raises(kagedb.SettingsError, match=r"pooler .* dropped the session's settings") as refusal:
            kagedb.connect(url=proxy.url)
        assert "PostgreSQL server itself" in refusal.value.hint


def test_a_pooler_that_hides_the_server_process_is_refused_with_the_reason(migrated_url: str, tmp_path: Path) -> None:
    place = tmp_path / "p"
    place.mkdir()

    def pretend(kind: bytes, body: bytes) -> bytes:
        return struct.pack("!i", 4711) + body[4:] if kind == b"K" else body

    with Proxy(place, migrated_url, answer=pretend) as proxy:
        with pytest.raises(kagedb.SettingsError, match=r"pooler .* not the one that answered"):
            kagedb.connect(url=proxy.url)
