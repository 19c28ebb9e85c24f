"""What a backend returns: per-token statistics from which every shift follows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Support:
    """The judged rows of each token besides the sampled one (``top_k`` only).

    ``residual[i, j] = (D w)_k / T`` of row ``k = rows[i, j]``, the last column being the sampled token.
    """

    rows: Int[Tensor, "N K"]
    residual: Float[Tensor, "N K"]


@dataclass(frozen=True)
class Statistics:
    """Per-token statistics, all ``[N]``, in the compute dtype."""

    log_odds: Float[Tensor, "N"]  # log π_a/(1 − π_a) of the full distribution
    rest_entropy: Float[Tensor, "N"]  # entropy of the full π′
    judged_log_odds: Float[Tensor, "N"]  # the same within the judged set
    u_sampled: Float[Tensor, "N"]  # u_a
    u_mean: Float[Tensor, "N"]  # E_π′[u]
    u_var: Float[Tensor, "N"]  # Var_π′(u)
    bend_gap: Float[Tensor, "N"]  # x_a − E_π′[x], x = φ″(y)(Δh)²/T
    left_out: Float[Tensor, "N"]  # ρ: probability outside the judged set (0 when renormalised)
    u_bound: Float[Tensor, "N"]  # B ≥ |u_k| for every row left out
    support: Support | None = None

    @staticmethod
    def full(
        log_odds: Float[Tensor, "N"],
        rest_entropy: Float[Tensor, "N"],
        u_sampled: Float[Tensor, "N"],
        u_mean: Float[Tensor, "N"],
        u_var: Float[Tensor, "N"],
        bend_gap: Float[Tensor, "N"],
    ) -> Statistics:
        """Statistics where every vocabulary row is judged: nothing is left out."""
        zero = torch.zeros_like(log_odds)
        return Statistics(
            log_odds, rest_entropy, log_odds, u_sampled, u_mean, u_var, bend_gap, zero, zero
        )

    @staticmethod
    def concatenate(parts: Sequence[Statistics]) -> Statistics:
        """Token chunks in order."""
        names = [f.name for f in fields(Statistics) if f.name != "support"]
        columns = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
        supports = [p.support for p in parts if p.support is not None]
        support = (
            Support(
                torch.cat([s.rows for s in supports]), torch.cat([s.residual for s in supports])
            )
            if supports
            else None
        )
        return Statistics(**columns, support=support)

    def reorder(self, index: Int[Tensor, "N"]) -> Statistics:
        """The tokens in another order."""
        columns = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "support"
        }
        support = self.support
        if support is not None:
            support = Support(support.rows[index], support.residual[index])
        return Statistics(**columns, support=support)
