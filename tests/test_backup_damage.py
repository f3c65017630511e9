"""No backup of a damaged store is blessed, and no damaged set is taken for a good one."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backup_sets import back_up, sets, verdict
from commands import answer_json, in_process
from kagedb.operations import backup_set

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


# Damage.


def _sqlite_path(url: str) -> Path:
    return Path(url.removeprefix("sqlite://"))


def _page_of(path: Path, sql: str) -> int:
    connection = sqlite3.connect(path)
    (page,) = connection.execute(sql).fetchone()
    connection.close()
    return int(page)


CORRUPTIONS = [
    "a zeroed page",
    "garbage in an index",
    "a broken page header",
    "a bit in a prompt",
    "a bit in a blob",
    "a bit in an event",
]


@pytest.mark.sqlite_only
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_no_set_of_a_damaged_store_is_blessed(stored_url: str, kind: str) -> None:
    """SQLite alone: its file can be reached. Six kinds of damage to one page, and six are found."""
    path = _sqlite_path(stored_url)
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    if kind.startswith("a bit in"):
        wanted = {"prompt": b"'quietly'", "blob": hashlib.sha256, "event": b'{"number":7}'}[kind.rpartition(" ")[2]]
        if callable(wanted):
            connection = sqlite3.connect(path)
            (blob,) = connection.execute("SELECT data FROM blob ORDER BY length(data) DESC LIMIT 1").fetchone()
            connection.close()
            wanted = bytes(blob[40:80])
        at = data.index(wanted) + 5
        assert data.count(wanted) >= 1
        data[at] ^= 1
    else:
        name = {
            "a zeroed page": "audit_event",
            "garbage in an index": "audit_event_subject",
            "a broken page header": "run",
        }[kind]
        page = _page_of(path, f"SELECT rootpage FROM sqlite_master WHERE name = '{name}'")
        start = (page - 1) * size
        if kind == "a zeroed page":
            data[start : start + size] = bytes(size)
        elif kind == "garbage in an index":
            data[start + size - 40 : start + size - 20] = bytes(range(20))
        else:
            data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    result = in_process("--url", stored_url, "backup")
    assert result.exit_code == 3, result.output
    assert [one.state for one in sets()] in ([], ["suspect"])
    assert in_process("--url", stored_url, "restore", "--latest").exit_code == 1


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
