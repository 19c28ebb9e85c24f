"""Grading many completions: in worker processes where a grader could run away, else here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from capo.tasks.base import Problem, Task
from capo.tasks.pool import LONGEST, GradingPool, shared_pool


@runtime_checkable
class PooledTask(Protocol):
    """A task whose grader parses what a completion says, so that its time has to be bounded."""

    def grading_job(self, completion: str, problem: Problem) -> dict[str, Any]:
        """The job for `capo.tasks.pool.GradingPool`, as JSON."""


def grade_many(
    task: Task,
    completions: Sequence[str],
    problems: Sequence[Problem],
    pool: GradingPool | None = None,
) -> list[float]:
    """The rewards of completions, in [0, 1], in their order; 1 is right.

    A completion whose grading runs out of time or dies has the reward 0. Of a completion of more
    than 65 536 characters only the last ones are looked at.

    Args:
        task: whose grader it is.
        completions: any text whatever.
        problems: as many; ``completions[i]`` answers ``problems[i]``.
        pool: by default the one that this process shares.

    Raises:
        RuntimeError: no grading process can be started.
    """
    pairs = list(zip(completions, problems, strict=True))
    if not isinstance(task, PooledTask):
        return [task.grade(completion, problem) for completion, problem in pairs]
    jobs = [task.grading_job(completion[-LONGEST:], problem) for completion, problem in pairs]
    return (pool or shared_pool()).grade(jobs)
