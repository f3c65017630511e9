"""Plugins: their manifests and whether they are enabled; and the table of their state."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Self

import peewee

from ..errors import InvalidValue, NotFound, StateError
from ..fields import BooleanField, IntegerField, JSONField, MillisField, NameField, TextField
from ..identity import now_ms
from .audit import AuditEvent
from .base import Hot, Identified, Model, Parameter, bound_store, check_actor
from .project import Project

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .plugin_state import State
    from .plugin_tables import PluginDatabase

PERMISSIONS = frozenset({"state", "tables", "files", "network", "processes", "secrets", "sessions", "prompts"})
"""What a manifest can ask for. The daemon enforces them; the store keeps what was asked and refuses unknown ones."""

KEY_CHARACTERS = 500
"""Longest key of the state: 4 bytes a character still fit PostgreSQL's 2,704-byte index entries, beside the id."""

_PLUGIN_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""Also part of the names of the plugin's own tables, hence no more than SQL takes without quotes."""


class Plugin(Identified):
    """A plugin installed in a project."""

    project = peewee.ForeignKeyField(Project, backref="plugins", index=False)
    name = NameField()
    version = TextField(max_length=100, one_line=True)
    manifest = JSONField()
    enabled = BooleanField()
    removed_at = MillisField(null=True)

    class Meta:
        table_name = "plugin"
        indexes = ((("project", "name"), True),)

    _named = Hot(
        lambda: Plugin.select().where(
            (Plugin.project == Parameter("project", Plugin.project)) & (Plugin.name == Parameter("name", Plugin.name))
        )
    )
    _change = Hot(
        lambda: Plugin.update(
            {
                Plugin.version: Parameter("version", Plugin.version),
                Plugin.manifest: Parameter("manifest", Plugin.manifest),
                Plugin.enabled: Parameter("enabled", Plugin.enabled),
                Plugin.removed_at: Parameter("removed_at", Plugin.removed_at),
            }
        ).where(Plugin.id == Parameter("id", Plugin.id))
    )

    @classmethod
    def install(cls, project: Project, manifest: dict[str, Any], *, actor: str) -> Self:
        """Install a plugin, enabled; or put another version in its place, which leaves it enabled or not as it was.

        `manifest` is a JSON object with a `name`, a `version` and `permissions` (a list of known ones).
        """
        check_actor(actor)
        name, version = check_manifest(manifest)
        with bound_store().transaction():
            project.require_active()
            row = cls._named.one(project=project.id, name=name)
            if row is None:
                plugin = cls.put(project=project.id, name=name, version=version, manifest=manifest, enabled=True)
                before = None
            else:
                plugin = cls.from_row(row)
                gone = plugin.removed_at is not None
                before = None if gone else plugin.version
                plugin._apply(version=version, manifest=manifest, enabled=gone or plugin.enabled, removed_at=None)
            AuditEvent.record(
                "plugin.installed",
                actor=actor,
                subject=plugin,
                body={"name": name, "version": version, "replaces": before, "permissions": manifest["permissions"]},
            )
        return plugin

    @classmethod
    def named(cls, project: Project, name: str) -> Self:
        """The installed plugin of that name. Raises NotFound."""
        row = cls._named.one(project=project.id, name=name)
        plugin = None if row is None else cls.from_row(row)
        if plugin is None or plugin.removed_at is not None:
            raise NotFound(f"the project {project.name!r} has no plugin {name!r}", "list them with: kaged plugin list")
        return plugin

    def enable(self, *, actor: str) -> None:
        """Raises StateError where it is enabled already or uninstalled."""
        self._switch(True, actor)

    def disable(self, *, actor: str) -> None:
        """Raises StateError where it is disabled already or uninstalled."""
        self._switch(False, actor)

    def uninstall(self, *, actor: str) -> None:
        """Remove the plugin, its state and its tables; that it was there remains known.

        Raises StateError where it is gone already.
        """
        from .plugin_tables import drop_tables

        check_actor(actor)
        with bound_store().transaction():
            current = self._current()
            keys, tables = self.state.wipe(), drop_tables(current)
            current._apply(enabled=False, removed_at=now_ms())
            AuditEvent.record(
                "plugin.uninstalled",
                actor=actor,
                subject=self,
                body={"name": self.name, "state_keys": keys, "tables": tables},
            )
        self.__data__.update(current.__data__)

    @property
    def state(self) -> State:
        """The keys and values that the plugin keeps."""
        from .plugin_state import State

        return State(self)

    def migrate(self, scripts: Mapping[str, str]) -> list[str]:
        """Run the scripts for the plugin's own tables that have not been run; see `PluginDatabase.migrate`."""
        return self.database().migrate(scripts)

    def database(self) -> PluginDatabase:
        """A handle that can touch the plugin's own tables, named p_<plugin>__..., and nothing else."""
        from .plugin_tables import PluginDatabase

        return PluginDatabase(self)

    def _switch(self, enabled: bool, actor: str) -> None:
        check_actor(actor)
        word = "enabled" if enabled else "disabled"
        with bound_store().transaction():
            current = self._current()
            if current.enabled is enabled:
                raise StateError(f"the plugin {self.name!r} is {word} already")
            current._apply(enabled=enabled)
            AuditEvent.record(f"plugin.{word}", actor=actor, subject=self, body={"name": self.name})
        self.__data__.update(current.__data__)

    def _current(self) -> Plugin:
        current = Plugin.by_id(self.id)
        if current.removed_at is not None:
            raise StateError(f"the plugin {self.name!r} is uninstalled", "install it again first")
        return current

    def _apply(self, **changes: Any) -> None:
        self.__data__.update(changes)
        values = ("id", "version", "manifest", "enabled", "removed_at")
        self._change.run(**{name: self.__data__[name] for name in values})

    @property
    def audited_project(self) -> str:
        return str(self.project_id)


