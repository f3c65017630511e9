"""What a storage URL may be, what each wrong form is told, and that no secret of one is ever shown."""

from __future__ import annotations

import copy
import os
import pickle
import re
from pathlib import Path
from urllib.parse import quote, unquote

import psycopg2
import psycopg2.extensions
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kagedb.errors import SettingsError
from kagedb.url import StorageURL

PATHS = [
    ("sqlite:///srv/kaged.db", "/srv/kaged.db"),
    ("sqlite:////srv/kaged.db", "/srv/kaged.db"),
    ("sqlite://///srv//kaged.db", "/srv/kaged.db"),
    ("SQLite:///srv/kaged.db", "/srv/kaged.db"),
    ("  sqlite:////srv/kaged.db\n", "/srv/kaged.db"),
    ("sqlite:///kaged.db", "/kaged.db"),
    ("sqlite:////srv/./a/kaged.db", "/srv/a/kaged.db"),
    ("sqlite:////srv/link/../kaged.db", "/srv/link/../kaged.db"),
    ("sqlite:////srv/with%20space/100%25%3F%23.db", "/srv/with space/100%?#.db"),
    ("sqlite:////srv/with space.db", "/srv/with space.db"),
    ("sqlite:////srv/дом/%D0%B4.db", "/srv/дом/д.db"),
    ("sqlite:////srv/%FF%FE.db", os.fsdecode(b"/srv/\xff\xfe.db")),
    ("sqlite:////srv/\udcff.db", os.fsdecode(b"/srv/\xff.db")),
    ("sqlite:////%7Eana/kaged.db", "/~ana/kaged.db"),
    ("sqlite:////srv/a%2Fb.db", "/srv/a/b.db"),
    ("sqlite:////srv/:memory:/kaged.db", "/srv/:memory:/kaged.db"),
    ("sqlite:////srv/a%0Ab.db", "/srv/a\nb.db"),
]


@pytest.mark.parametrize(("text", "path"), PATHS)
def test_a_sqlite_url_is_an_absolute_path(text: str, path: str) -> None:
    url = StorageURL.parse(text, "--url")
    assert (url.scheme, url.path, url.dsn) == ("sqlite", path, None)
    assert url == StorageURL.from_path(path)
    assert hash(url) == hash(StorageURL.from_path(path))
    assert StorageURL.parse(str(url), "--url") == url


