"""What the micro-batches of a step leave behind until it is taken, and what later passes show of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from capo.core.statistics.problem import Head
from capo.core.trust_region import TrustRegion
from capo.integrations._trl_batch import StepBatch, head_logits
from capo.integrations._trl_deep import DeepPass, Quadratic
from capo.integrations._trl_sample import Sample, draw_sample, part_of
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass
class Collected:
    """The micro-batches of one optimizer step.

    Attributes:
        samples: completions on which the step is tried, of every micro-batch.
        micro_batches: their completions, by which they are told apart.
        completions: with a gradient, in this process.
        quadratics: the objective shift along the step of each micro-batch, where asked for.
    """

    samples: list[Sample] = field(default_factory=list)
    micro_batches: list[Tensor] = field(default_factory=list)
    completions: int = 0
    quadratics: list[Quadratic] = field(default_factory=list)

    @property
    def quadratic(self) -> Quadratic:
        """Of the whole step."""
        return Quadratic(*(sum(parts) for parts in zip(*self.quadratics, strict=True)))


class Collector:
    """Keeps some completions of every micro-batch of the coming step.

    Args:
        seed: of the choice of completions; no other random numbers are touched.
        world: the processes.
    """

    def __init__(self, seed: int, world: World) -> None:
        self.seed = seed
        self.world = world
        self._now = Collected()
        self._previous: _Taken | None = None
        self._seen_again: list[Tensor] = []

    def collect(
        self,
        region: TrustRegion,
        inputs: dict[str, Any],
        mask: Bool[Tensor, "B T"],
        hidden: Float[Tensor, "B T d"],
        *,
        step: int,
        accumulation_steps: int,
        every_completion: bool,
        deep: DeepPass | None,
    ) -> None:
        """Keep some completions of a micro-batch.

        With `every_completion` each has a gradient, whatever its advantage.
        """
        now = self._now
        name = (self.seed * 1_000_003 + step) * 1_009 + len(now.micro_batches)
        generator = torch.Generator().manual_seed(name % (1 << 62))
        if deep is not None and region.step_length == "quadratic":
            now.quadratics.append(deep.quadratic(region.depth, generator))
        sequences = region.sequences
        assert sequences != "auto"  # the trainer knows how many prompts there are
        moved = mask.any(dim=1)
        if not every_completion:
            moved = moved & (inputs["advantages"] != 0).reshape(moved.numel(), -1).any(dim=1)
        now.completions += int(moved.sum())
        self._see_again(inputs["completion_ids"], hidden)
        sequences = part_of(sequences, len(now.samples), accumulation_steps)
        now.samples.append(draw_sample(inputs, mask, hidden, sequences, generator, self.world))

    def _see_again(self, completions: Tensor, hidden: Float[Tensor, "B T d"]) -> None:
        """On completions that the last step was of, this pass shows for free what that step did."""
        previous, index = self._previous, len(self._now.micro_batches)
        self._now.micro_batches.append(completions)
        if previous is None:
            return
        before = previous.micro_batches
        if index >= len(before) or before[index] is not completions:
            self._previous = None
            return
        self._seen_again.append(previous.batch.samples[index].again(hidden))

    def take(self) -> Collected:
        """All micro-batches since the last step."""
        now, self._now = self._now, Collected()
        return now

    def last_step(self, head: Head, exact_hidden: bool) -> tuple[float, float] | None:
        """Policy shift of the last step, and ``κ``: what that is of a unit of learning rate, squared.

        None where this batch is not the last step's, or training passes cannot be compared.
        """
        previous, self._previous = self._previous, None
        seen, self._seen_again = self._seen_again, []
        if previous is None or not exact_hidden or len(seen) != len(previous.micro_batches):
            return None
        batch = previous.batch
        divergence = batch.reference.to(head_logits(head, torch.cat(seen)[batch.chosen]))
        if batch.world.alone:
            shift = float(divergence.policy_shift @ batch.weights / batch.weights.sum())
        else:
            shift = batch.mean(divergence.policy_shift)
        return shift, shift / previous.length**2

    def forget(self) -> None:
        """Leave behind what an interrupted step has left."""
        self._now, self._previous, self._seen_again = Collected(), None, []

    def remember(self, batch: StepBatch, micro_batches: list[Tensor], length: float) -> None:
        """Look out for these completions: a step of this length (scale × learning rate) is taken."""
        self._previous = _Taken(batch, micro_batches, length)


@dataclass(frozen=True)
class _Taken:
    """A step that was taken, to be seen again when its completions are."""

    batch: StepBatch
    micro_batches: list[Tensor]
    length: float  # scale × learning rate
