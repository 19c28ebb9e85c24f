"""The completions on which one optimizer step is tried, and what is recorded of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from capo.core.statistics.problem import Head, compute_dtype
from capo.core.trust_region import Divergence, Reference, choose_tokens
from capo.integrations._trl_head import LMHead
from capo.integrations._trl_sample import Sample
from capo.integrations._trl_world import World, weighted_mean

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.integrations._trl_sharded import Engine


@dataclass(frozen=True)
class ShiftRecord:
    """What one optimizer step did to the completions on which it was measured. CPU tensors.

    Each of several processes records its own completions.

    Attributes:
        step: optimizer steps taken, this one included.
        token_ids: ``[n, T]``.
        mask: True on the tokens that count, ``[n, T]``; elsewhere the rest means nothing.
        divergence: KL(before ‖ after) in nats, ``[n, T]``; NaN where it was not measured (a large
            vocabulary's reference holds only so many tokens).
        advantage: ``[n, T]``.
        log_ratio: change of the sampled token's log-probability, ``[n, T]``.
        prompt_ids, prompt_mask: ``[n, P]``, left-padded.
    """

    step: int
    token_ids: Int[Tensor, "n T"]
    mask: Bool[Tensor, "n T"]
    divergence: Float[Tensor, "n T"]
    advantage: Float[Tensor, "n T"]
    log_ratio: Float[Tensor, "n T"]
    prompt_ids: Int[Tensor, "n P"]
    prompt_mask: Int[Tensor, "n P"]


@dataclass
class StepBatch:
    """One optimizer step's samples and the reference on them."""

    samples: list[Sample]
    chosen: Int[Tensor, " M"]  # of the samples' counted tokens, in their order
    reference: Reference
    hidden: Float[Tensor, "M d"]
    weights: Float[Tensor, " M"]
    world: World

    def run(self, engine: Engine) -> Float[Tensor, "M d"]:
        return torch.cat([sample.run(engine) for sample in self.samples])[self.chosen]

    def mean(self, values: Float[Tensor, " M"]) -> float:
        """Weighted mean over the tokens of all processes."""
        if self.world.alone:
            return float(values @ (self.weights / self.weights.sum()))
        return weighted_mean(self.world, values, self.weights)

    def with_hidden(self, hidden: Float[Tensor, "M d"], head: Head) -> StepBatch:
        """The same with a reference from other hidden states."""
        log_probs = torch.log_softmax(head_logits(head, hidden), dim=-1)
        reference = replace(self.reference, log_probs=log_probs)
        return replace(self, reference=reference, hidden=hidden.detach())

    @property
    def entropy(self) -> float:
        """Weighted mean entropy of the reference, nats a token."""
        log_probs = self.reference.log_probs
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return weighted_mean(self.world, entropy, self.weights)

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """Counted tokens of every completion."""
        return torch.cat([sample.mask.sum(-1) for sample in self.samples])

    @property
    def mean_length(self) -> float:
        """Weighted mean of the completions' lengths, tokens."""
        weight = torch.cat([sample.weight for sample in self.samples])
        return weighted_mean(self.world, self.lengths, weight)

    @property
    def extremes(self) -> tuple[int, float]:
        """Most counted tokens of a completion, and the largest size of an advantage."""
        largest = self.reference.advantages.abs()
        if self.world.alone:
            return int(self.lengths.max()), float(largest.max())
        counted = torch.cat([sample.weight for sample in self.samples]) > 0
        ends = [self.lengths[counted], largest[self.weights > 0]]
        zero = largest.new_zeros(1)
        most = self.world.highest(
            torch.cat([torch.cat([e.to(zero), zero]).max()[None] for e in ends])
        )
        return int(most[0]), float(most[1])


def make_batch(samples: list[Sample], head: Head, world: World) -> StepBatch:
    """The reference on the samples' tokens, from the hidden states of the training pass."""
    mask = torch.cat([sample.mask.flatten() for sample in samples])
    counted = torch.ones(int(mask.sum()), dtype=torch.bool, device=mask.device)
    chosen = choose_tokens(counted, head.vocabulary)

    def tokens(values: list[Tensor]) -> Tensor:
        return torch.cat(values)[chosen]

    hidden = tokens([sample.at_tokens(sample.hidden) for sample in samples])
    reference = Reference(
        torch.log_softmax(head_logits(head, hidden), dim=-1),
        tokens([sample.at_tokens(sample.token_ids) for sample in samples]),
        tokens([sample.at_tokens(sample.advantage) for sample in samples]).to(head.dtype),
    )
    weights = tokens([sample.token_weights() for sample in samples]).to(head.dtype)
    if not world.alone and chosen.numel():  # those that are left stand for all of the process
        weights = weights * (counted.numel() / chosen.numel())
    return StepBatch(samples, chosen, reference, hidden, weights, world)


@torch.no_grad()
def head_logits(head: Head, hidden: Float[Tensor, "M d"]) -> Float[Tensor, "M V"]:
    """Logits with scale, soft-cap and temperature, in the compute dtype."""
    return head.activate(head.raw(hidden.to(head.dtype), slice(0, head.vocabulary))).z


def core_head(head: LMHead) -> Head:
    options = head.logit_options
    return Head(
        head.weight,
        options["head_bias"],
        options["temperature"],
        options["logit_scale"],
        options["logit_softcap"],
        compute_dtype(head.weight),
    )


def shift_record(batch: StepBatch, divergence: Divergence, step: int) -> ShiftRecord:
    width = max(sample.token_ids.size(1) for sample in batch.samples)
    counted = sum(int(sample.mask.sum()) for sample in batch.samples)

    def pad(values: list[Tensor], size: int, *, left: bool = False) -> Tensor:
        room = [(size - v.size(1), 0) if left else (0, size - v.size(1)) for v in values]
        padded = [torch.nn.functional.pad(v, r) for v, r in zip(values, room, strict=True)]
        return torch.cat(padded).cpu()

    mask = pad([sample.mask for sample in batch.samples], width)

    def per_token(values: Tensor) -> Tensor:
        flat = torch.full((counted,), math.nan)
        flat[batch.chosen.cpu()] = values.float().cpu()
        return torch.full(mask.shape, math.nan).masked_scatter_(mask, flat)

    prompt = max(sample.prompt_ids.size(1) for sample in batch.samples)
    return ShiftRecord(
        step=step,
        token_ids=pad([sample.token_ids for sample in batch.samples], width),
        mask=mask,
        divergence=per_token(divergence.policy_shift),
        advantage=pad([sample.advantage for sample in batch.samples], width),
        log_ratio=per_token(divergence.log_ratio),
        prompt_ids=pad([sample.prompt_ids for sample in batch.samples], prompt, left=True),
        prompt_mask=pad([sample.prompt_mask for sample in batch.samples], prompt, left=True),
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
