"""Attachments of runs: what JSON cannot hold comes back as it was given."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from kagedb import AlreadyExists, InvalidValue, LimitExceeded, NotFound, Project, Run, Session, StorageCorrupt
from kagedb.models import Blob, RunAttachment

if TYPE_CHECKING:
    from kagedb.storage import Storage

ANA = "operator:ana"


@pytest.fixture
def run(storage: Storage) -> Run:
    session = Session.start(Project.add("house", actor=ANA), title="night watch", actor=ANA)
    return Run.dispatch(session, agent="planner", input={})


DATA: list[bytes | str] = [
    b"",
    "",
    b"\0",
    "text with \0 and \ud800",
    "ünïcödé" * 10_000,
    bytes(range(256)) * 5_000,
    random.Random(1).randbytes(3_000_000),
    "line of output\n" * 300_000,
]


def test_bytes_and_text_come_back_as_they_were_given(run: Run) -> None:
    for number, data in enumerate(DATA):
        run.attach(f"data {number}", data)
    for number, data in enumerate(DATA):
        found = Run.by_id(run.id).attachment(f"data {number}")
        assert type(found) is type(data)
        assert found == data
    assert [(a.name, a.kind) for a in run.attachments.order_by(RunAttachment.id)][:2] == [
        ("data 0", "bytes"),
        ("data 1", "text"),
    ]


def test_other_kinds_of_bytes_are_bytes(run: Run) -> None:
    run.attach("array", bytearray(b"ab"))  # type: ignore[arg-type]
    run.attach("view", memoryview(b"ab"))  # type: ignore[arg-type]
    assert (run.attachment("array"), run.attachment("view")) == (b"ab", b"ab")
    with pytest.raises(InvalidValue, match="bytes or text, not int"):
        run.attach("number", 5)  # type: ignore[arg-type]


def test_the_same_again_changes_nothing_and_something_else_is_refused(run: Run) -> None:
    run.attach("log", "one")
    run.attach("log", "one")
    for other in ("two", b"one"):
        with pytest.raises(AlreadyExists, match="has another attachment 'log'"):
            run.attach("log", other)
    assert (run.attachment("log"), RunAttachment.select().count()) == ("one", 1)


def test_equal_content_is_stored_once(run: Run) -> None:
    data = random.Random(2).randbytes(200_000)
    run.attach("a", data)
    blobs = Blob.select().count()
    run.attach("b", data)
    Run.dispatch(run.session, agent="b", input=1).attach("c", data)
    assert Blob.select().count() == blobs


def test_two_runs_may_use_one_name(run: Run) -> None:
    other = Run.dispatch(run.session, agent="b", input=1)
    run.attach("log", "mine")
    other.attach("log", "yours")
    assert (run.attachment("log"), other.attachment("log")) == ("mine", "yours")


def test_an_oversize_attachment_is_refused_before_it_is_written(storage: Storage, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage.database, "limits", storage.database.limits._replace(attachment_bytes=1_000))
    run.attach("fits", bytes(1_000))
    before = Blob.select().count()
    for data in (bytes(1_001), "ü" * 501):
        with pytest.raises(LimitExceeded, match=r"the limit is 1,000; raise limits\.attachment_bytes"):
            run.attach("large", data)
    assert (RunAttachment.select().count(), Blob.select().count()) == (1, before)


def test_what_is_not_there_is_not_found(run: Run) -> None:
    with pytest.raises(NotFound, match=f"the run {run.id} has no attachment 'log'"):
        run.attachment("log")
    stranger = Run(id="01JAB3C4D5E6F7G8H9JKMNPQRS")
    with pytest.raises(NotFound, match="there is no run"):
        stranger.attach("log", "x")
    assert Blob.select().count() == 0


def test_a_damaged_attachment_is_refused(storage: Storage, run: Run) -> None:
    run.attach("log", "line\n" * 50_000)
    for blob in list(Blob.select()):
        sql = storage.database.dialect("UPDATE blob SET data = ? WHERE digest = ?")
        storage.database.execute_sql(sql, (blob.data[:-1] + bytes([blob.data[-1] ^ 1]), blob.digest))
        with pytest.raises(StorageCorrupt):
            run.attachment("log")
        storage.database.execute_sql(sql, (blob.data, blob.digest))
    assert run.attachment("log") == "line\n" * 50_000
