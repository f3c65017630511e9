"""Projects, and the versions of their DSL config."""

from __future__ import annotations

import hashlib
from typing import Any, Self

import peewee

from ..errors import AlreadyExists, NotFound, StateError
from ..fields import TITLE_CHARACTERS, IntegerField, JSONField, MillisField, NameField, TextField
from ..identity import now_ms
from .audit import AuditEvent
from .base import Hot, Identified, Parameter, bound_store, check_actor


class Project(Identified):
    """What an operator works on: prompts, plugins and sessions belong to one."""

    name = NameField(unique=True)
    archived_at = MillisField(null=True)

    class Meta:
        table_name = "project"

    _by_name = Hot(lambda: Project.select().where(Project.name == Parameter("name", Project.name)))
    _archive = Hot(
        lambda: Project.update({Project.archived_at: Parameter("at", Project.archived_at)}).where(
            (Project.id == Parameter("id", Project.id)) & Project.archived_at.is_null()
        )
    )

    @classmethod
    def add(cls, name: str, *, actor: str) -> Self:
        """A new project. Raises AlreadyExists where the name is taken, by an archived one too."""
        check_actor(actor)
        with bound_store().transaction():
            if cls._by_name.one(name=name) is not None:
                raise AlreadyExists(f"there is a project {name!r} already", "choose another name")
            project = cls.put(name=name)
            AuditEvent.record("project.added", actor=actor, subject=project, body={"name": name})
        return project

    @classmethod
    def named(cls, name: str) -> Self:
        """The project of that name. Raises NotFound."""
        row = cls._by_name.one(name=name)
        if row is None:
            raise NotFound(f"there is no project {name!r}", "list them with: kaged project list")
        return cls.from_row(row)

    def configure(self, source: str, *, parsed: dict[str, Any], actor: str, message: str = "") -> ProjectConfig:
        """A new version of the DSL config: `source` as it was written and `parsed` as a JSON object.

        What equals the newest version is that version, and nothing is written. Raises StateError where the project is
        archived.
        """
        check_actor(actor)
        with bound_store().transaction():
            self.require_active()
            return ProjectConfig.append(self, source, parsed, actor, message)

    def config(self) -> ProjectConfig | None:
        """The newest version of the DSL config; None before the first."""
        return ProjectConfig.newest(self.id)

    def archive(self, *, actor: str) -> None:
        """Close the project to new work. Raises StateError where it is archived already."""
        check_actor(actor)
        at = now_ms()
        with bound_store().transaction():
            if self._archive.run(id=self.id, at=at).rowcount != 1:
                raise StateError(f"the project {self.name!r} is archived already")
            AuditEvent.record("project.archived", actor=actor, subject=self, body={"name": self.name})
        self.__data__.update(archived_at=at)

    def require_active(self) -> None:
        """Raises StateError where the project is archived, NotFound where it is not in the store."""
        row = Project._by_id.one(key=self.id)
        if row is None:
            raise NotFound(f"there is no project {self.id}", "list them with: kaged project list")
        if Project.from_row(row).archived_at is not None:
            raise StateError(f"the project {self.name!r} is archived", "work in another project")

    @property
    def audited_project(self) -> str:
        return str(self.id)


class ProjectConfig(Identified):
    """One version of a project's DSL config; never changed."""

    project = peewee.ForeignKeyField(Project, backref="configs", index=False)
    version = IntegerField()
    source = TextField()
    parsed = JSONField()
    digest = TextField()
    author = TextField()
    message = TextField(max_length=TITLE_CHARACTERS)

    class Meta:
        table_name = "project_config"
        indexes = ((("project", "version"), True),)

    _newest = Hot(
        lambda: (
            ProjectConfig.select()
            .where(ProjectConfig.project == Parameter("project", ProjectConfig.project))
            .order_by(ProjectConfig.version.desc())
            .limit(1)
        )
    )

    @classmethod
    def newest(cls, project_id: str) -> Self | None:
        """The newest version of a project's config; None before the first."""
        row = cls._newest.one(project=project_id)
        return None if row is None else cls.from_row(row)

    @classmethod
    def append(cls, project: Project, source: str, parsed: dict[str, Any], actor: str, message: str) -> Self:
        """The next version; inside the caller's transaction."""
        last = cls.newest(project.id)
        digest = digest_text(cls.source.check(source), cls.parsed.check_object(parsed))
        if last is not None and last.digest == digest:
            return last
        config = cls.put(
            project=project.id,
            version=last.version + 1 if last else 1,
            source=source,
            parsed=parsed,
            digest=digest,
            author=actor,
            message=message,
        )
        AuditEvent.record(
            "project.configured",
            actor=actor,
            subject=config,
            body={"version": config.version, "digest": digest, "message": message},
        )
        return config

    @property
    def audited_project(self) -> str:
        return str(self.project_id)


def digest_text(*texts: str) -> str:
    """One SHA-256, in hex, over several texts; where one ends and the next begins is part of it."""
    parts = [text.encode() for text in texts]
    return hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).hexdigest()
