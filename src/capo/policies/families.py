"""The way from one member of a family to another, read from a story of reasoning-gym.

The stories of ``family_relationships`` consist of three kinds of sentences: *A is married to B. They
have a child called C. They have children called C, D and E.*
"""

from __future__ import annotations

import random
import re
from collections import deque
from typing import Any

_COUPLE = re.compile(
    r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]+)\.)?"
)


def relations(story: str) -> dict[str, list[tuple[str, str]]]:
    """Of every person the next ones, as (what the person is to the other, the other's name)."""
    found: dict[str, list[tuple[str, str]]] = {}

    def note(person: str, role: str, other: str) -> None:
        pairs = found.setdefault(person, [])
        if (role, other) not in pairs:
            pairs.append((role, other))

    for one, other, children in _COUPLE.findall(story):
        note(one, "spouse", other)
        note(other, "spouse", one)
        for child in filter(None, re.split(r", | and ", children)):
            for parent in (one, other):
                note(parent, "parent", child)
                note(child, "child", parent)
    return found


def shortest_path(story: str, start: str, goal: str) -> str:
    """``Sarah, spouse of Edward, child of Elizabeth``: how ``start`` comes to ``goal``.

    Raises:
        ValueError: the story does not connect them.
    """
    known = relations(story)
    came: dict[str, tuple[str, str]] = {start: ("", "")}
    waiting = deque([start])
    while waiting:
        person = waiting.popleft()
        for role, other in known.get(person, []):
            if other not in came:
                came[other] = (person, role)
                waiting.append(other)
    if goal not in came:
        raise ValueError(f"{start} and {goal} are not connected")
    steps: list[str] = []
    person = goal
    while person != start:
        before, role = came[person]
        steps.append(f", {role} of {person}")
        person = before
    return start + "".join(reversed(steps))


def path_between(entry: dict[str, Any]) -> str:
    """The way between the two persons of the question."""
    meta = entry["metadata"]
    return shortest_path(entry["question"], meta["person1"], meta["person2"])


def careless_path(entry: dict[str, Any], rng: random.Random) -> str:
    """A way to somebody who was not asked about; to the right one where there is nobody else."""
    meta = entry["metadata"]
    named = [meta["person1"], meta["person2"]]
    others = [person for person in relations(entry["question"]) if person not in named]
    goal = rng.choice(others) if others else meta["person2"]
    return shortest_path(entry["question"], meta["person1"], goal)