RELATIVE = "relative"
MEMORY = "in-memory store, which kaged rules out on purpose"
ABSOLUTE_FORM = "sqlite:////path/to/kaged.db"
WRONG = [
    ("", "is empty", ABSOLUTE_FORM),
    (" \t\r\n", "is empty", ABSOLUTE_FORM),
    ("sqlite:kaged.db", "lacks the slashes", ABSOLUTE_FORM),
    ("sqlite:/srv/kaged.db", "lacks the slashes", ABSOLUTE_FORM),
    ("sqlite:", "lacks the slashes", ABSOLUTE_FORM),
    ("sqlite://kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite://srv/kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite:///./kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite:///../kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite:///%2E%2E/kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite:///~/kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite:///~ana/kaged.db", RELATIVE, ABSOLUTE_FORM),
    ("sqlite:///:memory:", MEMORY, ABSOLUTE_FORM),
    ("sqlite://:memory:", MEMORY, ABSOLUTE_FORM),
    ("sqlite::memory:", MEMORY, ABSOLUTE_FORM),
    ("sqlite:////srv/:memory:", MEMORY, ABSOLUTE_FORM),
    ("SQLITE:///:MEMORY:", MEMORY, ABSOLUTE_FORM),
    ("sqlite:///%3Amemory%3A", MEMORY, ABSOLUTE_FORM),
    ("sqlite:///file::memory:?cache=shared", MEMORY, ABSOLUTE_FORM),
    ("sqlite:///x?mode=memory&cache=shared", MEMORY, ABSOLUTE_FORM),
    ("file::memory:?cache=shared", MEMORY, ABSOLUTE_FORM),
    (":memory:", MEMORY, ABSOLUTE_FORM),
    ("sqlite://", "names no file", ABSOLUTE_FORM),
    ("sqlite:///", "names no file", ABSOLUTE_FORM),
    ("sqlite:////", "names no file", ABSOLUTE_FORM),
    ("sqlite:////srv/kaged/", "directory", ABSOLUTE_FORM),
    ("sqlite:////srv/kaged/.", "directory", ABSOLUTE_FORM),
    ("sqlite:////srv/kaged/..", "directory", ABSOLUTE_FORM),
    ("sqlite:////srv/kaged.db?timeout=5", "a ? or a #", "%3F"),
    ("sqlite:////srv/kaged#1.db", "a ? or a #", "%23"),
    ("sqlite:////srv/100%.db", "% that encodes nothing", "%25"),
    ("sqlite:////srv/%zz.db", "% that encodes nothing", "%25"),
    ("sqlite:////srv/a%00b.db", "NUL", ABSOLUTE_FORM),
    ("sqlite:////srv/a\0b.db", "control character", "percent-encode"),
    ("sqlite:////srv/a\nb.db", "control character", "percent-encode"),
    ("sqlite:////srv/a\x1b[31m.db", "control character", "percent-encode"),
    ("sqlite:////srv/\ud800.db", "no file name can", ABSOLUTE_FORM),
    ("/var/lib/kaged/kaged.db", "is a path, not a URL", "write sqlite:////var/lib/kaged/kaged.db"),
    ("/srv/a b/k.db", "is a path, not a URL", "write sqlite:////srv/a%20b/k.db"),
    ("kaged.db", "is a path, not a URL", ABSOLUTE_FORM),
    ("./kaged.db", "is a path, not a URL", ABSOLUTE_FORM),
    ("~/kaged.db", "is a path, not a URL", ABSOLUTE_FORM),
    ("C:\\kaged.db", "is a path, not a URL", ABSOLUTE_FORM),
    ("/var/lib/kaged/", "is a path, not a URL", ABSOLUTE_FORM),
    ("mysql://ana@host/house", "unknown scheme 'mysql'", "postgresql://user@host/database"),
    ("sqlite3:///srv/kaged.db", "unknown scheme 'sqlite3'", ABSOLUTE_FORM),
    ("sqlite+pysqlite:////srv/kaged.db", "unknown scheme 'sqlite+pysqlite'", ABSOLUTE_FORM),
    ("file:///srv/kaged.db", "unknown scheme 'file'", ABSOLUTE_FORM),
    ("file:kaged.db", "unknown scheme 'file'", ABSOLUTE_FORM),
    ("postgresql+psycopg2://ana@host/house", "unknown scheme 'postgresql+psycopg2'", "write postgresql://user@host"),
    ("postgresql:/house", "lacks the slashes", "write postgresql://user@host"),
    ("postgres:house", "lacks the slashes", "write postgresql://user@host"),
    ("postgresql://host/\udcff", "not UTF-8", "%25"),
    ("postgresql://host/\ud800", "not UTF-8", "%25"),
    ("postgresql://ana:100%a0@host/house", "not UTF-8", "%25"),
    ("postgresql://host/a\nb", "control character", "percent-encode"),
    ("host=db.example dbname=house", "connection string of keywords", "write postgresql://user@host"),
    ("ana@db.example/house", "is not a storage URL", "postgresql://user@host"),
]


