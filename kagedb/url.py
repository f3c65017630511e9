"""Storage URLs: parse, normalise, redact.

A URL says where a store lives, and nothing here opens it. What may be shown of a PostgreSQL URL is decided here
and nowhere else; which URL is in force, and why, is `kagedb.settings`.
"""

from __future__ import annotations

# urllib.parse is imported where it is needed: a daemon on its default store never is.
import os
import re
from dataclasses import dataclass

from .errors import SettingsError

SQLITE_FORM = "sqlite:////path/to/kaged.db"
POSTGRESQL_FORM = "postgresql://user@host/database"
HIDDEN = "***"

_WRITE_SQLITE = f"write the absolute path of the file: {SQLITE_FORM}"
_WRITE_POSTGRESQL = f"write {POSTGRESQL_FORM}"

# The connection parameters of libpq (PostgreSQL documentation, "Parameter Key Words"). One that is in neither list is
# hidden: libpq refuses it, so it is a slip, most often a piece of a password with a raw & in it.
_SECRET_PARAMETERS = frozenset(
    "password sslpassword oauth_client_secret scram_client_key scram_server_key".split()  # noqa: SIM905
)
_READABLE_PARAMETERS = frozenset(
    """application_name channel_binding client_encoding connect_timeout dbname fallback_application_name gssdelegation
    gssencmode gsslib host hostaddr keepalives keepalives_count keepalives_idle keepalives_interval krbsrvname
    load_balance_hosts max_protocol_version min_protocol_version oauth_client_id oauth_issuer oauth_scope options
    passfile port replication require_auth requirepeer requiressl service servicefile ssl ssl_max_protocol_version
    ssl_min_protocol_version sslcert sslcertmode sslcompression sslcrl sslcrldir sslkey sslkeylogfile sslmode
    sslnegotiation sslrootcert sslsni target_session_attrs tcp_user_timeout user""".split()  # noqa: SIM905
)

# Patterns are text, which `re` compiles when first used: a daemon on its default store uses none.

# What is shown of a user, host or database name: letters, digits and the encoded slash of a socket directory. An
# encoded : or @ may be a whole `user:password@host` that was encoded too eagerly.
_PLAIN = r"(?:[\w.+~$-]|%20|%2[Ff])*"
_PLAIN_HOST = rf"(?:\[(?:[0-9A-Za-z:.]|%25)*\]|{_PLAIN})(?::[0-9]{{0,5}})?"
_PLAIN_HOSTS = f"{_PLAIN_HOST}(?:,{_PLAIN_HOST})*"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{1,30}://"
_KEYWORDS = r"(?i)\b(?:host|hostaddr|port|dbname|user|password|service)\s*="
_MEMORY = r"(?i):memory:/*(?:[?#]|$)|[?&]mode=memory"
_CONTROL = r"[\x00-\x1f\x7f-\x9f]"
_BARE_PERCENT = r"%(?![0-9A-Fa-f]{2})"
_SURROGATE = r"[\ud800-\udfff]"
_UNENCODABLE = r"[\ud800-\udc7f\udd00-\udfff]"  # surrogates that do not stand for a byte of a file name (PEP 383)


