"""Plugins: what is installed in a project, in which version, enabled or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kagedb import AuditEvent, Change, InvalidValue, NotFound, Plugin, Project, StateError
from kagedb.identity import new_ulid

ANA = "operator:ana"
BEN = "operator:ben"


def manifest(name: str = "weather", version: str = "1.0", **more: Any) -> dict[str, Any]:
    return {"name": name, "version": version, "permissions": ["state"], **more}


def test_an_installed_plugin_is_enabled_and_found_by_its_name(project: Project) -> None:
    plugin = Plugin.install(project, manifest(homepage="https://example.org"), actor=ANA)
    kept = Plugin.named(project, "weather")
    assert (kept.id, kept.version, kept.enabled, kept.removed_at) == (plugin.id, "1.0", True, None)
    assert kept.manifest == {
        "name": "weather",
        "version": "1.0",
        "permissions": ["state"],
        "homepage": "https://example.org",
    }
    assert list(kept.manifest) == ["name", "version", "permissions", "homepage"]
    (event,) = AuditEvent.of(plugin)
    assert (event.kind, event.actor, event.project) == ("plugin.installed", ANA, project.id)
    assert json.loads(event.body) == {"name": "weather", "version": "1.0", "replaces": None, "permissions": ["state"]}


def test_another_version_takes_its_place_and_leaves_it_enabled_or_not(project: Project) -> None:
    first = Plugin.install(project, manifest(), actor=ANA)
    first.disable(actor=ANA)
    second = Plugin.install(project, manifest(version="2.0", permissions=[]), actor=BEN)
    assert (second.id, second.version, second.enabled) == (first.id, "2.0", False)
    assert Plugin.by_id(first.id).manifest["permissions"] == []
    assert json.loads(AuditEvent.of(second)[0].body)["replaces"] == "1.0"
    assert Plugin.select().count() == 1


def test_it_is_switched_off_and_on(project: Project) -> None:
    plugin = Plugin.install(project, manifest(), actor=ANA)
    stale = Plugin.named(project, "weather")
    plugin.disable(actor=BEN)
    assert (plugin.enabled, Plugin.by_id(plugin.id).enabled) == (False, False)
    with pytest.raises(StateError, match="the plugin 'weather' is disabled already"):
        stale.disable(actor=ANA)
    stale.enable(actor=ANA)
    with pytest.raises(StateError, match="the plugin 'weather' is enabled already"):
        plugin.enable(actor=ANA)
    kinds = [(event.kind, event.actor) for event in AuditEvent.of(plugin)]
    assert kinds == [("plugin.enabled", ANA), ("plugin.disabled", BEN), ("plugin.installed", ANA)]


def test_switching_a_stale_model_does_not_bring_back_the_old_version(project: Project) -> None:
    stale = Plugin.install(project, manifest(), actor=ANA)
    Plugin.install(project, manifest(version="2.0"), actor=ANA)
    stale.disable(actor=ANA)
    assert (stale.version, Plugin.by_id(stale.id).version) == ("2.0", "2.0")


def test_an_uninstalled_plugin_is_gone_but_known(project: Project) -> None:
    plugin = Plugin.install(project, manifest(), actor=ANA)
    plugin.uninstall(actor=BEN)
    assert (plugin.enabled, plugin.removed_at is not None) == (False, True)
    with pytest.raises(NotFound, match="the project 'house' has no plugin 'weather'"):
        Plugin.named(project, "weather")
    for verb in (plugin.enable, plugin.disable, plugin.uninstall):
        with pytest.raises(StateError, match="the plugin 'weather' is uninstalled; install it again first"):
            verb(actor=ANA)
    (event, _) = AuditEvent.of(plugin)
    assert (event.kind, event.actor) == ("plugin.uninstalled", BEN)
    assert json.loads(event.body) == {"name": "weather", "state_keys": 0, "tables": []}


def test_a_plugin_that_is_installed_again_is_enabled_and_replaces_nothing(project: Project) -> None:
    plugin = Plugin.install(project, manifest(), actor=ANA)
    plugin.disable(actor=ANA)
    plugin.uninstall(actor=ANA)
    again = Plugin.install(project, manifest(version="3"), actor=ANA)
    assert (again.id, again.enabled, again.removed_at) == (plugin.id, True, None)
    assert json.loads(AuditEvent.of(again)[0].body)["replaces"] is None


def test_plugins_of_two_projects_have_nothing_to_do_with_each_other(project: Project) -> None:
    garden = Project.add("garden", actor=ANA)
    here, there = (Plugin.install(place, manifest(), actor=ANA) for place in (project, garden))
    here.uninstall(actor=ANA)
    assert Plugin.named(garden, "weather").id == there.id


MANIFESTS: list[tuple[Any, str]] = [
    (None, "a plugin manifest is a JSON object"),
    ([], "a plugin manifest is a JSON object"),
    ({}, "the plugin manifest has no name, or not as text"),
    (manifest(name=5), "the plugin manifest has no name, or not as text"),  # type: ignore[arg-type]
    (manifest(version=1.0), "the plugin manifest has no version, or not as text"),  # type: ignore[arg-type]
    ({"name": "weather", "version": "1"}, "the plugin manifest has no permissions, or not as a list"),
    (manifest(permissions="state"), "the plugin manifest has no permissions, or not as a list"),
    (manifest(name=""), "the plugin name '' is not usable"),
    (manifest(name="Weather"), "the plugin name 'Weather' is not usable"),
    (manifest(name="weather\n"), r"the plugin name 'weather\\n' is not usable"),
    (manifest(name="a-b"), "the plugin name 'a-b' is not usable"),
    (manifest(name="x" * 41), "is not usable"),
    (manifest(name="\ud800"), r"the plugin name '\\ud800' is not usable"),
    (manifest(version=" "), "the plugin 'weather' has an empty version"),
    (manifest(version="x" * 101), r"plugin\.version has 101 characters; the limit is 100"),
    (manifest(version="1\0"), r"plugin\.version holds a NUL character"),
    (manifest(version="1\x1b[2J"), r"plugin\.version takes one line"),
    (manifest(permissions=["root"]), "the plugin 'weather' asks for unknown permissions: root; known are files, "),
    (manifest(permissions=[["state"]]), "asks for unknown permissions"),
    (manifest(permissions=[None]), "asks for unknown permissions: None"),
    (manifest(extra={1}), r"plugin\.manifest holds \{1\} \(set\)"),
    (manifest(extra=float("nan")), r"plugin\.manifest holds nan"),
]


def test_a_manifest_that_is_not_complete_and_known_is_refused(project: Project) -> None:
    events = AuditEvent.select().count()
    for wrong, message in MANIFESTS:
        with pytest.raises(InvalidValue, match=message):
            Plugin.install(project, wrong, actor=ANA)
    assert (Plugin.select().count(), AuditEvent.select().count()) == (0, events)


def test_a_plugin_that_is_not_in_the_store_cannot_be_switched(project: Project) -> None:
    stranger = Plugin(id=new_ulid(), project=project.id, name="weather", enabled=True)
    for verb in (stranger.enable, stranger.disable, stranger.uninstall):
        with pytest.raises(NotFound, match="there is no plugin"):
            verb(actor=ANA)


def test_subscribers_are_told_of_each_verb_once(project: Project, changes: list[Change]) -> None:
    plugin = Plugin.install(project, manifest(), actor=ANA)
    plugin.disable(actor=ANA)
    plugin.enable(actor=ANA)
    plugin.uninstall(actor=ANA)
    kinds = ("plugin.installed", "plugin.disabled", "plugin.enabled", "plugin.uninstalled")
    assert changes == [Change(kind, plugin.ref, project.id) for kind in kinds]
