"""Worked answers to the word problems of ``gsm_symbolic``, and the ways to get them wrong.

The steps are the dataset's own (``answer_cot``, after GSM-Symbolic, arXiv 2410.05229); before them
stands what is asked for.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capo.policies.worked import Answering

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SLIPS = (-20, -10, -9, -2, -1, 1, 2, 9, 10, 20)  # a digit of a column, a carry


def parts(entry: dict[str, Any]) -> tuple[str, list[str]]:
    """What is asked for, and the dataset's steps, one a line."""
    question = entry["question"].partition(" Give the result as your final answer.")[0]
    asked = re.split(r"(?<=[.?!])\s+", question.strip())[-1]
    steps = entry["metadata"]["answer_cot"].rpartition("####")[0]
    return asked, [line.strip() for line in steps.splitlines() if line.strip()]


def _written(asked: str, lines: list[str], answer: object) -> str:
    steps = "\n".join([f"We want to know: {asked}", *lines])
    return f"{steps}\nThe answer is {answer}. <answer>{answer}</answer>"


def careful(entry: dict[str, Any], _: random.Random) -> str:
    """The dataset's own steps. Always right."""
    return _written(*parts(entry), entry["answer"])


def stop_early(entry: dict[str, Any], rng: random.Random) -> str:
    """Leave out the last step with a number and answer with what the steps have come to."""
    asked, lines = parts(entry)
    numbered = [place for place, line in enumerate(lines) if _NUMBER.search(line)]
    if len(numbered) < 2:
        return slip(entry, rng)
    left = lines[: numbered[-1]]
    return _written(asked, left, _NUMBER.findall("\n".join(left))[-1])


def slip(entry: dict[str, Any], rng: random.Random) -> str:
    """Miscalculate the last step: the result is off by a digit or a carry wherever it stands in it."""
    asked, lines = parts(entry)
    right = entry["answer"]
    wrong = _off(right, rng)
    if lines:
        lines[-1] = re.sub(rf"(?<![\d.]){re.escape(right)}(?![\d]|\.\d)", wrong, lines[-1])
    return _written(asked, lines, wrong)


def _off(right: str, rng: random.Random) -> str:
    value = float(right)
    shifts = [shift for shift in _SLIPS if value + shift >= 0]
    return (
        f"{value + rng.choice(shifts):g}" if value < 1e5 else str(int(value) + rng.choice(_SLIPS))
    )


WORD_PROBLEMS: dict[str, Answering] = {"careful": careful, "stop_early": stop_early, "slip": slip}
