"""No backup of a damaged store is blessed, and no damaged set is taken for a good one."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import damages
from backup_sets import back_up, sets, verdict
from commands import answer_json, in_process
from kagedb.operations import backup_set
from stored import fill

if TYPE_CHECKING:
    from conftest import Places

# Damage.


def _sqlite_path(url: str) -> Path:
    return Path(url.removeprefix("sqlite://"))


@pytest.mark.sqlite_only
@pytest.mark.parametrize("damage", damages.SIX, ids=lambda damage: damage.__name__)
def test_no_set_of_a_damaged_store_is_blessed(stored_url: str, damage: Callable[[Path], None]) -> None:
    """SQLite alone: its file can be reached. Six kinds of damage to one page, and six are found."""
    damage(_sqlite_path(stored_url))
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 3, result.output
    assert [one.state for one in sets()] in ([], ["suspect"])
    assert in_process("--url", stored_url, "restore", "--latest").exit_code == 1


CHANGES = {
    "a prompt": "UPDATE kaged.prompt_version SET body = 'You look after a horse'",
    "a config": "UPDATE kaged.project_config SET parsed = '{}'",
    "a blob": "UPDATE kaged.blob SET data = set_byte(data, 3, get_byte(data, 3) # 1)",
    "an event": """UPDATE kaged.audit_event SET body = '{"number":8}' WHERE body::text LIKE '%"number":7%'""",
    "an event that is gone": "DELETE FROM kaged.audit_event WHERE seq = 5",
    "a row that others refer to": "DELETE FROM kaged.session",
}


@pytest.mark.postgres_only
@pytest.mark.parametrize("what", CHANGES)
def test_no_set_of_rows_that_were_tampered_with_is_blessed(stored_url: str, postgres_server: Any, what: str) -> None:
    """On PostgreSQL, past its guards and references: as a superuser may have it look away."""
    url = postgres_server.admin_url(stored_url.partition("?")[0].rpartition("/")[2])
    guards = "UPDATE pg_trigger SET tgenabled = '{}' WHERE tgenabled = '{}' AND NOT tgisinternal"
    steps = [guards.format("D", "A"), "SET session_replication_role = replica", CHANGES[what], guards.format("A", "D")]
    postgres_server.execute("; ".join(steps), url=url)
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 3, result.output
    assert [one.state for one in sets()] == ["suspect"]
    assert in_process("--url", stored_url, "restore", "--latest").exit_code == 1


def test_no_set_of_a_store_without_a_guard_is_blessed(stored_url: str, engine: str) -> None:
    if engine == "sqlite":
        connection = sqlite3.connect(_sqlite_path(stored_url))
        connection.execute("DROP TRIGGER audit_event_guard_update")
        connection.close()
    else:
        import psycopg2

        server = psycopg2.connect(stored_url)
        server.cursor().execute("DROP TRIGGER audit_event_guard_update ON kaged.audit_event")
        server.commit()
        server.close()
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 3, result.output
    assert "missing: trigger audit_event_guard_update" in " ".join(result.output.split())
    assert [one.state for one in sets()] == ["suspect"]


@pytest.mark.postgres_only
@pytest.mark.parametrize("how", ["a bit flipped", "a page zeroed"])
def test_no_set_of_a_damaged_page_of_a_server_is_blessed(own_postgres_server: Any, how: str) -> None:
    """The server's checksums find a bit. A page of zeros is an empty one to it, whose events are missed."""
    server = own_postgres_server
    name = f"damaged_{how.split()[-1]}"
    server.create_database(name)
    url, admin = server.url(name), server.admin_url(name)
    fill(url, events=60)
    ((path, checksums),) = server.execute(
        "SELECT pg_relation_filepath('kaged.audit_event'), current_setting('data_checksums')", url=admin
    )
    server.stop()
    if checksums != "on":
        server._run("pg_checksums", "--enable", "-D", str(server._data))
    with open(server._data / path, "r+b") as file:
        page = bytearray(file.read(PAGE_BYTES))
        page[PAGE_BYTES - 100] ^= 1
        file.seek(0)
        file.write(page if how == "a bit flipped" else bytes(PAGE_BYTES))
    server.start()
    result = in_process("--url", url, "backup")
    assert result.exit_code == 3, result.output
    assert [one.state for one in sets()] in ([], ["suspect"])
    checked = in_process("--url", url, "check")
    assert checked.exit_code == 3, checked.output
    server.drop_database(name)


PAGE_BYTES = 8192
"""Of PostgreSQL, as it is built everywhere."""


def test_a_bit_of_a_set_that_flips_is_found_and_the_set_kept(stored_url: str) -> None:
    one = back_up(stored_url)
    file = one.directory / one.manifest.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert verdict(stored_url, one) == [f"{file.name} is not what its checksum says"]
    assert one.state == "suspect"
    assert in_process("--url", stored_url, "verify", "--all").exit_code == 3


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "data"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut off"])
def test_a_set_with_a_file_missing_or_cut_off_is_damaged(stored_url: str, name: str, how: str) -> None:
    one = back_up(stored_url)
    file = one.directory / (one.manifest.file if name == "data" else name)
    if how == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if how == "empty" else file.stat().st_size - 9)
    assert verdict(stored_url, one)
    assert one.state == "suspect"
    listed = answer_json(stored_url, "backups")
    assert [row["state"] for row in listed] == ["suspect"]


def test_contents_that_differ_are_found_where_checksums_are_not(stored_url: str) -> None:
    """Somebody makes the sums fit: the digests of the manifest still tell."""
    one = back_up(stored_url)
    manifest = one.directory / "manifest.json"
    document = json.loads(manifest.read_text())
    document["facts"]["run"]["digest"] = "0" * 64
    document["facts"]["session"]["rows"] = 7
    manifest.write_text(json.dumps(document))
    backup_set.write_sums(one.directory, one.manifest.sha256, one.manifest.file)
    assert verdict(stored_url, one) == [
        "run has other contents than the manifest says",
        "session has 1 rows, the manifest says 7",
    ]


def test_a_set_that_is_found_good_again_is_no_longer_suspect(stored_url: str) -> None:
    one = back_up(stored_url)
    backup_set.mark_suspect(one.directory, ["it looked odd"])
    assert verdict(stored_url, one) == []
    assert one.state == "verified"


def test_verifying_needs_no_store(stored_url: str, places: Places, engine: str) -> None:
    one = back_up(stored_url)
    nowhere = "sqlite:///nowhere/at/all.db" if engine == "sqlite" else "postgresql://nobody@127.0.0.1:1/nothing"
    assert verdict(nowhere, one) == []