@pytest.mark.parametrize(("text", "problem", "form"), WRONG)
def test_a_wrong_url_is_told_where_it_was_read_what_is_wrong_and_the_right_form(
    text: str, problem: str, form: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        StorageURL.parse(text, "storage.url in /etc/kaged/config.toml")
    assert caught.value.message.startswith("storage.url in /etc/kaged/config.toml ")
    assert problem in caught.value.message
    assert form in caught.value.hint
    assert str(caught.value).isprintable()
    assert caught.value.__context__ is None, "the exception behind it would hold the text"


@pytest.mark.parametrize(
    "text", ["//ana:hunter22/house", "/ana:hunter22@h", "ana:hunter22/house", "/x?password=hunter22"]
)
def test_a_path_is_repeated_only_where_it_can_be_no_piece_of_a_url(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        StorageURL.parse(text, "--url")
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("value", [None, b"sqlite:////srv/kaged.db", Path("/srv/kaged.db"), 5])
def test_what_is_not_text_is_refused_by_its_type(value: object) -> None:
    with pytest.raises(SettingsError, match=f"--url is not text but of the type {type(value).__name__}"):
        StorageURL.parse(value, "--url")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("kaged.db", "relative"),
        ("", "relative"),
        ("~/kaged.db", "relative"),
        ("/../kaged.db", "relative"),
        ("/", "directory"),
        ("/srv/kaged/", "directory"),
        ("/srv/..", "directory"),
        ("/srv/a\0b", "NUL"),
        (":memory:", "relative"),
        ("/srv/:memory:", "in-memory"),
    ],
)
def test_a_path_that_no_store_can_have_gives_no_url(path: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        StorageURL.from_path(path)


def test_a_path_of_any_kind_gives_the_same_url() -> None:
    assert StorageURL.from_path("/srv//./k d.db") == StorageURL.from_path(Path("/srv/k d.db"))
    assert str(StorageURL.from_path("/srv/k d?#%.db")) == "sqlite:////srv/k%20d%3F%23%25.db"


FRAGMENTS = [
    *"/:@?#%&=~. \t\n\0é\udcff\ud800",
    *["sqlite:", "sqlite://", "postgres://", "postgresql://", "mysql://", ":memory:", "..", "srv", "%2F", "%zz", "%00"],
]
hostile_text = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))


@given(hostile_text)
@example("sqlite:////\udcff")
@example("postgresql://\ud800@")
def test_any_text_is_a_url_or_a_settings_error(text: str) -> None:
    try:
        url = StorageURL.parse(text, "--url")
    except SettingsError as error:
        assert str(error).isprintable()
        return
    assert repr(url).isprintable() or url.dsn is not None
    if url.path is None:
        assert url.dsn is not None
        assert url.dsn.startswith("postgresql://")
    else:
        assert os.path.isabs(url.path)
        assert not url.path.endswith("/")
        assert StorageURL.parse(str(url), "--url") == url


file_names = st.binary(min_size=1, max_size=12).filter(
    lambda name: not set(name) & {0, ord("/")} and name not in (b".", b"..") and not name.lower().endswith(b":memory:")
)


@given(st.lists(file_names, min_size=1, max_size=4))
@example([b"~", b"\xff\n"])
@example([b"%41", b"?mode=memory"])
def test_every_file_name_survives_its_url(names: list[bytes]) -> None:
    path = os.fsdecode(b"/" + b"/".join(names))
    assume("mode=memory" not in path.lower())
    url = StorageURL.from_path(path)
    assert url.path == path
    assert str(url).isascii()
    assert StorageURL.parse(str(url), "--url") == url


# PostgreSQL.


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "/house",
        "ana@db.example/house",
        "ana:pa%40ss@db.example:5433/house?sslmode=verify-full",
        "%2Fvar%2Frun%2Fpostgresql/house?user=ana",
        "h1:1,h2:2/house?target_session_attrs=read-write&options=-c%20statement_timeout%3D5s",
        "ana:p@ss@db.example/house",
        "[::1]:5432/house",
        "db.example/house?application_name=дом",
    ],
)
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "PostgreSQL"])
def test_a_postgresql_url_is_kept_whole(scheme: str, rest: str) -> None:
    url = StorageURL.parse(f" {scheme}://{rest} ", "--url")
    assert (url.scheme, url.path, url.dsn) == ("postgresql", None, f"postgresql://{rest}")
    assert url == StorageURL.parse(f"postgres://{rest}", "--url")
    assert url != StorageURL.parse("postgresql://elsewhere", "--url")


