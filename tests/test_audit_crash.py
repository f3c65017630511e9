"""kill -9 while eight threads append: what was acknowledged is there, once, and the chain holds."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import kagedb
from kagedb.models import AuditEvent
from kagedb.operations.audit_verify import verify
from programs import kill, start_python, wait_for_line

APPENDER = """
import os, sys, threading
import kagedb
from kagedb import AuditEvent

storage = kagedb.connect(url=sys.argv[1])
acknowledged = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
life = sys.argv[3]

def append(thread):
    n = 0
    while True:
        token = f"{life}-{thread}-{n}"
        AuditEvent.record("sandbox.event", actor="agent:planner", body={"token": token})
        os.write(acknowledged, (token + "\\n").encode())
        n += 1

for thread in range(8):
    threading.Thread(target=append, args=(thread,), daemon=True).start()
print("appending", flush=True)
threading.Event().wait()
"""


def prove(url: str, acknowledged: Path, kills: int) -> None:
    acknowledged.touch()
    chance = random.Random(kills)
    for life in range(kills):
        process = start_python(APPENDER, url, str(acknowledged), str(life))
        wait_for_line(process, "appending")
        time.sleep(chance.uniform(0.0, 0.12))
        kill(process)
    promised = acknowledged.read_text().split()
    with kagedb.connect(url=url) as storage:
        recorded = [
            event.body.split('"')[3]
            for event in AuditEvent.rows(AuditEvent.select().where(AuditEvent.kind == "sandbox.event"))
        ]
        assert len(set(recorded)) == len(recorded), "an event is there twice"
        assert set(promised) <= set(recorded), "an acknowledged event is gone"
        assert len(promised) > kills, "too little was recorded to prove anything"
        # What was in flight in the moment of a kill may be there too, at most one a thread.
        assert len(recorded) - len(promised) <= 8 * kills
        found = verify(storage)
        assert (found.result, found.last_seq) == ("holds", len(recorded) + 1), found.wrong


def test_nothing_acknowledged_is_lost_by_kills(migrated_url: str, tmp_path: Path) -> None:
    prove(migrated_url, tmp_path / "acknowledged", 6)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_two_hundred_kills(migrated_url: str, tmp_path: Path) -> None:
    prove(migrated_url, tmp_path / "acknowledged", 200)
