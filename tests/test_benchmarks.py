"""The benchmarks of contrib/benchmarks run, in their quick form. What they measure is nothing for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from postgres_server import DatabaseServer
from programs import run_python

BENCHMARKS = Path(__file__).parent.parent / "contrib" / "benchmarks"

TABLES = {
    "append.py": 4,
    "audit.py": 4,
    "backup.py": 2,
    "checkpoints.py": 3,
    "copying.py": 2,
    "engines.py": 6,
    "imports.py": 2,
    "pages.py": 4,
    "plugin_state.py": 1,
    "reads.py": 8,
    "retention.py": 2,
    "transcripts.py": 5,
}
"""How many tables each prints where it measures both engines."""


@pytest.mark.parametrize("name", TABLES)
def test_a_benchmark_prints_its_tables_and_leaves_nothing_in_the_database(
    name: str, postgres_server: DatabaseServer, postgres_database: str
) -> None:
    url = postgres_server.url(postgres_database)
    done = run_python(BENCHMARKS / name, "--quick", env={"KAGED_BENCHMARK_POSTGRES_URL": url})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n### ") == TABLES[name]
    assert "nan" not in done.stdout
    schemas = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
    assert postgres_server.execute(schemas, url=url) == [("public",)]


def test_every_benchmark_is_tried_here() -> None:
    scripts = {path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(TABLES)
