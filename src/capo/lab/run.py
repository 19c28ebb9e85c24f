"""One run: from a configuration to a directory that can be compared, continued and repeated."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError
from capo.lab.config import Config, parse_config
from capo.lab.devices import precision
from capo.lab.ingredients import Ingredients, accuracy_reward, prepare
from capo.lab.monitoring import attach_monitor, monitored_every
from capo.lab.progress import Progress
from capo.lab.provenance import collect_provenance, dirty_diff
from capo.lab.recording import ABOUT, Recording, make_recording
from capo.lab.rundir import OUT_OF_TIME, RunDirectory, write_text

if TYPE_CHECKING:
    import torch

    from capo.integrations.trl import CAPOTrainer
    from capo.lab.evaluate import Evaluation
    from capo.lab.recorder import StopRequest
    from capo.tasks import Problem


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
    if directory.final.exists():  # of a run that was killed before it could say that it is finished
        shutil.rmtree(directory.final)
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


def _dataset(problems: list[Problem]) -> Any:
    from datasets import Dataset

    columns = ("prompt", "answer", "id")
    return Dataset.from_dict({name: [getattr(p, name) for p in problems] for name in columns})
