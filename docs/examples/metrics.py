"""Figures of a store for a collector that reads text files: `metrics.py FILE`, from a timer, every few minutes.

Writes what `kaged status` and `kaged check --quick` say in the text format of Prometheus. A reader never sees
half of it.
"""

import json
import os
import subprocess
import sys


def ask(*command):
    """The exit status of a command and its JSON; nothing where it could not answer."""
    done = subprocess.run(["kaged", "-q", *command, "--json"], stdout=subprocess.PIPE, text=True)
    return done.returncode, json.loads(done.stdout) if done.stdout else None


def figures():
    status_exit, status = ask("status")
    check_exit, check = ask("check", "--quick")
    yield "kaged_status_exit", status_exit
    yield "kaged_check_exit", check_exit
    if check is not None:
        for name in [*check["checked"], *(one["check"] for one in check["unfinished"])]:
            found = sum(finding["check"] == name for finding in check["findings"])
            yield f'kaged_check_findings{{check="{name}"}}', found
    if status is not None:
        for part, size in status["bytes_by_part"].items():
            yield f'kaged_bytes{{part="{part}"}}', size
        yield "kaged_free_bytes", status["free_bytes"]
        yield "kaged_writer_busy_percent", status["writer_busy_percent"]
        yield "kaged_migrations_pending", len(status["pending"])
        yield "kaged_daemon_up", int(status["owner"] is not None)
        yield "kaged_newest_row_seconds", (status["newest_at"] or 0) / 1000
        yield "kaged_verified_backup_seconds", (status["backup_at"] or 0) / 1000


def main(path):
    draft = f"{path}.{os.getpid()}.new"
    with open(draft, "w") as file:
        file.writelines(f"{name} {value}\n" for name, value in figures())
    os.chmod(draft, 0o644)
    os.rename(draft, path)


main(sys.argv[1])
