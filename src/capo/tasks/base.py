"""What a task is: problems in two disjoint splits, and a grader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from capo.core.errors import InputError


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


def check_texts(task: object, *fields: str) -> None:
    """Refuse what a command line or a file has given as something else.

    Raises:
        InputError: a field of ``task`` is no text.
    """
    for field in fields:
        value = getattr(task, field)
        if not isinstance(value, str):
            raise InputError(field, f"must be text, got {value!r}.")


def check_prompting(template: object, max_completion_tokens: object) -> None:
    """Refuse what nothing can be asked with.

    Raises:
        InputError: a template without ``{problem}``, or a limit that is no integer of at least 1.
    """
    if not isinstance(template, str) or "{problem}" not in template:
        raise InputError("template", f"must contain {{problem}}, got {template!r}.")
    if type(max_completion_tokens) is not int or max_completion_tokens < 1:
        raise InputError(
            "max_completion_tokens",
            f"must be an integer of at least 1, got {max_completion_tokens!r}.",
        )


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
