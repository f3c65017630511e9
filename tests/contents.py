"""Everything that a store holds, for tests that compare: one store before and after, or two engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kagedb.engines import open_engine
from kagedb.models import Model
from kagedb.operations.digests import digests
from kagedb.settings import load

if TYPE_CHECKING:
    from kagedb.storage import Storage


def digests_at(url: str) -> dict[str, tuple[int, str]]:
    """Rows and digest of each table of the store at `url`, the history and the tables of plugins included."""
    engine = open_engine(load(url=url), read_only=True)
    engine.open(create=False)
    try:
        with engine.reading() as found:
            return {name: (facts.rows, facts.digest) for name, facts in digests(found).facts.items()}
    finally:
        engine.close()


def contents(storage: Storage) -> dict[str, list[tuple[Any, ...]]]:
    """Each table to its rows, in the order of their keys, as plain values that are alike on both engines.

    JSON is the text that is stored, byte for byte.
    """
    found = {}
    for model in Model.all():
        meta = model._meta
        # By way of an alias: SQLite takes a quoted name that is no column for a text.
        columns = ", ".join(f't."{field.column_name}"' for field in meta.sorted_fields)
        keys = ", ".join(f't."{field.column_name}"' for field in meta.get_primary_keys())
        query = f'SELECT {columns} FROM "{meta.table_name}" AS t ORDER BY {keys}'
        rows = storage.database.execute_sql(query).fetchall()
        booleans = [field.field_type == "BOOL" for field in meta.sorted_fields]
        found[meta.table_name] = [tuple(map(_plain, row, booleans)) for row in rows]
    return found


def _plain(value: Any, boolean: bool) -> Any:
    if boolean:
        return bool(value)
    return bytes(value) if isinstance(value, memoryview | bytearray) else value
