"""pg_dump and pg_restore: where they are, whether they fit the server, how they are run, and the text they give.

The password is in the child's environment and nowhere else. Nothing here knows what a backup is for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from ..errors import SettingsError, StorageCorrupt, StorageError, StorageFull, StorageUnavailable
from .archive import BLOB, BOOLEAN, INTEGER, REAL, TEXT

if TYPE_CHECKING:
    from ..settings import Settings

VERSION_SECONDS = 60
"""For `--version`; a card that is being written to takes seconds to load a program."""

NARROW_BYTES = 4096
"""Of a pipe, at least. With one so narrow a child is ahead of its reader by next to nothing, and rests when that does;
the 64 KiB that pipes have are a millisecond's work."""

SAID_LINES = 3
"""Of what a program says when it fails; the query that it ran comes last and is left out."""

_COPY_LINE = re.compile(rb'COPY ("(?:[^"]|"")+"|\w+)\.("(?:[^"]|"")+"|\w+) \((.*)\) FROM stdin;\n')
_NAME = re.compile(r'"((?:[^"]|"")+)"|(\w+)')
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|x[0-9A-Fa-f]{1,2}|.)", re.DOTALL)
_ESCAPED = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}

_OTHER_SECRETS = ("sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
"""Secrets of a URL for which libpq has no variable of the environment."""


@dataclass(frozen=True, slots=True)
class Script:
    """A piece of a dump's text: statements to be run at once."""

    sql: str


@dataclass(frozen=True, slots=True)
class Rows:
    """A piece of a dump's text: the rows of a table, as lines of COPY, which are read before the next piece."""

    schema: str
    table: str
    columns: list[str]
    lines: Iterator[bytes]
    copy: str
    """The COPY statement itself."""


def find(settings: Settings, program: str) -> str:
    """The path of a PostgreSQL program: in `backup.pg_bin`, else in PATH. Raises SettingsError."""
    directory = settings.backup_pg_bin
    found = shutil.which(program, path=directory or None)
    if found is None:
        where = f"in {directory} (backup.pg_bin)" if directory else "in PATH"
        raise SettingsError(
            f"{program} is not there {where}",
            "install PostgreSQL's client programs, or name their directory with backup.pg_bin",
        )
    return found


def require_version(settings: Settings, program: str, server_version: int) -> None:
    """Raises SettingsError where `program` is older than the server, whose number is as libpq gives it."""
    path = find(settings, program)
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, env=plain_environment()
    )
    found = re.search(r"(\d+)(?:\.(\d+))?", done.stdout)
    if done.returncode or found is None:
        raise SettingsError(f"{path} does not run: {done.stderr.strip()}", "mend it, or name another: backup.pg_bin")
    if int(found[1]) < server_version // 10_000:
        raise SettingsError(
            f"{program} {found[0]} ({path}) is older than the server, PostgreSQL"
            f" {server_version // 10_000}.{server_version % 10_000}",
            f"install the client programs of PostgreSQL {server_version // 10_000}, or name their directory with"
            " backup.pg_bin",
        )


def arguments_for(connection: Any, dsn: str) -> tuple[str, dict[str, str]]:
    """How a child connects to where `connection` is: a connection string without secrets, and its environment."""
    from psycopg2 import extensions

    given = extensions.parse_dsn(dsn)
    for secret in _OTHER_SECRETS:
        if secret in given:
            raise SettingsError(
                f"pg_dump cannot be given the {secret} of the storage URL without showing it to other users",
                "use a password, a password file or a key without a passphrase",
            )
    info = connection.info
    environment = plain_environment()
    password = given.pop("password", None)
    if password is not None:
        environment["PGPASSWORD"] = password
    # Several hosts may be named; the snapshot is of the one that answered.
    given.pop("hostaddr", None)
    given.update(host=info.host, port=str(info.port), dbname=info.dbname, user=info.user)
    given["application_name"] = "kaged backup"
    return extensions.make_dsn(**given), environment


@contextmanager
def running(command: list[str], environment: dict[str, str], scrub: Any, **streams: Any) -> Iterator[Any]:
    """A child that has ended well when the block is left, or is killed with it.

    Raises StorageError (StorageFull, StorageUnavailable) with what it said.
    """
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=said, **streams)
        try:
            yield child
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            if child.stdout is not None:
                child.stdout.close()
        if status:
            raise _failed(os.path.basename(command[0]), status, scrub(_said(said)))


