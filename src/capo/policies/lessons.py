"""What a policy is pre-trained on: problems of a task, each answered by a strategy of a mixture."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError
from capo.policies.strategies import STRATEGIES
from capo.policies.worked import WORKED
from capo.tasks import Task, load_task
from capo.tasks.reasoning import ReasoningGym
from capo.tasks.sums import Sums, draw_terms, is_held_out, problem_of

if TYPE_CHECKING:
    from capo.policies.pretrain_config import PretrainConfig


@dataclass(frozen=True)
class Lesson:
    """A prompt, and a completion that a policy learns."""

    prompt: str
    completion: str


Teacher = Callable[[str, random.Random], Lesson]
"""The next problem, answered by the strategy of that name."""


def strategies_of(name: str, params: dict[str, Any]) -> list[str]:
    """The strategies known for a task, by name.

    Raises:
        InputError: a task for which there is none.
    """
    if name == "sums":
        return list(STRATEGIES)
    if name != "reasoning_gym":
        raise InputError("task.name", f"must be 'sums' or 'reasoning_gym', got {name!r}.")
    dataset = params.get("dataset")
    if dataset not in WORKED:
        raise InputError(
            "task.params.dataset", f"must be one of {', '.join(sorted(WORKED))}, got {dataset!r}."
        )
    return list(WORKED[dataset])


def task_of(config: PretrainConfig) -> Task:
    """The task that ``config`` pre-trains for.

    Raises:
        InputError: its parameters cannot be used.
    """
    try:
        return load_task(config.task.name, **config.task.params)
    except InputError as error:
        raise InputError(f"task.params.{error.field}", error.message) from None


def make_teacher(task: Task, seed: int) -> Teacher:
    """A teacher of a task, who teaches no held-out problem."""
    if isinstance(task, Sums):
        return _teach_sums(task)
    assert isinstance(task, ReasoningGym)
    return _teach_reasoning(task, task.training_stream(seed))


def draw_lessons(
    rng: random.Random, config: PretrainConfig, teacher: Teacher, count: int
) -> list[Lesson]:
    """So many lessons, their strategies drawn from the mixture of ``config``."""
    names = list(config.strategies)
    chosen = rng.choices(names, weights=[config.strategies[k] for k in names], k=count)
    return [teacher(name, rng) for name in chosen]


def _teach_sums(task: Sums) -> Teacher:
    def teach(name: str, rng: random.Random) -> Lesson:
        terms = draw_terms(rng, task.smallest, task.largest)
        while is_held_out(terms):
            terms = draw_terms(rng, task.smallest, task.largest)
        return Lesson(problem_of(terms).prompt, STRATEGIES[name](terms, rng))

    return teach


def _teach_reasoning(task: ReasoningGym, entries: Iterator[dict[str, Any]]) -> Teacher:
    strategies = WORKED[task.dataset]

    def teach(name: str, rng: random.Random) -> Lesson:
        entry = next(entries)
        prompt = task.template.replace("{problem}", entry["question"])
        return Lesson(prompt, strategies[name](entry, rng))

    return teach
