"""LangGraph's checkpoint saver over kagedb, no thicker than its conformance tests ask; and the program that runs them.

A thread and namespace is a session, a checkpoint of theirs one of ours with their id as its label, their pending writes
are attachments of the run. Run by a Python that has langgraph-checkpoint-conformance (test_langgraph.py).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.conformance import checkpointer_test, validate

import kagedb
from kagedb import Checkpoint, Project, Run, Session

ACTOR = "agent:langgraph"

IN_COMMON = {"put", "get_tuple", "list", "copy_thread"}
"""What both can do: keep, give back, list, and fork; the last is their copying of a thread."""


class KagedSaver(BaseCheckpointSaver):  # type: ignore[misc,type-arg]
    def __init__(self, project: Project) -> None:
        super().__init__()
        self.project = project

    def _session(self, thread: str, namespace: str) -> Session | None:
        title = json.dumps([thread, namespace])
        return Session.get_or_none((Session.project == self.project.id) & (Session.title == title))

    def _run(self, thread: str, namespace: str) -> Run:
        session = self._session(thread, namespace)
        if session is None:
            session = Session.start(self.project, title=json.dumps([thread, namespace]), actor=ACTOR)
            return Run.dispatch(session, agent="graph", input=None)
        return Run.of(session)[0]

    @staticmethod
    def _labelled(session: Session, label: str) -> Checkpoint | None:
        return Checkpoint.get_or_none((Checkpoint.session == session.id) & (Checkpoint.label == label))

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        where = config["configurable"]
        run = self._run(where["thread_id"], where["checkpoint_ns"])
        parent = where.get("checkpoint_id") and self._labelled(run.session, where["checkpoint_id"])
        values = {name: self.serde.dumps_typed(value) for name, value in checkpoint["channel_values"].items()}
        state = {
            "checkpoint": {key: value for key, value in checkpoint.items() if key != "channel_values"},
            "metadata": dict(metadata),
            "parent": parent.label if parent else None,
            "kinds": {name: kind for name, (kind, _) in values.items()},
        }
        binaries = {name: data for name, (_, data) in values.items()}
        Checkpoint.pause(run, state, label=checkpoint["id"], parent=parent or None, binaries=binaries)
        return self._config(where["thread_id"], where["checkpoint_ns"], checkpoint["id"])

    async def aput_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        where = config["configurable"]
        run = self._run(where["thread_id"], where["checkpoint_ns"])
        for number, (channel, value) in enumerate(writes):
            kind, data = self.serde.dumps_typed(value)
            name = json.dumps([where["checkpoint_id"], task_id, number, channel, kind])
            run.attach(name, data)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        where = config["configurable"]
        session = self._session(where["thread_id"], where.get("checkpoint_ns", ""))
        if session is None:
            return None
        wanted = where.get("checkpoint_id")
        found = self._labelled(session, wanted) if wanted else Checkpoint.head(session)
        return None if found is None else self._tuple(where["thread_id"], where.get("checkpoint_ns", ""), found)

    async def alist(
        self, config: Any, *, filter: Any = None, before: Any = None, limit: int | None = None
    ) -> AsyncIterator[CheckpointTuple]:
        where = config["configurable"]
        session = self._session(where["thread_id"], where.get("checkpoint_ns", ""))
        found = Checkpoint.of(session)[::-1] if session is not None else []
        if before is not None:
            labels = [checkpoint.label for checkpoint in found]
            found = found[labels.index(before["configurable"]["checkpoint_id"]) + 1 :]
        given = 0
        for checkpoint in found:
            one = self._tuple(where["thread_id"], where.get("checkpoint_ns", ""), checkpoint)
            if all(one.metadata.get(key) == value for key, value in (filter or {}).items()) and given != limit:
                given += 1
                yield one

    async def acopy_thread(self, source: str, target: str) -> None:
        for session in list(Session.select().where(Session.project == self.project.id)):
            thread, namespace = json.loads(session.title)
            if thread == source:
                copy = self._run(target, namespace)
                for checkpoint in Checkpoint.of(session):
                    checkpoint.fork(actor=ACTOR, label=checkpoint.label, session=copy.session)
                for attachment in Run.of(session)[0].attachments:
                    copy.attach(attachment.name, attachment.content())

    @staticmethod
    def _config(thread: str, namespace: str, id: str) -> Any:
        return {"configurable": {"thread_id": thread, "checkpoint_ns": namespace, "checkpoint_id": id}}

    def _tuple(self, thread: str, namespace: str, found: Checkpoint) -> CheckpointTuple:
        state, binaries = found.content()
        values = {name: self.serde.loads_typed((kind, binaries[name])) for name, kind in state["kinds"].items()}
        writes = []
        for attachment in Run.of(found.session)[0].attachments:
            checkpoint, task, _, channel, kind = json.loads(attachment.name)
            if checkpoint == found.label:
                writes.append((task, channel, self.serde.loads_typed((kind, attachment.content()))))
        return CheckpointTuple(
            config=self._config(thread, namespace, str(found.label)),
            checkpoint={**state["checkpoint"], "channel_values": values},
            metadata=state["metadata"],
            parent_config=self._config(thread, namespace, state["parent"]) if state["parent"] else None,
            pending_writes=writes,
        )


def main() -> int:
    """Argument: the storage URL. Prints what each capability's tests gave; 0 where all in common pass."""
    with kagedb.connect(url=sys.argv[1]):
        project = Project.add("langgraph", actor=ACTOR)

        @checkpointer_test(name="kagedb")
        async def saver() -> AsyncIterator[KagedSaver]:
            yield KagedSaver(project)

        report = asyncio.run(validate(saver, capabilities=IN_COMMON))
    failures = 0
    for name in sorted(IN_COMMON):
        result = report.results[name]
        print(name, result.tests_passed, "passed", result.tests_failed, "failed")
        for failure in result.failures or ():
            print("  ", failure)
        failures += result.tests_failed or not result.tests_passed
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