class PluginState(Model):
    """One key of a plugin's state."""

    plugin = peewee.ForeignKeyField(Plugin, index=False)
    key = TextField(max_length=KEY_CHARACTERS)
    revision = IntegerField()
    expires_at = MillisField(null=True)
    size = IntegerField()
    value = JSONField()

    class Meta:
        table_name = "plugin_state"
        primary_key = peewee.CompositeKey("plugin", "key")

    wipe = Hot(lambda: PluginState.delete().where(PluginState.plugin == Parameter("plugin", PluginState.plugin)))


PluginState.add_index(PluginState.index(PluginState.expires_at, where=PluginState.expires_at.is_null(False)))


def check_manifest(manifest: Any) -> tuple[str, str]:
    """The name and version of a manifest. Raises InvalidValue saying what is wrong with it."""
    if not isinstance(manifest, dict):
        raise InvalidValue("a plugin manifest is a JSON object", "pass a dict with name, version and permissions")
    for key, kind, word in (("name", str, "text"), ("version", str, "text"), ("permissions", list, "a list")):
        if not isinstance(manifest.get(key), kind):
            raise InvalidValue(
                f"the plugin manifest has no {key}, or not as {word}",
                "a manifest has a name, a version and a list of permissions",
            )
    name, version, permissions = manifest["name"], manifest["version"], manifest["permissions"]
    if not _PLUGIN_NAME.fullmatch(name):
        raise InvalidValue(
            f"the plugin name {name[:60]!r} is not usable", "1 to 40 lower-case letters, digits and _, a letter first"
        )
    if not version.strip():
        raise InvalidValue(f"the plugin {name!r} has an empty version", "write one, like 1.0")
    unknown = sorted({str(permission) for permission in permissions} - PERMISSIONS)
    if unknown:
        raise InvalidValue(
            f"the plugin {name!r} asks for unknown permissions: {', '.join(unknown)[:200]}",
            f"known are {', '.join(sorted(PERMISSIONS))}",
        )
    return name, version
