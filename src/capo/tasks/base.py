"""What a task is: problems in two disjoint splits, and a grader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One question to a policy.

    Attributes:
        prompt: the text the policy continues, exactly as it is tokenized.
        answer: the reference answer that `Task.grade` compares with.
        id: a stable name; two problems of a task are the same problem iff their ids are equal.
    """

    prompt: str
    answer: str
    id: str


@runtime_checkable
class Task(Protocol):
    """Problems and their grader. Both splits are deterministic and share no problem."""

    @property
    def name(self) -> str:
        """The name `load_task` knows the task by."""

    @property
    def max_completion_tokens(self) -> int:
        """Tokens that suffice for a worked answer, end-of-sequence token included."""

    def train_problems(self, n: int, seed: int) -> list[Problem]:
        """Return ``n`` distinct problems to train on, the same for the same ``seed``.

        Raises:
            InputError: ``n`` is not in 1..(number of problems in the split).
        """

    def eval_problems(self, n: int, seed: int) -> list[Problem]:
        """Return ``n`` distinct held-out problems, the same for the same ``seed``.

        Raises:
            InputError: ``n`` is not in 1..(number of problems in the split).
        """

    def final_answer(self, completion: str) -> str | None:
        """Return what the completion answers, such that equal answers are equal texts; or None."""

    def grade(self, completion: str, problem: Problem) -> float:
        """Return the reward in [0, 1]: 1.0 iff the final answer is right. Never raises.

        Only a task that says so gives partial credit, below 1.
        """
