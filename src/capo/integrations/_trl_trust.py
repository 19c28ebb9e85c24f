"""The trust region in TRL: between the clipped gradient and the optimizer's step.

The order at every optimizer step is: accumulate, (unscale,) clip, foresee the policy shift, shorten the
step by lowering the learning rates for this one step, step, restore the learning rates, measure, and
only then the scheduler. Every torch optimizer's update is proportional to its learning rate, decoupled
weight decay included, so that this shortens the step and changes no direction and no moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from capo.core.proposed import ProposedStep
from capo.core.statistics.problem import Head
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
from capo.integrations._trl_deep import DeepPass, Quadratic
from capo.integrations._trl_head import LMHead, causal_lm
from capo.integrations._trl_sample import Sample, draw_sample

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

LEAST_SHARE = 0.1
"""Of the length that the budget allows, what the quadratic's maximiser leaves at least."""


class StepControl:
    """Foresees, shortens and measures every optimizer step of a trainer.

    Args:
        region: what to do.
        iterations: optimizer steps on the same completions.
        seed: of the choice of completions; no other random numbers are touched.
        shift_callbacks: called with a :class:`ShiftRecord` after every step.
    """

    def __init__(
        self,
        region: TrustRegion,
        *,
        iterations: int,
        seed: int,
        shift_callbacks: list[Callable[[ShiftRecord], None]],
        every_completion: bool = False,
    ) -> None:
        self.region = region
        self.iterations = iterations
        self.seed = seed
        self.shift_callbacks = shift_callbacks
        self.every_completion = every_completion
        self.followed = Followed()
        self.length = StepLength(region.cruise)
        self.calibration = Calibration()
        self.last_policy_shift: float | None = None
        self._samples: list[Sample] = []
        self._completions = 0
        self._lrs: list[Any] | None = None
        self._pending: _Pending | None = None
        self._micro_batches: list[Tensor] = []  # their completions, by which they are told apart
        self._previous: _Taken | None = None
        self._seen_again: list[Tensor] = []
        self._quadratics: list[Quadratic] = []

    # Before the step

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
        name = (self.seed * 1_000_003 + step) * 1_009 + len(self._micro_batches)
        generator = torch.Generator().manual_seed(name % (1 << 62))
        if deep is not None and self.region.step_length == "quadratic":
            self._quadratics.append(deep.quadratic(self.region.depth, generator))
        sequences = self.region.sequences
        assert sequences != "auto"  # the trainer knows how many prompts there are
        self._completions += self._informative(inputs["advantages"])
        self._see_again(inputs["completion_ids"], hidden)
        if sequences is not None:
            done = len(self._samples)
            sequences = sequences * (done + 1) // accumulation_steps - (
                sequences * done // accumulation_steps
            )
        if sequences == 0:
            sequences = 1
        self._samples.append(draw_sample(inputs, mask, hidden, sequences, generator))

    def _informative(self, advantages: Tensor) -> int:
        if self.every_completion:
            return advantages.size(0)
        return int((advantages != 0).reshape(advantages.size(0), -1).any(dim=1).sum())

    def _see_again(self, completions: Tensor, hidden: Float[Tensor, "B T d"]) -> None:
        """On completions that the last step was of, this pass shows for free what that step did."""
        previous, index = self._previous, len(self._micro_batches)
        self._micro_batches.append(completions)
        if previous is None:
            return
        before = previous.micro_batches
        if index >= len(before) or before[index] is not completions:
            self._previous = None
            return
        self._seen_again.append(previous.batch.samples[index].again(hidden))

    def _last_step(self, head: Head, exact_hidden: bool) -> tuple[float, float] | None:
        """Policy shift of the last step, and ``κ``: what that is of a unit of learning rate, squared.

        None where this batch is not the last step's, or training passes cannot be compared.
        """
        previous, self._previous = self._previous, None
        seen, self._seen_again = self._seen_again, []
        if previous is None or not exact_hidden or len(seen) != len(previous.micro_batches):
            return None
        batch = previous.batch
        divergence = batch.reference.to(head_logits(head, torch.cat(seen)[batch.chosen]))
        shift = float(divergence.policy_shift @ batch.weights / batch.weights.sum())
        return shift, shift / previous.length**2

    def before_step(
        self,
        policy: nn.Module,
        head: LMHead,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        exact_hidden: bool,
    ) -> None:
        """Choose the factor on the step that the gradients propose, and set the learning rates to it.

        Args:
            policy: the unwrapped model.
            head: its head.
            optimizer: the torch optimizer that is about to step.
            autocast: the trainer's mixed precision.
            exact_hidden: whether another forward pass of the same tokens gives the training pass's
                hidden states to rounding far below a step's effect (float32 without autocast), so that
                these can be used again.
        """
        samples, self._samples = self._samples, []
        micro_batches, self._micro_batches = self._micro_batches, []
        completions, self._completions = self._completions, 0
        quadratics, self._quadratics = self._quadratics, []
        if not any(bool(sample.mask.any()) for sample in samples):
            return
        backbone = causal_lm(policy).base_model
        lm_head = core_head(head)

        def hidden() -> Tensor:  # the head's own sums are done in full precision
            with torch.no_grad(), autocast():
                return batch.run(backbone)

        with eval_mode(policy):
            batch = make_batch(samples, lm_head)
            if not exact_hidden:
                batch = batch.with_hidden(hidden(), lm_head)
            probe = Probe(
                backbone,
                hidden,
                lm_head,
                head.parameter,
                ProposedStep(optimizer),
                batch.reference,
                batch.hidden,
                batch.weights,
            )
            lr = max(float(group["lr"]) for group in optimizer.param_groups)
            budget = self._budget(batch, self.followed.step(completions, _momentum(optimizer)))
            last = self._last_step(lm_head, exact_hidden)
            self.length.learns = completions > 0
            pending = self._choose(probe, batch, budget, lr, None if last is None else last[1])
        pending.batch, pending.budget = batch, budget
        if quadratics and budget is not None:
            pending.shorten(_maximiser(quadratics))
        pending.last_policy_shift = None if last is None else last[0]
        self._pending = pending
        length = pending.choice.scale * lr
        if length > 0 and self.iterations > 1:
            self._previous = _Taken(batch, micro_batches, length)
        self._lrs = _scale_learning_rates(optimizer, pending.choice.scale)
        if pending.choice.scale == 0.0:  # no finite step: 0 · NaN would still be NaN
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

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
        last_curvature: float | None,
    ) -> _Pending:
        tried: dict[float, Divergence] = {}

        def measured(scale: float) -> float:
            tried[scale] = probe.after(scale)
            return probe.mean(tried[scale]).policy

        if self.region.predictor == "measured":
            if last_curvature is not None and budget is not None:
                # The same completions again: what the last step did foretells what this one will.
                kappa = last_curvature * lr**2
                choice = self.length.choose(lambda scale: kappa * scale**2, budget, lr)
                return _Pending(choice, None)
            if budget is None:
                choice = StepChoice(1.0, shift := measured(1.0), shift, 1, capped=False)
            else:
                choice = self.length.choose(measured, budget, lr)
            nearest = min(tried, key=lambda s: abs(s - choice.scale), default=0.0)
            predicted = 0.0
            if nearest:  # to first order from there
                predicted = probe.mean(tried[nearest]).objective * choice.scale / nearest
            return _Pending(choice, predicted, divergence=tried.get(choice.scale))
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
        return _Pending(choice, slope * s + (raw.objective - slope) * s * s, raw.policy)

    # After the step

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the learning rates back to the scheduler."""
        if self._lrs is not None:
            for group, lr in zip(optimizer.param_groups, self._lrs, strict=True):
                group["lr"] = lr
        self._lrs = None

    def discard(self) -> None:
        """Forget the step: the optimizer skipped it."""
        self._pending = None

    @torch.no_grad()
    def after_step(
        self,
        policy: nn.Module,
        head: LMHead,
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
            return _ledger(pending, pending.batch)
        batch = pending.batch
        backbone = causal_lm(policy).base_model
        lm_head = core_head(head)
        divergence = pending.divergence
        if divergence is None:
            with eval_mode(policy), autocast():
                hidden = batch.run(backbone)
            divergence = batch.reference.to(head_logits(lm_head, hidden))
        share = batch.weights / batch.weights.sum()
        measured = float(divergence.policy_shift @ share)
        observed = float(divergence.objective_shift @ share)
        self.last_policy_shift = measured
        if pending.raw is not None and self.region.predictor == "head":
            self.calibration.observe(pending.raw * pending.choice.scale**2, measured)
        for callback in self.shift_callbacks:
            callback(shift_record(batch, divergence, step))
        entries = {"measured_policy_shift": measured, "observed_objective_shift": observed}
        return _ledger(pending, batch, entries)

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


@dataclass
class _Pending:
    """A step between its choice and its measurement."""

    choice: StepChoice
    objective: float | None  # predicted, of the step as taken, mean over tokens; None: not tried
    raw: float | None = None  # the predictor's uncalibrated shift of the whole step
    divergence: Divergence | None = None  # of the very step as taken, where it was tried
    batch: StepBatch | None = None
    budget: float | None = None
    maximiser: float | None = None  # of the objective shift, with step_length="quadratic"
    last_policy_shift: float | None = None  # of the step before, where this one's pass showed it

    def shorten(self, maximiser: float) -> None:
        """Take no more of the step than ``maximiser``."""
        self.maximiser = maximiser
        if (choice := self.choice).scale <= maximiser:
            return
        # Not to nothing: a batch whose halves disagree says little about the momentum's direction.
        scale = max(maximiser, LEAST_SHARE * choice.scale)
        share = scale / choice.scale
        self.choice = replace(choice, scale=scale, predicted=choice.predicted * share**2)
        self.objective = None if self.objective is None else self.objective * share
        self.divergence = None  # of another length


@dataclass(frozen=True)
class _Taken:
    """A step that was taken, to be seen again when its completions are."""

    batch: StepBatch
    micro_batches: list[Tensor]
    length: float  # scale × learning rate


def _maximiser(quadratics: list[Quadratic]) -> float:
    slopes, curvatures = zip(*quadratics, strict=True)
    return Quadratic(sum(slopes), sum(curvatures)).maximiser


def _slope(probe: Probe, divergence: Divergence) -> float:
    """First-order objective shift of the whole step: mean of ``A s``."""
    linear = divergence._replace(objective_shift=probe.reference.advantages * divergence.log_ratio)
    return probe.mean(linear).objective


def _momentum(optimizer: torch.optim.Optimizer) -> float:
    """Share of the first moment that the optimizer keeps from step to step."""
    group = optimizer.param_groups[0]
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("momentum", 0.0))


def _scale_learning_rates(optimizer: torch.optim.Optimizer, scale: float) -> list[Any]:
    """Multiply every group's learning rate; returns what they were."""
    before = [group["lr"] for group in optimizer.param_groups]
    if scale != 1.0:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale
    return before


