"""The questions of docs/schema.md are answered alike by both engines, and as the page says by other programs too."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import one_night
from commands import answer, answer_json
from extra_scripts import sqlite_path

if TYPE_CHECKING:
    from places import Places

PAGE = Path(__file__).parent.parent / "docs" / "schema.md"
QUESTIONS = dict(re.findall(r"^### (\d+)\. .*?^```sql\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def values(run: str) -> dict[str, str]:
    """What the questions ask to be given; a night of which nobody saw the beginning or the end."""
    return {"since": "2020-01-01", "until": "2100-01-01 08", "before": "2100", "run": run}


def arguments(sql: str, given: dict[str, str]) -> list[str]:
    named = sorted(set(re.findall(r"(?<!:):([a-z]+)", re.sub("'[^']*'", "", sql))))
    return ["query", sql, *(word for name in named for word in ("--param", f"{name}={given[name]}"))]


def besides_the_copy(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a copy leaves in the audit logs of both stores: an event, and the size of the log."""
    return [row for row in rows if "store.copied" not in str(row) and row.get("what") != "audit log"]


def test_there_are_ten_questions() -> None:
    assert sorted(map(int, QUESTIONS)) == list(range(1, 11))


def test_both_engines_answer_alike_and_say_something(places: Places) -> None:
    first, second = places.migrated("sqlite"), places.empty("postgres")
    given = values(one_night.fill(first))
    answer(first, "copy", "--to", second)
    found: dict[str, list[dict[str, Any]]] = {}
    for number, sql in QUESTIONS.items():
        rows, others = (besides_the_copy(answer_json(url, *arguments(sql, given))) for url in (first, second))
        assert others == rows, number
        assert rows, f"question {number} has no answer"
        found[number] = rows
    assert [row["agent"] for row in found["1"]] == ["planner", "scout", "reader", "planner"]
    assert [(row["agent"], row["exit_status"]) for row in found["2"]] == [("scout", 7)]
    assert [(row["from_version"], row["to_version"]) for row in found["4"]] == [(1, 2), (None, 1)]
    assert [row["body"] for row in found["5"]] == ['{"allowed":false}']
    assert [row["title"] for row in found["7"]] == ["night watch"]
    assert [(row["depth"], row["agent"]) for row in found["8"]] == [(0, "planner"), (1, "scout"), (2, "reader")]
    assert [(row["prompt_version"], row["runs"], row["good"]) for row in found["9"]] == [(1, 1, 1), (2, 1, 0)]
    assert "run of scout ended: failed" in {row["what"] for row in found["10"]}


def test_the_sqlite_library_alone_answers_them(places: Places) -> None:
    """As `sqlite3` and datasette do, which know nothing of kagedb: named values, a file opened read-only."""
    url = places.migrated("sqlite")
    given = values(one_night.fill(url))
    connection = sqlite3.connect(f"file:{sqlite_path(url)}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    for number, sql in QUESTIONS.items():
        rows = [dict(row) for row in connection.execute(sql, given)]
        assert rows == answer_json(url, *arguments(sql, given)), number
    connection.close()


def test_psql_answers_them_as_the_page_says(places: Places, tmp_path: Path, postgres_server: object) -> None:
    url = places.migrated("postgres")
    given = values(one_night.fill(url))
    psql = shutil.which("psql")
    assert psql and "-v since=\"'2026-11-23 18'\"" in PAGE.read_text()
    words = [word for name, value in given.items() for word in ("-v", f"{name}='{value}'")]
    for number, sql in QUESTIONS.items():
        text = f"SET search_path = kaged;\n{sql.rstrip()};\n"
        done = subprocess.run(
            [psql, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *words, url],
            input=text, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), (number, done.stderr)
        rows = answer_json(url, *arguments(sql, given))
        assert len(done.stdout.splitlines()) >= len(rows) > 0, number
