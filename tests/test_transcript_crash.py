"""kill -9 while a terminal is recorded: what is lost is at most what the policy says, the rest is byte-exact."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

import kagedb
import programs
from kagedb import Transcript
from kagedb.models.recorder import FLUSH_SECONDS
from kagedb.models.segment import CHUNK_BYTES
from recordings import new_session

COMMIT_SECONDS = 0.5
"""What a commit may take on a machine that kills and starts others meanwhile."""

RECORD = """
import sys, time
import kagedb
from kagedb import Session, Transcript

url, session, rate, path = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
with kagedb.connect(url=url):
    recorder = Transcript.open(Session.by_id(session), 80, 24)
    print(recorder.transcript.id, flush=True)
    log = open(path, "w", buffering=1)
    began, number, written = time.monotonic(), 0, 0
    while True:
        line = f"{number:09} of the recording {'=' * (number % 60)}\\r\\n".encode()
        recorder.write(line)
        number += 1
        written += len(line)
        # Written down after it was recorded, before the next: what the disk cannot know is at most one line.
        log.write(f"{time.time()} {written}\\n")
        time.sleep(max(0, began + written / rate - time.monotonic()))
"""


def recorded(size: int) -> bytes:
    """The beginning of what each victim writes."""
    lines, length, number = [], 0, 0
    while length < size:
        lines.append(f"{number:09} of the recording {'=' * (number % 60)}\r\n".encode())
        length += len(lines[-1])
        number += 1
    return b"".join(lines)[:size]


def written_by(times: list[tuple[float, int]], moment: float) -> int:
    return max((size for at, size in times if at < moment), default=0)


def kill_recorders(url: str, directory: Path, *, kills: int, bytes_per_second: int) -> list[int]:
    """Kill so many recorders after 2 to 4 seconds; gives how many bytes each lost."""
    rng = random.Random(kills * bytes_per_second)
    with kagedb.connect(url=url):
        session = new_session()
    victims: list[tuple[subprocess.Popen[str], str, float, Path]] = []
    for number in range(kills):
        log = directory / f"{number}.log"
        victim = programs.start_python(RECORD, url, session.id, str(bytes_per_second), str(log))
        assert victim.stdout
        victims.append((victim, victim.stdout.readline().strip(), rng.uniform(2.2, 4), log))
    began = time.monotonic()
    killed_at = {}
    for victim, id, after, _ in sorted(victims, key=lambda one: one[2]):
        time.sleep(max(0, began + after - time.monotonic()))
        killed_at[id] = time.time()
        programs.kill(victim)
    lost = []
    with kagedb.connect(url=url):
        for _, id, _, log in victims:
            times = [(float(at), int(size)) for at, size in (line.split() for line in log.read_text().splitlines())]
            found = b"".join(Transcript.by_id(id).raw())
            written = times[-1][1]
            assert found == recorded(len(found)), "what is left is not what was written"
            safe = written_by(times, killed_at[id] - FLUSH_SECONDS - COMMIT_SECONDS)
            late = written_by(times, killed_at[id] - COMMIT_SECONDS)
            assert len(found) >= safe, f"{safe - len(found)} bytes that were older than {FLUSH_SECONDS} s are lost"
            assert len(found) >= late - CHUNK_BYTES, f"{late - len(found)} bytes are lost: more than a chunk"
            assert Transcript.by_id(id).closed_at is None
            lost.append(written - len(found))
    assert any(lost), "nothing was lost: the victims were not killed in the middle"
    return lost


@pytest.mark.parametrize("bytes_per_second", [2_000, 60_000])
def test_kill_9_loses_two_seconds_or_a_chunk_and_nothing_else(
    migrated_url: str, tmp_path: Path, bytes_per_second: int
) -> None:
    kill_recorders(migrated_url, tmp_path, kills=3, bytes_per_second=bytes_per_second)


@pytest.mark.slow
def test_twenty_times_kill_9_at_two_kilobytes_a_second(migrated_url: str, tmp_path: Path) -> None:
    lost = kill_recorders(migrated_url, tmp_path, kills=20, bytes_per_second=2_000)
    assert max(lost) <= 2_000 * (FLUSH_SECONDS + COMMIT_SECONDS)
