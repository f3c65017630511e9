"""Prompts: immutable versions, and labels that point to one of them and remember every move."""

from __future__ import annotations

import io
from typing import Any, Self

import peewee

from ..errors import Conflict, NotFound
from ..fields import TITLE_CHARACTERS, IntegerField, JSONField, NameField, TextField
from .audit import AuditEvent
from .base import Hot, Identified, Parameter, bound_store, check_actor
from .project import Project, digest_text


class Prompt(Identified):
    """A named prompt of a project; its text is in its versions."""

    project = peewee.ForeignKeyField(Project, backref="prompts", index=False)
    name = NameField()

    class Meta:
        table_name = "prompt"
        indexes = ((("project", "name"), True),)

    _named = Hot(
        lambda: Prompt.select().where(
            (Prompt.project == Parameter("project", Prompt.project)) & (Prompt.name == Parameter("name", Prompt.name))
        )
    )

    @classmethod
    def named(cls, project: Project, name: str) -> Self:
        """The prompt of that name. Raises NotFound."""
        row = cls._named.one(project=project.id, name=name)
        if row is None:
            raise NotFound(f"the project {project.name!r} has no prompt {name!r}", "list them with: kaged prompt list")
        return cls.from_row(row)

    @classmethod
    def edit(
        cls,
        project: Project,
        name: str,
        body: str,
        *,
        actor: str,
        message: str = "",
        config: dict[str, Any] | None = None,
        parent: PromptVersion | None = None,
    ) -> PromptVersion:
        """A new version of the prompt, which is made if it is new.

        `config` is a JSON object (model, temperature and the like). `parent` is the version it was made from, by
        default the newest. What equals the newest version is that version, and nothing is written. Raises StateError
        where the project is archived.
        """
        check_actor(actor)
        with bound_store().transaction():
            project.require_active()
            row = cls._named.one(project=project.id, name=name)
            prompt = cls.put(project=project.id, name=name) if row is None else cls.from_row(row)
            return PromptVersion.append(prompt, body, config, actor, message, parent)

    @classmethod
    def label(
        cls,
        project: Project,
        name: str,
        label: str,
        version: PromptVersion | int | str,
        *,
        actor: str,
        if_revision: int | None = None,
    ) -> PromptLabel:
        """Point a label to a version of the prompt: a model, a number, or what another label points to now.

        With `if_revision` only where the label has that revision now (0: where it does not exist); else Conflict.
        Raises NotFound for a prompt or version that is not there.
        """
        check_actor(actor)
        with bound_store().transaction():
            project.require_active()
            prompt = cls.named(project, name)
            return PromptLabel.move(prompt, label, prompt.version(version), actor, if_revision)

    @classmethod
    def resolve(cls, project: Project, name: str, label: str) -> PromptVersion:
        """The version a label points to now. Raises NotFound."""
        row = PromptLabel._pointed_to.one(project=project.id, name=name, label=label)
        # Only where there is none does it matter which of the two names is wrong.
        return PromptVersion.from_row(row) if row is not None else cls.named(project, name).version(label)

    @classmethod
    def resolve_at(cls, project: Project, name: str, label: str, at: int) -> PromptVersion:
        """The version a label pointed to at a time in Unix milliseconds. Raises NotFound where it was not there yet."""
        prompt = cls.named(project, name)
        found = PromptLabel.named(prompt, label)
        move = (
            PromptLabelMove.select()
            .where((PromptLabelMove.label == found.id) & (PromptLabelMove.created_at <= at))
            .order_by(PromptLabelMove.revision.desc())
            .first()
        )
        if move is None:
            raise NotFound(f"the label {label!r} of the prompt {name!r} did not exist at that time")
        return PromptVersion.by_id(move.to_version_id)

    @classmethod
    def diff(cls, project: Project, name: str, old: PromptVersion | int | str, new: PromptVersion | int | str) -> str:
        """What changed between two versions (models, numbers or labels), as a unified diff; empty where nothing did."""
        prompt = cls.named(project, name)
        before, after = prompt.version(old), prompt.version(new)
        import difflib  # which few daemons and no start needs

        lines = difflib.unified_diff(
            # Not splitlines, to which a lone CR and a dozen other characters end a line too.
            list(io.StringIO(before.body)),
            list(io.StringIO(after.body)),
            f"{name} version {before.version}",
            f"{name} version {after.version}",
        )
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of text\n" for line in lines)

    def version(self, version: PromptVersion | int | str) -> PromptVersion:
        """A version of this prompt by its number or its label, or as it is. Raises NotFound for another prompt's."""
        if isinstance(version, PromptVersion):
            if version.prompt_id != self.id:
                raise NotFound(f"version {version.id} belongs to another prompt than {self.name!r}")
            return version
        if isinstance(version, str):
            return PromptVersion.by_id(PromptLabel.named(self, version).version_id)
        row = PromptVersion._numbered.one(prompt=self.id, version=version)
        if row is None:
            raise NotFound(f"the prompt {self.name!r} has no version {version}", "list them with: kaged prompt show")
        return PromptVersion.from_row(row)

    @property
    def audited_project(self) -> str:
        return str(self.project_id)


