"""What the pages on checkpoints and plugins show runs as it stands there, on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from test_docs import DOCS, blocks, program_of, run_page

PAGES = (DOCS / "checkpoints.md", DOCS / "plugin-authors.md")


@pytest.fixture
def granted(engine: str, url: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """On PostgreSQL, the operator has run the SQL of the page."""
    if engine == "sqlite":
        yield
        return
    server = request.getfixturevalue("postgres_server")
    admin = server.admin_url(url.partition("?")[0].rpartition("/")[2])
    for _, text in blocks(DOCS / "plugin-authors.md", "sql"):
        for statement in filter(str.strip, text.split(";")):
            server.execute(statement, url=admin)
    yield
    server.execute('DROP OWNED BY "kaged_p_weather" CASCADE', url=admin)
    server.execute('DROP ROLE "kaged_p_weather"', url=admin)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_the_page_gives_what_it_says(page: Path, url: str, granted: None, tmp_path: Path) -> None:
    assert program_of(page).count("_is(") > 10
    run_page(page, url, tmp_path)
