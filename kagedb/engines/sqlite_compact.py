"""Giving space back on SQLite: free pages leave the end of the file, the log is cut, lost marks come back.

Strategy: short turns to write, each with as many pages as fit into it by what the last one took, and pauses in which
others write. The log is moved into the file in turns of its own, so that no turn does both. Only a store that was
reloaded from a dump needs one VACUUM, and for that the store to itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peewee

from ..errors import StorageBusy, StorageInUse
from .compacting import HOLD_SECONDS, PAUSE_FACTOR, SHORTEST_PAUSE_SECONDS, Compaction
from .places import sync_file
from .sqlite_contents import INTERRUPTIBLE_STEPS
from .sqlite_database import APPLICATION_ID, SqliteStoreDatabase, sqlite3

if TYPE_CHECKING:
    from .sqlite import SqliteEngine

PAUSE_FACTOR_OF_MOVES = 100
"""After a move of the log, while others write: it syncs, so that it takes several times as long as a commit, and not
one writer in a hundred is to meet one. Measured: with 4 a writer's p99 was 4 times its own."""

LONGEST_PAUSE_SECONDS = 1.0
"""For disks on which a commit takes as long as a move: there a writer hardly notices it."""

OTHERS_SECONDS = 2.0
"""For how long after somebody's commit more of them are expected: without others there is nobody to pause for."""

FIRST_PAGES, FEWEST_PAGES, MOST_PAGES = 32, 8, 4_000
"""Of a step. 20 microseconds a page where it was measured; a card may take a hundred times that for the first."""

FEWEST_PAGES_OF_LOG = 256
"""Pages given back between two moves of the log at least: a move syncs twice, whatever it moves."""

READER_PATIENCE_SECONDS, READER_POLL_SECONDS = 2.0, 0.05
"""How long a reader that keeps the log is waited for: most have ended by then, and a backup takes minutes."""


class _Step:
    """How many pages a turn takes, by what the last one took."""

    def __init__(self, fewest: int) -> None:
        self.fewest = fewest
        self.pages = max(FIRST_PAGES, fewest)

    def took(self, seconds: float) -> None:
        fitting = int(self.pages * min(2.0, HOLD_SECONDS / max(seconds, 1e-6)))
        self.pages = min(MOST_PAGES, max(self.fewest, fitting))


def compact(engine: SqliteEngine, run: Compaction) -> None:
    """See Engine.compact."""
    _give_marks_back(engine, run)
    with _slowly(engine.database):
        _give_pages_back(engine, run)
        if not run.time_is_up() and not cut_log(engine, run):
            run.notes.append(
                f"a reader of {engine.path} keeps its write-ahead log at {_log_bytes(engine):,} bytes: end it, or wait"
                " until it is done, then: kaged compact"
            )


def erase(engine: SqliteEngine) -> bool:
    """Take every free page out of the file and what was in the log out of that; False where a reader keeps the log."""
    if "auto_vacuum" in engine.missing_marks():
        with engine.database.alone():
            engine.database.raw("VACUUM")
    run = Compaction()
    with _slowly(engine.database):
        _give_pages_back(engine, run)
        return run.finished and cut_log(engine, run)


# Free pages.


def _give_pages_back(engine: SqliteEngine, run: Compaction) -> None:
    goal = free_pages(engine.database)
    most_log_bytes = 1024 * max(engine.settings.journal_size_limit_kib, engine.settings.wal_autocheckpoint_kib)
    step, log = _Step(FEWEST_PAGES), _Log(engine, run)
    done = 0
    left = goal
    # Others may free pages meanwhile; those are for the next time, or this one might never end.
    while left and done < goal and not run.time_is_up():
        pages = step.pages
        step.took(_turn(engine.database, run, partial(_give, engine.database, pages)))
        done += min(pages, left)
        left = free_pages(engine.database)
        log.written(pages)
        if log.kept_bytes > most_log_bytes and not _wait_for_readers(log, run, most_log_bytes):
            run.finished = False
            run.notes.append(
                f"a reader of {engine.path} keeps {log.kept_bytes:,} bytes in its write-ahead log, which would grow"
                " further: when that reader is done, go on with: kaged compact"
            )
            return
        run.tell(min(done, goal), goal)


