"""Problems and graders.

`load_task` knows two tasks: ``sums`` (procedural, the embedded default) and ``math`` (problems from
a JSONL file or a Hugging Face dataset, graded by math-verify).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from capo.core.errors import InputError
from capo.tasks.base import Problem, Task
from capo.tasks.math_problems import MathProblems
from capo.tasks.sums import Sums

__all__ = ["TASKS", "Problem", "Task", "load_task"]

TASKS: dict[str, type[Sums] | type[MathProblems]] = {"sums": Sums, "math": MathProblems}


def load_task(name: str, **params: Any) -> Task:
    """Return the task called ``name``.

    Args:
        name: ``"sums"`` or ``"math"``.
        params: the fields of `capo.tasks.sums.Sums` or `capo.tasks.math_problems.MathProblems`.

    Raises:
        InputError: an unknown name, an unknown or missing parameter, or a value out of its range.
    """
    if name not in TASKS:
        raise InputError("task", f"must be one of {', '.join(sorted(TASKS))}, got {name!r}.")
    kind = TASKS[name]
    known = [field for field in dataclasses.fields(kind) if field.init]
    for param in params:
        if param not in {field.name for field in known}:
            allowed = ", ".join(field.name for field in known)
            raise InputError(param, f"is not a parameter of task {name!r}; allowed: {allowed}.")
    for field in known:
        if field.default is dataclasses.MISSING and field.name not in params:
            raise InputError(field.name, f"is required by task {name!r}.")
    task: Task = kind(**params)
    return task
