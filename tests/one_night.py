"""A store after one night in a house: runs that failed, subagents, a moved label, denials, a recording, checkpoints."""

from __future__ import annotations

import kagedb
from kagedb import AuditEvent, Checkpoint, Plugin, Project, Prompt, Run, Session, Transcript
from stored import ACTOR

TASK = {"goal": "all quiet"}


def fill(url: str) -> str:
    """Fill the store at `url`; gives the id of a run that called subagents, which called one in turn."""
    with kagedb.connect(url=url):
        house, shed = Project.add("house", actor=ACTOR), Project.add("shed", actor=ACTOR)
        house.configure("house {}", parsed={}, actor=ACTOR, message="first")
        house.configure("house { rooms 3 }", parsed={"rooms": 3}, actor=ACTOR, message="rooms")
        shed.archive(actor=ACTOR)
        first = Prompt.edit(house, "planner", "Look after the house.", actor=ACTOR, message="first")
        second = Prompt.edit(house, "planner", "Look after it; „quietly“ 😀.", actor=ACTOR, message="", config={"n": 1})
        for label, version in (("production", first), ("candidate", second), ("production", second)):
            Prompt.label(house, "planner", label, version, actor="operator:bo")
        lights = Plugin.install(house, {"name": "lights", "version": "1", "permissions": []}, actor=ACTOR)
        lights.state.set("on", {"lamp": True})
        lights.state.set("soon", [1, 2], ttl=3600)
        night, day = (Session.start(house, title=title, actor=ACTOR) for title in ("night watch", "day watch"))
        night.pin()
        run = Run.dispatch(night, agent="planner", input=TASK, prompt_version=first)
        scout = Run.dispatch(night, agent="scout", input=[1, None], parent=run)
        deeper = Run.dispatch(night, agent="reader", input="text", parent=scout)
        deeper.finish(exit_status=0, output={"read": 3})
        scout.fail("no answer from the door", exit_status=7)
        AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"allowed": False})
        AuditEvent.record("policy.decision", actor="agent:planner", subject=run, body={"allowed": True})
        run.attach("picture", bytes(range(256)) * 4)
        kept = Checkpoint.pause(run, {"step": 1}, label="before the door", reason="breakpoint")
        Checkpoint.pause(run, {"step": 2}, reason="breakpoint").pin()
        kept.rollback(actor=ACTOR)
        recorder = Transcript.open(night, columns=80, rows=24, run=run)
        recorder.write(b"all quiet\r\n" * 40)
        recorder.close()
        run.finish(exit_status=0, output={"quiet": True})
        Run.dispatch(day, agent="planner", input=TASK, prompt_version=second)
        seq = AuditEvent.record("sandbox.entered", actor="agent:scout", subject=scout, body={"secret": "x"}).seq
        AuditEvent.redact(seq, reason="a secret", actor=ACTOR)
        return str(run.id)
