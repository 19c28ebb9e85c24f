"""Softmax statistics of the tokens that were *not* sampled, block by block.

Everything CAPO needs of a distribution is said relative to the sampled token ``a`` and the *rest*,
``π′ = π restricted to k ≠ a, renormalised`` (README, §3): with ``r = 1 − π_a`` and any logit change
``u``,

    s = wᵀu = r (u_a − E_π′[u]),      Var_π(u) = r Var_π′(u) + p r (u_a − E_π′[u])².

No term cancels on confident tokens, and statistics of vocabulary blocks merge (Chan et al. 1983), so
that a shard of the head is just a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

ABSENT = -1.0e30
"""Stands for −∞ where ``0 · (−∞)`` must be 0."""


def dot(a: Float[Tensor, "n v"], b: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """Row-wise inner product without an ``[n, v]`` temporary."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


@dataclass(frozen=True)
class Rest:
    """Statistics of one vocabulary block, the sampled token left out; all ``[n]``.

    ``mean`` and ``var`` are of the values u under π′ of the block, ``bend`` the mean of the soft-cap
    term x. With ``degree = 1`` the values were computed with the block's own π′ in place of u (they are
    proportional to π′, as for SGD), and are rescaled when blocks merge.
    """

    lse: Float[Tensor, "n"]  # log Σ_{k≠a} exp z_k; −∞ for an empty block
    entropy: Float[Tensor, "n"]  # of π′
    mean: Float[Tensor, "n"]
    var: Float[Tensor, "n"]
    bend: Float[Tensor, "n"]
    degree: int = 0

    @staticmethod
    def empty(like: Float[Tensor, "n"], degree: int = 0) -> Rest:
        """The neutral element of :func:`merge`."""
        zero = torch.zeros_like(like)
        return Rest(torch.full_like(like, -torch.inf), zero, zero, zero, zero, degree)


def merge(a: Rest, b: Rest) -> Rest:
    """Statistics of two disjoint vocabulary blocks together (README, eq. 7)."""
    lse = torch.logaddexp(a.lse, b.lse)
    # A block without tokens has weight 0; two of them give 0/0, mended to 0.
    log_f = torch.where(a.lse == -torch.inf, -torch.inf, a.lse - lse)
    log_g = torch.where(b.lse == -torch.inf, -torch.inf, b.lse - lse)
    f, g = log_f.exp(), log_g.exp()
    entropy = f * a.entropy + g * b.entropy - torch.special.xlogy(f, f) - torch.special.xlogy(g, g)
    mean_a, mean_b, var_a, var_b, bend_a, bend_b = a.mean, b.mean, a.var, b.var, a.bend, b.bend
    if a.degree == 1:
        mean_a, mean_b = f * mean_a, g * mean_b
        var_a, var_b = f * f * var_a, g * g * var_b
        bend_a, bend_b = f * f * bend_a, g * g * bend_b
    gap = mean_b - mean_a
    return Rest(
        lse,
        entropy,
        mean_a * f + mean_b * g,
        f * var_a + g * var_b + f * g * gap * gap,
        f * bend_a + g * bend_b,
        a.degree,
    )


@dataclass(frozen=True)
class Weights:
    """``e_k = exp(z_k − max)`` of a block with the sampled token's entry 0, and their sum."""

    e: Float[Tensor, "n v"]
    total: Float[Tensor, "n"]
    lse: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"]

    @property
    def safe_total(self) -> Float[Tensor, "n"]:
        """The sum, kept from 0 where the block is empty."""
        return self.total.clamp_min(torch.finfo(self.e.dtype).tiny)

    @property
    def probabilities(self) -> Float[Tensor, "n v"]:
        """π′ of the block; 0 for an empty block."""
        return self.e / self.safe_total[:, None]

    def mean(self, values: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
        """``E_π′[values]``; 0 for an empty block."""
        return dot(self.e, values) / self.safe_total

    def moments(
        self, values: Float[Tensor, "n v"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Mean and centred variance of the values under π′; never ``E[u²] − E[u]²``."""
        mean = self.mean(values)
        centred = values - mean[:, None]
        return mean, self.mean(centred.mul_(centred))


def weigh(
    z: Float[Tensor, "n v"], position: Int[Tensor, "n"], present: Bool[Tensor, "n"]
) -> Weights:
    """Weights of the rest of a block; ``z`` is overwritten at the sampled token and then shifted.

    Args:
        z: logits of the block.
        position: column of the sampled token in this block (any valid column where absent).
        present: whether the sampled token lies in this block.
    """
    column = position[:, None]
    z.scatter_(1, column, torch.where(present[:, None], ABSENT, z.gather(1, column)))
    top = z.amax(dim=1)
    z.sub_(top[:, None])
    e = z.exp()
    # Alone in its block the sampled token would be its own maximum.
    e.scatter_(1, column, e.gather(1, column).masked_fill_(present[:, None], 0.0))
    total = e.sum(dim=1)
    lse = top + total.log()
    tiny = torch.finfo(e.dtype).tiny
    # H(π′) = log Σe − Σ e (z − max)/Σe
    safe = total.clamp_min(tiny)
    entropy = (safe.log() - dot(e, z) / safe).clamp_min_(0.0)
    # `== 0`, not `> 0`: a NaN must come out as NaN, so that it is reported.
    alone = total == 0
    return Weights(e, total, lse.masked_fill(alone, -torch.inf), entropy.masked_fill(alone, 0.0))


def rest_of_sums(
    top: Float[Tensor, "n"],
    total: Float[Tensor, "n"],
    energy: Float[Tensor, "n"],
    first: Float[Tensor, "n"] | None = None,
    second: Float[Tensor, "n"] | None = None,
) -> Rest:
    """Block statistics from ``Σe, Σe·(z−max)`` and, of the values π′, ``Σe(e−1), Σe(e−1)²``.

    The values are centred at their maximum (``e = 1``) before they are squared. Where their variance is
    small beside their square they lie close to it, so little cancels: with ``P(max) ≥ 1/Σe`` the relative
    rounding error of the variance is at most about ``eps · Σe``, and a block has few hundred entries.
    """
    safe = total.clamp_min(torch.finfo(total.dtype).tiny)
    alone = total == 0
    lse = (top + safe.log()).masked_fill(alone, -torch.inf)
    entropy = (safe.log() - energy / safe).clamp_min(0.0).masked_fill(alone, 0.0)
    zero = torch.zeros_like(lse)
    if first is None or second is None:
        return Rest(lse, entropy, zero, zero, zero)
    mean_x = first / safe
    mean = ((1.0 + mean_x) / safe).masked_fill(alone, 0.0)
    var = ((second / safe - mean_x * mean_x).clamp_min(0.0) / (safe * safe)).masked_fill(alone, 0.0)
    return Rest(lse, entropy, mean, var, zero, degree=1)


def locate(token_ids: Int[Tensor, "n"], block: slice) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n"]]:
    """Column of each sampled token in a vocabulary block, and whether it is there."""
    position = token_ids - block.start
    present = (position >= 0) & (position < block.stop - block.start)
    return torch.where(present, position, 0), present
