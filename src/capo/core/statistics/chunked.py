"""The streaming backend: token chunks × vocabulary blocks, never ``[N, V]`` nor ``[N, K, d]``.

Three loops, chosen by what the step needs of the distribution (README, §5):

- ``SGDStep`` and ``GivenStep`` on the full vocabulary: one pass of block statistics, merged;
- ``top_k``: one pass for the normaliser and the K − 1 largest rivals, then the judged rows;
- everything else on the full vocabulary: π must be known before u, so a few tokens' logits are held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from capo.core.statistics import fused
from capo.core.statistics.judged import (
    Candidates,
    Sampled,
    judge_candidates,
    sgd_statistics,
    values,
)
from capo.core.statistics.options import current
from capo.core.statistics.problem import Activation
from capo.core.statistics.projection import project_block
from capo.core.statistics.rest import (
    ABSENT,
    Rest,
    Weights,
    dot,
    locate,
    merge,
    rest_of_sums,
    weigh,
)
from capo.core.statistics.result import Statistics
from capo.core.statistics.topk import RunningTopK
from capo.core.steps import GivenStep, SGDStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.statistics.problem import Head, Problem


def compute(problem: Problem) -> Statistics:
    """Per-token statistics, one token chunk at a time."""
    step, vocabulary = problem.step, problem.head.vocabulary
    sizes = current(problem.hidden.device)
    one_pass = isinstance(step, GivenStep) or (isinstance(step, SGDStep) and not step.weight_decay)
    if problem.top_k is not None:
        judge, size = _judge_top_k, sizes.tokens(vocabulary)
    elif one_pass:
        judge, size = _judge_one_pass, sizes.tokens(vocabulary)
    else:
        judge, size = _judge_held, sizes.held_tokens(vocabulary)
    n = problem.token_ids.shape[0]
    chunks = (problem.chunk(slice(start, start + size)) for start in range(0, n, size))
    return Statistics.concatenate([judge(chunk) for chunk in chunks])


def vocabulary_blocks(head: Head, within: slice | None = None) -> Iterator[slice]:
    """Contiguous row blocks of ``vocab_chunk`` rows."""
    size, first, last = current(head.weight.device).vocab_chunk, 0, head.vocabulary
    if within is not None:
        first, last = within.start, within.stop
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


class _SampledGatherer:
    """Collects the sampled token's values from whichever block holds it."""

    def __init__(self, like: Float[Tensor, "n"]) -> None:
        self.z, self.slope, self.bend, self.q = (torch.zeros_like(like) for _ in range(4))

    def take(self, act: Activation, position: Int[Tensor, "n"], present: Bool[Tensor, "n"]) -> None:
        column = position[:, None]
        self.z = torch.where(present, act.z.gather(1, column)[:, 0], self.z)
        slope = (
            act.slope.gather(1, column)[:, 0]
            if isinstance(act.slope, torch.Tensor)
            else torch.full_like(self.slope, act.slope)
        )
        self.slope = torch.where(present, slope, self.slope)
        if act.bend is not None:
            self.bend = torch.where(present, act.bend.gather(1, column)[:, 0], self.bend)

    def sampled(self) -> Sampled:
        return Sampled(self.z, self.slope, self.bend)


def _judge_one_pass(chunk: Problem) -> Statistics:
    """SGD in closed form (README, eq. 9) and given steps: values of degree 1 and 0 in π′."""
    head, step, h = chunk.head, chunk.step, chunk.hidden
    rest = Rest.empty(h[:, 0], degree=1 if isinstance(step, SGDStep) else 0)
    gatherer = _SampledGatherer(h[:, 0])
    for block in vocabulary_blocks(head):
        act = head.activate(head.raw(h, block))
        position, present = locate(chunk.token_ids, block)
        gatherer.take(act, position, present)
        if isinstance(step, SGDStep):
            piece = _sgd_block(chunk, act, position, present)
        else:
            q = project_block(step, h, act.z, head.weight, block)  # act.z: unused by a given step
            gatherer.q = torch.where(present, q.gather(1, position[:, None])[:, 0], gatherer.q)
            weights = weigh(act.z, position, present)
            piece = _values_block(weights, *values(chunk, q, act))
        rest = merge(rest, piece)

    if isinstance(step, SGDStep):
        return sgd_statistics(chunk, step.lr, dot(h, h), gatherer.sampled(), rest)
    u_a = gatherer.q * gatherer.slope / head.temperature
    bend_gap = gatherer.bend * gatherer.q**2 / head.temperature - rest.bend
    return Statistics.full(gatherer.z - rest.lse, rest.entropy, u_a, rest.mean, rest.var, bend_gap)


