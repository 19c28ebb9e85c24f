"""One run: from a configuration to a directory that can be compared, continued and repeated."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError
from capo.lab.config import (
    Config,
    RuleTable,
    ThresholdsTable,
    TokenRuleTable,
    check_vocabulary,
    parse_config,
)
from capo.lab.devices import check_device, precision
from capo.lab.monitoring import attach_monitor, monitored_every
from capo.lab.progress import Progress
from capo.lab.provenance import collect_provenance, dirty_diff
from capo.lab.recording import ABOUT, Recording, make_recording
from capo.lab.rundir import OUT_OF_TIME, RunDirectory, write_text

if TYPE_CHECKING:
    import torch

    from capo.integrations.trl import CAPOConfig, CAPOTrainer
    from capo.lab.evaluate import Evaluation
    from capo.lab.recorder import StopRequest
    from capo.policies import Policy
    from capo.tasks import Problem, Task


_DEFAULT = "its default"


class Interrupted(Exception):  # noqa: N818 - the run is not in error
    """The run was asked to stop, and stopped where it can be continued.

    Attributes:
        output: the run directory.
        step: optimizer steps taken.
        steps: optimizer steps in all.
    """

    def __init__(self, output: Path, step: int, steps: int) -> None:
        """Say how to continue."""
        super().__init__(
            f"interrupted after step {step} of {steps}; "
            f"continue with: capo train --resume --output {output}"
        )
        self.output, self.step, self.steps = output, step, steps


@dataclass(frozen=True)
class Ingredients:
    """Everything that a run needs and that can be wrong, loaded before anything is written."""

    policy: Policy
    task: Task
    train_problems: list[Problem]
    eval_problems: list[Problem]
    arguments: CAPOConfig


def train(
    config: Config,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    tokens: int | None = None,
    monitor: int | None = None,
) -> Path:
    """Train a policy as ``config`` says and write the run to ``output``.

    SIGINT and SIGTERM finish the step, save and raise `Interrupted`. A run that was stopped or
    killed continues with ``resume`` to the weights that it would have reached undisturbed. One that has
    used up ``run.max_seconds`` is finished, whatever steps are left.

    Args:
        config: resolved.
        output: the run directory, to be made.
        overwrite: whether a run that is there already may be replaced.
        resume: continue the run that is there; its configuration must be ``config``.
        progress: hears of every step and evaluation.
        tokens: record the tokens of every so many steps, for `capo inspect`; by default every step of
            a run that judges its tokens, and none of another. It changes no weight.
        monitor: look at every so many steps with a `capo.CurvatureMonitor`, whose readings are logged and
            whose warnings are told. It changes no weight; a run that is continued goes on as it began.

    Returns:
        the run directory.

    Raises:
        InputError: anything that cannot be used; nothing has been written then.
        Interrupted: a signal stopped the run.
    """
    directory, progress = RunDirectory(Path(output)), progress or Progress()
    if resume:
        check_resumable(directory, config)
        if directory.state == "finished":
            return directory.path
    else:
        directory.check_free(overwrite)
    recording = make_recording(config, tokens, directory if resume else None)
    if resume and monitor is None:
        monitor = monitored_every(directory)
    quiet_libraries()
    ingredients = prepare(config, directory)
    with directory.locked(), threads(config.run.threads), precision(config):
        _begin(directory, config, resume)
        try:
            _run(config, directory, ingredients, progress, recording, monitor)
        except Interrupted as interrupted:
            directory.set_status("interrupted", interrupted.step, config.steps, str(interrupted))
            raise
        except BaseException as error:
            step = int(directory.read("status.json").get("step", 0))
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            message = f"{type(error).__name__}: {error}"
            directory.set_status(state, step, config.steps, message)  # type: ignore[arg-type]
            raise
        finally:
            progress.stopped()
    return directory.path


def recorded_config(output: str | Path) -> Config:
    """The configuration of the run in ``output``.

    Raises:
        InputError: there is no run.
    """
    directory = RunDirectory(Path(output))
    if not directory.exists:
        raise InputError("output", f"there is no run to resume in {str(directory.path)!r}.")
    return parse_config(directory.read("config.json"))


def check_resumable(directory: RunDirectory, config: Config) -> None:
    """Refuse to continue a run with another configuration.

    Raises:
        InputError: there is no run, its step rule keeps no state in checkpoints, or the first key in
            which the two differ.
    """
    if config.rival.rule != "none":
        raise InputError("rival.rule", "a run with a rule of others cannot be resumed.")
    recorded = recorded_config(directory.path).identity()
    for section, values in config.identity().items():
        for key in dict.fromkeys([*values, *recorded[section]]):
            value, before = (one.get(key, _DEFAULT) for one in (values, recorded[section]))
            if before != value:
                raise InputError(
                    f"{section}.{key}",
                    f"the run in {str(directory.path)!r} has {before!r} and "
                    f"cannot be resumed with {value!r}.",
                )


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
        arguments=_trainer_arguments(config, directory, task),
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


def quiet_libraries() -> None:
    """No telemetry, no banners, no bars but ours."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed sets its logger's level when accelerate imports it, and warns that no GPU is there.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # What these libraries plan to rename among themselves is no news to a reader of a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|accelerate")


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute on so many CPU threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(directory: RunDirectory, config: Config, resume: bool) -> None:
    if resume:
        directory.rewind(directory.last_checkpoint()[0])
        provenance = directory.read("provenance.json") or collect_provenance()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        provenance["resumed"] = [*provenance.get("resumed", []), now]
    else:
        directory.clear()
        provenance = collect_provenance()
        diff = dirty_diff()
        if diff:
            write_text(directory.path / "dirty.diff", diff + "\n")
    directory.write("provenance.json", provenance)
    directory.set_status("running", directory.last_checkpoint()[0], config.steps)
    directory.write("config.json", config.model_dump(mode="json"))  # last: now it is a run


