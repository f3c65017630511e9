"""Write migrations/catalogue/: what the scripts give on each engine. Run after writing a new script, then read the diff.

    python contrib/development/catalogue.py sqlite:////tmp/fresh.db postgresql:///empty_database
"""

import sys

from kagedb import schema
from kagedb.engines import open_engine
from kagedb.settings import load


def main() -> None:
    schema.drift = lambda *_: []  # there is nothing known to compare with yet
    from kagedb.storage import open_storage

    for url in sys.argv[1:]:
        settings = load(url=url)
        with open_storage(settings) as storage:
            name = schema.scripts()[-1].name
            path = schema.directory() / "catalogue" / f"{name}.{storage.engine.name}.txt"
            path.write_text("\n".join(storage.engine.catalogue()) + "\n")
            print(path)


if __name__ == "__main__":
    main()
