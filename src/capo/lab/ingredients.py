"""What a run needs and what can be wrong with it: policy, task, problems, arguments of the trainer."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError
from capo.lab.arguments import trainer_arguments
from capo.lab.config import Config, check_vocabulary
from capo.lab.devices import check_device
from capo.lab.rundir import RunDirectory

if TYPE_CHECKING:
    from capo.integrations.trl import CAPOConfig
    from capo.policies import Policy
    from capo.tasks import Problem, Task


@dataclass(frozen=True)
class Ingredients:
    """Everything that a run needs and that can be wrong, loaded before anything is written."""

    policy: Policy
    task: Task
    train_problems: list[Problem]
    eval_problems: list[Problem]
    arguments: CAPOConfig


def prepare(config: Config, directory: RunDirectory) -> Ingredients:
    """Load the policy, the task and its problems, and check them against ``config``.

    Raises:
        InputError: anything that does not fit.
    """
    from capo.policies import load_policy

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("WORLD_SIZE", "capo train runs in one process, got more than 1.")
    check_device(config)
    task = load_configured_task(config.task.name, config.task.params)
    policy = load_policy(config.policy.path)
    check_vocabulary(config, policy.model.get_output_embeddings().weight.shape[0])
    eval_problems = _problems(task.eval_problems, config.eval.problems, config.eval.seed, "eval")
    return Ingredients(
        policy=policy,
        task=task,
        train_problems=_training_problems(config, task, policy),
        eval_problems=eval_problems,
        arguments=trainer_arguments(config, directory, task),
    )


def load_configured_task(name: str, params: dict[str, Any]) -> Task:
    """The task of a configuration, with errors named by its keys.

    Raises:
        InputError: ``task.name`` or ``task.params.…``.
    """
    from capo.tasks import load_task

    try:
        return load_task(name, **params)
    except InputError as error:
        field = "task.name" if error.field == "task" else f"task.params.{error.field}"
        raise InputError(field, error.message) from None


def _training_problems(config: Config, task: Task, policy: Policy) -> list[Problem]:
    """The problems of every step, in the order of training: exactly as many as the run uses.

    The order is laid out here rather than left to the trainer's sampler, whose shuffling of a
    second epoch depends on whether the first ran in the same process.
    """
    training = config.training
    prompts_per_step = training.completions_per_step // training.num_generations
    needed = prompts_per_step * -(-config.steps // config.algorithm.num_iterations)
    wanted = min(needed, config.task.train_problems or needed)
    pool = _problems(task.train_problems, wanted, config.run.seed, "task.train")
    if training.max_prompt_tokens is not None:
        limit, tokenizer = training.max_prompt_tokens, policy.tokenizer
        pool = [p for p in pool if len(tokenizer(p.prompt)["input_ids"]) <= limit]
        if not pool:
            raise InputError(
                "training.max_prompt_tokens", f"no problem's prompt has at most {limit} tokens."
            )
    rng = random.Random(f"order {config.run.seed}")
    problems: list[Problem] = []
    while len(problems) < needed:
        problems += rng.sample(pool, len(pool))
    return problems[:needed]


def _problems(
    draw: Callable[[int, int], list[Problem]], n: int, seed: int, section: str
) -> list[Problem]:
    try:
        return draw(n, seed)
    except InputError as error:
        separator = "_" if section == "task.train" else "."
        raise InputError(f"{section}{separator}problems", error.message) from None


def accuracy_reward(task: Task) -> Callable[..., list[float]]:
    """The task's grader as a reward function of TRL, with the noise that the task may have."""
    from capo.tasks import Problem, grade_many
    from capo.tasks.sums import Sums

    def accuracy(
        prompts: list[str], completions: list[str], answer: list[str], id: list[str], **_: Any
    ) -> list[float]:
        problems = [Problem(*columns) for columns in zip(prompts, answer, id, strict=True)]
        if isinstance(task, Sums) and task.reward_noise:
            pairs = enumerate(zip(completions, problems, strict=True))
            return [task.training_reward(text, problem, draw) for draw, (text, problem) in pairs]
        return grade_many(task, completions, problems)

    return accuracy