class PromptVersion(Identified):
    """One text of a prompt; never changed."""

    prompt = peewee.ForeignKeyField(Prompt, backref="versions", index=False)
    version = IntegerField()
    parent = peewee.ForeignKeyField("self", null=True, backref="children", index=False)
    body = TextField()
    digest = TextField()
    config = JSONField(null=True)
    author = TextField()
    message = TextField(max_length=TITLE_CHARACTERS)

    class Meta:
        table_name = "prompt_version"
        indexes = ((("prompt", "version"), True),)

    _newest = Hot(
        lambda: (
            PromptVersion.select()
            .where(PromptVersion.prompt == Parameter("prompt", PromptVersion.prompt))
            .order_by(PromptVersion.version.desc())
            .limit(1)
        )
    )
    _numbered = Hot(
        lambda: PromptVersion.select().where(
            (PromptVersion.prompt == Parameter("prompt", PromptVersion.prompt))
            & (PromptVersion.version == Parameter("version", PromptVersion.version))
        )
    )

    @classmethod
    def append(
        cls,
        prompt: Prompt,
        body: str,
        config: dict[str, Any] | None,
        actor: str,
        message: str,
        parent: PromptVersion | None,
    ) -> Self:
        """The next version; inside the caller's transaction."""
        row = cls._newest.one(prompt=prompt.id)
        last = None if row is None else cls.from_row(row)
        digest = digest_text(cls.body.check(body), "" if config is None else cls.config.check_object(config))
        if last is not None and last.digest == digest:
            return last
        origin = prompt.version(parent) if parent is not None else last
        version = cls.put(
            prompt=prompt.id,
            version=last.version + 1 if last else 1,
            parent=origin.id if origin else None,
            body=body,
            digest=digest,
            config=config,
            author=actor,
            message=message,
        )
        AuditEvent.record(
            "prompt.edited",
            actor=actor,
            subject=version,
            project=prompt.project_id,
            body={"prompt": prompt.name, "version": version.version, "digest": digest, "message": message},
        )
        return version


class PromptLabel(Identified):
    """A name for one version of a prompt, such as `production`; moved by compare-and-set."""

    prompt = peewee.ForeignKeyField(Prompt, backref="labels", index=False)
    name = NameField()
    version = peewee.ForeignKeyField(PromptVersion, index=False)
    revision = IntegerField()

    class Meta:
        table_name = "prompt_label"
        indexes = ((("prompt", "name"), True),)

    _named = Hot(
        lambda: PromptLabel.select().where(
            (PromptLabel.prompt == Parameter("prompt", PromptLabel.prompt))
            & (PromptLabel.name == Parameter("name", PromptLabel.name))
        )
    )
    _pointed_to = Hot(
        lambda: (
            PromptVersion.select()
            .join(PromptLabel, on=(PromptLabel.version == PromptVersion.id))
            .join(Prompt, on=(PromptLabel.prompt == Prompt.id))
            .where(
                (Prompt.project == Parameter("project", Prompt.project))
                & (Prompt.name == Parameter("name", Prompt.name))
                & (PromptLabel.name == Parameter("label", PromptLabel.name))
            )
        )
    )
    _point = Hot(
        lambda: PromptLabel.update(
            {
                PromptLabel.version: Parameter("version", PromptLabel.version),
                PromptLabel.revision: Parameter("revision", PromptLabel.revision),
            }
        ).where(PromptLabel.id == Parameter("id", PromptLabel.id))
    )

    @classmethod
    def named(cls, prompt: Prompt, name: str) -> Self:
        """The label of that name. Raises NotFound."""
        row = cls._named.one(prompt=prompt.id, name=name)
        if row is None:
            raise NotFound(f"the prompt {prompt.name!r} has no label {name!r}", "list them with: kaged prompt show")
        return cls.from_row(row)

    @classmethod
    def move(cls, prompt: Prompt, name: str, version: PromptVersion, actor: str, if_revision: int | None) -> Self:
        """Point the label to `version`; inside the caller's transaction."""
        row = cls._named.one(prompt=prompt.id, name=name)
        label = None if row is None else cls.from_row(row)
        revision = label.revision if label is not None else 0
        if if_revision is not None and if_revision != revision:
            raise Conflict(
                f"the label {name!r} of the prompt {prompt.name!r} has revision {revision}, not {if_revision}",
                "read it again and decide anew",
            )
        before = label.version_id if label is not None else None
        if label is None:
            label = cls.put(prompt=prompt.id, name=name, version=version.id, revision=1)
        else:
            cls._point.run(id=label.id, version=version.id, revision=revision + 1)
            label = cls._from_data({**label.__data__, "version": version.id, "revision": revision + 1})
        PromptLabelMove.put(
            label=label.id, revision=label.revision, from_version=before, to_version=version.id, actor=actor
        )
        AuditEvent.record(
            "prompt.labelled",
            actor=actor,
            subject=version,
            project=prompt.project_id,
            body={"prompt": prompt.name, "label": name, "version": version.version, "revision": label.revision},
        )
        return label


class PromptLabelMove(Identified):
    """One move of a label: what `production` pointed to at any time can be told from these."""

    label = peewee.ForeignKeyField(PromptLabel, backref="moves", index=False)
    revision = IntegerField()
    from_version = peewee.ForeignKeyField(PromptVersion, null=True, index=False)
    to_version = peewee.ForeignKeyField(PromptVersion, index=False)
    actor = TextField()

    class Meta:
        table_name = "prompt_label_move"
        indexes = ((("label", "revision"), True),)
