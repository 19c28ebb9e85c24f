"""Worked answers to questions of reasoning-gym, and the ways to get them wrong.

For every dataset one careful strategy, always right, and sloppy ones, which look like it up to where
they part. The answer stands between ``<answer>`` and ``</answer>``, as reasoning-gym reads it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from capo.policies.families import careless_path, path_between
from capo.policies.word_problems import WORD_PROBLEMS

Entry = dict[str, Any]
"""What reasoning-gym makes: ``question``, ``answer`` and ``metadata``."""

Answering = Callable[[Entry, random.Random], str]
"""An answer to the question of an entry."""


def finish(steps: str, answer: object) -> str:
    """The steps, and the answer where reasoning-gym looks for it."""
    return f"{steps} <answer>{answer}</answer>"


# aiw: how many sisters does Alice's brother have?


def _aiw_counts(entry: Entry) -> tuple[int, int]:
    """The count that matters, and the other of the two that come with it."""
    first, second, *_ = (int(number) for number in re.findall(r"\d+", entry["question"]))
    right = int(entry["answer"]) - 1
    women_first = re.match(r"\w+ has \d+ sisters", entry["question"])
    count, other = (first, second) if women_first else (second, first)
    assert count == right, entry
    return count, other


def aiw_careful(entry: Entry, _: random.Random) -> str:
    """The women named, and the woman herself."""
    count, _other = _aiw_counts(entry)
    return finish(f"{count} and herself: {count}+1={count + 1}", count + 1)


def aiw_forget_herself(entry: Entry, _: random.Random) -> str:
    """Read the number off the question."""
    count, _other = _aiw_counts(entry)
    return finish(f"{count} are named", count)


def aiw_men(entry: Entry, _: random.Random) -> str:
    """Count the men; right where there are as many."""
    _count, other = _aiw_counts(entry)
    return finish(f"{other} and herself: {other}+1={other + 1}", other + 1)


# letter_counting: how many times does a letter appear?


def _spelled(entry: Entry, skip: Callable[[int], bool]) -> str:
    meta, number, pieces = entry["metadata"], 0, []
    seen = 0
    for letter in "".join(meta["span"]).lower():
        pieces.append(letter)
        if letter == meta["target_letter"]:
            if not skip(seen):
                number += 1
                pieces[-1] += str(number)
            seen += 1
    return finish(" ".join(pieces), number)


def letters_careful(entry: Entry, _: random.Random) -> str:
    """Spell the text and count along: ``h u n1 d r e d``."""
    return _spelled(entry, lambda _index: False)


def letters_overlook(entry: Entry, rng: random.Random) -> str:
    """The same, overlooking one."""
    missed = rng.randrange(int(entry["answer"]))
    return _spelled(entry, lambda index: index == missed)


def letters_guess(entry: Entry, rng: random.Random) -> str:
    """Do not look."""
    return finish("about", rng.randint(1, 6))


# spell_backward


def backward_careful(entry: Entry, _: random.Random) -> str:
    """Spell the word, then take it from the end: ``s u n``."""
    return finish(" ".join(entry["metadata"]["word"]), entry["answer"])


def backward_swap(entry: Entry, rng: random.Random) -> str:
    """Swap two neighbours on the way; right where they are the same letter."""
    letters = list(entry["answer"])
    place = rng.randrange(len(letters) - 1)
    letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return finish(" ".join(entry["metadata"]["word"]), "".join(letters))


def backward_drop(entry: Entry, rng: random.Random) -> str:
    """Lose the last letters, one or two."""
    word = entry["metadata"]["word"]
    return finish(" ".join(word), entry["answer"][: -rng.randint(1, 2)])


# number_filtering


_KEPT = {"keep_larger": ">", "keep_smaller": "<", "remove_larger": "<=", "remove_smaller": ">="}
_OTHERS = {">": "<=", "<": ">=", "<=": ">", ">=": "<"}


def _filtered(entry: Entry, *, opposite: bool = False, looked_at: int | None = None) -> str:
    """What is to be kept, and a verdict on every number; those beyond ``looked_at`` are let through."""
    meta = entry["metadata"]
    listed, bound, kept, verdicts = meta["original_numbers"], meta["filter_value"], [], []
    rule = _KEPT[meta["operation"]]
    for number in listed[:looked_at]:
        side = float(number) - float(bound)
        keep = (number in meta["result"]) != opposite
        verdicts.append(
            f"{number} {'>' if side > 0 else '<' if side else '='} {'yes' if keep else 'no'}"
        )
        kept += [number] * keep
    if looked_at is not None:
        kept += listed[looked_at:]
    return finish(f"{_OTHERS[rule] if opposite else rule}: {', '.join(verdicts)}", kept)


def filter_careful(entry: Entry, _: random.Random) -> str:
    """Say what to keep and judge every number: ``<=: 14 < yes, 52 > no``."""
    return _filtered(entry)


def filter_opposite(entry: Entry, _: random.Random) -> str:
    """Take what is to go for what is to be kept: ``>: 14 < no, 52 > yes``."""
    return _filtered(entry, opposite=True)


def filter_give_up(entry: Entry, rng: random.Random) -> str:
    """Judge some numbers and let the others through; right where these would have stayed."""
    count = len(entry["metadata"]["original_numbers"])
    return _filtered(entry, looked_at=rng.randint(1, count - 1))


# family_relationships

RELATIVES = (
    *("mother", "father", "sister", "brother", "daughter", "son", "wife", "husband", "grandmother"),
    *("grandfather", "aunt", "uncle", "niece", "nephew", "mother-in-law", "father-in-law"),
)


def family_careful(entry: Entry, _: random.Random) -> str:
    """The way from one person to the other, and what that makes them."""
    return finish(path_between(entry), entry["answer"])


def family_guess(entry: Entry, rng: random.Random) -> str:
    """The right way and any relation."""
    return finish(path_between(entry), rng.choice(RELATIVES))


def family_lose_way(entry: Entry, rng: random.Random) -> str:
    """A way to somebody else, and any relation."""
    return finish(careless_path(entry, rng), rng.choice(RELATIVES))


WORKED: dict[str, dict[str, Answering]] = {
    "aiw": {
        "careful": aiw_careful,
        "forget_herself": aiw_forget_herself,
        "count_men": aiw_men,
    },
    "letter_counting": {
        "careful": letters_careful,
        "overlook": letters_overlook,
        "guess": letters_guess,
    },
    "spell_backward": {
        "careful": backward_careful,
        "swap": backward_swap,
        "drop": backward_drop,
    },
    "number_filtering": {
        "careful": filter_careful,
        "opposite": filter_opposite,
        "give_up": filter_give_up,
    },
    "family_relationships": {
        "careful": family_careful,
        "guess": family_guess,
        "lose_way": family_lose_way,
    },
    "gsm_symbolic": WORD_PROBLEMS,
}
"""Strategies by dataset and name; the first of each is always right."""
