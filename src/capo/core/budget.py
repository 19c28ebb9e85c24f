"""Budgeted selection: remove tokens until the shift of the *aggregated* step is within its bound.

For a step that is linear in the gradient (SGD, momentum) the score change of token j under the step of
the kept tokens is ``s_j = s⁰_j + Σ_i C_ji x_i`` with the interaction

    C_ji = (α/N) A_i (w_jᵀ D_j D_i w_i) (h_jᵀ h_i) / T²,

and the batch-level policy shift (sampled Fisher) is ``m_F(x) = mean_j ½ s_j²``. N × N numbers, so this is
for batches of thousands of tokens, not of millions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from capo.core.errors import InputError
from capo.core.selection import Denominator, Reason, Selection, check_denominator, make_selection
from capo.core.statistics import chunked
from capo.core.statistics.problem import Problem
from capo.core.steps import MomentumStep, SGDStep
from capo.core.validation import (
    broadcast,
    check_mask,
    check_shapes,
    check_tokens,
    make_head,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.curvature import TokenCurvature


@dataclass(frozen=True)
class Interaction:
    """How every token's part of the step changes every token's log-probability.

    Args:
        matrix: ``[N, N]``, C: column i is token i's contribution.
        offset: ``[N]``, s⁰: what the old momentum and weight decay do, whoever is kept.
    """

    matrix: Float[Tensor, "N N"] = field(repr=False)
    offset: Float[Tensor, "N"] = field(repr=False)

    def score_change(self, weights: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """``s`` of every token under the step of the weighted tokens."""
        return self.offset + self.matrix @ weights

    def policy_shift(self, weights: Float[Tensor, "N"]) -> Float[Tensor, ""]:
        """Batch-level m_F (sampled Fisher), nats per token."""
        return 0.5 * self.score_change(weights).square().mean()


def interaction(
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    token_ids: Int[Tensor, "..."],
    advantages: Float[Tensor, "..."],
    *,
    step: SGDStep | MomentumStep,
    coefficients: Float[Tensor, "..."] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    head_bias: Float[Tensor, "V"] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Interaction:
    """Interaction of the unmasked tokens under one step from their mean gradient.

    Arguments as for :func:`capo.token_curvature`. Cost ``2N²V`` flops and ``N²`` numbers.

    Raises:
        InputError: the step is not linear in the gradient, or an argument is unusable.
    """
    if not isinstance(step, SGDStep | MomentumStep):
        raise InputError("step", "must be SGDStep or MomentumStep: the budget needs a linear step.")
    head = make_head(hidden, head_weight, head_bias, temperature, logit_scale, logit_softcap)
    chosen = check_mask(mask, token_ids)
    check_shapes(hidden, head_weight, token_ids)
    tokens = token_ids[chosen]
    check_tokens(tokens, head.vocabulary)
    a = broadcast("advantages", advantages, token_ids.shape)[chosen].to(head.dtype)
    if coefficients is not None:
        a = a * broadcast("coefficients", coefficients, token_ids.shape)[chosen]
    n = tokens.shape[0]
    if n == 0:
        empty = torch.zeros(0, dtype=head.dtype, device=hidden.device)
        return Interaction(empty.reshape(0, 0), empty)
    with torch.no_grad():
        ones = torch.ones_like(a)  # residuals without the advantage: A multiplies the columns
        whole = Problem(hidden[chosen], head, tokens, ones, step, None, True).chunk(slice(None))
        h = whole.hidden
        accumulator = chunked.ValueAccumulator(whole, *chunked.normalise(whole))
        overlap = h.new_zeros(n, n)
        offset = h.new_zeros(n)
        nothing = h.new_zeros(1, h.shape[1])
        for block in chunked.vocabulary_blocks(head):
            residual = accumulator.coefficient(head.activate(head.raw(h, block)), block)  # D w / T
            overlap.addmm_(residual, residual.T)
            weight = head.weight[block].to(h.dtype)
            drift = step.of_gradient(nothing.expand_as(weight), weight, block)
            offset += (residual * (h @ drift.T)).sum(dim=1)
        factor = step.lr / n
        if isinstance(step, MomentumStep):
            factor *= step.gradient_factor * step.grad_scale
        return Interaction(factor * overlap * (h @ h.T) * a[None, :], offset)


@dataclass(frozen=True)
class Budget:
    """Greedy removal: the token whose removal lowers the batch-level shift most goes first.

    The shift is recomputed after each removal, until it is under its bound; then tokens whose return
    keeps the bound are taken back, the cheapest first. Where it never is (old
    momentum alone may break it) the set with the smallest shift seen is kept, and ``Selection.met`` is
    False. A removed token's term leaves the sum and the denominator stays, so
    ``denominator`` is ``"all"``: renormalising would enlarge the step again.

    Args:
        policy_shift: bound on the batch-level m_F, nats per token, ≥ 0.
        interaction: of exactly the tokens that are selected among, in order.
    """

    policy_shift: float
    interaction: Interaction
    denominator: Denominator = "all"

    def __post_init__(self) -> None:
        """Check the bound."""
        if not self.policy_shift >= 0:
            raise InputError("policy_shift", f"must be a number ≥ 0, got {self.policy_shift!r}.")
        check_denominator(self.denominator)
        if self.denominator != "all":
            raise InputError("denominator", "must be 'all': renormalising would undo the removal.")

    def __call__(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Selection:
        """Weights 0 or 1."""
        matrix = self.interaction.matrix
        count = int(mask.sum())
        if matrix.shape != (count, count):
            raise InputError(
                "interaction", f"must be of the {count} selected tokens, got {tuple(matrix.shape)}."
            )
        kept, met = self._greedy()
        weights = torch.zeros(mask.shape, dtype=curvature.policy_shift.dtype, device=mask.device)
        weights[mask] = kept.to(weights.dtype)
        reason = torch.where(weights > 0, int(Reason.KEPT), int(Reason.BUDGET))
        return make_selection(weights, reason, mask, self.denominator, (Reason.BUDGET,), met=met)

    def _greedy(self) -> tuple[Bool[Tensor, "N"], bool]:
        n = self.interaction.matrix.shape[0]
        kept = torch.ones(n, dtype=torch.bool, device=self.interaction.matrix.device)
        best, least = kept, float("inf")
        for left in range(n, -1, -1):
            shift, change = self._marginal(kept)
            if shift <= self.policy_shift:
                return self._readmit(kept), True
            if shift < least:
                best, least = kept, shift
            if left:
                # Tokens that cancel each other make local minima: the least harmful removal is made
                # even where none helps.
                kept = kept.clone()
                kept[int(change.masked_fill(~kept, torch.inf).argmin())] = False
        return best, False

    def _readmit(self, kept: Bool[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Tokens whose return keeps the bound come back, the cheapest first."""
        while not bool(kept.all()):
            _, change = self._marginal(kept)
            change = change.masked_fill(kept, torch.inf)
            cheapest = int(change.argmin())
            candidate = kept.clone()
            candidate[cheapest] = True
            if not self._marginal(candidate)[0] <= self.policy_shift:
                break
            kept = candidate
        return kept

    def _marginal(self, kept: Bool[Tensor, "N"]) -> tuple[float, Float[Tensor, "N"]]:
        """The batch-level shift, and its change if each token were removed (or came back)."""
        c = self.interaction.matrix
        # From scratch, not by subtraction: thousands of removals must not pile up rounding.
        score = self.interaction.score_change(kept.to(c.dtype))
        shift = float(0.5 * score.square().mean()) if len(kept) else 0.0
        # f(x ∓ e_i) − f(x) = (∓C_iᵀs + ½‖C_i‖²)/N
        sign = torch.where(kept, -1.0, 1.0).to(c.dtype)
        return shift, sign * (c.T @ score) + 0.5 * c.square().sum(dim=0)