REDACTED = [
    ("", ""),
    ("ana@db.example/house", "ana@db.example/house"),
    ("ana:hunter22@db.example/house", "ana:***@db.example/house"),
    (":hunter22@/house", ":***@/house"),
    ("ana:@h/house", "ana:***@h/house"),
    ("ana:hunter22@h1:1,h2:2,[fe80::1%25eth0]:3/house", "ana:***@h1:1,h2:2,[fe80::1%25eth0]:3/house"),
    ("ana:hunter22@%2Fvar%2Frun/house", "ana:***@%2Fvar%2Frun/house"),
    ("h/house?password=hunter22&sslmode=require", "h/house?password=***&sslmode=require"),
    ("h/house?PassWord=hunter22", "h/house?PassWord=***"),
    ("h/house?p%61ssword=hunter22", "h/house?p%61ssword=***"),
    ("h/house?sslpassword=hunter22&oauth_client_secret=hunter22", "h/house?sslpassword=***&oauth_client_secret=***"),
    (
        "h/house?scram_client_key=hunter22&scram_server_key=hunter22",
        "h/house?scram_client_key=***&scram_server_key=***",
    ),
    ("h/house?options=-c%20search_path%3Dx&user=ana", "h/house?options=-c%20search_path%3Dx&user=ana"),
    ("h/house?sslkey=%2Fetc%2Fkey.pem", "h/house?sslkey=%2Fetc%2Fkey.pem"),
    # Raw characters that ought to have been encoded.
    ("ana:hunt@er22@h/house", "ana:***@h/house"),
    ("ana:hunt/er22@h/house", "ana:***@h/house"),
    ("ana:hunt#er22@h/house", "ana:***@h/house"),
    ("ana:hunt:er22@h/house", "ana:***@h/house"),
    ("ana:hunt?er22@h/house", "***"),
    ("h/house?password=hunt?er@22", "***"),
    ("h/house?password=hunt&er22&sslmode=require", "h/house?password=***&***&sslmode=require"),
    ("h/house?password=hunt&er=22", "h/house?password=***&***"),
    # Slips of other kinds.
    ("ana:hunter22/house", "***"),
    ("ana:hunter22", "***"),
    ("/ana:hunter22@h/house", "***@h/house"),
    ("ana%3Ahunter22%40h/house", "***"),
    ("h/house;password=hunter22", "***"),
    ("h/house&password=hunter22", "***"),
    ("h/house?sslmode=require?password=hunter22", "h/house?***"),
    ("h/house?sslmode=require?pass=hunter22", "h/house?***"),
    ("h/house?sslmode=require;pass=hunter22", "h/house?***"),
    ("h/house?sslmode=require%26password%3Dhunter22", "h/house?***"),
    ("ana@db:hunter22@h/house", "***@h/house"),
]


@pytest.mark.parametrize(("rest", "shown"), REDACTED)
def test_what_is_shown_of_a_postgresql_url(rest: str, shown: str) -> None:
    url = StorageURL.parse(f"postgres://{rest}", "--url")
    assert url.redacted == str(url) == f"{url}" == f"postgresql://{shown}"
    assert repr(url) == f"StorageURL('postgresql://{shown}')"


BASE_PARTS = "postgresql://ana:***@db.example:5432/house?sslmode=require&password=***&user=ana StorageURL('"
# Its letters make no word of a message, so what is found in one came from the secret.
password = st.text(st.sampled_from("ŻXZQJVYGH123456789@:/?#&=%é '\"\\[]+,;~"), min_size=4, max_size=16)
placements = st.sampled_from(
    [
        "{scheme}://ana:{secret}@db.example:5432/house?sslmode=require",
        "{scheme}://ana:{secret}@/house",
        "{scheme}://:{secret}@db.example",
        "{scheme}:///ana:{secret}@db.example/house",
        "{scheme}://ana:x{secret}@db.example:5432/house",
        "{scheme}://db.example/house?password={secret}",
        "{scheme}://db.example/house?user=ana&PASSWORD={secret}&sslmode=require",
        "{scheme}://ana:{secret}@db.example/house?sslpassword={secret}",
        "{scheme}://db.example/house?oauth_client_secret={secret}#x",
        "{scheme}:ana:{secret}@db.example/house",
        "{scheme}:/ana:{secret}@db.example/house",
        "ana:{secret}@db.example/house",
        "//ana:{secret}@db.example/house",
        "host=db.example user=ana password={secret}",
    ]
)
schemes = st.sampled_from(["postgres", "postgresql", "POSTGRES", "mysql", "postgresql+psycopg2", "sqlite", "file"])


def readable_pieces(secret: str) -> list[str]:
    """The parts of a secret that somebody could read out of a text, those of the URL around it left out."""
    pieces = {secret, unquote(secret), *re.findall(r"[^\W_]{4,}", secret), *re.findall(r"[^\W_]{4,}", unquote(secret))}
    return [piece for piece in pieces if len(piece) >= 4 and piece not in BASE_PARTS]