def _said(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read(10_000).decode(errors="replace").strip().splitlines()
    # What failed, and why: that a table could not be read says less than the server's own words after it.
    return " ".join(lines[:SAID_LINES]) if lines else "it said nothing"


def _failed(program: str, status: int, said: str) -> StorageError | SettingsError:
    if "unsupported version" in said:
        return SettingsError(
            f"{program} is older than the pg_dump that wrote the file: {said}",
            "install newer client programs of PostgreSQL, or name their directory with backup.pg_bin",
        )
    if "No space left" in said or "Disk quota" in said:
        return StorageFull(f"{program} ran out of room: {said}", "free some space, or name another place")
    if re.search(r"invalid page|could not read block|data is corrupt|(missing|unexpected) chunk", said):
        return StorageCorrupt(f"{program} found damage: {said}", "keep the store as it is, and restore a backup")
    if re.search(r"server closed|terminating connection|could not connect|connection to server", said):
        return StorageUnavailable(f"{program} lost the server: {said}", "try again")
    how = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
    return StorageError(f"{program} {how}: {said}", "see the server's log")


def pieces(text: IO[bytes]) -> Iterator[Script | Rows]:
    """A plain dump as pieces; psql's own commands are left out, and what would change later statements of ours.

    Raises StorageCorrupt where the text ends inside the rows of a table.
    """
    statements: list[bytes] = []
    for line in text:
        copied = _COPY_LINE.fullmatch(line)
        if copied is None:
            # \restrict and \unrestrict are for psql; older servers do not know every setting of newer dumps.
            if not line.startswith((b"\\", b"SET transaction_timeout", b"SET default_table_access_method")):
                statements.append(line)
            continue
        if any(map(_says_something, statements)):
            yield Script(b"".join(statements).decode())
        statements = []
        block = _Block(text)
        (schema,), (table,), columns = (_names(part.decode()) for part in copied.groups())
        yield Rows(schema, table, columns, block.lines(), line.decode().rstrip("\n;"))
        if not block.ended:
            raise StorageCorrupt(f"the dump ends inside the rows of {table}", "use another set: kaged backups")
    if any(map(_says_something, statements)):
        yield Script(b"".join(statements).decode())


def _says_something(line: bytes) -> bool:
    return bool(line.strip()) and not line.startswith(b"--")


class _Block:
    def __init__(self, text: IO[bytes]) -> None:
        self._text = text
        self.ended = False

    def lines(self) -> Iterator[bytes]:
        for line in self._text:
            if line == b"\\.\n":
                self.ended = True
                return
            yield line


def boolean(field: bytes) -> bytes:
    """A boolean of COPY as the digit that kaged writes for it."""
    if field not in (b"t", b"f"):
        raise ValueError(f"{field[:20]!r} is not a boolean")
    return b"1" if field == b"t" else b"0"


def _text(field: bytes) -> str:
    return (_ESCAPE.sub(_unescaped, field) if b"\\" in field else field).decode()


def _unescaped(found: re.Match[bytes]) -> bytes:
    text = found[1]
    if text[:1] in b"01234567":
        return bytes([int(text, 8)])
    if text[:1] == b"x" and len(text) > 1:
        return bytes([int(text[1:], 16)])
    return _ESCAPED.get(text, text)


NULL = b"\\N"

VALUES: dict[str, Callable[[bytes], Any]] = {
    INTEGER: int,
    REAL: float,
    TEXT: _text,
    BLOB: lambda field: bytes.fromhex(field[3:].decode()),
    BOOLEAN: lambda field: int(boolean(field)),
}
"""What makes of a field of a line of COPY a value, for each kind; raises ValueError where it is none. NULL is apart."""


def _names(text: str) -> list[str]:
    return [plain or quoted.replace('""', '"') for quoted, plain in _NAME.findall(text)]


def plain_environment() -> dict[str, str]:
    """This process's environment, with messages as we read them."""
    return {**os.environ, "LC_ALL": "C"}
