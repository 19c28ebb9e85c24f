"""From logits to the values u of the judged rows: the part that all backends share.

With ``w = e_a − π`` and ``D = diag φ′``: gradient coefficients ``c = A D w/T``, projections ``q = Δ h``,
values ``u = D q/T`` and the soft-cap term ``x = φ″ q²/T`` (README, §4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from capo.core.statistics.bounds import u_bound
from capo.core.statistics.problem import Activation
from capo.core.statistics.projection import project_gathered
from capo.core.statistics.rest import dot
from capo.core.statistics.result import Statistics, Support

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    Projector = Callable[[Float[Tensor, "n k"], Int[Tensor, "n k"]], Float[Tensor, "n k"]]

    from capo.core.statistics.problem import Problem
    from capo.core.statistics.rest import Rest


@dataclass(frozen=True)
class Sampled:
    """The sampled token's own logit and derivatives, all ``[n]``."""

    z: Float[Tensor, "n"]
    slope: Float[Tensor, "n"]
    bend: Float[Tensor, "n"]


@dataclass(frozen=True)
class Candidates:
    """The K − 1 largest logits besides the sampled token's, ``[n, K−1]``, as raw ``y``."""

    y: Float[Tensor, "n k"]
    rows: Int[Tensor, "n k"]
    left_out_lse: Float[Tensor, "n"]  # log Σ exp z over every other row


def values(
    chunk: Problem, q: Float[Tensor, "n v"], activation: Activation
) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n v"] | None]:
    """``(u, x)`` from projections."""
    temperature = chunk.head.temperature
    u = q * (activation.slope / temperature)
    x = None if activation.bend is None else activation.bend * q * q / temperature
    return u, x


def sgd_statistics(
    problem: Problem, lr: float, square_norm: Float[Tensor, "n"], sampled: Sampled, rest: Rest
) -> Statistics:
    """SGD on the full vocabulary (README, eq. 9) from block values ``φ′² π′`` and ``φ″ φ′² π′²``."""
    temperature = problem.head.temperature
    log_odds = sampled.z - rest.lse
    r = torch.sigmoid(-log_odds)
    # u_k = c φ′_k² w_k with w = (r, −r π′)
    c = lr * problem.advantages * square_norm / temperature**2
    squared = sampled.slope**2
    bend_gap = c * c * temperature * r * r * (sampled.bend * squared - rest.bend)
    return Statistics.full(
        log_odds,
        rest.entropy,
        c * squared * r,
        -c * r * rest.mean,
        (c * r) ** 2 * rest.var,
        bend_gap,
    )


def judge_candidates(
    chunk: Problem,
    sampled: Sampled,
    candidates: Candidates,
    rest_lse: Float[Tensor, "n"],
    rest_entropy: Float[Tensor, "n"],
    project: Projector | None = None,
) -> Statistics:
    """Statistics on ``{a} ∪ candidates``, π renormalised over the set or not.

    ``project(coefficient, rows)`` gives ``q``; by default from each token's own step.
    """
    head, dtype = chunk.head, chunk.dtype
    # A column of the sampled token beside its rivals: index K−1 of every [n, K] tensor below.
    act = head.activate(candidates.y.clone())
    set_lse = torch.logsumexp(act.z, dim=1)
    normaliser = set_lse if chunk.renormalize else rest_lse
    log_odds = sampled.z - normaliser
    r = torch.sigmoid(-log_odds)
    # π_k = r · π′_k: relative precision also where r is tiny
    w_rest = -r[:, None] * (act.z - normaliser[:, None]).exp()
    w = torch.cat([w_rest, r[:, None]], dim=1)
    slope: Tensor | float = act.slope
    if isinstance(slope, torch.Tensor):
        slope = torch.cat([slope, sampled.slope[:, None]], dim=1)
    residual = w * (slope / head.temperature)
    rows = torch.cat([candidates.rows, chunk.token_ids[:, None]], dim=1)
    coefficient = chunk.advantages[:, None] * residual
    if project is None:
        q = project_gathered(chunk.step, chunk.hidden, coefficient, head.weight, rows)
    else:
        q = project(coefficient, rows)
    bend = None if act.bend is None else torch.cat([act.bend, sampled.bend[:, None]], dim=1)
    u, x = values(chunk, q, Activation(act.z, slope, bend))
    weights = (act.z - set_lse[:, None]).exp()
    mean = dot(weights, u[:, :-1])
    centred = u[:, :-1] - mean[:, None]
    var = dot(weights, centred * centred)
    bend_mean = torch.zeros_like(mean) if x is None else dot(weights, x[:, :-1])
    zero = torch.zeros_like(mean)
    left_out, bound = zero, zero
    if not chunk.renormalize:
        # The rows left out are a block with u = 0 (README, eq. 8); its mass is summed, not subtracted.
        kept = _share(set_lse, rest_lse)
        missing = _share(candidates.left_out_lse, rest_lse)
        var = kept * var + kept * missing * mean * mean
        mean, bend_mean = kept * mean, kept * bend_mean
        left_out = r * missing * (1.0 + 64.0 * torch.finfo(dtype).eps)
        smallest = act.z.amin(dim=1) if act.z.shape[1] else rest_lse
        bound = u_bound(chunk, r * _share(smallest, rest_lse))
    x_sampled = zero if x is None else x[:, -1]
    return Statistics(
        log_odds=sampled.z - rest_lse,
        rest_entropy=rest_entropy,
        judged_log_odds=log_odds,
        u_sampled=u[:, -1],
        u_mean=mean,
        u_var=var,
        bend_gap=x_sampled - bend_mean,
        left_out=left_out,
        u_bound=bound,
        support=Support(rows, residual),
    )


def _share(part: Float[Tensor, "n"], whole: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """``exp(part − whole)``, at most 1; 0 where there is nothing to share (V = 1)."""
    return torch.where(whole == -torch.inf, 0.0, (part - whole).exp().clamp_max(1.0))
