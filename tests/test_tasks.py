"""asyncio: a transaction belongs to the task that opened it; other tasks of the thread are refused, never mixed in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from kagedb import Project
from kagedb.errors import TransactionError
from kagedb.models.base import Counter

if TYPE_CHECKING:
    from kagedb.storage import Storage


def names() -> set[str]:
    return {row.name for row in Counter.select()} - {"owner_epoch", "transcript"}


@pytest.mark.parametrize("block", ["transaction", "snapshot"])
def test_another_task_of_the_thread_cannot_join(storage: Storage, block: str) -> None:
    refused: list[Callable[[], Any]] = [
        lambda: Counter.put(name="second", value=0),
        names,
        lambda: storage.database.execute_sql("SELECT 1"),
        lambda: storage.transaction().__enter__(),
        lambda: storage.database.atomic().__enter__(),
        lambda: storage.snapshot().__enter__(),
        lambda: Project.add("house", actor="operator:ana"),
    ]

    async def first(inside: asyncio.Event, leave: asyncio.Event) -> None:
        with getattr(storage, block)():
            if block == "transaction":
                Counter.put(name="first", value=0)
            inside.set()
            await leave.wait()  # what docs/daemon-authors.md says not to do

    async def second(inside: asyncio.Event, leave: asyncio.Event) -> None:
        await inside.wait()
        for attempt in refused:
            with pytest.raises(TransactionError, match="another asyncio task"):
                attempt()
        leave.set()

    async def both() -> None:
        inside, leave = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(inside, leave), second(inside, leave))
        Counter.put(name="after", value=0)

    asyncio.run(both())
    assert names() == ({"first", "after"} if block == "transaction" else {"after"})


def test_a_refused_task_does_not_break_the_transaction_it_met(storage: Storage) -> None:
    """One task was told "committed" once, and another's rollback deleted its row."""

    async def first(inside: asyncio.Event, leave: asyncio.Event) -> None:
        with pytest.raises(KeyError), storage.transaction():
            Counter.put(name="undone", value=0)
            inside.set()
            await leave.wait()
            raise KeyError

    async def second(inside: asyncio.Event, leave: asyncio.Event) -> None:
        await inside.wait()
        with pytest.raises(TransactionError), storage.transaction():
            Counter.put(name="mixed", value=0)
        leave.set()

    async def both() -> None:
        inside, leave = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(inside, leave), second(inside, leave))
        with storage.transaction():
            Counter.put(name="kept", value=0)

    asyncio.run(both())
    assert names() == {"kept"}


def test_code_of_the_thread_outside_any_task_cannot_join_either(storage: Storage) -> None:
    async def run() -> None:
        refusals = []

        def callback() -> None:
            try:
                Counter.put(name="mixed", value=0)
            except TransactionError as error:
                refusals.append(error)

        with storage.transaction():
            Counter.put(name="task", value=0)
            asyncio.get_running_loop().call_soon(callback)
            await asyncio.sleep(0.01)
        assert len(refusals) == 1

    asyncio.run(run())
    assert names() == {"task"}


def test_many_tasks_write_side_by_side_through_to_thread(storage: Storage) -> None:
    def write(number: int) -> None:
        with storage.transaction("relaxed"):
            value = Counter.get_by_id("shared").value
            Counter.update(value=value + 1).where(Counter.name == "shared").execute()
            Counter.put(name=f"n{number}", value=number)

    async def run() -> None:
        await asyncio.gather(*(asyncio.to_thread(write, number) for number in range(40)))

    Counter.put(name="shared", value=0)
    asyncio.run(run())
    assert Counter.get_by_id("shared").value == 40
    assert len(names()) == 41


def test_a_task_may_use_the_store_without_threads_where_it_does_not_await(storage: Storage) -> None:
    async def write(number: int) -> None:
        for step in range(5):
            with storage.transaction("relaxed"):
                Counter.put(name=f"{number} {step}", value=0)
            await asyncio.sleep(0)

    async def run() -> None:
        await asyncio.gather(*(write(number) for number in range(5)))

    asyncio.run(run())
    assert len(names()) == 25
