"""States of an agent, step after step, as checkpoints keep them. Needs nothing but Python, so that others can use them.

The text in them is real: the sources of Python's own library, a new piece in each step.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MESSAGE_CHARACTERS, RESULT_CHARACTERS = 1_400, 4_950
"""Of what the agent says in a step, and of what a tool answers: 648 KB after 100 steps."""

ITEMS = 5_000
"""Elements of the long list, 145 bytes each as JSON: 724 KB."""


def _text() -> str:
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "mailbox", "optparse", "pickle")
    names += ("pdb", "subprocess", "tarfile", "threading", "turtle", "typing", "zipfile")
    return "".join(path.read_text(encoding="utf-8") for name in names if (path := library / f"{name}.py").exists())


def growing(steps: int) -> Iterator[dict[str, Any]]:
    """A conversation that grows by a message and the result of a tool in each step."""
    text, at = _text(), 0
    messages: list[dict[str, Any]] = []
    for step in range(steps):
        said, at = text[at : at + MESSAGE_CHARACTERS], at + MESSAGE_CHARACTERS
        result, at = text[at : at + RESULT_CHARACTERS], at + RESULT_CHARACTERS
        messages.append({"role": "assistant", "id": step, "content": said})
        messages.append({"role": "tool", "id": step, "name": "read_file", "content": result})
        yield {"step": step, "plan": f"look at part {step + 1}", "budget": 1 - step / 200, "messages": list(messages)}


def _item(number: int, noise: random.Random, words: list[str]) -> dict[str, Any]:
    name = " ".join(noise.choices(words, k=40))[:80]
    return {"id": number, "name": name, "done": False, "score": round(noise.random(), 9), "tags": None}


def filling(steps: int) -> Iterator[dict[str, Any]]:
    """A list that is filled by the same number of elements in each step, up to 5,000."""
    noise, words = random.Random(1), sorted(set(_text().split()))
    items: list[dict[str, Any]] = []
    for step in range(steps):
        items += [_item(len(items) + n, noise, words) for n in range(ITEMS // steps)]
        yield {"step": step, "items": list(items)}


def changing(steps: int) -> Iterator[dict[str, Any]]:
    """A list of 5,000 elements, of which another one is changed in each step."""
    noise, words = random.Random(2), sorted(set(_text().split()))
    items = [_item(number, noise, words) for number in range(ITEMS)]
    for step in range(steps):
        number = noise.randrange(ITEMS)
        items = [*items[:number], {**items[number], "done": True}, *items[number + 1 :]]
        yield {"step": step, "items": items}


KINDS = {"growing": growing, "filling": filling, "changing": changing}