def _give(database: SqliteStoreDatabase, pages: int) -> None:
    # It frees a page at each step of the statement, and the cursor of Python's own driver takes one step, no more.
    try:
        with database.calls:
            database.connection().executescript(f"PRAGMA incremental_vacuum({pages})")
    except sqlite3.Error as error:
        raise database.translate(error) from error


def free_pages(database: SqliteStoreDatabase) -> int:
    """Pages of the file that hold nothing."""
    return int(database.raw("PRAGMA freelist_count").fetchone()[0])


# The log.


def cut_log(engine: SqliteEngine, run: Compaction) -> bool:
    """Move the log into the file and cut it to nothing; False where a reader keeps it."""
    deadline = time.monotonic() + READER_PATIENCE_SECONDS
    while True:
        busy = [True]

        def cut() -> None:
            busy[0] = bool(engine.database.raw("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])  # noqa: B023

        _sync_log(engine)
        _turn(engine.database, run, cut)
        if not busy[0]:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(READER_POLL_SECONDS)


class _Log:
    """The write-ahead log while this thread's commits do not move it: moved now and then, in turns of its own."""

    def __init__(self, engine: SqliteEngine, run: Compaction) -> None:
        self.kept_bytes = 0
        """What a reader kept in it at the last move."""
        self._engine = engine
        self._run = run
        self._step = _Step(FEWEST_PAGES_OF_LOG)
        self._unmoved = 0
        self._version = 0
        self._others_until = 0.0

    def written(self, pages: int) -> float:
        """Move it if enough has been written since the last time; gives how long that held the writer, in seconds."""
        self._unmoved += pages
        if self._unmoved < self._step.pages:
            return 0.0
        return self.move()

    def move(self) -> float:
        """Move what can be moved; gives how long that held the writer, in seconds."""
        found: list[int] = []
        raw = self._engine.database.raw

        def move() -> None:
            found[:] = raw("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

        self._unmoved = 0
        _sync_log(self._engine)
        factor = PAUSE_FACTOR_OF_MOVES if self._others_write() else PAUSE_FACTOR
        seconds = _turn(self._engine.database, self._run, move, factor)
        self._step.took(seconds)
        _, in_log, moved = found
        self.kept_bytes = max(0, in_log - moved) * int(raw("PRAGMA page_size").fetchone()[0])
        return seconds

    def _others_write(self) -> bool:
        # It changes when another connection has committed, of this process or another.
        version = self._engine.database.raw("PRAGMA data_version").fetchone()[0]
        now = time.monotonic()
        if version != self._version:
            self._version, self._others_until = version, now + OTHERS_SECONDS
        return now < self._others_until


@contextmanager
def gently(engine: SqliteEngine) -> Iterator[Callable[[int], float]]:
    """See Engine.gently: the log is moved between commits, a few pages at a time, and not by one of them."""
    raw, log = engine.database.raw, _Log(engine, Compaction())
    before = raw("PRAGMA wal_autocheckpoint").fetchone()[0]
    raw("PRAGMA wal_autocheckpoint = 0")
    try:
        yield log.written
    finally:
        raw(f"PRAGMA wal_autocheckpoint = {before}")


def _wait_for_readers(log: _Log, run: Compaction, most_log_bytes: int) -> bool:
    deadline = time.monotonic() + READER_PATIENCE_SECONDS
    while time.monotonic() < deadline and not run.time_is_up():
        time.sleep(READER_POLL_SECONDS)
        log.move()
        if log.kept_bytes <= most_log_bytes:
            return True
    return False


def _sync_log(engine: SqliteEngine) -> None:
    # A move begins with it; done before the turn, it keeps nobody waiting.
    try:
        sync_file(engine.beside("-wal"))
    except FileNotFoundError:
        pass


def _log_bytes(engine: SqliteEngine) -> int:
    try:
        return engine.beside("-wal").stat().st_size
    except FileNotFoundError:
        return 0


def _turn(
    database: SqliteStoreDatabase, run: Compaction, work: Callable[[], Any], pause_factor: int = PAUSE_FACTOR
) -> float:
    """Do `work` in a turn to write, and let others write after it; gives the seconds that it took."""
    with database.alone():
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    run.longest_hold_seconds = max(run.longest_hold_seconds, seconds)
    time.sleep(min(LONGEST_PAUSE_SECONDS, max(SHORTEST_PAUSE_SECONDS, pause_factor * seconds)))
    return seconds


@contextmanager
def _slowly(database: SqliteStoreDatabase) -> Iterator[None]:
    """This thread's connection neither waits for readers in a turn, nor moves the log or syncs as part of a commit."""
    raw = database.raw
    words = ("synchronous", "wal_autocheckpoint", "busy_timeout")
    before = {word: raw(f"PRAGMA {word}").fetchone()[0] for word in words}
    try:
        # What is lost at a power cut is done again; the file is whole either way.
        raw("PRAGMA synchronous = NORMAL")
        raw("PRAGMA wal_autocheckpoint = 0")
        raw("PRAGMA busy_timeout = 0")
        yield
    finally:
        for word, value in before.items():
            raw(f"PRAGMA {word} = {value}")


# Marks.


def _give_marks_back(engine: SqliteEngine, run: Compaction) -> None:
    missing, database = engine.missing_marks(), engine.database
    if "application_id" in missing:
        with database.alone():
            database.raw(f"PRAGMA application_id = {APPLICATION_ID}")
        missing.remove("application_id")
    if not missing:
        return
    engine.require_space()
    try:
        engine.exclude()
    except StorageInUse as error:
        lost = f"the {' and the '.join(missing)} of its settings can only come back by rewriting it"
        hint = "stop the daemon, or whatever has it open, then: kaged compact"
        if "auto_vacuum" in missing:
            # Without it no page can be given back.
            raise StorageInUse(f"{error.message}; {lost}", hint) from error
        run.notes.append(f"{error.message}; {lost}: {hint}")
        return
    try:
        _rewrite(engine, missing)
    finally:
        engine.readmit()


def _rewrite(engine: SqliteEngine, missing: list[str]) -> None:
    """One VACUUM, with the store to itself. Whoever is killed in it leaves the store as it was."""
    database = engine.database
    raw = database.raw
    with database.alone():
        try:
            if "page_size" in missing:
                # The page size changes only outside WAL mode, which nobody else may be in.
                raw("PRAGMA busy_timeout = 0")
                raw("PRAGMA journal_mode = DELETE")
                raw(f"PRAGMA page_size = {engine.settings.page_size}")
            raw("PRAGMA auto_vacuum = INCREMENTAL")
            # A signal is seen between two steps only.
            database.connection().set_progress_handler(lambda: 0, INTERRUPTIBLE_STEPS)
            raw("VACUUM")
        except StorageBusy as error:
            raise StorageInUse(
                f"another program has {engine.path} open", "close whatever has it open, then: kaged compact"
            ) from error
        except peewee.PeeweeException as error:
            name = getattr(getattr(error, "orig", error), "sqlite_errorname", "")
            raise (KeyboardInterrupt() if name == "SQLITE_INTERRUPT" else error) from error
        finally:
            database.connection().set_progress_handler(None, 0)
            raw(f"PRAGMA busy_timeout = {engine.settings.busy_timeout_ms}")
            raw("PRAGMA journal_mode = WAL")


def roll_back_journal(path: Path) -> None:
    """Undo what a rewriting that was cut off has left in `path`; a connection that only reads could not do it."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    finally:
        connection.close()
