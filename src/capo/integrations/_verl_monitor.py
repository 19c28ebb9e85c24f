"""verl's actor under observation: everything is read, and nothing is touched."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from capo.core.diagnoses import Diagnoses
from capo.core.early_warning import FROZEN, EarlyWarning, StepReading
from capo.core.trust_region import auto_sequences
from capo.integrations._trl_judge import PolicyPass
from capo.integrations._trl_observe import StepObserver
from capo.integrations._trl_step import StepModel, keeps_moments
from capo.integrations._verl_options import Options

if TYPE_CHECKING:
    from capo.integrations._trl_sharded import Engine

Autocast = Callable[[], AbstractContextManager[Any]]

PREFIX = "capo/monitor/"

_log = logging.getLogger("capo.monitor")


class Monitor:
    """What :class:`capo.CurvatureMonitor` is for TRL: an observer, an early warning, three diagnoses.

    Args:
        options: the engine's, with `monitor` on.
        optimizer: whose step the tokens are judged by; Adam's moments are its own where it has the head's.
        fallback: `betas` and `eps` where the optimizer has none.
        trained: whether the head is.
        seed: of the choice of completions.
        rank: of the process; the first one warns.
    """

    def __init__(
        self,
        options: Options,
        optimizer: torch.optim.Optimizer,
        fallback: dict[str, Any],
        *,
        trained: bool,
        seed: int,
        rank: int,
    ) -> None:
        wanted = options.monitored()
        assert wanted is not None
        self.rank = rank
        self.sequences = wanted.sequences
        self.step_model = StepModel(
            "sgd" if isinstance(optimizer, torch.optim.SGD) else options.step_model,  # type: ignore[arg-type]
            "optimizer" if trained and keeps_moments(optimizer) else "simulated",
            options.grad_scale,
            fallback,
        )
        sequences = wanted.sequences if isinstance(wanted.sequences, int) else None
        self.observer = StepObserver(
            wanted.rule,
            self.step_model,
            options.curvature,
            sequences=sequences,
            depth=0,
            seed=seed,
        )
        self.diagnoses, self.warning = Diagnoses(1, deep=False), EarlyWarning()
        self.completions, self.iterations = 0, 1
        self._own = self._began = 0.0
        self._said: set[str] = set()

    def begin(self, completions: int, prompts: int, iterations: int) -> None:
        """A mini-batch is to come: its completions and prompts in all processes, and passes over it."""
        self.completions, self.iterations = completions, iterations
        if self.sequences == "auto":
            self.observer.sequences = auto_sequences(prompts)
        self._own, self._began = 0.0, time.perf_counter()

    def micro_batch(
        self, inputs: dict[str, Any], judged: PolicyPass, engine: Engine, step: int
    ) -> None:
        """A micro-batch between loss and backward pass."""
        began = time.perf_counter()
        # All processes look, or none: one that is missing would keep the others waiting for ever.
        numbers = (judged.hidden[judged.mask], judged.loss_gradient)
        odd = not all(bool(torch.isfinite(each).all()) for each in numbers)
        if engine.world.total_int(int(odd), judged.mask.device):
            self._say(
                f"step {step + 1} cannot be judged: its hidden states or its loss are not finite"
            )
        else:
            self.observer.micro_batch(inputs, judged, engine, step=step)
        self._own += time.perf_counter() - began

    def before_step(self, engine: Engine, autocast: Autocast, *, exact_hidden: bool) -> None:
        """The gradients are clipped."""
        began = time.perf_counter()
        self.observer.before_step(engine, autocast, exact_hidden=exact_hidden)
        self._own += time.perf_counter() - began

    def after_step(
        self,
        engine: Engine,
        autocast: Autocast,
        grad_norm: float,
        clip: float,
        *,
        step: int,
        growth: float,
    ) -> dict[str, float]:
        """The optimizer stepped: what there is to log of it."""
        began = time.perf_counter()
        readings = self.observer.after_step(engine, autocast, grad_norm, clip)
        now = time.perf_counter()
        self._own += now - began
        if not readings:
            return {}
        others = now - self._began - self._own
        readings["overhead"] = self._own / others if others > 0 else 0.0
        self._warn(step, readings, growth)
        for found in self.diagnoses.observe(step, readings, warned=self.warning.active):
            self._say(found.sentence)
        return {PREFIX + key: value for key, value in readings.items() if math.isfinite(value)}

    def _warn(self, step: int, readings: dict[str, float], growth: float) -> None:
        reading = StepReading(
            policy_shift=readings["measured_policy_shift"],
            entropy=readings["entropy"],
            completions=self.completions,
            iterations=self.iterations,
            mean_length=readings.pop("mean_length"),
            growth=growth,
        )
        warned = self.warning.observe(step, reading)
        if warned is not None:
            self._say(warned.sentence)
        readings["excess"] = reading.excess
        readings["warning_score"] = self.warning.score
        readings["warning"] = float(self.warning.active)

    def _say(self, sentence: str) -> None:
        if self.rank == 0 and sentence not in self._said:
            self._said.add(sentence)
            _log.warning("%s", sentence)

    def discard(self) -> None:
        """verl skipped the step."""
        self.observer.discard()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """For verl's checkpoint; simulated moments among it."""
        watch = {f"warning_{k}": v for k, v in self.warning.state_dict().items()}
        noise = {f"noise_{k}": v for k, v in self.observer.noise.state_dict().items()}
        return {**(self.step_model.state_dict() or {}), "monitor": {**watch, **noise}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from it; a checkpoint of a run without a monitor starts afresh."""
        own = state.pop("monitor", None)
        if own is not None:
            for prefix, part in (("warning_", self.warning), ("noise_", self.observer.noise)):
                part.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
                )
        if self.step_model.simulated and "exp_avg" in state:
            self.step_model.load_state_dict(state)


def foreseen_growth(scheduler: Any, steps: int) -> float:
    """How much the schedule still raises the learning rate within the horizon of the early warning.

    Args:
        scheduler: verl's, which ticks once an update of several optimizer steps.
        steps: optimizer steps taken.
    """
    factors = getattr(scheduler, "lr_lambdas", None)
    if not factors:
        return 1.0
    now = int(scheduler.last_epoch)
    ahead = math.ceil(FROZEN.horizon * max(now, 1) / max(steps, 1))
    coming = [factors[0](now + tick) for tick in range(min(ahead, FROZEN.horizon) + 1)]
    return max(coming) / coming[0] if coming[0] > 0 else 1.0
