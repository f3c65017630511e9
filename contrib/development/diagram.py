"""An entity diagram as SVG: boxes in a grid of columns, and lines between them that go around boxes.

Plain text out of numbers: the same tables give the same bytes everywhere. What the tables are is in schema_docs.py.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

LETTER = 7.3
"""Width of a letter of the monospaced 12 px font, a little more than fonts have, in pixels like all below."""
ROW, HEAD, PADDING = 18, 26, 10
GAP = 56
"""Between two boxes of a column: room for the lines that go through."""
LANE = 9
"""Between two lines side by side."""
MARGIN = 24

COLOURS = ("#2f7ed8", "#c2571a", "#2e8b57", "#8a5fc7", "#b8860b", "#c23b6f", "#1b8f9e")
"""Of lines, by what they lead to: they can be told apart on white and on black."""

STYLE = """
  text { font: 12px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #1f2328; }
  .name { font-weight: bold; }
  .key { text-decoration: underline; }
  .more { fill: #6e7781; }
  .page { fill: #ffffff; }
  .box { fill: #f6f8fa; stroke: #8c959f; }
  .link { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
  .meant { stroke-dasharray: 5 4; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .more { fill: #8d96a0; }
    .page { fill: #0d1117; }
    .box { fill: #161b22; stroke: #6e7681; }
  }
"""


@dataclass(frozen=True)
class Box:
    """A table: the columns that are shown, with whether each is of the key, and how many are not."""

    name: str
    rows: list[tuple[str, bool]]
    more: int
    column: int
    row: int


@dataclass(frozen=True)
class Link:
    """A reference from a column of one table to another table; dashed where nothing enforces it."""

    table: str
    column: str
    target: str
    enforced: bool


@dataclass(frozen=True)
class Place:
    """Where a box is, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass
class Route:
    """A line: the gutters that it goes along, and the heights between them at which it crosses columns."""

    link: Link
    gutters: list[int]
    heights: list[float]
    colour: str


def draw(boxes: list[Box], links: list[Link], keys: dict[str, str]) -> str:
    """The SVG text. `keys` is the column of each table at which lines to it end."""
    heights = _stack(boxes)
    routes = _route(boxes, links, keys, heights)
    lanes = defaultdict(list)
    for route in sorted(routes, key=lambda route: (route.colour, route.link.target, route.link.table)):
        for gutter in route.gutters:
            lanes[gutter].append(id(route))
    columns = range(max(box.column for box in boxes) + 1)
    widths = [max(_width(box) for box in boxes if box.column == column) for column in columns]
    lefts, gutters, x = [], [], float(MARGIN)
    for column in (*columns, len(columns)):
        gutters.append(x)
        x += LANE * (len(lanes[column]) + 3) if lanes[column] or column not in (0, len(columns)) else 0
        lefts.append(x)
        x += widths[column] if column in columns else MARGIN
    places = {box.name: Place(lefts[box.column], heights[box.name], widths[box.column], _height(box)) for box in boxes}
    paths = []
    for route in routes:
        xs = [gutters[gutter] + LANE * (lanes[gutter].index(id(route)) + 2) for gutter in route.gutters]
        paths.append(_path(route, xs, places))
    page = max(place.bottom for place in places.values()) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x:g} {page:g}" width="{x:g}" height="{page:g}">',
        f"<style>{STYLE}</style>",
        "<defs>",
        *(
            f'<marker id="to{n}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
            for n, colour in enumerate(COLOURS)
        ),
        "</defs>",
        f'<rect class="page" width="{x:g}" height="{page:g}"/>',
        *paths,
        *(line for box in boxes for line in _drawn(box, places[box.name])),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _width(box: Box) -> float:
    return round(LETTER * max(len(box.name) + 1, *(len(name) for name, _ in box.rows), 11) + 2 * PADDING)


def _height(box: Box) -> int:
    return HEAD + ROW * (len(box.rows) + bool(box.more)) + PADDING


def _stack(boxes: list[Box]) -> dict[str, float]:
    """The top of each box: under the one above it in its column."""
    tops: dict[str, float] = {}
    for _, column in itertools.groupby(sorted(boxes, key=lambda box: (box.column, box.row)), lambda box: box.column):
        y = float(GAP)
        for box in column:
            tops[box.name] = y
            y += _height(box) + GAP
    return tops


def _row(box: Box, tops: dict[str, float], column: str) -> float:
    """The height of a column's row in its box."""
    number = [name for name, _ in box.rows].index(column)
    return tops[box.name] + HEAD + ROW * number + ROW / 2


def _route(boxes: list[Box], links: list[Link], keys: dict[str, str], tops: dict[str, float]) -> list[Route]:
    by_name = {box.name: box for box in boxes}
    targets = sorted({link.target for link in links})
    taken: dict[tuple[int, float], int] = defaultdict(int)
    routes = []
    for link in links:
        start, end = by_name[link.table], by_name[link.target]
        first = _row(start, tops, link.column)
        last = _row(end, tops, keys[link.target])
        gutters, heights = [], [first]
        if end.column > start.column:
            gutters = list(range(start.column + 1, end.column + 1))
            between = range(start.column + 1, end.column)
        else:
            gutters = list(range(start.column, min(end.column, start.column - 1), -1))
            between = range(start.column - 1, end.column, -1)
        for column in between:
            gap = min(_gaps(boxes, tops, column), key=lambda gap: abs(gap - (heights[-1] + last) / 2))
            taken[column, gap] += 1
            heights.append(gap + LANE * taken[column, gap])
        routes.append(Route(link, gutters, [*heights, last], COLOURS[targets.index(link.target) % len(COLOURS)]))
    return routes


def _gaps(boxes: list[Box], tops: dict[str, float], column: int) -> Iterator[float]:
    """The heights at which the space over, between and under the boxes of a column begins."""
    yield 0.0
    for box in boxes:
        if box.column == column:
            yield tops[box.name] + _height(box)


def _path(route: Route, xs: list[float], places: dict[str, Place]) -> str:
    start, end = places[route.link.table], places[route.link.target]
    leftwards = end.left <= start.left
    points = [(start.left if leftwards else start.right, route.heights[0])]
    for x, before, after in zip(xs, route.heights, route.heights[1:], strict=False):
        points += [(x, before), (x, after)]
    # Into the side that faces the last gutter.
    points.append((end.right if xs[-1] > end.right else end.left, route.heights[-1]))
    line = "M" + " ".join(f"{x:g} {y:g}" for x, y in points)
    kind = "link" if route.link.enforced else "link meant"
    return (
        f'<path class="{kind}" data-from="{route.link.table}.{route.link.column}" data-to="{route.link.target}"'
        f' stroke="{route.colour}" marker-end="url(#to{COLOURS.index(route.colour)})" d="{line}"/>'
    )


def _drawn(box: Box, place: Place) -> Iterator[str]:
    yield f'<g id="{box.name}">'
    yield (
        f'<rect class="box" x="{place.left:g}" y="{place.top:g}" width="{place.width:g}" height="{place.height:g}"'
        ' rx="4"/>'
    )
    x, y = place.left + PADDING, place.top + HEAD - 8
    yield f'<text class="name" x="{x:g}" y="{y:g}">{escape(box.name)}</text>'
    for number, (name, key) in enumerate(box.rows):
        kind = ' class="key"' if key else ""
        yield f'<text{kind} x="{x:g}" y="{place.top + HEAD + ROW * number + 13:g}">{escape(name)}</text>'
    if box.more:
        y = place.top + HEAD + ROW * len(box.rows) + 13
        yield f'<text class="more" x="{x:g}" y="{y:g}">{box.more} more</text>'
    yield "</g>"
