"""Giving space back on PostgreSQL: plain VACUUM of the store's own tables, one by one, on a connection of its own.

Never VACUUM FULL, which keeps everybody out while it copies a table. Plain VACUUM makes the room of dead rows usable
again beside readers and writers, and gives back to the disk what is at the end of a table.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from .compacting import Compaction
from .postgres_query import Beside
from .postgres_server import QUERY_CANCELED, driver, timeout_ms
from .sqlite_contents import quoted

if TYPE_CHECKING:
    from .postgres import PostgresEngine

COST_DELAY_MS = 2
"""As autovacuum does it: a VACUUM by hand does not pause, and takes the disk from writers."""

UNDEFINED_TABLE = "42P01"

_TABLES = (
    "SELECT n.nspname, c.relname, pg_get_userbyid(c.relowner) FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE (n.nspname = %s OR starts_with(n.nspname, %s)) AND c.relkind = 'r' ORDER BY pg_table_size(c.oid), 1, 2"
)
"""Those of plugins too, in schemas of their own; the largest last, so that a bound of time leaves few tables out."""


def compact(engine: PostgresEngine, run: Compaction) -> None:
    """See Engine.compact."""
    connection = engine.server.connect(application_name="kaged compact")
    try:
        with connection.cursor() as cursor, Beside(connection) as beside:
            cursor.execute(f"SET vacuum_cost_delay = {COST_DELAY_MS}")
            cursor.execute(_TABLES, (engine.schema, f"{engine.schema}_p_"))
            tables = cursor.fetchall()
            for number, (schema, table, owner) in enumerate(tables):
                run.tell(number, len(tables))
                if run.time_is_up():
                    return
                ends_at = math.inf if run.ends_at is None else run.ends_at
                cursor.execute(f"SET statement_timeout = {timeout_ms(ends_at)}")
                connection.notices.clear()
                name = f"{quoted(schema)}.{quoted(table)}"
                # Not behind another VACUUM of the table: what that one does need not be done again.
                vacuum = partial(cursor.execute, f"VACUUM (ANALYZE, SKIP_LOCKED) {name}")
                try:
                    beside.run(vacuum)
                except driver.Error as error:
                    if error.pgcode == QUERY_CANCELED and run.time_is_up():
                        return
                    # A plugin may have dropped it meanwhile.
                    if error.pgcode != UNDEFINED_TABLE:
                        raise
                # The server does not fail over a table that it may not or cannot clean now: it says so.
                run.notes += [
                    f"{name}: {engine.settings.url.scrub(' '.join(notice.split()))}; its owner may do it:"
                    f" as {owner}, VACUUM (ANALYZE) {name}"
                    for notice in connection.notices
                ]
            run.tell(len(tables), len(tables))
    except driver.Error as error:
        raise engine.database.translate(error) from error
    finally:
        connection.close()
