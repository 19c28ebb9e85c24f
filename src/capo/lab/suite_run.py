"""Running a suite: pass@1, pass@k and majority@k of a policy on every task, with intervals.

Every interval is Wilson's, on as many effective trials as the standard error over problems amounts
to (`capo.lab.evaluate`): problems are the independent units, and the interval is honest at 0 and 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capo.lab.evaluate import effective_trials, wilson_interval

if TYPE_CHECKING:
    from capo.lab.suites import Entry
    from capo.policies import Policy


@dataclass(frozen=True)
class Figure:
    """A mean over problems, its standard error, and its 95% interval."""

    mean: float
    stderr: float
    interval: tuple[float, float]

    @classmethod
    def over(cls, scores: Sequence[float]) -> Figure:
        """The mean of one score a problem, each in [0, 1]."""
        n = len(scores)
        mean = sum(scores) / n
        stderr = math.sqrt(sum((score - mean) ** 2 for score in scores)) / n
        return cls(mean, stderr, wilson_interval(mean, effective_trials(mean, stderr, n)))

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {"mean": self.mean, "stderr": self.stderr, "interval": list(self.interval)}


@dataclass(frozen=True)
class Outcome:
    """What came out on one task.

    Attributes:
        name: of the task in its suite.
        problems: number of problems.
        k: completions a problem.
        temperature: they were sampled at.
        pass_at: by number of completions, powers of two up to ``k``, and ``k``.
        majority: of the most frequent final answer of the ``k``; None for ``k`` = 1.
        reward: mean reward, partial credit included.
    """

    name: str
    problems: int
    k: int
    temperature: float
    pass_at: dict[int, Figure]
    majority: Figure | None
    reward: float

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {
            "name": self.name,
            "problems": self.problems,
            "k": self.k,
            "temperature": self.temperature,
            "pass_at": {str(j): figure.to_dict() for j, figure in self.pass_at.items()},
            "majority": None if self.majority is None else self.majority.to_dict(),
            "reward": self.reward,
        }


def run_suite(
    policy: Policy, entries: Sequence[Entry], said: Callable[[str], None] = lambda _: None
) -> list[Outcome]:
    """Evaluate ``policy`` on every task of a suite, in order; ``said`` hears of each one done."""
    outcomes = []
    for entry in entries:
        outcomes.append(_run(policy, entry))
        said(f"{entry.settings.name}: pass@1 {outcomes[-1].pass_at[1].mean:.3f}")
    return outcomes


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` completions is right.

    Source: Chen et al., arXiv 2107.03374, eq. 1: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: completions sampled, n ≥ k.
        right: right ones among them, c.
        k: completions a problem is given.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first completion with the most frequent final answer; ties go to the earlier.

    Completions without an answer do not vote; None where there is no vote at all.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    winner = votes.most_common(1)[0][0]  # in order of first appearance among equals
    return list(answers).index(winner)


def mean_pass_at_1(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Mean of pass@1 over tasks, each weighing the same, and its standard error."""
    figures = [outcome.pass_at[1] for outcome in outcomes]
    mean = sum(figure.mean for figure in figures) / len(figures)
    return mean, math.sqrt(sum(figure.stderr**2 for figure in figures)) / len(figures)


def _run(policy: Policy, entry: Entry) -> Outcome:
    from capo.policies import sample_completions
    from capo.tasks import grade_many

    settings, problems, k = entry.settings, entry.problems, entry.settings.k
    completions = sample_completions(
        policy,
        [problem.prompt for problem in problems],
        k,
        settings.temperature,
        settings.max_completion_tokens or entry.task.max_completion_tokens,
        settings.seed,
        settings.top_k,
        batch_size=settings.batch_size,
    )
    flat = [(text, p) for texts, p in zip(completions, problems, strict=True) for text in texts]
    rewards = grade_many(entry.task, [text for text, _ in flat], [p for _, p in flat])
    rights = [[r == 1 for r in rewards[i : i + k]] for i in range(0, len(rewards), k)]
    voted = [
        (chosen := majority([entry.task.final_answer(text) for text in texts])) is not None
        and right[chosen]
        for texts, right in zip(completions, rights, strict=True)
    ]
    return Outcome(
        name=settings.name,
        problems=len(problems),
        k=k,
        temperature=settings.temperature,
        pass_at={
            j: Figure.over([pass_at_k(k, sum(right), j) for right in rights]) for j in _ladder(k)
        },
        majority=Figure.over([float(one) for one in voted]) if k > 1 else None,
        reward=sum(rewards) / len(rewards),
    )


def _ladder(k: int) -> list[int]:
    return sorted({2**power for power in range(k.bit_length())} | {k})
