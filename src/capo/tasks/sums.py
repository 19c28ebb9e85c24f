"""Three-term sums with a worked answer: the procedural task of the embedded policy.

A prompt is ``37+58+26?``; a careful answer works in two additions, ``37+58=95 95+26=121``.
Only what follows the last ``=`` is graded, so there are many ways to be wrong and no credit for
format.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
from typing import ClassVar

from capo.core.errors import InputError
from capo.tasks.base import Problem

_HELD_OUT_ONE_IN = 8
_ENUMERABLE = 50_000  # below this many sums a split is listed; above, it is sampled by rejection
_FINAL_NUMBER = re.compile(r"0*([0-9]{1,9})")

Terms = tuple[int, int, int]


@dataclass(frozen=True)
class Sums:
    """Sums ``a+b+c`` of integers between ``smallest`` and ``largest``.

    Args:
        smallest: the smallest term, 0..999.
        largest: the largest term, ``smallest``..999. The embedded policy was pre-trained on the
            default range and knows nothing of others.
        reward_noise: share of the training rewards that are turned round, in [0, 0.5); evaluation
            stays exact.

    Raises:
        InputError: a bound that is not an integer in its range, or an impossible noise.
    """

    smallest: int = 10
    largest: int = 99
    reward_noise: float = 0.0

    name: ClassVar[str] = "sums"

    def __post_init__(self) -> None:
        """Check the bounds."""
        for field, lowest in (("smallest", 0), ("largest", self.smallest)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(field, f"must be an integer, got {value!r}.")
            if not lowest <= value <= 999:
                raise InputError(field, f"must be in {lowest}..999, got {value}.")
        noise = self.reward_noise
        if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < 0.5:
            raise InputError("reward_noise", f"must be a number in [0, 0.5), got {noise!r}.")

    @property
    def max_completion_tokens(self) -> int:
        """Length of the longest right answer, its end-of-sequence token, and three to spare."""
        a = self.largest
        return len(f"{a}+{a}={a + a} {a + a}+{a}={3 * a}") + 1 + 3

    def train_problems(self, n: int, seed: int) -> list[Problem]:
        """See `Task.train_problems`."""
        return self._sample(n, seed, held_out=False)

    def eval_problems(self, n: int, seed: int) -> list[Problem]:
        """See `Task.eval_problems`."""
        return self._sample(n, seed, held_out=True)

    def grade(self, completion: str, problem: Problem) -> float:
        """1.0 iff the text after the last ``=`` is the sum and nothing else."""
        return float(self.final_answer(completion) == problem.answer)

    def training_reward(self, completion: str, problem: Problem, draw: int) -> float:
        """The grade, turned round with the probability ``reward_noise``.

        What decides is a hash of problem, completion and ``draw``, the completion's place in its
        batch: a run that is repeated or continued meets the same noise.
        """
        grade = self.grade(completion, problem)
        text = f"{problem.id}|{draw}|{completion}"
        digest = hashlib.sha256(text.encode()).digest()
        flipped = int.from_bytes(digest[:8], "big") < self.reward_noise * 2**64
        return 1.0 - grade if flipped else grade

    def final_answer(self, completion: str) -> str | None:
        """The text after the last ``=``, if it is a number."""
        _, sign, final = completion[-64:].rpartition("=")
        number = _FINAL_NUMBER.fullmatch(final.strip(" \n"))
        return number[1] if sign and number is not None else None

    def _sample(self, n: int, seed: int, *, held_out: bool) -> list[Problem]:
        split = "held-out" if held_out else "train"
        rng = random.Random(f"{self.smallest}..{self.largest} {split} {seed}")
        span = range(self.smallest, self.largest + 1)
        size = len(span) ** 3
        if size <= _ENUMERABLE:
            every = [t for t in itertools.product(span, span, span) if is_held_out(t) == held_out]
            _check_count(n, len(every), split)
            return [problem_of(terms) for terms in rng.sample(every, n)]
        _check_count(n, size // (2 * _HELD_OUT_ONE_IN), split)  # sparse enough for rejection
        chosen: dict[Terms, Problem] = {}
        while len(chosen) < n:
            terms = draw_terms(rng, self.smallest, self.largest)
            if is_held_out(terms) == held_out:
                chosen.setdefault(terms, problem_of(terms))
        return list(chosen.values())


def draw_terms(rng: random.Random, smallest: int, largest: int) -> Terms:
    """Draw three terms, independent and uniform."""
    a, b, c = (rng.randint(smallest, largest) for _ in range(3))
    return a, b, c


def problem_of(terms: Terms) -> Problem:
    """The problem that asks for the sum of ``terms``."""
    a, b, c = terms
    return Problem(prompt=f"{a}+{b}+{c}?", answer=str(a + b + c), id=f"sums/{a}+{b}+{c}")


def is_held_out(terms: Terms) -> bool:
    """Whether a sum belongs to the eval split: a hash decides, so the seed of a run cannot."""
    digest = hashlib.sha256("+".join(map(str, terms)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _check_count(n: int, available: int, split: str) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= available:
        raise InputError("n", f"must be in 1..{available} ({split} problems available), got {n!r}.")
