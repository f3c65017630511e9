"""Prompts: immutable versions, and labels that are moved by compare-and-set and remember every move."""

from __future__ import annotations

import json
import threading
import time

import pytest

from kagedb import (
    AuditEvent,
    Change,
    Conflict,
    InvalidValue,
    NotFound,
    Project,
    Prompt,
    PromptLabel,
    PromptLabelMove,
    PromptVersion,
)
from kagedb.identity import new_ulid

ANA = "operator:ana"
BEN = "operator:ben"


@pytest.fixture
def versions(project: Project) -> list[PromptVersion]:
    return [Prompt.edit(project, "planner", body, actor=ANA) for body in ("one\n", "one\ntwo\n", "two\n")]


def test_each_edit_is_a_version_made_from_the_one_before(project: Project) -> None:
    first = Prompt.edit(project, "planner", "Plan.\n", actor=ANA, message="first")
    second = Prompt.edit(project, "planner", "Plan well.\n", actor=BEN, config={"temperature": 0.5})
    third = Prompt.edit(project, "planner", "Plan.\n", actor=ANA, parent=first)
    assert [(v.version, v.parent_id, v.author) for v in (first, second, third)] == [
        (1, None, ANA),
        (2, first.id, BEN),
        (3, first.id, ANA),
    ]
    kept = PromptVersion.by_id(second.id)
    assert (kept.body, kept.config, kept.message) == ("Plan well.\n", {"temperature": 0.5}, "")
    assert (third.digest, third.config) == (first.digest, None)
    assert Prompt.select().count() == 1


def test_an_edit_is_recorded(project: Project) -> None:
    version = Prompt.edit(project, "planner", "Plan.\n", actor=BEN, message="first")
    (event,) = AuditEvent.of(version)
    assert (event.kind, event.actor, event.project) == ("prompt.edited", BEN, project.id)
    assert json.loads(event.body) == {"prompt": "planner", "version": 1, "digest": version.digest, "message": "first"}


def test_the_same_text_again_is_no_version(project: Project) -> None:
    first = Prompt.edit(project, "planner", "x", actor=ANA, config={"a": 1})
    events = AuditEvent.select().count()
    assert Prompt.edit(project, "planner", "x", actor=BEN, config={"a": 1}, message="again").id == first.id
    assert AuditEvent.select().count() == events
    assert Prompt.edit(project, "planner", "x", actor=ANA).version == 2, "no config is another prompt than this config"
    assert Prompt.edit(project, "planner", "x", actor=ANA, config={}).version == 3


def test_an_edit_that_fails_leaves_no_prompt(project: Project) -> None:
    with pytest.raises(InvalidValue):
        Prompt.edit(project, "planner", "\0", actor=ANA)
    with pytest.raises(NotFound):
        Prompt.named(project, "planner")


def test_a_version_of_another_prompt_is_no_parent_and_takes_no_label(project: Project) -> None:
    other = Prompt.edit(project, "writer", "x", actor=ANA)
    Prompt.edit(project, "planner", "x", actor=ANA)
    with pytest.raises(NotFound, match=f"version {other.id} belongs to another prompt than 'planner'"):
        Prompt.edit(project, "planner", "y", actor=ANA, parent=other)
    with pytest.raises(NotFound, match="belongs to another prompt"):
        Prompt.label(project, "planner", "production", other, actor=ANA)
    assert (PromptVersion.select().count(), PromptLabel.select().count()) == (2, 0)


def test_prompts_of_two_projects_have_nothing_to_do_with_each_other(project: Project) -> None:
    garden = Project.add("garden", actor=ANA)
    Prompt.edit(project, "planner", "house", actor=ANA)
    Prompt.edit(garden, "planner", "garden", actor=ANA)
    for place in (project, garden):
        Prompt.label(place, "planner", "production", 1, actor=ANA)
        assert Prompt.resolve(place, "planner", "production").body == place.name


def test_a_label_remembers_every_move(project: Project, versions: list[PromptVersion]) -> None:
    for version, actor in ((versions[0], ANA), (versions[2], BEN), (2, ANA)):
        label = Prompt.label(project, "planner", "production", version, actor=actor)
    assert (label.revision, label.version_id) == (3, versions[1].id)
    assert Prompt.resolve(project, "planner", "production").id == versions[1].id
    moves = list(label.moves.order_by(PromptLabelMove.revision))
    one, two, three = (version.id for version in versions)
    assert [(m.revision, m.from_version_id, m.to_version_id, m.actor) for m in moves] == [
        (1, None, one, ANA),
        (2, one, three, BEN),
        (3, three, two, ANA),
    ]
    (event,) = AuditEvent.of(versions[2])[:1]
    assert (event.kind, event.actor, event.project) == ("prompt.labelled", BEN, project.id)
    assert json.loads(event.body) == {"prompt": "planner", "label": "production", "version": 3, "revision": 2}


def test_a_label_can_be_put_where_another_one_is(project: Project, versions: list[PromptVersion]) -> None:
    Prompt.label(project, "planner", "staging", versions[1], actor=ANA)
    Prompt.label(project, "planner", "production", "staging", actor=ANA)
    Prompt.label(project, "planner", "staging", versions[2], actor=ANA)
    assert Prompt.resolve(project, "planner", "production").version == 2
    with pytest.raises(NotFound, match="the prompt 'planner' has no label 'canary'"):
        Prompt.label(project, "planner", "production", "canary", actor=ANA)


