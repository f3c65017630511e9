"""The reader of damaged SQLite files by itself: what it takes the file for, whatever its header says."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

import damages
import kagedb
from kagedb import Run, Session
from kagedb.engines.sqlite_pages import PageFile
from kagedb.engines.sqlite_records import Records, misplaced
from kagedb.operations import salvage
from kagedb.settings import load
from stored import ACTOR, fill

HEADER_BITS = [(byte, bit) for byte in [*range(16, 24), *range(32, 36), *range(52, 56)] for bit in range(8)]
"""Page size, reserved bytes, the fixed fractions, the list of free pages, the mark of a pointer map."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Path:
    path = tmp_path_factory.mktemp("pages") / "kaged.db"
    shutil.copy(sqlite_template, path)
    fill(f"sqlite://{path}", events=150)
    with kagedb.connect(url=f"sqlite://{path}"):
        run = Run.dispatch(Session.select().get(), agent="planner", input={})
        run.attach("noise", random.Random(1).randbytes(9000))
    return path


def read_sizes(path: Path) -> tuple[int, int, bool]:
    file = PageFile(path)
    try:
        return file.page_bytes, file.usable_bytes, file.has_map
    finally:
        file.close()


def test_no_bit_of_the_header_leads_it_astray(healthy: Path, tmp_path: Path) -> None:
    whole = healthy.read_bytes()
    page_bytes = damages.page_bytes_of(healthy)
    path = tmp_path / "kaged.db"
    for byte, bit in HEADER_BITS:
        data = bytearray(whole)
        data[byte] ^= 1 << bit
        path.write_bytes(data)
        assert read_sizes(path) == (page_bytes, page_bytes, True), (byte, bit)


@pytest.mark.parametrize("page_bytes", [1024, 4096, 8192])
def test_the_page_size_is_told_from_the_pages(tmp_path: Path, page_bytes: int) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[sqlite]\npage_size = {page_bytes}\n")
    path = tmp_path / "kaged.db"
    kagedb.connect(url=f"sqlite://{path}", config=config).close()
    fill(f"sqlite://{path}", events=100)
    damages.write_page(path, page_bytes, 1, bytes(100))
    assert read_sizes(path) == (page_bytes, page_bytes, True)


def test_a_store_without_a_pointer_map_is_read_too(healthy: Path, tmp_path: Path) -> None:
    """As one reloaded from a dump is: pages are given to tables by the shape of their rows."""
    path = tmp_path / "kaged.db"
    shutil.copy(healthy, path)
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode = DELETE", "PRAGMA auto_vacuum = NONE", "VACUUM"):
        connection.execute(statement)
    connection.close()
    assert read_sizes(path)[2] is False
    known = damages.anatomy(path)
    damages.zero(path, known.page_bytes, *[page for page in known.of("internal") if page > 1])
    target = tmp_path / "new.db"
    salvage.salvage(load(url=f"sqlite://{path}"), load(url=f"sqlite://{target}"), actor=ACTOR)
    assert known.rows["audit_event"].keys() <= damages.stored_rows(target)["audit_event"]


def test_a_page_that_says_it_is_empty_is_a_loss_that_is_told(healthy: Path, tmp_path: Path) -> None:
    """Nothing but the index knows better."""
    path = tmp_path / "kaged.db"
    shutil.copy(healthy, path)
    known = damages.anatomy(path)
    leaf = known.of("leaf", "audit_event")[2]
    damages.write_page(path, known.page_bytes, leaf, b"\0\0", 3)
    done = salvage.salvage(load(url=f"sqlite://{path}"), load(url=f"sqlite://{tmp_path}/new.db"), actor=ACTOR)
    assert done.tables["audit_event"].lost == sum(leaf in pages for pages in known.rows["audit_event"].values()) > 0


def test_a_garbled_history_is_not_taken_for_that_of_a_newer_program(healthy: Path, tmp_path: Path) -> None:
    path = tmp_path / "kaged.db"
    shutil.copy(healthy, path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE schema_migration SET name = replace(name, 'initial', 'initiaM')")
    connection.commit()
    connection.close()
    target = f"sqlite://{tmp_path}/new.db"
    done = salvage.salvage(load(url=f"sqlite://{path}"), load(url=target), actor=ACTOR)
    assert done.tables["schema_migration"].lost is None
    kagedb.connect(url=target, migrate=False).close()


def test_a_chain_of_pages_that_bites_its_tail_ends(healthy: Path, tmp_path: Path) -> None:
    path = tmp_path / "kaged.db"
    shutil.copy(healthy, path)
    known = damages.anatomy(path)
    overflow = known.of("overflow", "blob")
    for number in overflow:
        damages.write_page(path, known.page_bytes, number, overflow[0].to_bytes(4, "big"))
    done = salvage.salvage(load(url=f"sqlite://{path}"), load(url=f"sqlite://{tmp_path}/new.db"), actor=ACTOR)
    assert done.tables["blob"].lost == 1
    assert any("attachments" in note for note in done.notes)


def test_a_tree_that_leads_into_itself_ends(healthy: Path, tmp_path: Path) -> None:
    path = tmp_path / "kaged.db"
    shutil.copy(healthy, path)
    known = damages.anatomy(path)
    root = damages.root_of(path, "audit_event")
    damages.write_page(path, known.page_bytes, root, root.to_bytes(4, "big"), 8)
    done = salvage.salvage(load(url=f"sqlite://{path}"), load(url=f"sqlite://{tmp_path}/new.db"), actor=ACTOR)
    assert done.tables["audit_event"].lost == 0


def test_numbers_out_of_order_are_told_from_those_around_them() -> None:
    assert misplaced([1, 2, 3], None, None) == set()
    assert misplaced([1, 900, 3, 4], None, None) == {900}
    assert misplaced([5, 6, 1, 7], 4, 7) == {1}
    assert misplaced([5, 6, 8], 4, 7) == {8}
    assert misplaced([], 4, 7) == set()


def test_noise_is_never_an_error(tmp_path: Path, healthy: Path) -> None:
    """Whatever is in a page, reading it gives something or nothing."""
    chance = random.Random(1)
    path = tmp_path / "kaged.db"
    shutil.copy(healthy, path)
    size = damages.page_bytes_of(path)
    for kind in (13, 5, 10, 2) * 40:
        page = bytearray(chance.randbytes(size))
        page[0] = kind
        page[3:5] = chance.randrange(size // 4).to_bytes(2, "big")
        damages.write_page(path, size, 5, bytes(page))
        file = PageFile(path)
        try:
            records = Records(file)
            node = records.node(5)
            for place in node.cells if node else ():
                if node is not None and kind == 13:
                    records.cell(node, place)
                    records.kinds(node, place)
                elif node is not None and kind == 5:
                    records.children(node)
                elif node is not None:
                    records.index_payload(node, place)
        finally:
            file.close()
