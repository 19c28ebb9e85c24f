"""Problems and graders.

`load_task` knows three tasks: ``sums`` (procedural, the embedded default), ``math`` (problems from
a JSONL file or a Hugging Face dataset, graded by math-verify) and ``reasoning_gym`` (any dataset of
reasoning-gym, by name). `grade_many` grades in processes of bounded time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from capo.core.errors import InputError
from capo.tasks.base import Problem, Task
from capo.tasks.grading import grade_many
from capo.tasks.math_problems import MathProblems
from capo.tasks.reasoning import ReasoningGym
from capo.tasks.sums import Sums

__all__ = ["TASKS", "Problem", "Task", "grade_many", "load_task"]

TASKS: dict[str, type[Sums] | type[MathProblems] | type[ReasoningGym]] = {
    "sums": Sums,
    "math": MathProblems,
    "reasoning_gym": ReasoningGym,
}


def load_task(name: str, **params: Any) -> Task:
    """Return the task called ``name``.

    Args:
        name: ``"sums"``, ``"math"`` or ``"reasoning_gym"``.
        params: the fields of `capo.tasks.sums.Sums`, `capo.tasks.math_problems.MathProblems` or
            `capo.tasks.reasoning.ReasoningGym`; of the last, the dataset's own parameters may stand
            among them.

    Raises:
        InputError: an unknown name, an unknown or missing parameter, or a value out of its range.
    """
    if name not in TASKS:
        raise InputError("task", f"must be one of {', '.join(sorted(TASKS))}, got {name!r}.")
    kind = TASKS[name]
    known = [field for field in dataclasses.fields(kind) if field.init]
    if kind is ReasoningGym:
        params = _gathered(params, {field.name for field in known})
    for param in params:
        if param not in {field.name for field in known}:
            allowed = ", ".join(field.name for field in known)
            raise InputError(param, f"is not a parameter of task {name!r}; allowed: {allowed}.")
    for field in known:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in params:
            raise InputError(field.name, f"is required by task {name!r}.")
    task: Task = kind(**params)
    return task


def _gathered(params: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """Put what is no field of the task's own among the dataset's ``parameters``."""
    given = params.get("parameters", {})
    if not isinstance(given, dict):
        raise InputError("parameters", f"must be a table, got {given!r}.")
    rest = {name: value for name, value in params.items() if name not in own}
    kept = {name: value for name, value in params.items() if name in own}
    return kept | {"parameters": given | rest}
