"""Sequence and batch granularity: one step from the mean gradient of a group of tokens.

``G = mean_{i ∈ group} A_i (D w_i) h_iᵀ/T`` (as a loss gradient: ``−G``), ``Δ`` what the optimizer makes
of it, and every token of the group is judged by that one ``Δ`` (README, §6). Rows of ``Δ`` are built
block by block; with ``top_k`` only the rows that occur in some token's set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from capo.core.statistics import chunked
from capo.core.statistics.judged import judge_candidates
from capo.core.statistics.options import current
from capo.core.statistics.projection import gathered_product, gradient_scale
from capo.core.statistics.result import Statistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.statistics.problem import Problem


def compute(problem: Problem, groups: Int[Tensor, "N"]) -> Statistics:
    """Per-token statistics of each token under its group's step, in the order of the tokens.

    Args:
        problem: the tokens.
        groups: ``[N]`` group of each token, any integers.
    """
    order = torch.argsort(groups, stable=True)
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1].tolist()
    parts = []
    for index in torch.split(order, sizes):
        group = replace(
            problem,
            hidden=problem.hidden[index],
            token_ids=problem.token_ids[index],
            advantages=problem.advantages[index],
        ).chunk(slice(None))
        parts.append(_judge_rows(group) if problem.top_k is not None else _judge_all(group))
    return Statistics.concatenate(parts).reorder(torch.argsort(order))


def _judge_all(group: Problem) -> Statistics:
    """Full vocabulary: gradient, step and values of one block of rows after the other."""
    head, h, step = group.head, group.hidden, group.step
    n, size = h.shape[0], current().tokens(head.vocabulary)
    pieces = [
        chunked.normalise(group.chunk(slice(start, start + size))) for start in range(0, n, size)
    ]
    rest, sampled = chunked.join(pieces)
    accumulator = chunked.ValueAccumulator(group, rest, sampled)
    rows = max(1, min(current().vocab_chunk, current().logit_buffer // n))
    for start in range(0, head.vocabulary, rows):
        block = slice(start, min(start + rows, head.vocabulary))
        act = head.activate(head.raw(h, block))
        coefficient = accumulator.coefficient(act, block)
        gradient = coefficient.T @ h * (-gradient_scale(step) / n)
        delta = step.of_gradient(gradient, head.weight[block].to(h.dtype), block)
        accumulator.take(h @ delta.T, act, block)
    return accumulator.statistics()


def _judge_rows(group: Problem) -> Statistics:
    """Judged rows only: the union of the tokens' sets."""
    h, step, head = group.hidden, group.step, group.head
    n, size = h.shape[0], current().tokens(head.vocabulary)
    found = [
        chunked.find_rivals(group.chunk(slice(start, start + size))) for start in range(0, n, size)
    ]
    rest, sampled = chunked.join([(rest, sampled) for rest, sampled, _ in found])
    candidates = chunked.join_candidates([c for *_, c in found])

    def project(
        coefficient: Float[Tensor, "n k"], rows: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n k"]:
        used, position = torch.unique(rows, return_inverse=True)
        gradient = scatter_gradient(coefficient, h, position, used.shape[0])
        gradient *= -gradient_scale(step) / n
        delta = step.of_gradient(gradient, head.weight[used].to(h.dtype), used)
        return gathered_product(delta, position, h)

    return judge_candidates(group, sampled, candidates, rest.lse, rest.entropy, project)


DENSE_ROWS = 16  # × K: below this many used rows one matmul beats scattered additions


def scatter_gradient(
    coefficient: Float[Tensor, "n k"],
    hidden: Float[Tensor, "n d"],
    position: Int[Tensor, "n k"],
    rows: int,
) -> Float[Tensor, "rows d"]:
    """``Σ_i c_ij h_i`` added into row ``position[i, j]`` of ``rows`` used rows."""
    n, k = position.shape
    gradient = hidden.new_zeros(rows, hidden.shape[1])
    if rows > DENSE_ROWS * k:
        for j in range(k):
            gradient.index_add_(0, position[:, j], coefficient[:, j, None] * hidden)
        return gradient
    size = max(1, current().logit_buffer // rows)
    for start in range(0, n, size):
        part = slice(start, start + size)
        dense = hidden.new_zeros(hidden[part].shape[0], rows)
        dense.scatter_add_(1, position[part], coefficient[part])
        gradient.addmm_(dense.T, hidden[part])
    return gradient