def _ledger(
    pending: _Pending, batch: StepBatch, measured: dict[str, float] | None = None
) -> dict[str, float]:
    choice = pending.choice
    entries = {
        "scale": choice.scale,
        "proposed_policy_shift": choice.proposed,
        "predicted_policy_shift": choice.predicted,
        "trials": float(choice.trials if pending.objective is not None else 0),
        **(measured or {}),
    }
    if pending.budget is not None:
        entries["budget"] = pending.budget
    if pending.maximiser is not None and math.isfinite(pending.maximiser):
        entries["maximiser"] = pending.maximiser
    if pending.last_policy_shift is not None:
        entries["last_measured_policy_shift"] = pending.last_policy_shift
    if pending.objective is not None and measured is not None:
        shift = measured["measured_policy_shift"]
        # Theorem 5.1 for episodes of at most T tokens, γ = 1 (docs/theorem.md).
        longest = int(batch.lengths.max())
        largest = float(batch.reference.advantages.abs().max())
        constant = math.sqrt(2.0) * largest * longest * (longest - 1)
        entries["predicted_objective_shift"] = pending.objective
        entries["omega"] = pending.objective * batch.mean_length
        entries["penalty"] = constant * math.sqrt(max(shift, 0.0))
        if pending.budget is not None:
            entries["met"] = float(shift <= pending.budget)
    return {f"capo/trust/{name}": value for name, value in entries.items()}
