"""Each kind of damage is named by `check`, refused by `connect` where it must be, left as it is, and salvaged.

About the SQLite engine alone: a server's files are its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import damages
import kagedb
from commands import in_process
from kagedb.errors import KagedError, SchemaTooNew, StorageCorrupt
from stored import fill

WAYS_TO_OPEN: tuple[dict[str, Any], ...] = ({}, {"migrate": False}, {"read_only": True}, {"exclusive": True})

EVENTS = 120


@dataclass(frozen=True)
class Expected:
    """What a kind of damage leads to."""

    found_by: str
    """The check that names it."""
    refused: type[KagedError] | None = None
    """What `connect` raises; None where what it reads is whole, so that a daemon can go on."""
    status: int = 3
    """Exit status of `check`, and of `salvage` where it refuses."""
    salvaged: bool = True


DAMAGES: dict[Callable[[Path], None], Expected] = {
    damages.zero_page: Expected("opening", StorageCorrupt),
    damages.garbage_in_an_index: Expected("integrity"),
    damages.broken_page_header: Expected("integrity"),
    damages.bit_in_a_prompt: Expected("stored hashes"),
    damages.bit_in_a_blob: Expected("stored hashes"),
    damages.bit_in_an_event: Expected("audit log"),
    damages.leaf_zeroed: Expected("integrity"),
    damages.interior_zeroed: Expected("opening", StorageCorrupt),
    damages.first_page_zeroed: Expected("opening", StorageCorrupt),
    damages.header_overwritten: Expected("opening", StorageCorrupt),
    damages.pointer_map_zeroed: Expected("integrity"),
    damages.cut_in_half: Expected("opening", StorageCorrupt),
    damages.cut_off_at_the_end: Expected("opening", StorageCorrupt),
    damages.text_file: Expected("opening", StorageCorrupt, salvaged=False),
    damages.emptied: Expected("opening", StorageCorrupt, salvaged=False),
    damages.from_the_future: Expected("opening", SchemaTooNew, status=1, salvaged=False),
}

pytestmark = pytest.mark.sqlite_only


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "kaged.db"
    shutil.copy(sqlite_template, path)
    fill(f"sqlite://{path}", events=EVENTS)
    return path


@pytest.fixture(params=DAMAGES, ids=lambda damage: damage.__name__)
def damage(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    done: Callable[[Path], None] = request.param
    return done


@pytest.fixture
def path(tmp_path: Path, healthy: Path, damage: Callable[[Path], None], engine: str) -> Path:
    """A damaged store, alone in its directory."""
    place = tmp_path / "kaged.db"
    shutil.copy(healthy, place)
    damage(place)
    return place


def files(directory: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for those that SQLite and the locks may leave beside a database."""
    return {
        one.name: one.read_bytes()
        for one in directory.iterdir()
        if not one.name.endswith((".lock", "-shm", ".owner"))
        and not (one.name.endswith("-wal") and one.stat().st_size == 0)
    }


def salvaged(path: Path, target: Path) -> dict[str, Any]:
    done = in_process("--url", f"sqlite://{path}", "salvage", "--to", f"sqlite://{target}", "--json")
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_check_names_it_and_what_mends_it(path: Path, damage: Callable[[Path], None]) -> None:
    done = in_process("--url", f"sqlite://{path}", "check", "--json")
    assert done.exit_code == DAMAGES[damage].status, done.output
    findings = json.loads(done.stdout)["findings"]
    assert DAMAGES[damage].found_by in {one["check"] for one in findings}
    assert all(one["wrong"] and one["mend"] for one in findings)


def test_connect_refuses_what_it_must_and_nothing_is_replaced(path: Path, damage: Callable[[Path], None]) -> None:
    refused = DAMAGES[damage].refused
    before = files(path.parent)
    for options in WAYS_TO_OPEN:
        if refused is None:
            kagedb.connect(url=f"sqlite://{path}", **options).close()
        else:
            with pytest.raises(refused) as caught:
                kagedb.connect(url=f"sqlite://{path}", **options)
            assert type(caught.value) is refused
            assert str(path) in caught.value.message and caught.value.hint
        assert files(path.parent) == before, options


def test_salvage_gets_back_every_row_on_a_page_that_is_whole(
    path: Path, healthy: Path, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    known = damages.anatomy(healthy)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    target = tmp_path / "new" / "kaged.db"
    target.parent.mkdir(mode=0o700)
    if not DAMAGES[damage].salvaged:
        done = in_process("--url", f"sqlite://{path}", "salvage", "--to", f"sqlite://{target}")
        assert done.exit_code == DAMAGES[damage].status
        assert not target.exists()
    else:
        changed = damages.changed_pages(healthy, path, known.page_bytes)
        report = salvaged(path, target)
        found = damages.stored_rows(target)
        for table, rows in known.rows.items():
            untouched = known.untouched(table, changed)
            assert untouched <= found[table], table
            told = report["tables"][table]["lost"]
            assert told is None or told >= len(rows.keys() - found[table]) - report["tables"][table]["doubtful"], table
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()} == before
