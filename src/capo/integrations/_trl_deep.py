"""The step of a micro-batch at full depth, foreseen between its loss and its backward pass.

The gradient is taken once for the judgement (and twice more, over halves, for the step length) and again
by the trainer's own backward pass, which is gated by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import capo
from capo.core.proposed import ProposedStep
from capo.core.trust_region import Probe
from capo.core.trust_region.divergence import REFERENCE_ENTRIES
from capo.core.trust_region.probe import Depth
from capo.integrations._trl_batch import core_head, eval_mode, make_batch
from capo.integrations._trl_head import LMHead
from capo.integrations._trl_loss import GradientGate
from capo.integrations._trl_sample import Sample, take_rows
from capo.integrations._trl_sharded import Engine
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Quadratic(NamedTuple):
    """``slope · η + curvature · η²``: objective shift of η times a step, summed over tokens."""

    slope: float
    curvature: float

    @property
    def maximiser(self) -> float:
        """The η ≥ 0 where it is largest: infinite where it only grows, 0 where it only falls."""
        if self.curvature < 0:
            return max(0.0, -0.5 * self.slope / self.curvature)
        return math.inf if self.slope > 0 else 0.0


@dataclass(frozen=True)
class DeepPass:
    """One micro-batch between loss and backward.

    Attributes:
        engine: policy and optimizer, replicated where there are several processes.
        head: its head.
        autocast: the trainer's mixed precision.
        loss: the micro-batch's.
        gate: on its log-probabilities.
        inputs, mask, hidden: as the trainer has them; ``hidden [B, T, d]`` from the training pass.
        accumulation_steps: micro-batches in an optimizer step; this one stands for all of them.
        max_grad_norm: what the trainer clips to, or 0.
    """

    engine: Engine
    head: LMHead
    autocast: Callable[[], AbstractContextManager[Any]]
    loss: Float[Tensor, ""]
    gate: GradientGate
    inputs: dict[str, Any]
    mask: Bool[Tensor, "B T"]
    hidden: Float[Tensor, "B T d"]
    accumulation_steps: int
    max_grad_norm: float

    def curvature(self, depth: Depth) -> capo.TokenCurvature:
        """What the step of this micro-batch's gradient does to each of its tokens, from ``depth``."""
        names = ("objective_shift", "policy_shift", "log_prob", "entropy", "s", "variance")
        full = {n: torch.zeros(self.mask.shape, device=self.mask.device) for n in names}
        step = self._step(None)
        everything = torch.arange(self.mask.size(0))
        for sample, probe in self._probes(everything, step):
            found, log_probs = probe.along(depth), probe.reference.log_probs
            a = probe.reference.token_ids[:, None]
            values = (
                found.objective_shift,
                found.policy_shift,
                log_probs.gather(1, a)[:, 0],
                -(log_probs.exp() * log_probs).sum(-1),
                found.log_ratio,
                2.0 * found.policy_shift,
            )
            width = sample.token_ids.size(1)
            for name, value in zip(names, values, strict=True):
                block = torch.zeros(sample.mask.shape, device=value.device)
                block[sample.mask] = value.float()
                full[name][sample.rows, :width] = block
        return capo.TokenCurvature(
            objective_shift=full["objective_shift"],
            policy_shift=full["policy_shift"],
            log_prob=full["log_prob"],
            entropy=full["entropy"],
            s=full["s"],
            variance=full["variance"],
            truncation_bound=None,
            mask=self.mask,
        )

    def quadratic(self, depth: Depth, generator: torch.Generator) -> Quadratic:
        """Objective shift along the step, each half of the batch judging the step of the other.

        Halves are of whole prompts where there are several: a group's advantages hang together. The
        micro-batch is that of all processes; the sum is this one's part.
        """
        prompts, own_rows = self.engine.world.prompts(self.inputs)
        halves = _halves(prompts, generator)
        total = Quadratic(0.0, 0.0)
        for own, other in (halves, halves[::-1]):
            share = prompts.size(0) / own.numel()
            step = self._step(_inside(own, own_rows), share)
            for _, probe in self._probes(_inside(other, own_rows), step):
                found = probe.along(depth)
                slope = float((probe.reference.advantages * found.log_ratio).sum())
                both = float(found.objective_shift.sum())
                total = Quadratic(total.slope + slope, total.curvature + both - slope)
        return total

    def _step(self, rows: Int[Tensor, " n"] | None, share: float = 1.0) -> ProposedStep:
        """The optimizer's step for the gated gradient of some rows, as if they were the whole batch.

        Of the rows of all processes, these being the own ones, and all being ``1 / share`` of the batch.
        """
        parameters = [p for p in self.engine.policy.parameters() if p.requires_grad]
        weights, factor = self.gate.weights, float(self.accumulation_steps)
        if rows is not None:
            chosen = torch.zeros_like(self.mask, dtype=torch.float32)
            chosen[rows] = 1.0
            self.gate.weights = chosen if weights is None else weights * chosen
            factor *= share
        try:
            found = torch.autograd.grad(self.loss, parameters, retain_graph=True, allow_unused=True)
        finally:
            self.gate.weights = weights
        world = self.engine.world
        if not world.alone:  # the loss is the mean of the processes' losses
            factor /= world.size
            found = tuple(None if g is None else world.total(g) for g in found)
        gradients = {
            id(p): g * factor for p, g in zip(parameters, found, strict=True) if g is not None
        }
        if self.max_grad_norm > 0 and gradients:
            norm = torch.stack([g.float().norm() for g in gradients.values()]).norm()
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {key: g * clip.to(g.dtype) for key, g in gradients.items()}
        return ProposedStep(self.engine.optimizer, gradients)

    def _probes(
        self, rows: Int[Tensor, " n"], step: ProposedStep
    ) -> Iterator[tuple[Sample, Probe]]:
        """Probes over the rows, as many at a time as a reference may hold."""
        head = core_head(self.head)
        size = max(1, REFERENCE_ENTRIES // (head.vocabulary * self.mask.size(1)))
        for some in torch.split(rows, size):
            if not bool(self.mask[some].any()):
                continue
            ones = torch.ones(some.numel())
            sample = take_rows(self.inputs, self.mask, self.hidden, some, ones)
            batch = make_batch([sample], head, World())

            def hidden(sample: Sample = sample) -> Tensor:
                with self.autocast():
                    return sample.run(self.engine)

            with eval_mode(self.engine.policy):
                yield (
                    sample,
                    Probe(
                        self.engine.backbone,
                        hidden,
                        head,
                        self.head.parameter,
                        step,
                        batch.reference,
                        batch.hidden,
                    ),
                )


def _inside(rows: Int[Tensor, " n"], own: slice) -> Int[Tensor, " m"]:
    """Those of all processes' rows that are this one's, counted from its first."""
    inside: Tensor = rows[(rows >= own.start) & (rows < own.stop)] - own.start
    return inside


def _halves(
    prompts: Int[Tensor, "B P"], generator: torch.Generator
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Rows of two halves: of the prompts, or of the completions where there is only one prompt."""
    _, group = torch.unique(prompts, dim=0, return_inverse=True)
    groups = int(group.max()) + 1
    if groups > 1:
        first = torch.randperm(groups, generator=generator)[: groups // 2]
        inside = torch.isin(group, first)
    else:
        order = torch.randperm(prompts.size(0), generator=generator)
        inside = torch.zeros(prompts.size(0), dtype=torch.bool)
        inside[order[: max(1, prompts.size(0) // 2)]] = True
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
