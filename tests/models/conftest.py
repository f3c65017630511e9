"""What the tests of the models share: a project, a session, what was recorded and what was told of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from kagedb import Change, Project, Session

if TYPE_CHECKING:
    from kagedb.storage import Storage

ANA = "operator:ana"


@pytest.fixture
def project(storage: Storage) -> Project:
    return Project.add("house", actor=ANA)


@pytest.fixture
def session(project: Project) -> Session:
    return Session.start(project, title="night watch", actor=ANA)


@pytest.fixture
def changes(storage: Storage, project: Project) -> Iterator[list[Change]]:
    """What subscribers are told, from after the project was added; a test may clear it."""
    told: list[Change] = []
    unsubscribe = storage.subscribe(told.append)
    yield told
    unsubscribe()
