"""How far a policy moves: from a reference policy's log-probabilities to another's, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

REFERENCE_ENTRIES = 1 << 26
"""Most entries ``tokens × V`` of a stored reference (256 MB in float32)."""


class Divergence(NamedTuple):
    """What a step does to every token's distribution; ``[M]`` each.

    Attributes:
        policy_shift: ``KL(before ‖ after)``, or its second order, in nats.
        log_ratio: change of the sampled token's log-probability, or its first order.
        objective_shift: change of ``A · π_a(after)/π_a(before)``: ``A (ratio − 1)``, or its second order.
    """

    policy_shift: Float[Tensor, " M"]
    log_ratio: Float[Tensor, " M"]
    objective_shift: Float[Tensor, " M"]


@dataclass(frozen=True)
class Reference:
    """The distributions before a step, at chosen tokens.

    Attributes:
        log_probs: ``[M, V]`` in float32 (float64 for float64 logits).
        token_ids: ``[M]`` sampled tokens.
        advantages: ``[M]``.
    """

    log_probs: Float[Tensor, "M V"]
    token_ids: Int[Tensor, " M"]
    advantages: Float[Tensor, " M"]

    def to(self, logits: Float[Tensor, "M V"]) -> Divergence:
        """The exact divergence to the policy with these logits (temperature applied).

        ``KL = Σ π (e^u − 1 − u)`` with ``u`` the change of the log-probabilities: every term is ≥ 0,
        so that small divergences are not lost in the difference of large numbers.
        """
        u = torch.log_softmax(logits.to(self.log_probs.dtype), dim=-1) - self.log_probs
        log_ratio = u.gather(1, self.token_ids[:, None])[:, 0]
        shift = (self.log_probs.exp() * _excess(u)).sum(dim=-1)
        return Divergence(shift, log_ratio, self.advantages * torch.expm1(log_ratio))

    def along(self, logit_tangent: Float[Tensor, "M V"]) -> Divergence:
        """To second order for a step whose first-order change of the logits this is (README, eq. 4–6).

        ``m_F = ½ Var_π(u)``, ``m_H = A s + ½ A (s² − Var_π(u))``, ``s = u_a − E_π u``. The second
        derivative of the logits along the step is left out, as in the last-layer model, where it is 0.
        """
        probability = self.log_probs.exp()
        u = logit_tangent.to(self.log_probs.dtype)
        u = u - (probability * u).sum(dim=-1, keepdim=True)
        variance = (probability * u * u).sum(dim=-1)
        s = u.gather(1, self.token_ids[:, None])[:, 0]
        objective = self.advantages * (s + 0.5 * (s * s - variance))
        return Divergence(0.5 * variance, s, objective)


def _excess(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``e^u − 1 − u`` ≥ 0; by its series where the closed form cancels."""
    series = u * u * (0.5 + u * (1.0 / 6.0 + u * (1.0 / 24.0 + u / 120.0)))
    return torch.where(u.abs() < 0.05, series, torch.expm1(u) - u)


def choose_tokens(
    mask: Bool[Tensor, "..."], vocabulary: int, entries: int = REFERENCE_ENTRIES
) -> Int[Tensor, " M"]:
    """Flat positions of the tokens to keep a reference of: all, or evenly spread where too many."""
    positions = mask.flatten().nonzero()[:, 0]
    most = max(1, entries // vocabulary)
    if positions.numel() <= most:
        return positions
    spread = torch.linspace(0, positions.numel() - 1, most, device=positions.device)
    return positions[spread.round().long()]
