"""Write docs/schema.md below its mark, and docs/schema.svg, from the models and the known catalogues.

python contrib/development/schema_docs.py [DIRECTORY]

Run it after catalogue.py, and read the diff. Types, indexes and guards come from migrations/catalogue/, the columns of
views from a new SQLite store; what is above the mark is written by hand and stays.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path
from typing import Any

import peewee
from diagram import Box, Link, draw

import kagedb
from kagedb import schema
from kagedb.engines.engine import HISTORY_TABLE
from kagedb.fields import BlobField, BooleanField, IntegerField, JSONField, MillisField, UlidField
from kagedb.models import Model

DOCS = Path(__file__).parents[2] / "docs"
MARK = "<!-- From here on written by contrib/development/schema_docs.py. -->\n"

HOLDS: tuple[tuple[type[Any], str], ...] = (
    (UlidField, "ULID"),
    (MillisField, "Unix milliseconds, UTC"),
    (IntegerField, "integer"),
    (JSONField, "JSON"),
    (BlobField, "bytes"),
    (BooleanField, "true or false"),
)
"""What a column holds, in words, by its field; the rest is text."""

HISTORY = "The migrations that were applied to the store: script, SHA-256 of its text, when, and by which kagedb."

MEANT = {
    ("audit_event", "project"): "project",
    ("audit_seal", "last_seq"): "audit_event",
    ("checkpoint", "parent_id"): "checkpoint",
    ("checkpoint", "run_id"): "run",
    ("checkpoint", "root"): "blob",
    ("run_attachment", "blob"): "blob",
    ("transcript_chunk", "key"): "transcript",
}
"""What a column names without a foreign key, and the table that it is in: each model says why there is none."""

VIEWS = {
    "v_project": "Projects, with their newest config and how much is in them.",
    "v_config": "Every version of every project's config.",
    "v_prompt": "Every version of every prompt, with the labels that are on it.",
    "v_label_move": "Every move of a label from one version of a prompt to another.",
    "v_plugin": "Plugins, with how much state each keeps.",
    "v_plugin_state": "The state of plugins, key by key; also what has expired and was not removed yet.",
    "v_session": "Sessions, with their runs. `last_run_at` is when the newest run began.",
    "v_run": "Runs and subagents' invocations, with what they ran under. `seconds` is how long a run took.",
    "v_attachment": "What was attached to runs; `blob` is the digest under which the bytes are kept.",
    "v_checkpoint": "Checkpoints; `current` is the one that its session stands on.",
    "v_transcript": "Recordings. `bytes` is what the terminal sent, `stored_bytes` what that takes; `last_at` is when"
    " the last chunk began.",
    "v_audit": "The audit log. A body that is empty was redacted.",
}
"""What each view shows; a view that is not here stops the script."""

# Name to column and row. What refers stands right of what it refers to, or under it.
PLACES = {
    "project": (0, 0),
    "audit_event": (0, 1),
    "audit_seal": (0, 2),
    "counter": (0, 3),
    HISTORY_TABLE: (0, 4),
    "plugin": (1, 0),
    "project_config": (1, 1),
    "prompt": (1, 2),
    "session": (1, 3),
    "plugin_state": (2, 0),
    "prompt_version": (2, 1),
    "run": (2, 2),
    "prompt_label": (3, 0),
    "checkpoint": (3, 1),
    "transcript": (3, 2),
    "run_attachment": (3, 3),
    "prompt_label_move": (4, 0),
    "checkpoint_head": (4, 1),
    "transcript_chunk": (4, 2),
    "blob": (4, 3),
}
"""Where the diagram has each table; a table that is not here stops the script."""


@dataclass
class Table:
    name: str
    about: str
    columns: list[Column]
    indexes: list[str] = field(default_factory=list)
    guards: dict[str, list[str]] = field(default_factory=dict)
    """What a refused caller reads, to the events that are refused."""


@dataclass
class Column:
    name: str
    holds: str
    types: tuple[str, str]
    required: bool
    key: bool
    refers_to: str
    enforced: bool


def tables() -> list[Table]:
    """Every table as models and catalogues have it, by name."""
    newest = schema.scripts()[-1].name
    lite, post = (schema.catalogue_path(engine, newest).read_text().splitlines() for engine in ("sqlite", "postgres"))
    types = {name: (kind, _type_of(name, post)) for name, kind in _starting(lite, r"column (\S+) (\w+)")}
    required = set(_starting(lite, r"column (\S+) .*NOT NULL"))
    keys = set(_starting(lite, r"column (\S+) .* KEY \d+"))
    references = dict(_starting(lite, r"foreign key (\S+) to (\w+)\."))

    def column(table: str, name: str, holds: str) -> Column:
        full = f"{table}.{name}"
        refers_to = references.get(full, "")
        meant = MEANT.get((table, name), "")
        return Column(
            name, holds, types[full], full in required, full in keys, refers_to or meant, enforced=bool(refers_to)
        )

    found = [
        Table(
            model._meta.table_name,
            cleandoc(model.__doc__ or ""),
            [column(model._meta.table_name, f.column_name, _holds(f)) for f in model._meta.sorted_fields],
        )
        for model in Model.all()
    ]
    history = [name.partition(".")[2] for name in types if name.startswith(f"{HISTORY_TABLE}.")]
    found.append(
        Table(
            HISTORY_TABLE,
            HISTORY,
            [column(HISTORY_TABLE, n, HOLDS[1][1] if n.endswith("_at") else "text") for n in history],
        )
    )
    by_name = {table.name: table for table in sorted(found, key=lambda table: table.name)}
    for table, unique, columns, where in _starting(
        lite, r"index on (\w+) (?!of )\w+( UNIQUE)? \((.*?)\)(?: WHERE (.*))?$"
    ):
        text = f"`{columns.replace(' COLLATE BINARY', '')}`{', unique' if unique else ''}"
        by_name[table].indexes.append(text + (f", where `{where.strip('()')}`" if where else ""))
    for lines, pattern in (
        (lite, r"trigger \w+ on (\w+): .*? BEFORE (\w+) ON .*RAISE\(ABORT, 'kagedb: (.*?)'\)"),
        (post, r"trigger \w+ on (\w+) enabled .*? BEFORE (\w+) ON .*MESSAGE = 'kagedb: (.*?)'"),
    ):
        for table, event, why in _starting(lines, pattern):
            events = by_name[table].guards.setdefault(why, [])
            if event not in events:
                events.append(event)
    return list(by_name.values())


def _starting(lines: Iterable[str], pattern: str) -> Iterator[Any]:
    """The groups of the lines that match."""
    for line in lines:
        found = re.match(pattern, line)
        if found:
            yield found.groups() if len(found.groups()) > 1 else found[1]


def _type_of(column: str, lines: list[str]) -> str:
    (kind,) = _starting(lines, rf"column {re.escape(column)} (.*?)(?: COLLATE \"C\")?(?: NOT NULL)?$")
    return str(kind)


def _holds(column: peewee.Field) -> str:
    if isinstance(column, peewee.ForeignKeyField):
        column = column.rel_field
    words = next((words for kind, words in HOLDS if isinstance(column, kind)), "")
    if words:
        return words
    limit = f" of at most {column.max_length} characters" if column.max_length else ""
    return f"{'a line' if column.one_line else 'text'}{limit}"


def views() -> dict[str, tuple[str, ...]]:
    """Every view with its columns."""
    with tempfile.TemporaryDirectory() as directory:
        with kagedb.connect(f"sqlite://{directory}/kaged.db") as storage:
            return storage.engine.views()


def page() -> str:
    """What stands below the mark."""
    all_tables, all_views = tables(), views()
    lines = [
        "",
        "## Diagram",
        "",
        "Each box is a table with its key (underlined) and what it refers to. A solid line is a foreign key; a dashed"
        " one is a reference that the models keep and no engine enforces.",
        "",
        "![The tables of the store and how they refer to each other](schema.svg)",
        "",
        "## Tables",
        "",
        'On PostgreSQL every text is `COLLATE "C"`, so that both engines sort it by its bytes; on SQLite every table is'
        " STRICT. A column may be NULL where it says so.",
    ]
    for table in all_tables:
        lines += ["", f"### `{table.name}`", "", *_about(table), ""]
        lines += ["| column | holds | SQLite | PostgreSQL | |", "|---|---|---|---|---|"]
        for column in table.columns:
            notes = ["key"] if column.key else []
            notes += [] if column.required else ["may be NULL"]
            if column.refers_to:
                how = "refers to" if column.enforced else "names, not enforced, a row of"
                notes.append(f"{how} [`{column.refers_to}`](#{column.refers_to})")
            lite, post = column.types
            lines.append(f"| `{column.name}` | {column.holds} | {lite} | {post} | {', '.join(notes)} |")
        if table.indexes:
            lines += ["", f"Indexes: {'; '.join(table.indexes)}."]
        for why, events in table.guards.items():
            # A guard on INSERT beside the others refuses no new row: REPLACE, which would change an old one.
            told = ["REPLACE" if event == "INSERT" and len(events) > 1 else event for event in events]
            lines += ["", f"Guard on {', '.join(sorted(told))}: {why}."]
    lines += ["", "## Views", ""]
    lines += ["Columns in their order; times are text, and ids come last."]
    for name, columns in all_views.items():
        lines += ["", f"### `{name}`", "", VIEWS[name], "", ", ".join(f"`{column}`" for column in columns)]
    return "\n".join(lines) + "\n"


def _about(table: Table) -> list[str]:
    return [" ".join(part.split()) for paragraph in table.about.split("\n\n") for part in (paragraph, "")][:-1]


def picture() -> str:
    """The diagram, as SVG."""
    found = tables()
    boxes = []
    for table in found:
        shown = [column for column in table.columns if column.key or column.refers_to]
        rows = [(column.name, column.key) for column in shown]
        boxes.append(Box(table.name, rows, len(table.columns) - len(rows), *PLACES[table.name]))
    links = [
        Link(table.name, column.name, column.refers_to, column.enforced)
        for table in found
        for column in table.columns
        if column.refers_to
    ]
    keys = {table.name: next(column.name for column in table.columns if column.key) for table in found}
    return draw(boxes, links, keys)


def write(directory: Path) -> None:
    by_hand = (DOCS / "schema.md").read_text().partition(MARK)[0]
    (directory / "schema.md").write_text(by_hand + MARK + page())
    (directory / "schema.svg").write_text(picture())


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
