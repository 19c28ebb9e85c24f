"""One run under the monitor: its excesses step by step, its accuracy, and where that had halved."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.lab.warning.plan import RunPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from capo.core.early_warning import WarningConstants
    from capo.lab.evaluate import Evaluation

HALF = 0.5
AFTERMATH = 3  # evaluations after the halving: what comes then is of no interest
PROBLEMS = 256


@dataclass(frozen=True)
class Watched:
    """What a run showed.

    Attributes:
        group, preset, seed, settings: as planned.
        steps: optimizer steps taken.
        excess: by optimizer step, None where there is none (a learning rate of 0).
        accuracy: ``[step, accuracy]`` of every evaluation.
    """

    group: str
    preset: str
    seed: int
    settings: dict[str, Any]
    steps: int
    excess: list[float | None]
    accuracy: list[tuple[int, float]]

    @property
    def peak(self) -> float:
        """The best accuracy before it halved, if it did."""
        until = self.halved if self.halved is not None else math.inf
        return max(value for step, value in self.accuracy if step <= until)

    @property
    def halved(self) -> int | None:
        """The first step after which the accuracy is below half of its peak so far."""
        peak = 0.0
        for step, value in self.accuracy:
            peak = max(peak, value)
            if value < HALF * peak:
                return step
        return None

    def warned(self, constants: WarningConstants) -> int | None:
        """The step after which the first warning is raised."""
        from capo.core.early_warning import EarlyWarning

        watch = EarlyWarning(constants)
        for step, excess in enumerate(self.excess, start=1):
            if excess is not None and watch.feed(excess):
                return step
        return None

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Watched:
        """What :meth:`to_dict` gave."""
        return cls(**{**row, "accuracy": [(int(s), float(a)) for s, a in row["accuracy"]]})


def watch_run(plan: RunPlan) -> Watched:
    """Train as planned, under the monitor, until the accuracy has halved or the run is over."""
    from capo import CurvatureMonitor
    from capo.lab.ingredients import prepare
    from capo.lab.run import make_trainer, measure_of, quiet_libraries, threads
    from capo.lab.rundir import RunDirectory
    from capo.lab.sources import load_config

    config = load_config(
        plan.preset,
        [f"run.seed={plan.seed}", "run.threads=1", f"eval.problems={PROBLEMS}", *plan.overrides],
    )
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder, threads(1):
        ingredients = prepare(config, RunDirectory(Path(folder)))
        ingredients.arguments.save_strategy = "no"
        follower = _follower(plan.evaluate_every, measure_of(config, ingredients))
        trainer = make_trainer(config, ingredients, callbacks=[follower])
        monitor = CurvatureMonitor(trainer)
        follower.monitor = monitor
        trainer.train()
    return Watched(
        plan.group,
        plan.preset,
        plan.seed,
        plan.settings,
        len(follower.excess),
        follower.excess,
        follower.accuracy,
    )


def _follower(every: int, measure: Callable[[], Evaluation]) -> Any:
    from transformers import TrainerCallback

    class Follower(TrainerCallback):  # type: ignore[misc]
        """Writes down the excess of every step and evaluates; ends a run that has collapsed."""

        def __init__(self) -> None:
            self.monitor: Any = None
            self.excess: list[float | None] = []
            self.accuracy: list[tuple[int, float]] = []
            self.peak = 0.0
            self.after = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.evaluate(0)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "train_runtime" in (kwargs.get("logs") or {}):
                return
            excess = self.monitor.readings.get("excess", math.nan)
            self.excess.append(float(f"{excess:.4g}") if math.isfinite(excess) else None)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.evaluate(state.global_step)
            control.should_training_stop |= self.after >= AFTERMATH

        def evaluate(self, step: int) -> None:
            accuracy = measure().accuracy
            self.accuracy.append((step, accuracy))
            self.peak = max(self.peak, accuracy)
            if self.after or accuracy < HALF * self.peak:
                self.after += 1

    return Follower()
