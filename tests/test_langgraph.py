"""LangGraph's own conformance tests of checkpoint savers, for what it and kagedb have in common.

They come from PyPI with a hundred megabytes of dependencies, so they are no part of the extra `test`. They run in a
Python of their own: the one that KAGED_TEST_LANGGRAPH_PYTHON names, which has them and kagedb, or one that is made.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
INSTALL_SECONDS = 600


@pytest.fixture(scope="module")
def langgraph_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    given = os.environ.get("KAGED_TEST_LANGGRAPH_PYTHON")
    if given:
        return given
    place = tmp_path_factory.mktemp("langgraph")
    python = place / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", place], check=True, timeout=INSTALL_SECONDS)
    install = [python, "-m", "pip", "install", "-q", "langgraph-checkpoint-conformance", f"{PROJECT}[postgres]"]
    subprocess.run(install, check=True, timeout=INSTALL_SECONDS)
    return str(python)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_put_get_list_and_fork_conform(migrated_url: str, langgraph_python: str) -> None:
    """Needs the network, unless KAGED_TEST_LANGGRAPH_PYTHON is set."""
    done = subprocess.run(
        [langgraph_python, Path(__file__).with_name("langgraph_adapter.py"), migrated_url],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["copy_thread", "get_tuple", "list", "put"]
    assert all(line.endswith(" 0 failed") for line in done.stdout.splitlines())
