"""`kaged prompt`: the prompts, their versions, and what the labels point to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options import Options, json_option, limit_option, pass_options, project_option
from .output import Row, limited, show_json, show_list, show_record, show_table, show_text

if TYPE_CHECKING:
    from ..models import Prompt, PromptVersion


@click.group
def prompt() -> None:
    """List, show and compare prompts."""


@prompt.command("list")
@project_option
@limit_option
@json_option
@pass_options
def list_prompts(options: Options, project: str | None, limit: int, as_json: bool) -> None:
    """List the prompts, by project and name.

    JSON: a list of project, name, id, version, edited_at, author, labels (name, version).
    """
    with options.reading():
        from peewee import fn

        from ..models import Project, Prompt, PromptLabel, PromptVersion

        other = PromptVersion.alias()
        newest = other.select(fn.MAX(other.version)).where(other.prompt == Prompt.id)
        query = (
            Prompt.select(
                Project.name.alias("project"),
                Prompt.name,
                Prompt.id,
                PromptVersion.version,
                PromptVersion.created_at.alias("edited_at"),
                PromptVersion.author,
            )
            .join(Project)
            .join_from(
                Prompt, PromptVersion, on=(PromptVersion.prompt == Prompt.id) & (PromptVersion.version == newest)
            )
            .order_by(Project.name, Prompt.name)
        )
        labels = PromptLabel.select(PromptLabel.prompt, PromptLabel.name, PromptVersion.version).join(PromptVersion)
        if project is not None:
            owner = Project.named(project)
            query = query.where(Prompt.project == owner)
            labels = labels.join_from(PromptLabel, Prompt).where(Prompt.project == owner)
        rows = limited(query, limit)
        of_prompt: dict[str, list[Row]] = {}
        for row in labels.order_by(PromptLabel.name).dicts():
            of_prompt.setdefault(row.pop("prompt"), []).append(row)
    for row in rows:
        row["labels"] = of_prompt.get(row["id"], [])
    if not as_json:
        for row in rows:
            row["labels"] = [f"{label['name']}={label['version']}" for label in row["labels"]]
    show_list(
        rows,
        ["id", "version", "edited_at", "author", "project", "name", "labels"],
        options,
        as_json=as_json,
        limit=limit,
    )


@prompt.command
@click.argument("project")
@click.argument("name")
@click.option("--version", metavar="N", type=click.IntRange(min=1), help="Print the text of this version.")
@click.option("--label", metavar="LABEL", help="Print the text of the version that this label points to.")
@json_option
@pass_options
def show(options: Options, project: str, name: str, version: int | None, label: str | None, as_json: bool) -> None:
    """Show a prompt, or one of its texts.

    Without --version and --label: the versions, the labels and how they moved. A text goes into a file or pipe as it
    is, byte for byte.

    JSON: name, project, id, created_at, versions, labels (name, version, revision), moves (label, revision, from, to,
    actor, at), newest first. JSON of one version: version, id, created_at, author, message, digest, parent (a number),
    config, body.
    """
    if version is not None and label is not None:
        raise click.UsageError("--version and --label are two ways to say one thing")
    with options.reading():
        from ..models import Project, Prompt

        owner = Project.named(project)
        found = Prompt.named(owner, name)
        if version is not None or label is not None:
            which = Prompt.resolve(owner, name, label) if label is not None else found.version(version or 0)
            parent = which.parent
            document = _version(which) | {"parent": parent and parent.version, "config": which.config}
            document["body"] = which.body
        else:
            document = {"name": found.name, "project": owner.name, "id": found.id, "created_at": found.created_at}
            document |= _history(found)
    if as_json:
        show_json(document)
    elif "body" in document:
        show_text(document["body"])
    else:
        _show_history(document)


def _version(version: PromptVersion) -> Row:
    return {key: getattr(version, key) for key in ("version", "id", "created_at", "author", "message", "digest")}


def _history(prompt: Prompt) -> Row:
    """The versions, labels and moves of a prompt; bodies are left where they are."""
    from ..models import PromptLabel, PromptLabelMove, PromptVersion

    keys = (PromptVersion.version, PromptVersion.id, PromptVersion.created_at, PromptVersion.author)
    of_prompt = PromptVersion.select(*keys, PromptVersion.message, PromptVersion.digest).where(
        PromptVersion.prompt == prompt
    )
    versions = list(of_prompt.order_by(PromptVersion.version.desc()).dicts())
    number = {row["id"]: row["version"] for row in versions}
    labels = list(PromptLabel.rows(PromptLabel.select().where(PromptLabel.prompt == prompt).order_by(PromptLabel.name)))
    names = {label.id: label.name for label in labels}
    moves = (
        PromptLabelMove.select()
        .join(PromptLabel)
        .where(PromptLabel.prompt == prompt)
        .order_by(PromptLabelMove.id.desc())
    )
    return {
        "versions": versions,
        "labels": [
            {"name": label.name, "version": number[label.version_id], "revision": label.revision} for label in labels
        ],
        "moves": [
            {
                "label": names[move.label_id],
                "revision": move.revision,
                "from": number.get(move.from_version_id),
                "to": number[move.to_version_id],
                "actor": move.actor,
                "at": move.created_at,
            }
            for move in PromptLabelMove.rows(moves)
        ],
    }


def _show_history(document: Row) -> None:
    versions, labels, moves = (document.pop(key) for key in ("versions", "labels", "moves"))
    show_record(document)
    click.echo()
    for row in versions:
        row["labels"] = [label["name"] for label in labels if label["version"] == row["version"]]
    show_table(versions, ["version", "id", "created_at", "author", "labels", "message"])
    if moves:
        click.echo("\nmoves of the labels:")
        for move in moves:
            move["moved_at"] = move["at"]
        show_table(moves, ["moved_at", "label", "from", "to", "revision", "actor"])


@prompt.command
@click.argument("project")
@click.argument("name")
@click.argument("old")
@click.argument("new")
@json_option
@pass_options
def diff(options: Options, project: str, name: str, old: str, new: str, as_json: bool) -> None:
    """Show what changed between two versions.

    OLD and NEW are version numbers or labels.

    JSON: project, name, old, new, diff (a unified diff, empty where nothing changed).
    """
    with options.reading():
        from ..models import Project, Prompt

        text = Prompt.diff(Project.named(project), name, _number_or_label(old), _number_or_label(new))
    if as_json:
        show_json({"project": project, "name": name, "old": old, "new": new, "diff": text})
    else:
        show_text(text)


def _number_or_label(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text
