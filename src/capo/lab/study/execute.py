"""One run of the study in this process: `capo.lab.run`'s trainer, kept in memory.

No run directory is made: hundreds of short runs leave one small file each.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from capo.lab.config import Config
from capo.lab.evaluate import Evaluation
from capo.lab.ingredients import prepare
from capo.lab.run import make_trainer, measure_of, quiet_libraries, threads
from capo.lab.rundir import RunDirectory
from capo.lab.study.jobs import Arm, Job
from capo.lab.study.outcome import Ended, Evaluated, Outcome, has_collapsed, reached

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

KEPT = ("loss", "grad_norm", "learning_rate", "reward", "entropy", "kl", "completions/mean_length")
KEPT_PREFIXES = ("capo/trust/", "capo/rejection_rate", "rival/", "clip_ratio/region_mean")


def execute(job: Job, provenance: dict[str, Any]) -> Outcome:
    """Make the run.

    Raises:
        InputError: its configuration cannot be used.
    """
    arm, config, began = job.arm, job.config(), time.monotonic()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="capo-study-") as folder, threads(config.run.threads):
        ingredients = prepare(config, RunDirectory(Path(folder)))
        ingredients.arguments.save_strategy = SaveStrategy.NO
        watch = Watch(config, arm, measure_of(config, ingredients))
        trainer = make_trainer(config, ingredients, callbacks=[watch])
        try:
            trainer.train()
        except (RuntimeError, ValueError) as error:
            if not _is_divergence(trainer.model, error):
                raise
            watch.ended = "diverged"
    return Outcome(
        stage=arm.stage,
        arm=arm.name,
        seed=job.seed,
        fingerprint=job.fingerprint(),
        preset=arm.preset,
        overrides=arm.overrides,
        completions_per_step=config.training.completions_per_step,
        learning_rate=config.training.learning_rate,
        target=arm.target,
        spacing=arm.spacing,
        evaluations=tuple(watch.evaluations),
        completions=config.completions_after(trainer.state.global_step),
        horizon=config.completions_after(config.steps),
        ended=watch.ended,
        metrics=tuple(watch.rows),
        seconds=round(time.monotonic() - began, 2),
        provenance=provenance,
    )


class Watch(TrainerCallback):  # type: ignore[misc]
    """Evaluates when it is time, keeps the metrics that matter, and ends the run as the arm says.

    Where completions are used several times, the policy is looked at after the last pass over
    them, when it is what these completions made of it.
    """

    def __init__(self, config: Config, arm: Arm, evaluate: Callable[[], Evaluation]) -> None:
        """Nothing is measured yet."""
        self.config = config
        self.arm = arm
        self.evaluate = evaluate
        self.evaluations: list[Evaluated] = []
        self.rows: list[dict[str, Any]] = []
        self.ended: Ended = "steps"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate the base policy."""
        self._evaluate(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate if it is time; end the run if there is a reason."""
        step = state.global_step
        if step % self.config.algorithm.num_iterations:
            return
        if self._due(step):
            self._evaluate(step)
        ended = self._reason(step)
        if ended is not None:
            self.ended = ended
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Keep the step's row."""
        if not logs or "train_runtime" in logs:  # the trainer's farewell is no step
            return
        step = state.global_step
        row: dict[str, Any] = {"step": step, "completions": self.config.completions_after(step)}
        row |= {key: _short(value) for key, value in logs.items() if _is_kept(key)}
        self.rows.append(row)

    def _due(self, step: int) -> bool:
        before = step - self.config.algorithm.num_iterations
        now, then = (self.config.completions_after(s) // self.arm.spacing for s in (step, before))
        return now > then or step == self.config.steps

    def _evaluate(self, step: int) -> None:
        result = self.evaluate()
        completions = self.config.completions_after(step)
        self.evaluations.append(
            Evaluated(step, completions, result.accuracy, round(result.stderr, 5))
        )

    def _reason(self, step: int) -> Ended | None:
        arm, batch = self.arm, self.config.training.completions_per_step
        if step >= self.config.steps:
            return None  # it ends by itself
        if "target" in arm.stop_at and reached(self.evaluations, batch, arm.spacing, arm.target):
            return "target"
        if "collapse" in arm.stop_at and has_collapsed(self.evaluations):
            return "collapse"
        if arm.budget is not None and self.config.completions_after(step) >= arm.budget:
            return "budget"
        return None


def _is_kept(key: str) -> bool:
    return key in KEPT or key.startswith(KEPT_PREFIXES)


def _short(value: Any) -> Any:
    """Six digits, which is more than a figure shows and a third of the file."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _is_divergence(model: Any, error: Exception) -> bool:
    """Whether a run failed because its policy is no distribution any more."""
    import torch

    if "probability tensor" in str(error):  # what torch says of sampling from infinite logits
        return True
    return any(
        not math.isfinite(float(parameter.detach().abs().sum(dtype=torch.float64)))
        for parameter in model.parameters()
    )
