"""How often a policy's sampled answers are right, with an honest error bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError

if TYPE_CHECKING:
    from capo.policies import Policy
    from capo.tasks import Problem, Task


@dataclass(frozen=True)
class Evaluation:
    """Sampled accuracy at temperature 1 from the full vocabulary.

    Attributes:
        accuracy: mean over problems of the share of their completions that is right.
        stderr: standard error of that mean, problems being the independent units.
        interval: 95% interval of Wilson, on as many effective trials as ``stderr`` amounts to.
        problems: number of problems.
        k: completions sampled per problem.
        pass_at_k: share of problems with at least one right completion.
        completion_tokens_limit: tokens a completion could take.
    """

    accuracy: float
    stderr: float
    interval: tuple[float, float]
    problems: int
    k: int
    pass_at_k: float
    completion_tokens_limit: int

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def evaluate(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    *,
    seed: int,
    k: int = 1,
    max_completion_tokens: int | None = None,
    batch_size: int = 512,
) -> Evaluation:
    """Sample ``k`` completions of every problem and grade them.

    Nothing about the policy changes, nor about torch's global random numbers; the same ``seed``
    means the same random numbers, so that two policies are compared on common noise.

    Raises:
        InputError: no problem, or ``k`` below 1.
    """
    from capo.policies import sample_completions
    from capo.tasks import grade_many

    if not problems:
        raise InputError("problems", "must not be empty.")
    if k < 1:
        raise InputError("k", f"must be at least 1, got {k}.")
    limit = max_completion_tokens or task.max_completion_tokens
    completions = sample_completions(
        policy,
        [problem.prompt for problem in problems],
        k,
        1.0,
        limit,
        seed,
        batch_size=batch_size,
    )
    rewards = grade_many(
        task,
        [text for texts in completions for text in texts],
        [problem for problem in problems for _ in range(k)],
    )
    # partial credit is no right answer
    shares = [sum(r == 1 for r in rewards[i : i + k]) / k for i in range(0, len(rewards), k)]
    n = len(shares)
    accuracy = sum(shares) / n
    stderr = math.sqrt(sum((share - accuracy) ** 2 for share in shares)) / n
    return Evaluation(
        accuracy=accuracy,
        stderr=stderr,
        interval=wilson_interval(accuracy, effective_trials(accuracy, stderr, n)),
        problems=n,
        k=k,
        pass_at_k=sum(share > 0 for share in shares) / n,
        completion_tokens_limit=limit,
    )


def effective_trials(accuracy: float, stderr: float, problems: int) -> float:
    """Independent trials that would have this standard error; ``problems`` where it is 0."""
    return accuracy * (1 - accuracy) / stderr**2 if stderr > 0 else float(problems)


def wilson_interval(share: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike ±z·stderr it is honest at 0 and at 1.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    half /= 1 + z**2 / trials
    return max(0.0, centre - half), min(1.0, centre + half)
