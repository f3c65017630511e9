"""Stand-ins for lost rows: what a salvaged row refers to is put there again, marked as lost, so that it can be kept.

The mark is `lost` and the id, in whatever column of the row people read; docs/damage.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import peewee

from ..engines.archive import Contents, Table
from ..identity import new_ulid, ulid_ms
from ..models import Model
from ..models.audit import DAY_MS
from ..models.base import Identified
from ..models.checkpoint import PAUSED
from ..models.project import digest_text
from ..models.run import FAILED
from ..models.session import ENDED
from ..models.transcript import SEQUENCE_BITS

BATCH_ROWS = 200
"""Lost rows asked for at a time."""

COLUMNS, ROWS = 80, 24
"""The size of a terminal of which nothing is known."""

Load = Callable[[Table, Iterable[tuple[Any, ...]]], None]


class StandIns:
    """What is missing in the tables of `contents`, made with `load`. `made` is how many, by table."""

    def __init__(self, contents: Contents, load: Load) -> None:
        self._contents = contents
        self._tables = {table.name: table for table in contents.tables()}
        self._load = load
        self._anybodys: dict[str, str] = {}
        self._lowest: dict[str, int] = {}
        self._number = 0
        self.made: dict[str, int] = {}
        self.removed: dict[str, int] = {}
        """Rows that refer to what cannot ever have been there, by table."""

    def make(self) -> None:
        newest = self._newest_ms()
        self._transcripts_of_chunks()
        while self._found_more(newest):
            # A row that was removed may have been referred to.
            pass

    def _found_more(self, newest: int) -> bool:
        """Make what rows refer to and is not there; True where rows had to go instead."""
        removed = False
        # Children first: a stand-in refers to others in turn.
        for model in reversed(Model.all()):
            child = model._meta.table_name
            references = [field for field in model._meta.sorted_fields if isinstance(field, peewee.ForeignKeyField)]
            # And of a table first what refers to itself, for the same reason.
            for field in sorted(references, key=lambda field: field.rel_model is not model):
                parent = field.rel_model._meta.table_name
                while lost := self._lost(child, field):
                    possible = [one for one in lost if ulid_ms(one[0]) <= newest + DAY_MS]
                    if possible:
                        self._add(parent, [self._row(parent, *one) for one in possible])
                        continue
                    removed = True
                    for id, *_ in lost:
                        self._remove(child, field.column_name, id)
        return removed

    def _newest_ms(self) -> int:
        """The time of the newest row; an id beyond it is a damaged one, and would make every later id as late."""
        tables = [model._meta.table_name for model in Model.all() if issubclass(model, Identified)]
        ids = [self._contents.raw(f'SELECT MAX(id) FROM "{table}"').fetchone()[0] for table in tables]  # noqa: S608
        (at,) = self._contents.raw("SELECT MAX(at) FROM audit_event").fetchone()
        return max([at or 0, *(ulid_ms(id) for id in ids if id)])

    def _lost(self, child: str, field: Any) -> list[tuple[Any, ...]]:
        """Ids that `child` refers to by `field` and that are not there; with each what such a row says beside it."""
        beside = {name: f'MIN(c."{name}")' for name in ("session_id", "prompt_id", "to_version_id")}
        beside["revision"] = 'MAX(c."revision")'
        told = [sql if name in self._tables[child].columns else "NULL" for name, sql in beside.items()]
        # Not the table's own key: it may be laid aside while rows are loaded.
        column, parent, key = field.column_name, field.rel_model._meta.table_name, field.rel_field.column_name
        sql = (
            f'SELECT c."{column}", {", ".join(told)} FROM "{child}" c WHERE c."{column}" IS NOT NULL'  # noqa: S608
            f' AND NOT EXISTS (SELECT 1 FROM "{parent}" p WHERE p."{key}" = c."{column}")'
            f' GROUP BY c."{column}" LIMIT {BATCH_ROWS}'
        )
        return [tuple(row) for row in self._contents.raw(sql).fetchall()]

    def _remove(self, child: str, column: str, id: str) -> None:
        cursor = self._contents.raw(f'DELETE FROM "{child}" WHERE "{column}" = ?', (id,))  # noqa: S608
        self.removed[child] = self.removed.get(child, 0) + cursor.rowcount

    def _add(self, name: str, rows: list[dict[str, Any]]) -> None:
        table = self._tables[name]
        self._load(table, [tuple(row.get(column) for column in table.columns) for row in rows])
        self.made[name] = self.made.get(name, 0) + len(rows)

    def _row(
        self,
        table: str,
        id: str,
        session: str | None,
        prompt: str | None,
        version: str | None,
        revision: int | None,
    ) -> dict[str, Any]:
        said = f"lost {id}"
        row: dict[str, Any] = {"id": id, "created_at": ulid_ms(id)}
        if table == "project":
            return row | {"name": said}
        if table == "prompt":
            return row | {"project_id": self._any("project"), "name": said}
        if table == "prompt_version":
            prompt = prompt or self._any("prompt")
            # Below all that the verbs give, so that they go on counting where they were.
            (lowest,) = self._contents.raw(
                "SELECT MIN(version) FROM prompt_version WHERE prompt_id = ?", (prompt,)
            ).fetchone()
            self._lowest[prompt] = number = min(0, lowest or 0, self._lowest.get(prompt, 0)) - 1
            return row | {
                "prompt_id": prompt,
                "version": number,
                "body": said,
                "digest": digest_text(said, ""),
                "author": "system:kagedb",
                "message": said,
            }
        if table == "prompt_label":
            found = self._contents.raw("SELECT prompt_id FROM prompt_version WHERE id = ?", (version,)).fetchone()
            return row | {
                "prompt_id": found[0] if found else self._any("prompt"),
                "name": said,
                "version_id": version,
                "revision": revision,
            }
        if table == "plugin":
            manifest = f'{{"name":"lost-{id.lower()}","version":"0","permissions":[]}}'
            return row | {
                "project_id": self._any("project"),
                "name": f"lost-{id.lower()}",
                "version": "0",
                "manifest": manifest,
                "enabled": False,
            }
        if table == "session":
            # Ended: nothing goes on in it.
            return row | {
                "project_id": self._any("project"),
                "title": said,
                "state": ENDED,
                "ended_at": ulid_ms(id),
                "pinned": False,
                "metadata": "{}",
            }
        session = session or self._any("session")
        if table == "run":
            return row | {
                "session_id": session,
                "agent": "lost",
                "input": "null",
                "state": FAILED,
                "error": said,
                "started_at": ulid_ms(id),
                "finished_at": ulid_ms(id),
            }
        if table == "checkpoint":
            # A digest that no blob has: what was in it cannot be restored, and says so.
            return row | {
                "session_id": session,
                "label": said,
                "reason": said,
                "state": PAUSED,
                "pinned": False,
                "root": bytes(32),
            }
        assert table == "transcript", f"there is no stand-in for a row of {table}"
        (number,) = self._contents.raw("SELECT MIN(number) FROM transcript").fetchone()
        self._number = min(0, number or 0, self._number) - 1
        return row | self._transcript(self._number, ulid_ms(id))

    def _transcript(self, number: int, at: int) -> dict[str, Any]:
        # It has no column that people read, so that its session is one that is marked.
        return {
            "session_id": self._any("session"),
            "number": number,
            "columns": COLUMNS,
            "rows": ROWS,
            "closed_at": at,
        }

    def _any(self, table: str) -> str:
        """The id of the one stand-in for what is lost and of which not even the id is known."""
        if table not in self._anybodys:
            # Made first: what it refers to may be such a one too.
            id = self._anybodys[table] = new_ulid()
            self._add(table, [self._row(table, id, None, None, None, None)])
        return self._anybodys[table]

    def _transcripts_of_chunks(self) -> None:
        """Chunks refer to their transcript by its number alone, which no foreign key tells."""
        sql = (
            f"SELECT c.key / {1 << SEQUENCE_BITS}, MIN(c.at) FROM transcript_chunk c WHERE NOT EXISTS"  # noqa: S608
            f" (SELECT 1 FROM transcript t WHERE t.number = c.key / {1 << SEQUENCE_BITS})"
            f" GROUP BY c.key / {1 << SEQUENCE_BITS} LIMIT {BATCH_ROWS}"
        )
        while lost := self._contents.raw(sql).fetchall():
            made = [{"id": new_ulid(), "created_at": at, **self._transcript(number, at)} for number, at in lost]
            self._add("transcript", made)
