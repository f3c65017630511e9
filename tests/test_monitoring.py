"""What docs/operators.md says on upkeep, checks and monitoring is there, and its recipes run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kagedb
from kagedb.operations import checking, systemd
from machine import Page
from stored import fill
from test_systemd import SOURCE, analyze, needs_systemd, started

PROJECT = Path(__file__).parents[1]
PAGE = Page("operators.md")
UPKEEP = PAGE.text[PAGE.text.index("\n## Upkeep\n") :]

(WEEKLY,) = PAGE.blocks("Upkeep")
MAIL, COLLECT = PAGE.blocks("Monitoring")
(TELL,) = PAGE.blocks("Monitoring", "ini")


@pytest.fixture
def store(home: Path) -> Path:
    """The default store of this account, with something in it and a backup."""
    kagedb.connect().close()
    fill(f"sqlite://{home}/.local/share/kaged/kaged.db")
    assert run("kaged -q backup").returncode == 0
    return home / ".local/share/kaged/kaged.db"


def run(script: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a recipe, where `kaged` and `python3` are those of this installation."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}, cwd=PROJECT, timeout=60
    )


def spoil(store: Path) -> None:
    store.chmod(0o644)


# What the page lists is what is there.


def test_every_check_has_a_line_on_what_to_do() -> None:
    table = UPKEEP.partition("### When a check fails")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| ([a-z, -]+?) \| ", table, re.MULTILINE)[1:]
    names = [name for line in listed for name in line.split(", ")]
    assert sorted(names) == sorted([checking.OPENING, *checking._CHECKS])


def test_every_unit_of_the_weekly_work_is_listed_with_what_it_runs() -> None:
    rows = dict(re.findall(r"^\| `(kaged-[a-z]+)\.service` \| (.+?) \|", UPKEEP, re.MULTILINE))
    assert set(rows) == set(systemd.SERVICES) - {"kaged-backup"}
    for name, told in rows.items():
        assert re.findall(r"`kaged ([^`]+)`", told) == started(f"{name}.service", "system")


def test_every_figure_that_is_to_be_watched_is_in_the_status(store: Path) -> None:
    import json

    status = json.loads(run("kaged status --json").stdout)
    told = UPKEEP.partition("In the figures, watch")[2].partition("\n\n")[0]
    names = [name for name in re.findall(r"`([a-z_]+)`", told) if name not in ("backup.max_age_hours",)]
    assert len(names) == 4
    assert set(names) <= set(status)


# The recipes.


def test_the_weekly_line_for_cron_says_nothing_where_all_is_well(store: Path) -> None:
    done = run(WEEKLY)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stdout
    assert "verified" in done.stdout or "good" in done.stdout
    spoil(store)
    assert "chmod 600" in run(WEEKLY).stdout


def test_cron_mails_where_something_is_wrong_and_only_then(store: Path) -> None:
    done = run(MAIL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    spoil(store)
    assert f"chmod 600 {store}" in run(MAIL).stdout
    store.write_bytes(b"no database" * 1000)
    assert "damaged or not a SQLite database" in run(MAIL).stdout


def test_a_collector_gets_the_figures_and_the_findings(store: Path, tmp_path: Path) -> None:
    recipe = COLLECT.replace(" kaged.prom", f" {tmp_path}/kaged.prom")
    assert (done := run(recipe)).returncode == 0, done.stderr
    figures = read_metrics(tmp_path / "kaged.prom")
    assert (figures["kaged_status_exit"], figures["kaged_check_exit"]) == (0, 0)
    assert figures['kaged_bytes{part="database"}'] == store.stat().st_size
    assert figures["kaged_verified_backup_seconds"] > 1_700_000_000
    assert figures['kaged_check_findings{check="permissions"}'] == 0
    spoil(store)
    with kagedb.connect(exclusive=True):
        run(recipe)
    figures = read_metrics(tmp_path / "kaged.prom")
    assert figures['kaged_check_findings{check="permissions"}'] > 0
    assert figures["kaged_daemon_up"] == 1
    store.write_bytes(b"")
    run(recipe)
    figures = read_metrics(tmp_path / "kaged.prom")
    assert (figures["kaged_check_exit"], figures["kaged_status_exit"]) == (3, 3)
    assert os.listdir(tmp_path) == ["kaged.prom"]


def read_metrics(file: Path) -> dict[str, float]:
    found = {}
    for line in file.read_text().splitlines():
        assert re.fullmatch(r'[a-z_]+(\{[a-z]+="[a-z -]+"\})? -?[\d.e+]+', line), line
        name, _, value = line.rpartition(" ")
        found[name] = float(value)
    return found


@needs_systemd
def test_systemd_accepts_the_drop_in_that_tells_of_a_failure(tmp_path: Path) -> None:
    unit = tmp_path / "kaged-failure@.service"
    unit.write_text((SOURCE / "system" / unit.name).read_text())
    drop_in = tmp_path / f"{unit.name}.d" / "tell.conf"
    assert f"{unit.name}.d/{drop_in.name}`" in UPKEEP
    drop_in.parent.mkdir()
    drop_in.write_text(TELL)
    done = analyze([unit], "verify", "--man=no", runtime=tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    drop_in.write_text(TELL.replace("PrivateNetwork=no", "PrivatNetwork=no"))
    assert analyze([unit], "verify", "--man=no", runtime=tmp_path / "run").stderr, "a wrong one is noticed"
