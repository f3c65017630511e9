"""The PostgreSQL server of a store: how a session with it is opened, set up and checked, and why one cannot be.

The secret in the URL is used here and nowhere else; what libpq says is scrubbed of it before anybody hears of it.
"""

from __future__ import annotations

import select
import time
from typing import Any

import peewee

from ..errors import SettingsError, StorageError, StorageUnavailable
from ..settings import Settings

driver: Any = peewee.psycopg2  # type: ignore[attr-defined]
"""psycopg2, or None where the extra is not installed."""

OLDEST_VERSION = 130000
"""PostgreSQL 13, as the server counts versions: the oldest whose settings used below exist and that is tried at all."""

KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_COUNT = 30, 10, 3
USER_TIMEOUT_MS = 60_000
"""On both sides of a connection: a host that died without a word frees its locks within a minute."""

STARTING_POLL_SECONDS = 0.05
"""Between tries while the server says that it is starting up: after a crash it reads its log for seconds."""

QUERY_CANCELED = "57014"  # SQLSTATE of a statement that its timeout or a request has ended

MOST_TIMEOUT_MS = 2**31 - 1
"""What statement_timeout takes: 24 days."""


class PostgresServer:
    """Opens sessions for one store. Raises SettingsError where psycopg2 is missing or does not understand the URL."""

    def __init__(self, settings: Settings, *, read_only: bool) -> None:
        if driver is None:
            raise SettingsError(
                f"{settings.url.redacted} needs psycopg2, which is not installed",
                "install the extra: pip install 'kagedb[postgres]'",
            )
        self.settings = settings
        self.url = settings.url
        self.schema = settings.schema
        self.full_commit = "on"
        """What `synchronous_commit` is for a full transaction: "on", or the more that the operator asked for."""
        self._read_only = read_only
        self._parameters = self._connection_parameters()

    def connect(self, **more: str) -> Any:
        """A new connection with its session settings, checked; `more` are libpq's own words.

        Raises StorageUnavailable, SettingsError.
        """
        deadline = time.monotonic() + self.settings.busy_timeout_ms / 1000
        while True:
            try:
                connection = driver.connect(self.url.dsn, **{**self._parameters, **more})
                break
            except driver.OperationalError as error:
                text = self.url.scrub(str(error).strip())
            # Outside the handler: libpq's text may quote the URL, and a chained error would carry it along.
            if "starting up" in text and time.monotonic() < deadline:
                time.sleep(STARTING_POLL_SECONDS)
                continue
            raise self._connect_error(text)
        try:
            self._check_session(connection)
        except driver.Error as error:
            connection.close()
            text = self.url.scrub(str(error).strip())
        except BaseException:
            connection.close()
            raise
        else:
            return connection
        raise self._connect_error(text)

    def _connection_parameters(self) -> dict[str, Any]:
        from psycopg2 import extensions

        text, given = "", {}
        try:
            given = extensions.parse_dsn(self.url.dsn)
        except driver.Error as error:
            text = self.url.scrub(str(error).strip())
        if text:
            raise SettingsError(
                f"the storage URL {self.url.redacted} is not understood: {text}",
                "write postgresql://user@host/database",
            )
        settings = self.settings
        server = {
            "search_path": self.schema,
            "lock_timeout": settings.busy_timeout_ms,
            "client_min_messages": "warning",
            "tcp_keepalives_idle": KEEPALIVE_IDLE_SECONDS,
            "tcp_keepalives_interval": KEEPALIVE_INTERVAL_SECONDS,
            "tcp_keepalives_count": KEEPALIVE_COUNT,
            "tcp_user_timeout": USER_TIMEOUT_MS,
        }
        if self._read_only:
            server["default_transaction_read_only"] = "on"
        options = [given["options"]] if given.get("options") else []
        options += [f"-c {name}={value}" for name, value in server.items()]
        defaults = {
            "application_name": "kaged",
            "connect_timeout": settings.connect_timeout_s,
            "keepalives_idle": KEEPALIVE_IDLE_SECONDS,
            "keepalives_interval": KEEPALIVE_INTERVAL_SECONDS,
            "keepalives_count": KEEPALIVE_COUNT,
            "tcp_user_timeout": USER_TIMEOUT_MS,
            "client_encoding": "UTF8",
        }
        chosen = {name: value for name, value in defaults.items() if name not in given}
        return {**chosen, "options": " ".join(options)}

    def _connect_error(self, text: str) -> StorageError | SettingsError:
        shown = " ".join(text.split())
        if "unsupported startup parameter" in shown:
            return self._pooler(shown)
        for sign in ("authentication failed", "does not exist", "no password", "no pg_hba.conf entry", "invalid"):
            if sign in shown:
                return SettingsError(
                    f"PostgreSQL at {self.url.redacted} does not let us in: {shown}",
                    "check the role, password and database in the storage URL",
                )
        return StorageUnavailable(
            f"PostgreSQL at {self.url.redacted} cannot be reached: {shown}",
            "start the server, or check the storage URL",
        )

    def _pooler(self, why: str) -> SettingsError:
        return SettingsError(
            f"a connection pooler stands between kaged and PostgreSQL ({why}); kaged's session locks do not survive it",
            "name the PostgreSQL server itself in the storage URL",
        )

    def _check_session(self, connection: Any) -> None:
        from psycopg2 import extras

        connection.autocommit = True
        # JSON columns come back as the text they are: the field decodes them.
        extras.register_default_json(connection, loads=lambda text: text)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_backend_pid(), current_setting('search_path'), current_setting('synchronous_commit'),"
                " current_setting('server_encoding'), current_setting('server_version_num')::int"
            )
            pid, path, commits, encoding, version = cursor.fetchone()
        if pid != connection.info.backend_pid:
            raise self._pooler("the server process behind it is not the one that answered")
        if path != self.schema:
            raise self._pooler("it dropped the session's settings")
        if encoding != "UTF8":
            raise SettingsError(
                f"the database at {self.url.redacted} has the encoding {encoding}", "make one with ENCODING 'UTF8'"
            )
        if version < OLDEST_VERSION:
            raise SettingsError(f"PostgreSQL {version // 10000} is too old", "use PostgreSQL 13 or newer")
        if commits != "off":
            # Where the operator asked for more (remote_apply), full means that.
            self.full_commit = commits


TRANSACTION_STATUS_UNKNOWN = 4
"""PQTRANS_UNKNOWN of libpq: the connection is bad."""


def readable(connection: Any) -> bool:
    """Whether the server has said something on an idle connection: its end, or a notice."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


def lost(connection: Any) -> bool:
    """Whether the connection is known to be gone; psycopg2 does not always call it closed."""
    return bool(connection.closed) or connection.info.transaction_status == TRANSACTION_STATUS_UNKNOWN


def alive(connection: Any) -> bool:
    """Whether an idle connection still is one. Asks the server only where it has said something."""
    if lost(connection):
        return False
    if not readable(connection):
        return True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except driver.Error:
        return False
    return True


def timeout_ms(moment: float) -> int:
    """The statement_timeout that ends a statement at `moment` (time.monotonic())."""
    return int(min(MOST_TIMEOUT_MS, max(1, (moment - time.monotonic()) * 1000)))