@dataclass(frozen=True, slots=True, repr=False)
class StorageURL:
    """Where a store lives: an absolute file path (`path`) or a PostgreSQL URL (`dsn`); the other one is None.

    Made by `parse` or `from_path`. Two are equal when they name the same path or hold the same PostgreSQL URL. `str`
    and `repr` are safe to print. It cannot be pickled, so that a password does not travel with it.
    """

    path: str | None
    dsn: str | None

    @classmethod
    def parse(cls, text: str, origin: str) -> StorageURL:
        """Read a URL as an operator wrote it; `origin` says where (`--url`, `storage.url in FILE`).

        `sqlite:///path` and `sqlite:////path` are the absolute path `/path`, percent-encoding decoded. A PostgreSQL
        URL is kept whole for libpq, which reads its hosts and parameters itself. Raises SettingsError, which names
        the origin and the right form and quotes nothing that could hold a secret.
        """
        from urllib.parse import unquote

        if not isinstance(text, str):
            raise _refusal(origin, f"is not text but of the type {type(text).__name__}")
        text = text.strip(" \t\r\n")
        if not text:
            raise _refusal(origin, "is empty")
        if re.search(_CONTROL, text):
            raise _refusal(origin, "holds a control character", "percent-encode it where it belongs to a name")
        scheme, _, rest = text.partition(":")
        scheme = scheme.lower()
        if scheme in ("postgres", "postgresql") and rest.startswith("//"):
            # psycopg2 cannot decode them, and its error would hold the password.
            if re.search(_SURROGATE, text + unquote(text, errors="surrogateescape")):
                raise _refusal(
                    origin, "holds bytes that are not UTF-8", "write a % that belongs to a name or password as %25"
                )
            return cls(None, f"postgresql:{rest}")
        if re.search(_MEMORY, unquote(text)):
            raise _refusal(origin, "names an in-memory store, which kaged rules out on purpose", _WRITE_SQLITE)
        if scheme != "sqlite" or not rest.startswith("//"):
            raise _refusal(origin, *_neither_engine(text))
        return cls(_sqlite_path(rest[2:], origin), None)

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> StorageURL:
        """The URL of the SQLite store in the file `path`. Raises SettingsError unless it is absolute and a file's."""
        text = os.fsdecode(path)
        if problem := _path_problem(text):
            raise SettingsError(f"the path {printable(text)} {problem}", "give the absolute path of the store's file")
        return cls(normal_path(text), None)

    @property
    def scheme(self) -> str:
        """`sqlite` or `postgresql`."""
        return "postgresql" if self.path is None else "sqlite"

    @property
    def redacted(self) -> str:
        """The URL without its secrets. An SQLite one is whole and can be parsed again."""
        if self.path is not None:
            return _sqlite_text(self.path)
        return f"postgresql://{_redact(self._behind_scheme)}"

    def __str__(self) -> str:
        return self.redacted

    def __repr__(self) -> str:
        return f"StorageURL({self.redacted!r})"

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a StorageURL may hold a password and is not pickled or copied; parse the URL again instead")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every text that must not be shown, as it stands in the URL and decoded."""
        from urllib.parse import unquote

        found = set(_secrets_in(self._behind_scheme))
        found |= {unquote(secret) for secret in found}
        return tuple(sorted(found - {""}))

    def scrub(self, text: str) -> str:
        """`text`, such as a message of libpq, with every secret of this URL hidden."""
        # Every occurrence, also one that begins inside another: a pattern would step over it.
        hidden = bytearray(len(text))
        for secret in self.secrets:
            start = text.find(secret)
            while start >= 0:
                hidden[start : start + len(secret)] = b"\1" * len(secret)
                start = text.find(secret, start + 1)
        kept = "".join("\0" if hide else character for character, hide in zip(text, hidden, strict=True))
        return re.sub("\0+", HIDDEN, kept)

    @property
    def _behind_scheme(self) -> str:
        return "" if self.dsn is None else self.dsn.removeprefix("postgresql://")


def normal_path(path: str) -> str:
    """An absolute path without doubled slashes, `.` and a slash at the end; `..` stays, a link may lie before it."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def is_absolute(path: str) -> bool:
    return path.startswith("/") and "\0" not in path


def printable(text: str) -> str:
    """`text` for one line of a terminal: control characters and bytes that are not UTF-8 are escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def _refusal(origin: str, what: str, hint: str = f"write {SQLITE_FORM} or {POSTGRESQL_FORM}") -> SettingsError:
    return SettingsError(f"{origin} {what}", hint)


# SQLite.


def _sqlite_path(body: str, origin: str) -> str:
    """The path in the part of the URL behind `sqlite://`."""
    from urllib.parse import unquote_to_bytes

    if not body.strip("/"):
        raise _refusal(origin, "names no file", _WRITE_SQLITE)
    if "?" in body or "#" in body:
        raise _refusal(
            origin,
            "holds a ? or a #, and a sqlite URL has no parameters",
            "write %3F and %23 where they belong to the name; page size, timeouts and the like are settings",
        )
    if re.search(_BARE_PERCENT, body):
        raise _refusal(origin, "holds a % that encodes nothing", "write %25 for a % that belongs to the name")
    first = body.lstrip("/").partition("/")[0]
    if not body.startswith("/") or first.startswith("~"):
        raise _refusal(origin, "names a relative path", _WRITE_SQLITE)
    if re.search(_UNENCODABLE, body):
        raise _refusal(origin, "holds a character that no file name can", _WRITE_SQLITE)
    # Bytes, not text: a file name need not be UTF-8.
    path = os.fsdecode(unquote_to_bytes(os.fsencode(body)))
    if problem := _path_problem(path):
        raise _refusal(origin, problem, _WRITE_SQLITE)
    return normal_path(path)