def _sgd_block(
    chunk: Problem, act: Activation, position: Int[Tensor, "n"], present: Bool[Tensor, "n"]
) -> Rest:
    """Block statistics of the values ``φ′² π′`` (and ``φ″ φ′² π′²``)."""
    if isinstance(act.slope, float):
        squared = act.slope**2
        rest = _softmax_block(chunk, act.z, position, present, squares=True)
        # Constant slope: scaled once per token instead of once per logit.
        return replace(rest, mean=squared * rest.mean, var=squared**2 * rest.var)
    weights = weigh(act.z, position, present)
    pi = weights.probabilities
    value = act.slope * act.slope * pi
    mean, var = weights.moments(value)
    assert act.bend is not None
    bend = weights.mean(act.bend * value * pi)
    return Rest(weights.lse, weights.entropy, mean, var, bend, degree=1)


def _values_block(
    weights: Weights, u: Float[Tensor, "n v"], x: Float[Tensor, "n v"] | None
) -> Rest:
    mean, var = weights.moments(u)
    bend = torch.zeros_like(mean) if x is None else weights.mean(x)
    return Rest(weights.lse, weights.entropy, mean, var, bend)


def normalise(chunk: Problem, held: Float[Tensor, "n V"] | None = None) -> tuple[Rest, Sampled]:
    """One pass for the normaliser alone; keeps the raw logits in ``held`` where given."""
    head, h = chunk.head, chunk.hidden
    rest = Rest.empty(h[:, 0])
    gatherer = _SampledGatherer(h[:, 0])
    for block in vocabulary_blocks(head):
        y = head.raw(h, block)
        if held is not None:
            held[:, block] = y
        act = head.activate(y)
        position, present = locate(chunk.token_ids, block)
        gatherer.take(act, position, present)
        rest = merge(rest, _softmax_block(chunk, act.z, position, present, squares=False))
    return rest, gatherer.sampled()


class ValueAccumulator:
    """Merges the blocks of u, once the normaliser is known."""

    def __init__(self, chunk: Problem, rest: Rest, sampled: Sampled) -> None:
        self.chunk, self.rest = chunk, rest
        self.log_odds = sampled.z - rest.lse
        self.r = torch.sigmoid(-self.log_odds)
        self.u_a, self.x_a = torch.zeros_like(self.r), torch.zeros_like(self.r)
        self.value = Rest.empty(self.r)

    def coefficient(self, act: Activation, block: slice) -> Float[Tensor, "n v"]:
        """Ascent-gradient coefficients ``A (D w)_k / T`` of a block."""
        position, present = locate(self.chunk.token_ids, block)
        column = position[:, None]
        w = (act.z - self.rest.lse[:, None]).exp_().mul_(-self.r[:, None])
        w.scatter_(1, column, torch.where(present[:, None], self.r[:, None], w.gather(1, column)))
        factor = self.chunk.advantages / self.chunk.head.temperature
        return w.mul_(act.slope).mul_(factor[:, None])

    def take(self, q: Float[Tensor, "n v"], act: Activation, block: slice) -> None:
        """Take in the projections of a block; ``act.z`` is overwritten."""
        position, present = locate(self.chunk.token_ids, block)
        column = position[:, None]
        u, x = values(self.chunk, q, act)
        self.u_a = torch.where(present, u.gather(1, column)[:, 0], self.u_a)
        if x is not None:
            self.x_a = torch.where(present, x.gather(1, column)[:, 0], self.x_a)
        self.value = merge(self.value, _values_block(weigh(act.z, position, present), u, x))

    def statistics(self) -> Statistics:
        """The result, when every block has been taken."""
        value = self.value
        bend_gap = self.x_a - value.bend
        return Statistics.full(
            self.log_odds, self.rest.entropy, self.u_a, value.mean, value.var, bend_gap
        )


def _judge_held(chunk: Problem) -> Statistics:
    """Steps whose u needs π: this chunk's raw logits are held, then walked a second time."""
    head, h = chunk.head, chunk.hidden
    held = h.new_empty(h.shape[0], head.vocabulary)
    accumulator = ValueAccumulator(chunk, *normalise(chunk, held))
    for block in vocabulary_blocks(head):
        act = head.activate(held[:, block])
        coefficient = accumulator.coefficient(act, block)
        q = project_block(chunk.step, h, coefficient, head.weight, block)
        accumulator.take(q, act, block)
    return accumulator.statistics()


