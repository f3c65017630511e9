"""What a plugin wears a card with that sets a key every second for an hour: at once, and held back for a while.

The hour is not waited for: what is held is flushed after as many sets as there are seconds between flushes.
"""

from __future__ import annotations

from pathlib import Path

from harness import Disk, arguments, describe, open_disk, open_store, print_table, sqlite_url

from kagedb import Plugin, Project

ACTOR = "operator:benchmark"
KEYS = 20
FLUSHES_SECONDS = (0, -1, 10, 30, 300)
"""Seconds between flushes; 0 is a commit for each set, -1 a relaxed one."""


def hour(directory: Path, sets: int, flush_seconds: int) -> None:
    with open_store(sqlite_url(directory / "kaged.db"), directory):
        state = Plugin.get().state
        for second in range(sets):
            value = {"at": 1_700_000_000 + second, "degrees": 20 + second % 7 / 10, "sky": "clear"}
            key = f"sensor/{second % KEYS}"
            if flush_seconds < 0:
                with state.transaction("relaxed"):
                    state.set(key, value)
                continue
            state.set(key, value, flush_seconds=3_600 if flush_seconds else None)
            if flush_seconds and second % flush_seconds == flush_seconds - 1:
                state.flush()


def measure(disk: Disk, sets: int, flush_seconds: int) -> int:
    directory = disk.directory / f"every-{flush_seconds}"
    directory.mkdir()
    with open_store(sqlite_url(directory / "kaged.db"), directory):
        manifest = {"name": "weather", "version": "1", "permissions": ["state"]}
        Plugin.install(Project.add("house", actor=ACTOR), manifest, actor=ACTOR)
    before = disk.written()
    hour(directory, sets, flush_seconds)
    return disk.written() - before


def main() -> None:
    given = arguments(__doc__ or "", sets=(3_600, 40))
    with open_disk(given.quick) as disk:
        describe(disk)
        written = {seconds: measure(disk, given.sets, seconds) for seconds in FLUSHES_SECONDS}
    print(f"\n### {given.sets:,} sets, one a second\n")
    names = {0: "each at once", -1: "each at once, relaxed"}
    rows = [
        [
            names.get(seconds, f"flush_seconds={seconds}"),
            f"{count / 1e6:.1f}",
            f"{count / max(1, written[0]):.3f}",
        ]
        for seconds, count in written.items()
    ]
    print_table(["sets", "MB written", "share"], rows)


if __name__ == "__main__":
    main()
