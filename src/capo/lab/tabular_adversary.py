"""The worst MDP that gradient ascent finds: how tight the theorem can be, how early it can fail.

Random MDPs are kind. Here the transition, the reward, the start, the policy and the step are all
free parameters, and Adam climbs ``(ω − ΔJ) / (C √δ)``, many restarts at once. A lower bound on the
truth, as every search is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from capo.lab.tabular_bounds import compare, constants
from capo.lab.tabular_mdp import TabularMDP, evaluate

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Search:
    """Size of the search; the defaults take some seconds."""

    states: int = 4
    actions: int = 2
    restarts: int = 48
    iterations: int = 500
    learning_rate: float = 0.05


def worst_ratio(
    discounts: Float[Tensor, "C"] | None = None,
    *,
    horizon: int | None = None,
    quadratic: bool = False,
    logit_ranges: Float[Tensor, "C"] | None = None,
    seed: int = 0,
    search: Search | None = None,
) -> Float[Tensor, "C"]:
    """Largest ``(ω − ΔJ)/(C √δ)`` found for each cell (a discount and a size of the step).

    Args:
        discounts: γ of each cell; ``None`` for the episodic form.
        horizon: T of the episodic form, which has one cell (or one a logit range).
        quadratic: ω and δ by the quadratic forms instead of exactly.
        logit_ranges: the largest logit range of the step of each cell; free if ``None``.
        seed: of the restarts.
        search: how long to look.

    Returns:
        One ratio a cell; above 1 the claim is false.
    """
    search = search or Search()
    S, A = search.states, search.actions
    generator = torch.Generator().manual_seed(seed)
    given = discounts if discounts is not None else logit_ranges
    cells = 1 if given is None else given.numel()
    B = cells * search.restarts
    gamma = None
    if discounts is not None:
        gamma = discounts.to(torch.float64).repeat_interleave(search.restarts)

    def parameter(*shape: int, scale: float) -> Tensor:
        value = scale * torch.randn(B, *shape, generator=generator, dtype=torch.float64)
        return value.requires_grad_()

    # A step of logit range R does most harm to a policy whose rare actions have π ≈ e^−R.
    widths = torch.full((B,), 4.0, dtype=torch.float64)
    if logit_ranges is not None:
        widths = logit_ranges.to(torch.float64).repeat_interleave(search.restarts)
    transition = parameter(S, A, S, scale=3.0)
    reward = parameter(1, S, A, scale=1.0)
    start = parameter(S, scale=2.0)
    logits = parameter(S, A, scale=1.0)
    logits.data *= widths[:, None, None] / 2
    step = parameter(S, A, scale=3.0)
    optimizer = torch.optim.Adam(
        [transition, reward, start, logits, step], lr=search.learning_rate, eps=1e-12
    )
    best = torch.zeros(B, dtype=torch.float64)
    for _ in range(search.iterations):
        mdp = TabularMDP(transition.softmax(-1), reward, start.softmax(-1), gamma, horizon)
        delta = step
        if logit_ranges is not None:
            width = (step.amax(-1) - step.amin(-1)).amax(-1)
            delta = step * (widths / width)[:, None, None]
        base = evaluate(mdp, logits)
        c = compare(mdp, logits, delta, base)
        surrogate = c.quadratic_surrogate if quadratic else c.surrogate
        kl = c.quadratic_kl if quadratic else c.mean_kl
        ratio = (surrogate - c.improvement) / (
            constants(mdp, base.epsilon).paper * kl.clamp_min(1e-16).sqrt()
        )
        best = torch.maximum(best, ratio.detach())
        optimizer.zero_grad()
        torch.autograd.backward(-ratio.sum())
        optimizer.step()
    return best.view(cells, search.restarts).amax(1)
