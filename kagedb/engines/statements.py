"""What kind of statement a text of SQL is: does it read, write, control a transaction, or need to stand alone.

Only the database classes of this folder ask. Unsure means "writes": a read that takes the writer lock is slow, a
write that does not take it can lose data.
"""

from __future__ import annotations

import enum
import functools
import re
import sqlite3
from collections.abc import Iterator


class Kind(enum.Enum):
    READ = "reads"
    WRITE = "writes"
    ALONE = "writes, but cannot run inside a transaction"
    CONTROL = "begins or ends a transaction"
    SEVERAL = "is more than one statement"


_LEADING = re.compile(r"(?:\s+|--[^\n]*(?:\n|\Z)|/\*.*?\*/|[;(])*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
# Texts are compiled by `re` when first used: a start needs none of them, and compiling takes milliseconds.
_WRITING_WORD = r"(?i)\b(?:INSERT|UPDATE|DELETE|INTO|NEXTVAL|SETVAL)\b"
# Names are quoted in what Peewee renders, so an unquoted INTO or a sequence call is the only way for SELECT to write.
_WRITING_WORD_IN_SELECT = re.compile(r"\b(?:INTO|NEXTVAL|SETVAL)\b", re.IGNORECASE)
# Comments, strings (PostgreSQL's E'' and $tag$ too) and quoted names: whatever is in them is no word of SQL.
QUOTED = re.compile(
    r"--[^\n]*|/\*.*?\*/|\bE'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\$(\w*)\$.*?\$\1\$",
    re.DOTALL | re.IGNORECASE,
)
_FOLLOWED = re.compile(r";\s*[^\s;]")
_HAS_A_BODY = r"(?i)CREATE\b[^;]*?\b(?:TRIGGER|FUNCTION|PROCEDURE)\b"

_CONTROL = frozenset({"BEGIN", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE", "START", "PREPARE"})
_ALONE = frozenset({"VACUUM", "ATTACH", "DETACH", "CHECKPOINT"})
# Pragmas that only look; all others may write, to the file or to how the connection writes.
_READING_PRAGMA = (
    r"(?i)PRAGMA\s+(?:\w+\.)?(?:"
    r"(?:table_info|table_xinfo|table_list|index_list|index_info|index_xinfo|foreign_key_list|foreign_key_check"
    r"|integrity_check|quick_check|compile_options|database_list|collation_list|function_list|freelist_count"
    r"|page_count|data_version)\b(?!\s*=)"
    r"|(?:page_size|auto_vacuum|journal_mode|synchronous|foreign_keys|busy_timeout|cache_size|mmap_size"
    r"|journal_size_limit|wal_autocheckpoint|application_id|user_version|encoding|query_only|secure_delete"
    r"|schema_version)\s*;?\s*\Z)"
)


@functools.lru_cache(maxsize=512)
def classify(sql: str) -> Kind:
    """The kind of the statement `sql`; comments and brackets before it are skipped."""
    start = _LEADING.match(sql)
    text = sql[start.end() :] if start else sql
    bare = QUOTED.sub("''", text)
    if _FOLLOWED.search(bare) and not re.match(_HAS_A_BODY, bare):
        # SQLite's driver refuses them; PostgreSQL's would run the second one as nobody expects it.
        return Kind.SEVERAL
    found = _WORD.match(text)
    word = found.group().upper() if found else ""
    if word == "SELECT":
        return Kind.WRITE if _WRITING_WORD_IN_SELECT.search(bare) else Kind.READ
    if word in ("WITH", "EXPLAIN"):
        # A data-modifying WITH, EXPLAIN ANALYZE of a write: the word anywhere is enough to be careful.
        return Kind.WRITE if re.search(_WRITING_WORD, bare) else Kind.READ
    if word in ("VALUES", "SHOW", "TABLE"):
        return Kind.READ
    if word == "PRAGMA":
        return Kind.READ if re.match(_READING_PRAGMA, text) else Kind.ALONE
    if word in _CONTROL:
        return Kind.CONTROL
    if word in _ALONE:
        return Kind.ALONE
    return Kind.WRITE


def split(script: str) -> Iterator[str]:
    """The statements of a script, without their semicolons; what is in quotes or comments ends none."""
    text = ""
    for piece in re.split(r"(?<=;)", script):
        text += piece
        if sqlite3.complete_statement(text):
            yield text.strip().rstrip(";")
            text = ""
    rest = _LEADING.match(text)
    if rest is None or rest.end() < len(text):
        yield text
