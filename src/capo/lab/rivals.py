"""Step rules of others, to be compared with: skip on spike, and the KL-adaptive learning rate.

Both act between the trainer's clipping of the gradient and the optimizer's step. What TRL has
already (the gradient clip, the PPO clip, the KL penalty) is not here.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from capo.lab.config import RivalSection

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from capo.integrations.trl import CAPOTrainer

FIRST_NORMS = 5  # gradient norms that a running median needs to mean something
ADAPTATION = 1.5  # factor on the learning rate, and
TOLERANCE = 2.0  # factor of the target either way before it is applied: Schulman's, as in rl_games

Log = Callable[[str, float], None]


class SkipOnSpike(TrainerCallback):  # type: ignore[misc]
    """No optimizer step where the gradient's norm leaps: weights and moments stay as they are.

    The norms of skipped steps enter the running median too, so that a lasting change of scale is
    not skipped for ever. A norm that is not finite is always skipped, and does not enter it.

    Args:
        factor: the largest norm that is let pass, in running medians.
        window: norms in the median, the last ones.
        norm: the norm of this step's gradient before it was clipped.
        log: takes the metric ``rival/skipped``, 1 or 0.
    """

    def __init__(
        self, factor: float, window: int, norm: Callable[[], float], log: Log | None = None
    ) -> None:
        """No norm is known yet."""
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=window)
        self.norm = norm
        self.log = log

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Take the gradients away if this step is a spike."""
        assert optimizer is not None
        norm = self.norm()
        spike = not math.isfinite(norm) or norm > self._limit()
        if math.isfinite(norm):
            self.norms.append(norm)
        if spike:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        if self.log is not None:
            self.log("rival/skipped", float(spike))

    def _limit(self) -> float:
        assert self.norms.maxlen is not None
        if len(self.norms) < min(FIRST_NORMS, self.norms.maxlen):
            return math.inf
        return self.factor * statistics.median(self.norms)


class KLAdaptive(TrainerCallback):  # type: ignore[misc]
    """The schedule's learning rate × a factor that follows the measured policy shift of the steps.

    Above twice the target, the next step's learning rate falls by 1.5; below half of it, it grows by
    1.5. It stays within its bounds, except where the schedule itself is outside of them. The
    optimizer has the scaled learning rate for the step alone; `restore` gives it the schedule's back.

    Args:
        target: policy shift of a step, in nats a token.
        bounds: smallest and largest learning rate.
        shift: the measured policy shift of the last step, None where there is none yet.
        log: takes the metrics ``rival/factor`` and ``rival/learning_rate``.
    """

    def __init__(
        self,
        target: float,
        bounds: tuple[float, float],
        shift: Callable[[], float | None],
        log: Log | None = None,
    ) -> None:
        """The first step has the schedule's own learning rate."""
        self.target = target
        self.bounds = bounds
        self.shift = shift
        self.log = log
        self.factor = 1.0
        self._scheduled: list[float] | None = None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Adapt to the last step; scale the learning rate of this one."""
        assert optimizer is not None
        shift = self.shift()
        if shift is not None:
            if not shift <= TOLERANCE * self.target:  # one that is no number counts as too large
                self.factor /= ADAPTATION
            elif shift < self.target / TOLERANCE:
                self.factor *= ADAPTATION
        scheduled = [float(group["lr"]) for group in optimizer.param_groups]
        first = scheduled[0]
        if first > 0:  # no wind-up: the factor is never more than what it does
            low, high = min(self.bounds[0], first), max(self.bounds[1], first)
            self.factor = min(max(self.factor, low / first), high / first)
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"]) * self.factor
        self._scheduled = scheduled
        if self.log is not None:
            self.log("rival/factor", self.factor)
            self.log("rival/learning_rate", first * self.factor)

    def restore(self, optimizer: Optimizer) -> None:
        """Give the optimizer the schedule's learning rate back, to the bit."""
        assert self._scheduled is not None, "a step begins before it ends"
        for group, learning_rate in zip(optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = learning_rate
        self._scheduled = None


class StepTaken(TrainerCallback):  # type: ignore[misc]
    """Calls back with the optimizer when it has stepped."""

    def __init__(self, then: Callable[[Optimizer], None]) -> None:
        """Do nothing yet."""
        self.then = then

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Call back."""
        assert optimizer is not None
        self.then(optimizer)


def attach_rival(trainer: CAPOTrainer, section: RivalSection) -> None:
    """Give the trainer the step rule of the configuration, if there is one.

    A rule acts before the trainer's own callbacks, which then see the step as it will be taken, and
    what it changed for the step alone is put back after them, who put back what they found.
    """

    def log(name: str, value: float) -> None:
        trainer._metrics["train"][name].append(value)

    def norm() -> float:
        assert trainer._grad_norm is not None, "max_grad_norm is positive, so the norm is taken"
        return trainer._grad_norm

    callbacks = trainer.callback_handler.callbacks
    if section.rule == "skip_on_spike":
        callbacks.insert(0, SkipOnSpike(section.spike_factor, section.spike_window, norm, log))
    elif section.rule == "kl_adaptive":
        bounds = (section.min_learning_rate, section.max_learning_rate)
        rule = KLAdaptive(section.target_shift, bounds, lambda: trainer.last_policy_shift, log)
        callbacks.insert(0, rule)
        trainer.add_callback(StepTaken(rule.restore))