def _run(
    config: Config,
    directory: RunDirectory,
    ingredients: Ingredients,
    progress: Progress,
    recording: Recording,
    monitor: int | None,
) -> None:
    from capo.lab.recorder import stop_on_signals

    with stop_on_signals(progress) as stop:
        trainer = _build_trainer(config, directory, ingredients, progress, stop, recording, monitor)
        _, checkpoint = directory.last_checkpoint()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < config.steps and not stop.out_of_time:
        raise Interrupted(directory.path, step, config.steps)
    aside = directory.path / ".final.tmp"
    trainer.model.save_pretrained(aside)
    ingredients.policy.tokenizer.save_pretrained(aside)
    aside.replace(directory.final)
    directory.set_status("finished", step, config.steps, OUT_OF_TIME if stop.out_of_time else "")


def _build_trainer(
    config: Config,
    directory: RunDirectory,
    ingredients: Ingredients,
    progress: Progress,
    stop: StopRequest,
    recording: Recording,
    monitor: int | None,
) -> CAPOTrainer:
    from capo.lab.ledger import Ledger
    from capo.lab.recorder import Recorder
    from capo.lab.records import TokenWriter, write_vocabulary

    tokenizer = ingredients.policy.tokenizer
    tokens = TokenWriter(directory.tokens, recording.wants) if recording.every else None
    if tokens is not None:
        write_vocabulary(directory.tokens, tokenizer)
        directory.write(ABOUT, recording.about())
    ledger = Ledger(directory, tokenizer.decode) if config.capo.ledger is not None else None
    recorder = Recorder(
        config,
        directory,
        evaluate=measure_of(config, ingredients),
        progress=progress,
        stop=stop,
        tokens=tokens,
        ledger=ledger,
    )
    watch = None
    if recording.watches and tokens is not None:
        watch, arguments = recording.watch, ingredients.arguments
        arguments.step_model, arguments.moments = recording.step_model, recording.moments
    trainer = make_trainer(
        config,
        ingredients,
        callbacks=[recorder],
        token_callbacks=[tokens] if tokens is not None else [],
        shift_callbacks=[ledger] if ledger is not None else [],
        token_watch=watch,
    )
    if monitor is not None:
        recorder.monitor = attach_monitor(trainer, monitor)
    return trainer


def measure_of(config: Config, ingredients: Ingredients) -> Callable[[], Evaluation]:
    """Evaluates the policy in training as ``[eval]`` says."""
    from capo.lab.evaluate import evaluate

    return partial(
        evaluate,
        ingredients.policy,
        ingredients.task,
        ingredients.eval_problems,
        seed=config.eval.seed,
        max_completion_tokens=ingredients.arguments.max_completion_length,
    )