@settings(max_examples=1000, deadline=None)  # takes about a second
@given(password, placements, schemes, st.booleans())
def test_no_secret_is_ever_shown(secret: str, placement: str, scheme: str, encoded: bool) -> None:
    text = placement.format(scheme=scheme, secret=quote(secret, safe="") if encoded else secret)
    pieces = readable_pieces(secret)
    try:
        url = StorageURL.parse(text, "--url")
    except SettingsError as error:
        shown = [str(error), repr(error), error.message, error.hint]
    else:
        assume(url.dsn is not None)  # sqlite:///ana:…@db.example/house is a path, if an odd one
        shown = [str(url), repr(url), url.redacted, f"{url}", repr([url]), url.scrub(f"could not use {url.dsn}")]
        try:
            psycopg2.extensions.parse_dsn(url.dsn)
        except psycopg2.Error as error:
            shown.append(url.scrub(str(error)))
    for piece in pieces:
        assert not [one for one in shown if piece in one]


@pytest.mark.parametrize(
    ("rest", "message", "scrubbed"),
    [
        (
            "ana:pa%40ss@h/house",
            'connection to "h" with pa%40ss, that is pa@ss, failed',
            'connection to "h" with ***, that is ***, failed',
        ),
        ("h?password=a+b%25", "a+b%25 a+b%", "*** ***"),
        ("ana:hunt/er22@h/house", 'invalid port number: "hunt"', 'invalid port number: "***"'),
        ("ana:hunt@er22@h/house", 'could not translate host name "er22@h"', 'could not translate host name "***@h"'),
        ("ana:hunt%,xy/22@h", 'invalid percent-encoded token: "hunt%,"', 'invalid percent-encoded token: "***,"'),
        ("ana:hunter22", 'invalid port number: "hunter22"', 'invalid port number: "***"'),
        ("ana:abc@h?password=abcdef", "abcdef abc", "*** ***"),
        ("ana:abcd@h?password=cdef", "abcdef", "***"),
        ("ana:abab@h", "ababab", "***"),
        ("h?password=hunt&er22&sslmode=x", 'missing "=" in "er22"', 'missing "=" in "***"'),
        ("h?sslmod=require", 'invalid URI query parameter: "sslmod"', 'invalid URI query parameter: "sslmod"'),
        ("ana@h/house", "nothing to hide: ana h house", "nothing to hide: ana h house"),
        ("ana:.*@h/house", "taken literally, not as a pattern: .*", "taken literally, not as a pattern: ***"),
    ],
)
def test_a_secret_is_scrubbed_out_of_a_message(rest: str, message: str, scrubbed: str) -> None:
    assert StorageURL.parse(f"postgresql://{rest}", "--url").scrub(message) == scrubbed


def test_what_the_real_libpq_quotes_of_a_password_is_scrubbed() -> None:
    url = StorageURL.parse("postgresql://ana:hunter%zz22@h/house", "--url")
    with pytest.raises(psycopg2.Error, match="hunter%zz22") as caught:
        psycopg2.extensions.parse_dsn(url.dsn)
    assert "hunter" not in url.scrub(str(caught.value))


def test_a_file_has_no_secrets() -> None:
    url = StorageURL.from_path("/srv/password=hunter22@x.db")
    assert url.secrets == ()
    assert url.scrub("/srv/password=hunter22@x.db") == "/srv/password=hunter22@x.db"


@pytest.mark.parametrize("travel", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("text", ["postgresql://ana:hunter22@h/house", "sqlite:////srv/kaged.db"])
def test_a_url_does_not_travel(text: str, travel: object) -> None:
    assert callable(travel)
    with pytest.raises(TypeError, match="may hold a password"):
        travel(StorageURL.parse(text, "--url"))


def test_a_url_cannot_be_changed() -> None:
    url = StorageURL.parse("sqlite:////srv/kaged.db", "--url")
    with pytest.raises(AttributeError):
        url.path = "/elsewhere"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        url.note = "more"  # type: ignore[attr-defined]
