"""Damage done to the file of a SQLite store, and which rows were where, as SQLite itself says (its dbstat table)."""

from __future__ import annotations

import random
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kagedb
from kagedb import AuditEvent, AuditSeal, Checkpoint, Plugin, Project, Prompt, Run, Session, Transcript
from stored import ACTOR

Row = tuple[Any, ...]


def fill_widely(url: str) -> None:
    """Every table has rows, the larger ones on many pages, and some pages are free again."""
    with kagedb.connect(url=url) as storage:
        projects = [Project.add(f"house {number}", actor=ACTOR) for number in range(12)]
        with storage.transaction():
            for project in projects:
                project.configure("house { rooms 3 }" * 40, parsed={"rooms": 3}, actor=ACTOR, message="")
                for number in range(4):
                    body = f"You look after house {number}.\n" * 30
                    version = Prompt.edit(project, f"planner {number % 2}", body, actor=ACTOR, message="")
                    Prompt.label(project, f"planner {number % 2}", "production", version, actor=ACTOR)
        plugin = Plugin.install(projects[0], {"name": "lights", "version": "1", "permissions": []}, actor=ACTOR)
        for number in range(40):
            plugin.state.set(f"lamp {number}", {"on": True, "text": "x" * 200})
        sessions = [Session.start(projects[number % 12], title=f"night {number}", actor=ACTOR) for number in range(60)]
        with storage.transaction():
            for number, session in enumerate(sessions):
                run = Run.dispatch(session, agent="planner", input={"goal": "quiet " * 20}, prompt_version=version)
                child = Run.dispatch(session, agent="helper", input={"n": number}, parent=run)
                child.finish(exit_status=0, output={"text": "done " * 30})
                if number % 10 == 0:
                    run.attach("picture", random.Random(number).randbytes(9000))
                    checkpoint = Checkpoint.pause(run, {"list": list(range(300)), "n": number}, label="x", reason="")
        checkpoint.rollback(actor=ACTOR)
        for session in sessions[:3]:
            with Transcript.open(session, columns=80, rows=24) as recorder:
                for number in range(12):
                    recorder.write(random.Random(number).randbytes(30_000))
        with storage.transaction():
            for number in range(300):
                AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"n": number})
        AuditSeal.close_all()
        # What was there stays on the pages that this frees.
        for number in range(30):
            plugin.state.delete(f"lamp {number}")
        for number in range(40):
            plugin.state.set(f"large {number}", {"text": "gone " * 400})
        for number in range(40):
            plugin.state.delete(f"large {number}")


@dataclass(slots=True)
class Page:
    number: int
    table: str
    kind: str
    """leaf, internal or overflow, as dbstat says; free for the rest."""


@dataclass(slots=True)
class Anatomy:
    """A healthy file: its pages, and for each row of each table the pages that it is on."""

    page_bytes: int
    pages: dict[int, Page] = field(default_factory=dict)
    rows: dict[str, dict[Row, set[int]]] = field(default_factory=dict)

    def of(self, kind: str, *tables: str) -> list[int]:
        return [
            page.number for page in self.pages.values() if page.kind == kind and (not tables or page.table in tables)
        ]

    def untouched(self, table: str, damaged: set[int]) -> set[Row]:
        return {row for row, pages in self.rows[table].items() if not pages & damaged}


def anatomy(path: Path) -> Anatomy:
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        found = Anatomy(connection.execute("PRAGMA page_size").fetchone()[0])
        (count,) = connection.execute("PRAGMA page_count").fetchone()
        found.pages = {number: Page(number, "", "free") for number in range(1, count + 1)}
        leaves: dict[str, list[tuple[str, int, int]]] = {}
        chains: dict[tuple[str, str], set[int]] = {}
        told = connection.execute("SELECT name, path, pageno, pagetype, ncell FROM dbstat ORDER BY name, path")
        for name, place, number, kind, cells in told:
            found.pages[number] = Page(number, name, kind)
            if kind == "leaf":
                leaves.setdefault(name, []).append((place, number, cells))
            elif kind == "overflow":
                chains.setdefault((name, place.partition("+")[0]), set()).add(number)
        for (table,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        ):
            rows = found.rows[table] = {}
            stored = connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')
            # The rows of a table lie on its leaves in the order of their rowids, as many on each as it has cells.
            for place, number, cells in leaves[table]:
                for cell in range(cells):
                    rows[next(stored)] = {number} | chains.get((table, f"{place}{cell:03x}"), set())
            assert next(stored, None) is None
        return found
    finally:
        connection.close()


