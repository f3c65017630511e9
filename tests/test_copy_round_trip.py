"""A million events go from SQLite to PostgreSQL and back, and nothing is lost: contrib/benchmarks/copying.py does it.

Its short form, with two thousand, runs with the other benchmarks (test_benchmarks.py): it fails where anything is not
what it was.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from postgres_server import DatabaseServer
from programs import run_python

SCRIPT = Path(__file__).parent.parent / "contrib" / "benchmarks" / "copying.py"


@pytest.mark.slow
def test_a_million_events_go_there_and_back(postgres_server: DatabaseServer, postgres_database: str) -> None:
    """With 100,000 runs and 200 MB of transcripts: some ten minutes, most of them to make it."""
    env = {"KAGED_BENCHMARK_POSTGRES_URL": postgres_server.url(postgres_database)}
    done = run_python(SCRIPT, "--rounds", "1", env=env, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    proved = [line for line in done.stdout.splitlines() if line.startswith("- ") and line.endswith(": yes")]
    assert len(proved) == 8
    assert "the audit log of back holds, 1,000,0" in done.stdout
    memory = next(line for line in done.stdout.splitlines() if line.startswith("- MB of memory: "))
    assert memory.endswith("**met**")