def test_a_label_is_moved_only_from_the_revision_that_was_expected(
    project: Project, versions: list[PromptVersion]
) -> None:
    with pytest.raises(Conflict, match="the label 'production' of the prompt 'planner' has revision 0, not 1"):
        Prompt.label(project, "planner", "production", 1, actor=ANA, if_revision=1)
    Prompt.label(project, "planner", "production", 1, actor=ANA, if_revision=0)
    Prompt.label(project, "planner", "production", 2, actor=ANA, if_revision=1)
    events = AuditEvent.select().count()
    for expected in (0, 1, 3, -1):
        with pytest.raises(Conflict, match=f"has revision 2, not {expected}; read it again and decide anew"):
            Prompt.label(project, "planner", "production", 3, actor=BEN, if_revision=expected)
    assert Prompt.resolve(project, "planner", "production").version == 2
    assert (PromptLabelMove.select().count(), AuditEvent.select().count()) == (2, events)


def test_of_many_who_move_a_label_at_once_one_wins(project: Project, versions: list[PromptVersion]) -> None:
    Prompt.label(project, "planner", "production", 1, actor=ANA)
    outcomes: list[str] = []
    together = threading.Barrier(4)

    def move(number: int) -> None:
        together.wait(timeout=30)
        try:
            Prompt.label(project, "planner", "production", 2, actor=f"operator:{number}", if_revision=1)
            outcomes.append("won")
        except Conflict:
            outcomes.append("lost")

    threads = [threading.Thread(target=move, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert PromptLabelMove.select().count() == 2


def test_what_a_label_pointed_to_can_be_told_for_any_time(project: Project, versions: list[PromptVersion]) -> None:
    times = []
    for version in versions:
        Prompt.label(project, "planner", "production", version, actor=ANA)
        times.append(PromptLabelMove.select().order_by(PromptLabelMove.revision.desc()).get().created_at)
        time.sleep(0.003)
    for at, version in zip(times, versions, strict=True):
        assert Prompt.resolve_at(project, "planner", "production", at).id == version.id
        assert Prompt.resolve_at(project, "planner", "production", at + 1).id == version.id
    assert Prompt.resolve_at(project, "planner", "production", 2**62).id == versions[2].id
    with pytest.raises(NotFound, match="the label 'production' of the prompt 'planner' did not exist at that time"):
        Prompt.resolve_at(project, "planner", "production", times[0] - 1)
    with pytest.raises(InvalidValue):
        Prompt.resolve_at(project, "planner", "production", 1.5)  # type: ignore[arg-type]


def test_of_two_moves_in_one_millisecond_the_later_one_counts(
    project: Project, versions: list[PromptVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = time.time_ns() + 10**9
    monkeypatch.setattr(time, "time_ns", lambda: at)
    Prompt.label(project, "planner", "production", 1, actor=ANA)
    Prompt.label(project, "planner", "production", 3, actor=ANA)
    assert Prompt.resolve_at(project, "planner", "production", at // 1_000_000).version == 3


def test_what_is_not_there_is_said_by_its_name(project: Project, versions: list[PromptVersion]) -> None:
    for missing, message in (
        (lambda: Prompt.resolve(project, "writer", "production"), "the project 'house' has no prompt 'writer'"),
        (lambda: Prompt.resolve(project, "planner", "production"), "the prompt 'planner' has no label 'production'"),
        (lambda: Prompt.resolve_at(project, "planner", "staging", 5), "the prompt 'planner' has no label 'staging'"),
        (lambda: Prompt.named(project, "planner").version(4), "the prompt 'planner' has no version 4"),
        (lambda: Prompt.label(project, "planner", "x", 0, actor=ANA), "the prompt 'planner' has no version 0"),
        (lambda: Prompt.label(project, "writer", "x", 1, actor=ANA), "the project 'house' has no prompt 'writer'"),
        (lambda: Prompt.diff(project, "planner", 1, "x"), "the prompt 'planner' has no label 'x'"),
        (lambda: PromptVersion.by_id(new_ulid()), "there is no prompt version .*kaged prompt list"),
    ):
        with pytest.raises(NotFound, match=message):
            missing()


def test_a_label_without_a_valid_name_or_version_is_refused(project: Project, versions: list[PromptVersion]) -> None:
    for name, version in (("", 1), (" x", 1), (None, 1), (5, 1), ("x", True), ("x", 1.0), ("x", None), ("x", 2**63)):
        with pytest.raises(InvalidValue):
            Prompt.label(project, "planner", name, version, actor=ANA)  # type: ignore[arg-type]
    assert PromptLabel.select().count() == 0


def test_a_diff_is_unified_and_says_which_versions(project: Project, versions: list[PromptVersion]) -> None:
    Prompt.label(project, "planner", "production", 3, actor=ANA)
    expected = "--- planner version 1\n+++ planner version 3\n@@ -1 +1 @@\n-one\n+two\n"
    for old, new in ((1, 3), (versions[0], versions[2]), (1, "production")):
        assert Prompt.diff(project, "planner", old, new) == expected
    assert Prompt.diff(project, "planner", 2, 2) == ""


def test_a_diff_says_where_a_text_has_no_line_end(project: Project) -> None:
    for body in ("a", "a\n"):
        Prompt.edit(project, "planner", body, actor=ANA)
    assert Prompt.diff(project, "planner", 1, 2).splitlines()[3:] == ["-a", "\\ No newline at end of text", "+a"]


def test_subscribers_are_told_of_edits_and_moves(project: Project, changes: list[Change]) -> None:
    version = Prompt.edit(project, "planner", "x", actor=ANA)
    Prompt.label(project, "planner", "production", version, actor=ANA)
    with pytest.raises(Conflict):
        Prompt.label(project, "planner", "production", version, actor=ANA, if_revision=7)
    assert changes == [
        Change("prompt.edited", version.ref, project.id),
        Change("prompt.labelled", version.ref, project.id),
    ]
