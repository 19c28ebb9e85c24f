"""The trust region in TRL: between the clipped gradient and the optimizer's step.

The order at every optimizer step is: accumulate, (unscale,) clip, foresee the policy shift, shorten the
step by lowering the learning rates for this one step, step, restore the learning rates, measure, and
only then the scheduler. Every torch optimizer's update is proportional to its learning rate, decoupled
weight decay included, so that this shortens the step and changes no direction and no moment.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from capo.core.trust_region import (
    Calibration,
    Divergence,
    Followed,
    Probe,
    StepChoice,
    StepLength,
    TrustRegion,
    auto_policy_shift,
)
from capo.integrations._trl_batch import (
    ShiftRecord,
    StepBatch,
    core_head,
    eval_mode,
    head_logits,
    make_batch,
    shift_record,
)
from capo.integrations._trl_collect import Collector
from capo.integrations._trl_deep import DeepPass, Quadratic
from capo.integrations._trl_ledger import Pending, ledger
from capo.integrations._trl_sharded import Engine
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class StepControl:
    """Foresees, shortens and measures every optimizer step of a trainer.

    With several processes each tries the step on its own completions, and every mean is over those of
    all, so that all take the same part of the step.

    Args:
        region: what to do.
        iterations: optimizer steps on the same completions.
        seed: of the choice of completions; no other random numbers are touched.
        shift_callbacks: called with a :class:`ShiftRecord` after every step.
        every_completion: whether every completion has a gradient, whatever its advantage.
        world: the processes.

    Attributes:
        last_policy_shift: measured, of the last step that was measured (nats a token), or None.
        dropped: whether the optimizer was left without gradients: neither weights nor moments change.
    """

    def __init__(
        self,
        region: TrustRegion,
        *,
        iterations: int,
        seed: int,
        shift_callbacks: list[Callable[[ShiftRecord], None]],
        every_completion: bool = False,
        world: World | None = None,
    ) -> None:
        self.region = region
        self.iterations = iterations
        self.shift_callbacks = shift_callbacks
        self.world = world or World()
        self.followed = Followed()
        self.length = StepLength(region.cruise)
        self.calibration = Calibration()
        self.last_policy_shift: float | None = None
        self.dropped = False
        self.every_completion = every_completion
        self._collector = Collector(seed, self.world)
        self._lrs: list[Any] | None = None
        self._pending: Pending | None = None

    # Before the step

    def begin(self) -> None:
        """Training begins, perhaps after it was interrupted in the middle of a step."""
        self._collector.forget()
        self._pending = self._lrs = None
        self.dropped = False

    def collect(
        self,
        inputs: dict[str, Any],
        mask: Bool[Tensor, "B T"],
        hidden: Float[Tensor, "B T d"],
        *,
        step: int,
        accumulation_steps: int,
        deep: DeepPass | None = None,
    ) -> None:
        """Keep some completions of a micro-batch of the coming step.

        With ``step_length="quadratic"``, `deep` is the micro-batch between loss and backward.
        """
        self._collector.collect(
            self.region,
            inputs,
            mask,
            hidden,
            step=step,
            accumulation_steps=accumulation_steps,
            every_completion=self.every_completion,
            deep=deep,
        )

    def before_step(
        self,
        engine: Engine,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        exact_hidden: bool,
    ) -> None:
        """Choose the factor on the step that the gradients propose, and set the learning rates to it.

        Args:
            engine: policy and optimizer, which is about to step.
            autocast: the trainer's mixed precision.
            exact_hidden: whether another forward pass of the same tokens gives the training pass's
                hidden states to rounding far below a step's effect (float32 without autocast or
                dropout), so that these can be used again.
        """
        now, self.dropped = self._collector.take(), False
        counted = sum(int(sample.mask.sum()) for sample in now.samples)
        device = now.micro_batches[0].device if now.micro_batches else torch.device("cpu")
        if not self.world.total_int(counted, device):
            if self.region.scales:  # mere momentum, of a length that nothing here could foresee
                self._drop(engine)
            return
        completions = self.world.total_int(now.completions, device)

        def hidden() -> Tensor:  # the head's own sums are done in full precision
            with torch.no_grad(), eval_mode(engine.policy), autocast():
                return batch.run(engine)

        with engine.reading():
            head = engine.head()
            lm_head = core_head(head)
            batch = make_batch(now.samples, lm_head, self.world)
            if not exact_hidden:
                batch = batch.with_hidden(hidden(), lm_head)
            lr = max(float(group["lr"]) for group in engine.groups)
            budget = self._budget(batch, self.followed.step(completions, _momentum(engine)))
            last = self._collector.last_step(lm_head, exact_hidden)
            self.length.learns = completions > 0
            if self.region.predictor == "measured" and last is not None and budget is not None:
                # The same completions again: what the last step did foretells what this one will.
                kappa = last[1] * lr**2
                choice = self.length.choose(lambda scale: kappa * scale**2, budget, lr)
                pending = Pending(choice, None)
            else:
                probe = Probe(
                    engine.backbone,
                    hidden,
                    lm_head,
                    head.parameter,
                    engine.proposed_step(),
                    batch.reference,
                    batch.hidden,
                    batch.weights,
                    None if self.world.alone else self.world.total,
                )
                pending = self._choose(probe, batch, budget, lr)
        pending.batch, pending.budget = batch, budget
        if now.quadratics and budget is not None:
            both = torch.tensor(now.quadratic, dtype=torch.float64, device=device)
            pending.shorten(Quadratic(*self.world.total(both).tolist()).maximiser)
        pending.last_policy_shift = None if last is None else last[0]
        self._pending = pending
        length = pending.choice.scale * lr
        if length > 0 and self.iterations > 1:
            self._collector.remember(batch, now.micro_batches, length)
        self._lrs = _scale_learning_rates(engine, pending.choice.scale)
        if pending.choice.scale == 0.0:  # no finite step: 0 · NaN would still be NaN
            self._drop(engine)

    def _drop(self, engine: Engine) -> None:
        engine.drop_gradients()
        self.dropped = True

    def _budget(self, batch: StepBatch, completions: float) -> float | None:
        shift = self.region.policy_shift
        if shift == "auto":
            return auto_policy_shift(batch.entropy, completions, self.iterations, batch.mean_length)
        return shift

    def _choose(
        self,
        probe: Probe,
        batch: StepBatch,
        budget: float | None,
        lr: float,
    ) -> Pending:
        tried: dict[float, Divergence] = {}

        def measured(scale: float) -> float:
            tried[scale] = probe.after(scale)
            return probe.mean(tried[scale]).policy

        if self.region.predictor == "measured":
            if budget is None:
                choice = StepChoice(1.0, shift := measured(1.0), shift, 1, capped=False)
            else:
                choice = self.length.choose(measured, budget, lr)
            nearest = min(tried, key=lambda s: abs(s - choice.scale), default=0.0)
            predicted = 0.0
            if nearest:  # to first order from there
                predicted = probe.mean(tried[nearest]).objective * choice.scale / nearest
            return Pending(choice, predicted, divergence=tried.get(choice.scale))
        depth = 0 if self.region.predictor == "head" else self.region.depth
        divergence = probe.along(depth)
        raw = probe.mean(divergence)
        slope = _slope(probe, divergence)
        factor = self.calibration.factor if self.region.predictor == "head" else 1.0
        trial: Callable[[float], float] = measured
        if factor is not None:  # uncalibrated, the head knows no absolute size: measure instead
            curvature = raw.policy * factor

            def second_order(scale: float) -> float:
                return curvature * scale**2

            trial = second_order
        if budget is None:
            shift = trial(1.0)
            choice = StepChoice(1.0, shift, shift, probe.passes, capped=False)
        else:
            choice = self.length.choose(trial, budget, lr)
        s = choice.scale
        return Pending(choice, slope * s + (raw.objective - slope) * s * s, raw.policy)

    # After the step

    def restore(self, engine: Engine) -> None:
        """Give the learning rates back to the scheduler."""
        if self._lrs is not None:
            for group, lr in zip(engine.groups, self._lrs, strict=True):
                group["lr"] = lr
        self._lrs = None

    def discard(self) -> None:
        """Forget the step: the optimizer skipped it."""
        self._pending = None
        self._collector.take()  # where it was skipped before it was looked at

    @torch.no_grad()
    def after_step(
        self,
        engine: Engine,
        autocast: Callable[[], AbstractContextManager[Any]],
        step: int,
    ) -> dict[str, float]:
        """Measure the step that was taken, learn from it, and return the ledger's entries.

        A step that was tried at the very length that was taken has been measured already.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.batch is None:
            return {}
        if pending.objective is None:  # it will be seen in the next pass
            if pending.last_policy_shift is not None:
                self.last_policy_shift = pending.last_policy_shift
            return ledger(pending, pending.batch)
        batch = pending.batch
        divergence = pending.divergence
        if divergence is None:
            with eval_mode(engine.policy), engine.reading():
                with autocast():
                    hidden = batch.run(engine)
                lm_head = core_head(engine.head())
            divergence = batch.reference.to(head_logits(lm_head, hidden))
        measured = batch.mean(divergence.policy_shift)
        observed = batch.mean(divergence.objective_shift)
        self.last_policy_shift = measured
        if pending.raw is not None and self.region.predictor == "head":
            self.calibration.observe(pending.raw * pending.choice.scale**2, measured)
        for callback in self.shift_callbacks:
            callback(shift_record(batch, divergence, step))
        entries = {"measured_policy_shift": measured, "observed_objective_shift": observed}
        return ledger(pending, batch, entries)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from: plain numbers."""
        return {
            "trust_region": {
                "length": self.length.state_dict(),
                "followed": self.followed.state_dict(),
                "calibration": self.calibration.state_dict(),
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; one saved without a trust region starts anew."""
        own = state.get("trust_region")
        if own is not None:
            self.length.load_state_dict(own["length"])
            self.followed.load_state_dict(own["followed"])
            self.calibration.load_state_dict(own["calibration"])


def _slope(probe: Probe, divergence: Divergence) -> float:
    """First-order objective shift of the whole step: mean of ``A s``."""
    linear = divergence._replace(objective_shift=probe.reference.advantages * divergence.log_ratio)
    return probe.mean(linear).objective


def _momentum(engine: Engine) -> float:
    """Share of the first moment that the optimizer keeps from step to step."""
    group = engine.groups[0]
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum", 0.0))


def _scale_learning_rates(engine: Engine, scale: float) -> list[Any]:
    """Multiply every group's learning rate; returns what they were."""
    before = [group["lr"] for group in engine.groups]
    if scale != 1.0:
        for group in engine.groups:
            group["lr"] = group["lr"] * scale
    return before
