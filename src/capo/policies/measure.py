"""How good a policy is at a task: sampled accuracy, greedy accuracy, pass@k."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from capo.core.errors import InputError
from capo.policies.loading import Policy
from capo.policies.sampling import sample_completions
from capo.tasks.base import Task
from capo.tasks.grading import grade_many


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
    every = [text for texts in sampled for text in texts]
    rewards = grade_many(task, every, [problem for problem in held_out for _ in range(k)])
    right = [sum(r == 1 for r in rewards[i : i + k]) for i in range(0, len(rewards), k)]
    greedily = [r == 1 for r in grade_many(task, [text for [text] in greedy], held_out)]
    return Measured(
        problems=problems,
        k=k,
        sampled_accuracy=sum(right) / (problems * k),
        greedy_accuracy=sum(greedily) / problems,
        pass_at_k=sum(count > 0 for count in right) / problems,
    )
