"""`kaged query`: read-only SQL on either engine, shown as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .options import Options, limit_option, pass_options
from .output import show_grid, visible

if TYPE_CHECKING:
    from ..operations.query import Spool

CELL_CHARACTERS = 100
"""Of a value in the table: beyond that no line of it can be read."""


@click.command
@click.argument("sql", required=False)
@click.argument("values", nargs=-1)
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="The value of :NAME in the query.")
@click.option("--schema", is_flag=True, help="Show the tables, views and columns that can be asked.")
@click.option("--json", "form", flag_value="json", help="A JSON list with an object for each row.")
@click.option("--json-lines", "form", flag_value="lines", help="A JSON object on a line for each row.")
@click.option("--csv", "form", flag_value="csv", help="Comma-separated values, with a heading.")
@limit_option
@pass_options
def query(
    options: Options,
    sql: str | None,
    values: tuple[str, ...],
    params: tuple[str, ...],
    schema: bool,
    form: str | None,
    limit: int,
) -> None:
    """Answer one SQL statement that reads; - is standard input.

    It runs on the engine that the store is on, beside the daemon, and cannot change anything. VALUES are for each ? in
    the order of the query. Bytes are shown as hex digits; the table cuts long values off, JSON and CSV do not.
    """
    if schema == (sql is not None):
        raise click.UsageError("give SQL, or --schema")
    named = dict(map(_named, params))
    text = sys.stdin.read() if sql == "-" else sql
    with options.reading(any_schema=True, snapshot=False) as storage:
        from ..operations import query as querying

        if text is None:
            spool = querying.columns(storage.engine)
        else:
            spool = querying.ask(storage.engine, text, named, values, limit)
    with spool:
        _show(spool, form)
        if spool.more:
            options.note(f"there are more than {limit}: --limit 0 shows all")


def _named(param: str) -> tuple[str, str]:
    name, equals, value = param.partition("=")
    if not equals or not name.isidentifier():
        raise click.BadParameter(f"{param!r} is not NAME=VALUE", param_hint="'--param'")
    return name, value


def _show(spool: Spool, form: str | None) -> None:
    if form is None:
        show_grid([visible(name) for name in spool.columns], lambda: (list(map(_cell, row)) for row in spool))
    elif form == "csv":
        for line in _csv(spool):
            click.echo(visible(line, lines=True) if sys.stdout.isatty() else line, nl=False)
    else:
        # A piece at a time: the answer may be larger than memory.
        rows = (json.dumps(dict(zip(spool.columns, row, strict=True))) for row in spool)
        if form == "lines":
            for row in rows:
                click.echo(row)
            return
        click.echo("[", nl=False)
        for number, row in enumerate(rows):
            click.echo(f"{',' if number else ''}\n  {row}", nl=False)
        click.echo("\n]")


def _csv(spool: Spool) -> Iterator[str]:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")

    def line(row: list[Any]) -> str:
        buffer.seek(0)
        buffer.truncate()
        writer.writerow(row)
        return buffer.getvalue()

    yield line(list(spool.columns))
    for row in spool:
        yield line([_text(value) for value in row])


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool | list) else value


def _cell(value: Any) -> str:
    text = "-" if value is None else visible(str(_text(value)))
    return text if len(text) <= CELL_CHARACTERS else text[: CELL_CHARACTERS - 3] + "..."
