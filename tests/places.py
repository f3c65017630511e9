"""Places for stores on either engine, new for each test."""

from __future__ import annotations

import itertools
import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from postgres_server import DatabaseServer


class Places:
    """Storage URLs of new places for stores on either engine, which are gone after the test."""

    def __init__(self, directory: Path, request: pytest.FixtureRequest) -> None:
        self._directories = itertools.chain([directory], (directory / f"place-{n}" for n in itertools.count(2)))
        self._request = request
        self._databases: list[str] = []

    def empty(self, engine: str) -> str:
        """Where no store is yet: a file that does not exist, or a database without tables."""
        return sqlite_url(self._new_path()) if engine == "sqlite" else self._new_database(None)

    def migrated(self, engine: str) -> str:
        """Where a store with this version's schema and no rows is; nobody has it open."""
        return self.copy(engine, self._request.getfixturevalue(f"{engine}_template"))

    def copy(self, engine: str, template: Path | str) -> str:
        """A copy of a store that nobody has open: the path of its file, or the name of its database."""
        if engine == "sqlite":
            path = self._new_path()
            shutil.copy(template, path)
            return sqlite_url(path)
        return self._new_database(str(template))

    def clear(self) -> None:
        while self._databases:
            self._server.drop_database(self._databases.pop())

    @property
    def _server(self) -> DatabaseServer:
        server: DatabaseServer = self._request.getfixturevalue("postgres_server")
        return server

    def _new_path(self) -> Path:
        directory = next(self._directories)
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory / "kaged.db"

    def _new_database(self, template: str | None) -> str:
        name = new_name()
        self._server.create_database(name, template)
        self._databases.append(name)
        return self._server.url(name)


def new_name() -> str:
    """The name of a database that no other run has."""
    return f"kaged_test_{secrets.token_hex(6)}"


def sqlite_url(path: Path) -> str:
    """The storage URL of a file."""
    return "sqlite://" + quote(str(path))
