"""Everything that a store holds, for tests that compare: one store before and after, or two engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kagedb.models import Model

if TYPE_CHECKING:
    from kagedb.storage import Storage


def contents(storage: Storage) -> dict[str, list[tuple[Any, ...]]]:
    """Each table to its rows, in the order of their keys, as plain values that are alike on both engines.

    JSON is the text that is stored, byte for byte.
    """
    found = {}
    for model in Model.all():
        meta = model._meta
        keys = [field.column_name for field in meta.get_primary_keys()]
        columns = ", ".join(f'"{field.column_name}"' for field in meta.sorted_fields)
        order = ", ".join(f'"{key}"' for key in keys)
        rows = storage.database.execute_sql(f'SELECT {columns} FROM "{meta.table_name}" ORDER BY {order}').fetchall()
        booleans = [field.field_type == "BOOL" for field in meta.sorted_fields]
        found[meta.table_name] = [tuple(map(_plain, row, booleans)) for row in rows]
    return found


def _plain(value: Any, boolean: bool) -> Any:
    if boolean:
        return bool(value)
    return bytes(value) if isinstance(value, memoryview | bytearray) else value