def join(pieces: Sequence[tuple[Rest, Sampled]]) -> tuple[Rest, Sampled]:
    """Normalisers of token chunks in order."""
    rests, sampled = [r for r, _ in pieces], [s for _, s in pieces]
    columns = {
        name: torch.cat([getattr(r, name) for r in rests])
        for name in ("lse", "entropy", "mean", "var", "bend")
    }
    own = {name: torch.cat([getattr(s, name) for s in sampled]) for name in ("z", "slope", "bend")}
    return Rest(**columns, degree=rests[0].degree), Sampled(**own)


def join_candidates(pieces: Sequence[Candidates]) -> Candidates:
    """Candidates of token chunks in order."""
    return Candidates(
        torch.cat([c.y for c in pieces]),
        torch.cat([c.rows for c in pieces]),
        torch.cat([c.left_out_lse for c in pieces]),
    )


def _judge_top_k(chunk: Problem) -> Statistics:
    """Normaliser and the largest rivals in one pass, then the judged rows."""
    rest, sampled, candidates = find_rivals(chunk)
    return judge_candidates(chunk, sampled, candidates, rest.lse, rest.entropy)


def find_rivals(chunk: Problem) -> tuple[Rest, Sampled, Candidates]:
    """The normaliser and the K − 1 largest logits besides the sampled token's.

    Logits are made block by block and sorted stretch by stretch: a stretch is as many blocks as
    ``logit_buffer`` holds, since what sorting costs is mostly per row and call.
    """
    assert chunk.top_k is not None
    head, h = chunk.head, chunk.hidden
    rest = Rest.empty(h[:, 0])
    gatherer = _SampledGatherer(h[:, 0])
    left_out = torch.full_like(h[:, 0], -torch.inf)
    # φ is increasing, so the largest raw logits are the largest logits.
    rivals = RunningTopK(h[:, 0], chunk.top_k - 1, descending=head.scale >= 0)
    for stretch in _stretches(head, h.shape[0]):
        held = h.new_empty(h.shape[0], stretch.stop - stretch.start)
        for block in vocabulary_blocks(head, within=stretch):
            y = head.raw(h, block)
            held[:, block.start - stretch.start : block.stop - stretch.start] = y
            act = head.activate(y)
            position, present = locate(chunk.token_ids, block)
            gatherer.take(act, position, present)
            rest = merge(rest, _softmax_block(chunk, act.z, position, present, squares=False))
        position, present = locate(chunk.token_ids, stretch)
        columns, evicted = rivals.update(held, stretch.start, position, present)
        if not chunk.renormalize:
            own = torch.where(present, position, held.shape[1])[:, None]
            gone = torch.zeros_like(held[:, :1]).expand(-1, 1)
            never = torch.cat([held, gone], 1).scatter_(1, torch.cat([columns, own], 1), ABSENT)
            left_out = torch.logaddexp(left_out, _lse_of_rivals(head, never[:, :-1]))
            left_out = torch.logaddexp(left_out, _lse_of_rivals(head, evicted))
    return rest, gatherer.sampled(), Candidates(*rivals.result(), left_out)


def _stretches(head: Head, tokens: int) -> Iterator[slice]:
    """Runs of whole vocabulary blocks whose logits fit into ``logit_buffer``."""
    sizes = current(head.weight.device)
    size = max(1, sizes.logit_buffer // (tokens * sizes.vocab_chunk)) * sizes.vocab_chunk
    for start in range(0, head.vocabulary, size):
        yield slice(start, min(start + size, head.vocabulary))


def _lse_of_rivals(head: Head, y: Float[Tensor, "n e"]) -> Float[Tensor, "n"]:
    absent = y.abs() >= -ABSENT
    return torch.logsumexp(head.activate(y).z.masked_fill_(absent, -torch.inf), dim=1)


def _softmax_block(
    chunk: Problem,
    z: Float[Tensor, "n v"],
    position: Int[Tensor, "n"],
    present: Bool[Tensor, "n"],
    *,
    squares: bool,
) -> Rest:
    """Normaliser and entropy of a block, and with ``squares`` the moments of the values ``π′`` themselves.

    ``z`` may be overwritten.
    """
    if fused.pays(chunk.hidden.shape[0] * chunk.head.vocabulary, z.device):
        sums = fused.softmax_sums(z, torch.where(present, position, -1), squares=squares)
        if sums is not None:
            return rest_of_sums(*sums)
    weights = weigh(z, position, present)
    zero = torch.zeros_like(weights.lse)
    if not squares:
        return Rest(weights.lse, weights.entropy, zero, zero, zero)
    mean, var = weights.moments(weights.probabilities)
    return Rest(weights.lse, weights.entropy, mean, var, zero, degree=1)