def _path_problem(path: str) -> str:
    """What keeps a path from being a store's, or nothing."""
    parts = path.strip("/").split("/")
    if "\0" in path:
        return "holds a NUL, which no file name can"
    if not path.startswith("/") or parts[0] in (".", ".."):
        return "is relative"
    if path.endswith("/") or parts[-1] in (".", ".."):
        return "is a directory's, not a file's"
    if re.search(_MEMORY, path):
        return "names an in-memory store, which kaged rules out on purpose"
    return ""


def _sqlite_text(path: str) -> str:
    from urllib.parse import quote

    text = quote(os.fsencode(path))
    if text.startswith("/~"):  # a bare ~ there is refused as somebody's home
        text = f"/%7E{text[2:]}"
    return f"sqlite:///{text}"


def _neither_engine(text: str) -> tuple[str, str]:
    """What is wrong with a text that is neither engine's URL, and what was probably meant."""
    scheme = text.partition(":")[0].lower()
    if scheme in ("sqlite", "postgres", "postgresql"):
        return f"lacks the slashes behind {scheme}:", _WRITE_SQLITE if scheme == "sqlite" else _WRITE_POSTGRESQL
    if re.match(_SCHEME, text) or scheme == "file":
        what = f"has the unknown scheme {scheme!r}"
        if scheme.startswith(("sqlite", "file")):
            return what, _WRITE_SQLITE
        if scheme.startswith(("postgres", "pgsql", "psql")):
            return what, _WRITE_POSTGRESQL
        return what, f"write {SQLITE_FORM} or {POSTGRESQL_FORM}"
    if re.search(_KEYWORDS, text):
        return "is a connection string of keywords, not a URL", _WRITE_POSTGRESQL
    if "://" in text or "@" in text:
        return "is not a storage URL", f"write {SQLITE_FORM} or {POSTGRESQL_FORM}"
    if (
        text.startswith("/")
        and not text.startswith("//")
        and not re.search(_UNENCODABLE, text)
        and not _path_problem(text)
    ):
        return "is a path, not a URL", f"write {_sqlite_text(normal_path(text))}"
    return "is a path, not a URL", _WRITE_SQLITE


# PostgreSQL. libpq takes as `user:password` what stands before the first @ if no / is before that. A person who wrote a
# raw @, /, ? or # into a password meant something else, so both readings are hidden, and what neither explains as well.


def _redact(rest: str) -> str:
    head, at, tail = rest.rpartition("@")
    place, mark, query = tail.partition("?")
    hosts, slash, name = place.partition("/")
    if "?" in head or not re.fullmatch(_PLAIN_HOSTS, hosts) or not re.fullmatch(_PLAIN, name):
        return HIDDEN
    user, colon, _ = head.partition(":")
    if not re.fullmatch(_PLAIN, user):
        user, colon = HIDDEN, ""
    password = f":{HIDDEN}" if colon else ""
    parameters = "&".join(map(_redact_parameter, query.split("&"))) if query else ""
    return f"{user}{password}{at}{hosts}{slash}{name}{mark}{parameters}"


def _redact_parameter(parameter: str) -> str:
    from urllib.parse import unquote

    key, _, value = parameter.partition("=")
    keyword = unquote(key).lower()
    if keyword in _SECRET_PARAMETERS:
        return f"{key}={HIDDEN}"
    swallowed = any(f"{secret}=" in unquote(value).lower() for secret in _SECRET_PARAMETERS)
    if keyword not in _READABLE_PARAMETERS or swallowed or set(value) & set("?=#"):
        return HIDDEN
    return parameter


def _secrets_in(rest: str) -> list[str]:
    from urllib.parse import unquote

    meant = rest.rpartition("@")[0].partition(":")[2]
    read = rest.partition("@")[0].partition(":")[2] if re.match("[^/@]*@", rest) else ""
    found = [meant, read]
    if meant != read or _redact(rest) == HIDDEN:
        # libpq quotes the pieces of what it misread: `invalid port number: "hunt"` for a password hunt/er.
        found += re.split(r"[][@:/?#&=,]", meant or rest.partition(":")[2])
    behind_secret = False
    for mark in re.finditer("[?&]", rest):
        parameter = rest[mark.end() :].partition("&")[0]
        key, _, value = parameter.partition("=")
        if unquote(key).lower() in _SECRET_PARAMETERS:
            found.append(value)
            behind_secret = True
        elif behind_secret and _redact_parameter(parameter) == HIDDEN:
            # It may belong to a password with a raw & in it.
            found += [parameter, key, value]
    return found
