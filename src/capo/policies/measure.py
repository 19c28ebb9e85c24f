"""How good a policy is at a task: sampled accuracy, greedy accuracy, pass@k."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from capo.core.errors import InputError
from capo.policies.loading import Policy
from capo.policies.sampling import sample_completions
from capo.tasks.base import Task


@dataclass(frozen=True)
class Measured:
    """Figures over held-out problems.

    Attributes:
        problems: how many.
        k: completions sampled per problem, at temperature 1 from the full vocabulary.
        sampled_accuracy: fraction of all ``problems × k`` sampled completions that are right.
        greedy_accuracy: fraction of problems answered right at temperature 0.
        pass_at_k: fraction of problems with at least one right completion among its ``k``.
    """

    problems: int
    k: int
    sampled_accuracy: float
    greedy_accuracy: float
    pass_at_k: float

    def to_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def measure(policy: Policy, task: Task, *, problems: int, k: int, seed: int) -> Measured:
    """Measure ``policy`` on ``problems`` held-out problems of ``task``.

    Raises:
        InputError: ``k`` is below 1, or the task has fewer held-out problems.
    """
    if k < 1:
        raise InputError("k", f"must be at least 1, got {k}.")
    held_out = task.eval_problems(problems, seed)
    prompts = [problem.prompt for problem in held_out]
    length = task.max_completion_tokens
    sampled = sample_completions(policy, prompts, k, 1.0, length, seed)
    greedy = sample_completions(policy, prompts, 1, 0.0, length, seed)
    right = [
        sum(task.grade(text, problem) for text in texts)
        for problem, texts in zip(held_out, sampled, strict=True)
    ]
    greedily = [task.grade(text, problem) for problem, [text] in zip(held_out, greedy, strict=True)]
    return Measured(
        problems=problems,
        k=k,
        sampled_accuracy=sum(right) / (problems * k),
        greedy_accuracy=sum(greedily) / problems,
        pass_at_k=sum(count > 0 for count in right) / problems,
    )