def make_trainer(
    config: Config, ingredients: Ingredients, *, callbacks: list[Any], **listeners: Any
) -> CAPOTrainer:
    """The trainer of a run, with these callbacks; ``listeners`` are `CAPOTrainer`'s own."""
    from transformers import PrinterCallback

    from capo.integrations.trl import CAPOTrainer
    from capo.lab.rivals import attach_rival

    if config.training.optimizer == "momentum":  # TRL knows SGD without momentum only
        listeners["optimizers"] = (_momentum(config, ingredients), None)
    trainer = CAPOTrainer(
        model=ingredients.policy.model,
        reward_funcs=accuracy_reward(ingredients.task),
        args=ingredients.arguments,
        train_dataset=_dataset(ingredients.train_problems),
        processing_class=ingredients.policy.tokenizer,
        callbacks=callbacks,
        **listeners,
    )
    trainer.remove_callback(PrinterCallback)
    attach_rival(trainer, config.rival)
    return trainer


def _momentum(config: Config, ingredients: Ingredients) -> torch.optim.Optimizer:
    import torch

    training = config.training
    return torch.optim.SGD(
        ingredients.policy.model.parameters(),
        lr=training.learning_rate,
        momentum=training.adam_betas[0],
        weight_decay=training.weight_decay,
    )


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


def _dataset(problems: list[Problem]) -> Any:
    from datasets import Dataset

    columns = ("prompt", "answer", "id")
    return Dataset.from_dict({name: [getattr(p, name) for p in problems] for name in columns})


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


def _trainer_arguments(config: Config, directory: RunDirectory, task: Task) -> CAPOConfig:
    """The whole configuration in TRL's terms."""
    from capo.integrations.trl import CAPOConfig

    training, algorithm, capo = config.training, config.algorithm, config.capo
    assert training.micro_batch is not None
    selection: Any = capo.selection
    if selection is None and capo.watch:
        selection = ThresholdsTable()  # no threshold: every token is judged and kept
    if isinstance(selection, ThresholdsTable):
        selection = selection.model_dump(mode="json")
    elif isinstance(selection, RuleTable):
        selection = selection.model_dump(mode="json", exclude_none=True)
    elif isinstance(selection, TokenRuleTable):
        selection = selection.spec()
    return CAPOConfig(
        output_dir=str(directory.checkpoints),
        seed=config.run.seed,
        # batches
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.completions_per_step // training.micro_batch,
        generation_batch_size=training.completions_per_step,
        num_generations=training.num_generations,
        max_completion_length=training.max_completion_tokens or task.max_completion_tokens,
        max_steps=config.steps,
        shuffle_dataset=False,
        temperature=training.temperature,
        top_k=training.top_k or 0,
        # optimizer
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        optim={"adamw": "adamw_torch"}.get(training.optimizer, "sgd"),
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        adam_epsilon=training.adam_eps,
        weight_decay=training.weight_decay,
        bf16=training.bf16,
        use_cpu=config.run.device == "cpu",
        gradient_checkpointing=training.gradient_checkpointing,
        # loss
        loss_type=algorithm.loss_type,
        scale_rewards=algorithm.scale_rewards,
        epsilon=algorithm.epsilon,
        epsilon_high=algorithm.epsilon_high,
        delta=algorithm.delta,
        beta=algorithm.beta,
        num_iterations=algorithm.num_iterations,
        importance_sampling_level=algorithm.importance_sampling_level,
        top_entropy_quantile=algorithm.top_entropy_quantile,
        # selection
        selection=selection,
        step_model=capo.step_model,
        moments=capo.moments,
        fisher=capo.fisher,
        curvature_top_k=capo.top_k,
        renormalize=capo.renormalize,
        grad_scale=capo.grad_scale,
        depth=capo.depth,
        advantage_baseline="none" if algorithm.name == "reinforce" else "group",
        trust_region=None if capo.ledger is None else capo.ledger.spec(),
        # housekeeping
        save_strategy="steps",
        save_steps=training.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is news
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
