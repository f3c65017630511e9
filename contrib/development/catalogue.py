"""Write migrations/catalogue/: what the scripts give on each engine. Run it after writing a script, and read the diff.

python contrib/development/catalogue.py sqlite:////tmp/fresh.db postgresql:///empty_database
"""

from __future__ import annotations

import sys
from pathlib import Path

from kagedb import schema
from kagedb.settings import load
from kagedb.storage import open_storage


def write_catalogue(url: str) -> Path:
    """Make a new store at `url` and write down its catalogue as the known one of the newest script."""
    known = schema.drift
    schema.drift = lambda *_: []  # there is nothing yet to compare with
    try:
        with open_storage(load(url=url)) as storage:
            path = schema.catalogue_path(storage.engine.name, schema.scripts()[-1].name)
            path.write_text("\n".join(storage.engine.catalogue()) + "\n")
    finally:
        schema.drift = known
    return path


if __name__ == "__main__":
    for url in sys.argv[1:]:
        print(write_catalogue(url))
