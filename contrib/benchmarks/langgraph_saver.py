"""The same states through LangGraph's SQLite saver, to compare with; run by a Python that has it (checkpoints.py).

The saver is used as its documentation does, on a file, with a commit a step.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from contextlib import closing
from typing import Any

from states import KINDS


def main() -> None:
    """Arguments: the file, the kind of states, how many; prints the milliseconds of a restore. With 0 only makes it."""
    from langgraph.checkpoint.base import empty_checkpoint
    from langgraph.checkpoint.sqlite import SqliteSaver

    path, kind, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with closing(sqlite3.connect(path, check_same_thread=False)) as connection:
        saver = SqliteSaver(connection)
        saver.setup()
        if not steps:
            return
        config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
        state: Any = None
        for step, state in enumerate(KINDS[kind](steps)):
            versions = dict.fromkeys(state, step + 1)
            checkpoint = {**empty_checkpoint(), "channel_values": state, "channel_versions": versions}
            config = saver.put(config, checkpoint, {"source": "loop", "step": step}, versions)
        began = time.perf_counter()
        found = saver.get_tuple(config)
        took = time.perf_counter() - began
        if found is None or found.checkpoint["channel_values"] != state:
            raise AssertionError("it gave back another state")
    print(took * 1000)
