"""A store with something of everything in it, for tests of what is done with whole stores."""

from __future__ import annotations

import kagedb
from kagedb import AuditEvent, AuditSeal, Checkpoint, Plugin, Project, Prompt, Run, Session, Transcript
from kagedb.operations import audit

ACTOR = "operator:ana"


def fill(url: str, name: str = "house", events: int = 20) -> None:
    """Add a project with a config, prompts, a plugin and its state, a session with runs, and so many audit events."""
    with kagedb.connect(url=url) as storage:
        project = Project.add(name, actor=ACTOR)
        project.configure(
            "house { rooms 3 }", parsed={"rooms": 3, "names": ["Küche", None, 1e2]}, actor=ACTOR, message=""
        )
        first = Prompt.edit(project, "planner", "You look after a house;\n'quietly';\n", actor=ACTOR, message="first")
        Prompt.edit(
            project, "planner", "Tab\t, back\\slash, 日本語 \u2028 😀", actor=ACTOR, message="", config={"n": 1}
        )
        Prompt.label(project, "planner", "production", first, actor=ACTOR)
        plugin = Plugin.install(project, {"name": "lights", "version": "1", "permissions": []}, actor=ACTOR)
        plugin.state.set("on", {"lamp": True, "since": 12})
        session = Session.start(project, title="night watch", actor=ACTOR)
        run = Run.dispatch(session, agent="planner", input={"goal": "all quiet"}, parent=None, prompt_version=first)
        run.attach("picture", bytes(range(256)) * 40)
        run.finish(exit_status=0, output={"quiet": True})
        with storage.transaction():
            for number in range(events):
                AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"number": number})


def fill_fully(url: str) -> None:
    """Every table has rows; the audit log is sealed, pruned and redacted."""
    fill(url, events=30)
    with kagedb.connect(url=url) as storage:
        session = Session.select().get()
        run = Run.dispatch(session, agent="planner", input={"texts": ["tab\t", "back\\slash", "\n\r", "\\N"]})
        with Transcript.open(session, columns=80, rows=24) as recorder:
            recorder.write(bytes(range(256)) * 300)
        checkpoint = Checkpoint.pause(
            run, {"list": list(range(500)), "text": "x" * 5000}, label="before", reason="test"
        )
        checkpoint.rollback(actor=ACTOR)
        AuditSeal.close_all()
        with storage.transaction():
            for number in range(30):
                AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"number": number})
        AuditSeal.close_all()
        audit.redact(storage, 40, actor=ACTOR, reason="a name")


def add_more(count: int = 1) -> None:
    """Change the open store a little."""
    for number in range(count):
        AuditEvent.record("policy.decision", actor="agent:other", body={"more": number})
