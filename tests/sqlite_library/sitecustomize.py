"""Chooses the SQLite library of a test run, in the run itself and, through PYTHONPATH, in every Python it starts.

Peewee takes pysqlite3 wherever it is the newer one; `KAGED_TEST_SQLITE=stdlib` (the default) hides it.
"""

import os
import sys

if os.environ.get("KAGED_TEST_SQLITE", "stdlib") == "stdlib":
    sys.modules["pysqlite3"] = None  # type: ignore[assignment]  # Python's way to say that an import shall fail
