"""docs/schema.md and its diagram are what the script makes of this version, and nothing is missing in either."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

from kagedb import Storage
from kagedb.models import Model
from programs import run_python

PROJECT = Path(__file__).parent.parent
PAGE, PICTURE = PROJECT / "docs" / "schema.md", PROJECT / "docs" / "schema.svg"
SCRIPT = PROJECT / "contrib" / "development" / "schema_docs.py"
SVG = "{http://www.w3.org/2000/svg}"


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def has_on_its_edge(self, x: float, y: float) -> bool:
        return x in (self.left, self.right) and self.top < y < self.bottom

    def is_entered_by(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        """Whether a line, which is level or upright, has a point inside."""
        (left, right), (top, bottom) = sorted((start[0], end[0])), sorted((start[1], end[1]))
        return left < self.right and right > self.left and top < self.bottom and bottom > self.top


def test_page_and_picture_are_current(tmp_path: Path) -> None:
    """Where this fails: run contrib/development/schema_docs.py, and read the diff."""
    done = run_python(SCRIPT, str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "schema.md").read_text() == PAGE.read_text()
    assert (tmp_path / "schema.svg").read_bytes() == PICTURE.read_bytes()


def sections() -> dict[str, str]:
    """The part of the page about each table and view."""
    return dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def test_every_table_view_and_column_of_a_store_is_on_the_page(storage: Storage) -> None:
    found = sections()
    views = storage.engine.views()
    assert found.keys() == {*storage.engine.tables(), *views}
    with storage.engine.reading() as contents:
        for table in contents.tables():
            assert set(re.findall(r"^\| `(\w+)` \|", found[table.name], re.MULTILINE)) == set(table.columns)
    for view, columns in views.items():
        assert found[view].strip().endswith(", ".join(f"`{column}`" for column in columns))


def test_what_a_column_refers_to_is_on_the_page_and_in_the_picture(storage: Storage) -> None:
    links = {(link.get("data-from"), link.get("data-to")) for link in picture().iter(f"{SVG}path")}
    count = 0
    for model in Model.all():
        for field in model._meta.refs:
            table, target = model._meta.table_name, field.rel_model._meta.table_name
            assert f"refers to [`{target}`](#{target})" in next(
                line for line in sections()[table].splitlines() if line.startswith(f"| `{field.column_name}` |")
            )
            assert (f"{table}.{field.column_name}", target) in links
            count += 1
    assert count > 20


def test_what_is_guarded_says_so(storage: Storage) -> None:
    guarded = {name for name, text in sections().items() if "\nGuard on " in text}
    triggers = [line.split()[1] for line in storage.engine.catalogue() if line.startswith("trigger ")]
    assert guarded == {trigger.partition("_guard_")[0] for trigger in triggers}


def picture() -> ET.Element:
    return ET.parse(PICTURE).getroot()


def boxes() -> dict[str, Box]:
    found = {}
    for group in picture().iter(f"{SVG}g"):
        (rect,) = group.iter(f"{SVG}rect")
        x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        found[group.get("id", "")] = Box(x, y, x + width, y + height)
    return found


def lines() -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The corners of each line, by the column that it comes from and the table that it leads to."""
    found = {}
    for link in picture().iter(f"{SVG}path"):
        if link.get("data-from"):
            numbers = [float(number) for number in link.get("d", "").lstrip("M").split()]
            corners = list(zip(numbers[::2], numbers[1::2], strict=True))
            found[link.get("data-from", ""), link.get("data-to", "")] = corners
    return found


def test_every_table_has_a_box_and_its_text_fits_into_it(storage: Storage) -> None:
    assert boxes().keys() == set(storage.engine.tables())
    for group in picture().iter(f"{SVG}g"):
        box = boxes()[group.get("id", "")]
        for text in group.iter(f"{SVG}text"):
            x, y = float(text.get("x", "")), float(text.get("y", ""))
            # 0.6 em: what monospaced fonts take for a letter.
            assert box.left < x and x + 0.6 * 12 * len(text.text or "") < box.right
            assert box.top < y < box.bottom


def test_no_box_overlaps_another_or_the_edge_of_the_picture() -> None:
    for (first, one), (second, other) in combinations(boxes().items(), 2):
        apart = one.right < other.left or other.right < one.left or one.bottom < other.top or other.bottom < one.top
        assert apart, (first, second)
    width, height = (float(number) for number in picture().get("viewBox", "").split()[2:])
    for box in boxes().values():
        assert box.left > 0 and box.top > 0 and box.right < width and box.bottom < height


def test_every_line_goes_from_its_box_to_the_other_one_around_all_boxes() -> None:
    places = boxes()
    for (column, target), corners in lines().items():
        assert places[column.partition(".")[0]].has_on_its_edge(*corners[0]), column
        assert places[target].has_on_its_edge(*corners[-1]), (column, target)
        for start, end in pairwise(corners):
            assert start[0] == end[0] or start[1] == end[1]
            assert not any(box.is_entered_by(start, end) for box in places.values()), (column, target)


def test_lines_to_different_tables_never_lie_on_each_other() -> None:
    parts = [
        (target, *sorted((start, end)))
        for (_, target), corners in lines().items()
        for start, end in pairwise(corners)
        if start != end
    ]
    for (target, start, end), (other, begin, stop) in combinations(parts, 2):
        if target != other:
            upright = start[0] == end[0] == begin[0] == stop[0] and start[1] < stop[1] and begin[1] < end[1]
            level = start[1] == end[1] == begin[1] == stop[1] and start[0] < stop[0] and begin[0] < end[0]
            assert not upright and not level, (target, other, start, end)


def test_what_is_written_by_hand_stays(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(SCRIPT.parent, tmp_path / "contrib" / "development")
    docs.mkdir()
    (docs / "schema.md").write_text("# By hand\n")
    assert run_python(tmp_path / "contrib" / "development" / SCRIPT.name).returncode == 0
    below = PAGE.read_text()[PAGE.read_text().index("<!-- From here on written by") :]
    assert (docs / "schema.md").read_text() == "# By hand\n" + below
