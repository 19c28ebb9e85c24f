"""The plain backend: whole ``[N, V]`` logits, written to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from capo.core.statistics.judged import Candidates, Sampled, judge_candidates, values
from capo.core.statistics.projection import project_block
from capo.core.statistics.result import Statistics

if TYPE_CHECKING:
    from capo.core.statistics.problem import Problem


def compute(problem: Problem) -> Statistics:
    """Per-token statistics from one matrix of logits."""
    p = problem.chunk(slice(None))
    head, everything = p.head, slice(0, p.head.vocabulary)
    y = head.raw(p.hidden, everything)
    act = head.activate(y.clone())
    a = p.token_ids[:, None]
    is_sampled = torch.zeros_like(y, dtype=torch.bool).scatter_(1, a, value=True)

    slope = act.slope if isinstance(act.slope, torch.Tensor) else torch.full_like(y, act.slope)
    bend = torch.zeros_like(y) if act.bend is None else act.bend
    z_a, slope_a, bend_a = (t.gather(1, a)[:, 0] for t in (act.z, slope, bend))
    log_rest = torch.log_softmax(act.z.masked_fill(is_sampled, -torch.inf), dim=1)  # log π′
    rest_lse = torch.logsumexp(act.z.masked_fill(is_sampled, -torch.inf), dim=1)
    log_rest = log_rest.nan_to_num(nan=-torch.inf)  # V = 1: there is no rest
    pi_rest = log_rest.exp()
    rest_entropy = torch.special.entr(pi_rest).sum(dim=1)

    if p.top_k is not None:
        rivals = act.z.masked_fill(is_sampled, -torch.inf)
        rows = rivals.topk(p.top_k - 1, dim=1).indices
        left_out = torch.logsumexp(rivals.scatter(1, rows, -torch.inf), dim=1)
        candidates = Candidates(y.gather(1, rows), rows, left_out)
        return judge_candidates(
            p, Sampled(z_a, slope_a, bend_a), candidates, rest_lse, rest_entropy
        )

    log_odds = z_a - rest_lse
    r = torch.sigmoid(-log_odds)
    w = torch.where(is_sampled, r[:, None], -r[:, None] * pi_rest)  # w = e_a − π
    coefficient = p.advantages[:, None] * slope * w / head.temperature
    q = project_block(p.step, p.hidden, coefficient, head.weight, everything)
    u, x = values(p, q, act._replace(slope=slope, bend=bend))
    u_mean = (pi_rest * u).sum(dim=1)
    zero = torch.zeros_like(log_odds)
    assert x is not None
    return Statistics(
        log_odds=log_odds,
        rest_entropy=rest_entropy,
        judged_log_odds=log_odds,
        u_sampled=u.gather(1, a)[:, 0],
        u_mean=u_mean,
        u_var=(pi_rest * (u - u_mean[:, None]) ** 2).sum(dim=1),
        bend_gap=x.gather(1, a)[:, 0] - (pi_rest * x).sum(dim=1),
        left_out=zero,
        u_bound=zero,
    )