def changed_pages(healthy: Path, damaged: Path, page_bytes: int) -> set[int]:
    """Which pages are not what they were, or not there."""
    one, other = healthy.read_bytes(), damaged.read_bytes()
    return {
        at // page_bytes + 1
        for at in range(0, len(one), page_bytes)
        if one[at : at + page_bytes] != other[at : at + page_bytes]
    }


def stored_rows(path: Path) -> dict[str, set[Row]]:
    """What a healthy store has, table by table."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        ).fetchall()
        return {table: set(connection.execute(f'SELECT * FROM "{table}"')) for (table,) in tables}
    finally:
        connection.close()


def is_stand_in(row: Row) -> bool:
    return any(isinstance(value, str) and value.startswith("lost") for value in row)


# Damage.


def write_page(path: Path, page_bytes: int, number: int, data: bytes, at: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek((number - 1) * page_bytes + at)
        file.write(data)


def zero(path: Path, page_bytes: int, *numbers: int) -> None:
    for number in numbers:
        write_page(path, page_bytes, number, bytes(page_bytes))


def strike(path: Path, page_bytes: int, number: int, chance: random.Random) -> None:
    """Damage one page somehow."""
    data = bytearray(path.read_bytes()[(number - 1) * page_bytes : number * page_bytes])
    kind = chance.choice(["zero", "noise", "bit", "bits", "head", "part"])
    if kind == "zero":
        data[:] = bytes(page_bytes)
    elif kind == "noise":
        data[:] = chance.randbytes(page_bytes)
    elif kind == "head":
        data[:12] = chance.randbytes(12)
    elif kind == "part":
        at = chance.randrange(page_bytes - 100)
        data[at : at + 100] = chance.randbytes(100)
    else:
        for _ in range(1 if kind == "bit" else 20):
            data[chance.randrange(page_bytes)] ^= 1 << chance.randrange(8)
    write_page(path, page_bytes, number, bytes(data))


# Kinds of damage, each to a file that nobody has open.


def root_of(path: Path, name: str) -> int:
    """Where a table or index begins."""
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        return int(connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0])
    finally:
        connection.close()


def page_bytes_of(path: Path) -> int:
    told = int.from_bytes(path.read_bytes()[16:18], "big")
    return 65536 if told == 1 else told


def zero_page(path: Path) -> None:
    zero(path, page_bytes_of(path), root_of(path, "audit_event"))


def garbage_in_an_index(path: Path) -> None:
    size = page_bytes_of(path)
    write_page(path, size, root_of(path, "audit_event_subject"), bytes(range(20)), size - 40)


def broken_page_header(path: Path) -> None:
    write_page(path, page_bytes_of(path), root_of(path, "run"), b"\xff" * 8)


def bit_in_a_prompt(path: Path) -> None:
    _flip_after(path, b"'quietly'")


def bit_in_a_blob(path: Path) -> None:
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    (blob,) = connection.execute("SELECT data FROM blob ORDER BY length(data) DESC LIMIT 1").fetchone()
    connection.close()
    _flip_after(path, bytes(blob[40:80]))


def bit_in_an_event(path: Path) -> None:
    _flip_after(path, b'{"number":7}')


def _flip_after(path: Path, wanted: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(wanted) + 5] ^= 1
    path.write_bytes(data)


SIX = (zero_page, garbage_in_an_index, broken_page_header, bit_in_a_prompt, bit_in_a_blob, bit_in_an_event)
"""One page each; SQLite's own checks find four."""


def leaf_zeroed(path: Path) -> None:
    found = anatomy(path)
    zero(path, found.page_bytes, found.of("leaf", "audit_event")[3])


def interior_zeroed(path: Path) -> None:
    """Of the list of tables: behind its root, which is in the first page."""
    found = anatomy(path)
    zero(path, found.page_bytes, *[page for page in found.of("internal", "audit_event", "run") if page > 1])


def first_page_zeroed(path: Path) -> None:
    zero(path, page_bytes_of(path), 1)


def header_overwritten(path: Path) -> None:
    write_page(path, page_bytes_of(path), 1, b"\xa5" * 100)


def pointer_map_zeroed(path: Path) -> None:
    zero(path, page_bytes_of(path), 2)


def cut_in_half(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size // 2)


def cut_off_at_the_end(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def text_file(path: Path) -> None:
    path.write_text("Dear diary,\n" * 500)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def from_the_future(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO schema_migration VALUES ('9999_later', 'x', 1, '99.0')")
    connection.commit()
    connection.close()
