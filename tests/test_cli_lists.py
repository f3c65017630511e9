"""`kaged project`, `prompt`, `plugin`, `session` and `run`: what an operator sees of what the daemon stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import kagedb
from commands import answer, answer_json, in_process
from kagedb import Plugin, Project, Prompt, Run, Session

ANA = "operator:ana"
MANIFEST = {"name": "mail", "version": "1.2", "permissions": ["network", "state"]}


@dataclass
class House:
    """A store with two projects, and the ids of what is in it."""

    url: str
    sessions: list[str]
    runs: list[str]


@pytest.fixture
def house(migrated_url: str) -> Iterator[House]:
    with kagedb.connect(url=migrated_url):
        project, other = Project.add("house", actor=ANA), Project.add("garden", actor=ANA)
        project.configure("agent planner", parsed={"agents": ["planner"]}, actor=ANA, message="first")
        first = Prompt.edit(project, "planner", "plan\n", actor=ANA)
        second = Prompt.edit(project, "planner", "plan well\n", actor=ANA, message="better", config={"model": "m"})
        Prompt.edit(other, "mower", "mow", actor=ANA)
        Prompt.label(project, "planner", "production", first, actor=ANA)
        Prompt.label(project, "planner", "production", second, actor="operator:bo")
        Plugin.install(project, MANIFEST, actor=ANA)
        Plugin.install(other, {**MANIFEST, "name": "rain"}, actor=ANA).uninstall(actor=ANA)
        night = Session.start(project, title="night watch", actor=ANA, metadata={"tty": 3})
        day = Session.start(other, title="day", actor=ANA)
        top = Run.dispatch(night, agent="planner", input={"goal": "rest"}, prompt_version=second)
        below = Run.dispatch(night, agent="searcher", input=[1], parent=top)
        lowest = Run.dispatch(night, agent="reader", input="text", parent=below)
        beside = Run.dispatch(night, agent="writer", input=None, parent=top)
        alone = Run.dispatch(day, agent="mower", input={})
        lowest.fail("no\nlight", exit_status=3)
        below.finish(output={"found": 2})
        sessions, runs = [night.id, day.id], [run.id for run in (top, below, lowest, beside, alone)]
    yield House(migrated_url, sessions, runs)


# Lists.


def test_things_with_names_are_listed_by_name_and_things_in_time_newest_first(house: House) -> None:
    def ids(*command: str) -> list[str]:
        return [row["id"] for row in answer_json(house.url, *command)]

    assert [row["name"] for row in answer_json(house.url, "project", "list")] == ["garden", "house"]
    assert [(row["project"], row["name"]) for row in answer_json(house.url, "prompt", "list")] == [
        ("garden", "mower"),
        ("house", "planner"),
    ]
    assert ids("session", "list") == house.sessions[::-1]
    assert ids("run", "list") == house.runs[::-1]


def test_a_list_is_of_one_project_or_session_where_that_is_asked_for(house: House) -> None:
    night, day = house.sessions
    assert [row["id"] for row in answer_json(house.url, "session", "list", "--project", "garden")] == [day]
    assert [row["name"] for row in answer_json(house.url, "prompt", "list", "--project", "house")] == ["planner"]
    assert [row["name"] for row in answer_json(house.url, "plugin", "list", "--project", "house")] == ["mail"]
    assert [row["id"] for row in answer_json(house.url, "run", "list", "--session", day)] == house.runs[4:]
    assert len(answer_json(house.url, "run", "list", "--session", night)) == 4


def test_a_list_is_cut_off_with_a_word_and_only_where_there_is_more(house: House) -> None:
    cut = in_process("--url", house.url, "run", "list", "--limit", "4")
    assert len(cut.stdout.splitlines()) == 1 + 4
    assert cut.stderr == "there are more than 4: --limit 0 shows all\n"
    for limit in ("5", "0"):
        whole = in_process("--url", house.url, "run", "list", "--limit", limit)
        assert (len(whole.stdout.splitlines()), whole.stderr) == (1 + 5, "")
    assert in_process("--url", house.url, "-q", "run", "list", "--limit", "4").stderr == ""
    assert len(answer_json(house.url, "run", "list", "--limit", "4")) == 4


def test_a_list_of_nothing_prints_nothing_and_says_so(migrated_url: str) -> None:
    for family in ("project", "prompt", "plugin", "session", "run"):
        result = in_process("--url", migrated_url, family, "list")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "there are none\n")
        assert answer_json(migrated_url, family, "list") == []


def test_ids_are_whole_in_tables_and_can_be_given_in_lower_case(house: House) -> None:
    for id in house.sessions:
        assert id in answer(house.url, "session", "list")
        assert answer_json(house.url, "session", "show", id.lower())["id"] == id
    for id in house.runs:
        assert id in answer(house.url, "run", "list")
        assert answer_json(house.url, "run", "show", id.lower())["id"] == id


@pytest.mark.parametrize(
    "command",
    [
        ("project", "show", "cellar"),
        ("prompt", "list", "--project", "cellar"),
        ("prompt", "show", "house", "mower"),
        ("prompt", "show", "house", "planner", "--version", "9"),
        ("prompt", "show", "house", "planner", "--label", "staging"),
        ("prompt", "diff", "house", "planner", "1", "staging"),
        ("plugin", "show", "garden", "rain"),
        ("session", "list", "--project", "cellar"),
        ("session", "show", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
        ("run", "list", "--session", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
        ("run", "show", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
        ("run", "tree", "01JAB3C4D5E6F7G8H9JKMNPQRS"),
    ],
    ids=" ".join,
)
def test_what_is_not_there_ends_with_1_and_where_to_look(house: House, command: tuple[str, ...]) -> None:
    result = in_process("--url", house.url, *command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "kaged " in result.stderr.splitlines()[1]


# Single things.


def test_a_project_is_shown_with_its_newest_config(house: House) -> None:
    found = answer_json(house.url, "project", "show", "house")
    assert (found["prompts"], found["plugins"], found["sessions"]) == (1, 1, 1)
    assert (found["config"]["version"], found["config"]["source"]) == (1, "agent planner")
    assert found["config"]["parsed"] == {"agents": ["planner"]}
    assert "agent planner" in answer(house.url, "project", "show", "house")
    assert answer_json(house.url, "project", "show", "garden")["config"] is None
    assert "config" not in answer(house.url, "project", "show", "garden")


def test_a_prompt_is_shown_with_its_versions_labels_and_moves(house: House) -> None:
    found = answer_json(house.url, "prompt", "show", "house", "planner")
    assert [(row["version"], row["message"]) for row in found["versions"]] == [(2, "better"), (1, "")]
    assert found["labels"] == [{"name": "production", "version": 2, "revision": 2}]
    assert [(move["from"], move["to"], move["actor"]) for move in found["moves"]] == [
        (1, 2, "operator:bo"),
        (None, 1, ANA),
    ]
    shown = answer(house.url, "prompt", "show", "house", "planner")
    assert "operator:bo" in shown
    assert answer_json(house.url, "prompt", "list")[1]["labels"] == [{"name": "production", "version": 2}]
    assert "production=2" in answer(house.url, "prompt", "list")


def test_a_prompts_text_is_printed_as_it_is(house: House) -> None:
    planner = ("prompt", "show", "house", "planner")
    assert answer(house.url, *planner, "--version", "1") == "plan\n"
    assert answer(house.url, *planner, "--label", "production") == "plan well\n"
    assert answer(house.url, "prompt", "show", "garden", "mower", "--version", "1") == "mow"
    found = answer_json(house.url, *planner, "--version", "2")
    assert (found["parent"], found["config"], found["body"]) == (1, {"model": "m"}, "plan well\n")
    assert answer_json(house.url, *planner, "--version", "1")["parent"] is None


def test_a_diff_takes_numbers_and_labels(house: House) -> None:
    by_number = answer(house.url, "prompt", "diff", "house", "planner", "1", "2")
    assert by_number.splitlines()[-2:] == ["-plan", "+plan well"]
    assert answer(house.url, "prompt", "diff", "house", "planner", "1", "production") == by_number
    assert answer_json(house.url, "prompt", "diff", "house", "planner", "1", "2")["diff"] == by_number
    assert answer(house.url, "prompt", "diff", "house", "planner", "2", "production") == ""


def test_a_plugin_is_shown_with_its_manifest_and_an_uninstalled_one_is_not_listed(house: House) -> None:
    found = answer_json(house.url, "plugin", "show", "house", "mail")
    assert (found["version"], found["enabled"], found["state_keys"]) == ("1.2", True, 0)
    assert (found["permissions"], found["manifest"]) == (MANIFEST["permissions"], MANIFEST)
    assert [row["name"] for row in answer_json(house.url, "plugin", "list")] == ["mail"]


def test_a_session_is_shown_with_how_its_runs_are(house: House) -> None:
    found = answer_json(house.url, "session", "show", house.sessions[0])
    assert (found["project"], found["state"], found["title"]) == ("house", "attached", "night watch")
    assert found["runs"] == {"failed": 1, "finished": 1, "running": 2}
    assert found["metadata"] == {"tty": 3}
    assert "night watch" in answer(house.url, "session", "show", house.sessions[0])


def test_a_run_is_shown_with_its_input_output_and_prompt(house: House) -> None:
    top, below, lowest, *_ = house.runs
    found = answer_json(house.url, "run", "show", top)
    assert found["prompt"] == {"project": "house", "name": "planner", "version": 2}
    assert (found["input"], found["output"], found["parent"]) == ({"goal": "rest"}, None, None)
    assert answer_json(house.url, "run", "show", below)["output"] == {"found": 2}
    failed = answer_json(house.url, "run", "show", lowest)
    assert (failed["state"], failed["exit_status"], failed["error"]) == ("failed", 3, "no\nlight")
    shown = answer(house.url, "run", "show", lowest)
    assert "error:\nno\nlight\n" in shown
    assert shown.endswith("input:\ntext\n")
    assert "house planner version 2" in answer(house.url, "run", "show", top)


# The tree.


def test_a_tree_is_parents_before_children_oldest_first(house: House) -> None:
    rows = answer_json(house.url, "run", "tree", house.sessions[0])
    assert [(row["depth"], row["agent"]) for row in rows] == [
        (0, "planner"),
        (1, "searcher"),
        (2, "reader"),
        (1, "writer"),
    ]
    shown = answer(house.url, "run", "tree", house.sessions[0]).splitlines()
    assert [line[:12].rstrip() for line in shown] == ["AGENT", "planner", "  searcher", "    reader", "  writer"]
    assert shown[3].split()[1:3] == ["failed", "3"]


def test_a_tree_of_a_run_is_that_run_and_what_is_below_it(house: House) -> None:
    rows = answer_json(house.url, "run", "tree", house.runs[1].lower())
    assert [(row["depth"], row["id"]) for row in rows] == [(0, house.runs[1]), (1, house.runs[2])]


def test_a_session_without_runs_has_an_empty_tree(migrated_url: str) -> None:
    with kagedb.connect(url=migrated_url):
        session = Session.start(Project.add("house", actor=ANA), title="idle", actor=ANA)
    result = in_process("--url", migrated_url, "run", "tree", session.id)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "there are none\n")
    assert answer_json(migrated_url, "run", "tree", session.id) == []


@pytest.mark.sqlite_only
def test_a_tree_may_be_deeper_than_the_interpreter_recurses(migrated_url: str) -> None:
    """The tree is made above the engines."""
    with kagedb.connect(url=migrated_url) as storage, storage.transaction():
        session = Session.start(Project.add("house", actor=ANA), title="deep", actor=ANA)
        run = None
        for _ in range(2000):
            run = Run.dispatch(session, agent="a", input=0, parent=run)
    assert [row["depth"] for row in answer_json(migrated_url, "run", "tree", session.id)] == list(range(2000))
    assert len(answer(migrated_url, "run", "tree", session.id).splitlines()) == 2001
