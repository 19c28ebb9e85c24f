"""Sequence and batch granularity: one step from the mean gradient of a group of tokens.

``G = mean_{i ∈ group} A_i (D w_i) h_iᵀ/T`` (as a loss gradient: ``−G``), ``Δ`` what the optimizer makes
of it, and every token of the group is judged by that one ``Δ`` (README, §6). Rows of ``Δ`` are built
block by block; with ``top_k`` only the rows that occur in some token's set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from capo.core.statistics import chunked, triton_backend, triton_launch
from capo.core.statistics.judged import Candidates, Sampled, judge_candidates
from capo.core.statistics.options import current
from capo.core.statistics.projection import gathered_product, gradient_scale
from capo.core.statistics.result import Statistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.statistics.problem import Head, Problem
    from capo.core.steps import Step


def compute(problem: Problem, groups: Int[Tensor, "N"], *, fused: bool = False) -> Statistics:
    """Per-token statistics of each token under its group's step, in the order of the tokens.

    Args:
        problem: the tokens.
        groups: ``[N]`` group of each token, any integers.
        fused: find the judged rows and read the step with the Triton kernels (``top_k`` only; float64
            never is).
    """
    fused = fused and problem.dtype != torch.float64
    order = torch.argsort(groups, stable=True)
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1].tolist()
    parts = []
    for index in torch.split(order, sizes):
        group = replace(
            problem,
            hidden=problem.hidden[index],
            token_ids=problem.token_ids[index],
            advantages=problem.advantages[index],
        )
        if problem.top_k is None:
            parts.append(_judge_all(group.chunk(slice(None))))
        else:
            parts.append(_judge_rows(group, fused))
    return Statistics.concatenate(parts).reorder(torch.argsort(order))


def _judge_all(group: Problem) -> Statistics:
    """Full vocabulary: gradient, step and values of one block of rows after the other."""
    head, h, step = group.head, group.hidden, group.step
    sizes = current(h.device)
    n, size = h.shape[0], sizes.tokens(head.vocabulary)
    pieces = [
        chunked.normalise(group.chunk(slice(start, start + size))) for start in range(0, n, size)
    ]
    rest, sampled = chunked.join(pieces)
    accumulator = chunked.ValueAccumulator(group, rest, sampled)
    rows = max(1, min(sizes.vocab_chunk, sizes.logit_buffer // n))
    for start in range(0, head.vocabulary, rows):
        block = slice(start, min(start + rows, head.vocabulary))
        act = head.activate(head.raw(h, block))
        coefficient = accumulator.coefficient(act, block)
        gradient = coefficient.T @ h * (-gradient_scale(step) / n)
        delta = step.of_gradient(gradient, head.weight[block].to(h.dtype), block)
        accumulator.take(h @ delta.T, act, block)
    return accumulator.statistics()


def _judge_rows(given: Problem, fused: bool) -> Statistics:
    """Judged rows only: the union of the tokens' sets."""
    group = given.chunk(slice(None))  # in the compute dtype; the kernels read the given one

    def project(
        coefficient: Float[Tensor, "n k"], rows: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n k"]:
        delta, position = step_on_rows(group.step, group.head, group.hidden, coefficient, rows)
        return product_of_rows(delta, position, given.hidden, given.dtype, fused=fused)

    found = triton_backend.rivals(given) if fused else _rivals(group)
    return judge_candidates(group, *found, project)


def step_on_rows(
    step: Step,
    head: Head,
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    rows: Int[Tensor, "n k"],
) -> tuple[Float[Tensor, "R d"], Int[Tensor, "n k"]]:
    """The step of the tokens' mean gradient on the rows that occur, and each token's rows among these.

    Args:
        hidden: in the compute dtype.
        coefficient: ascent-gradient coefficients ``A (D w)_k / T``.
        rows: their vocabulary rows.
    """
    used, position = torch.unique(rows, return_inverse=True)
    delta = scatter_gradient(coefficient, hidden, position, used.shape[0])
    delta *= -gradient_scale(step) / hidden.shape[0]
    size = max(1, current(hidden.device).logit_buffer // hidden.shape[1])
    for start in range(0, used.shape[0], size):  # in place: Δ is as large as the head
        part = slice(start, start + size)
        some = used[part]
        delta[part] = step.of_gradient(delta[part], head.weight[some].to(hidden.dtype), some)
    return delta, position


def product_of_rows(
    delta: Float[Tensor, "R d"],
    position: Int[Tensor, "n k"],
    hidden: Float[Tensor, "n d"],
    dtype: torch.dtype,
    *,
    fused: bool,
) -> Float[Tensor, "n k"]:
    """``delta[position[i, j]] · h_i``; fused by the kernels, which read ``hidden`` as it is."""
    if fused:
        return triton_launch.over_rows("product", hidden, position, first=delta)
    return gathered_product(delta, position, hidden.to(dtype))


def _rivals(
    group: Problem,
) -> tuple[Sampled, Candidates, Float[Tensor, "n"], Float[Tensor, "n"]]:
    n = group.hidden.shape[0]
    size = current(group.hidden.device).tokens(group.head.vocabulary)
    found = [
        chunked.find_rivals(group.chunk(slice(start, start + size))) for start in range(0, n, size)
    ]
    rest, sampled = chunked.join([(rest, sampled) for rest, sampled, _ in found])
    return sampled, chunked.join_candidates([c for *_, c in found]), rest.lse, rest.entropy


DENSE_ROWS = 16  # × K: below this many used rows one matmul beats scattered additions


def scatters(rows: int, k: int) -> bool:
    """Whether so many used rows are added to one by one."""
    return rows > DENSE_ROWS * k


def scatter_rows(
    into: Float[Tensor, "R d"],
    coefficient: Float[Tensor, "n k"],
    hidden: Float[Tensor, "n d"],
    position: Int[Tensor, "n k"],
) -> None:
    """``into[position[i, j]] += c_ij h_i``."""
    for j in range(position.shape[1]):
        into.index_add_(0, position[:, j], coefficient[:, j, None] * hidden)


def scatter_gradient(
    coefficient: Float[Tensor, "n k"],
    hidden: Float[Tensor, "n d"],
    position: Int[Tensor, "n k"],
    rows: int,
) -> Float[Tensor, "rows d"]:
    """``Σ_i c_ij h_i`` added into row ``position[i, j]`` of ``rows`` used rows."""
    n, k = position.shape
    gradient = hidden.new_zeros(rows, hidden.shape[1])
    if scatters(rows, k):
        scatter_rows(gradient, coefficient, hidden, position)
        return gradient
    size = max(1, current(hidden.device).logit_buffer // rows)
    for start in range(0, n, size):
        part = slice(start, start + size)
        dense = hidden.new_zeros(hidden[part].shape[0], rows)
        dense.scatter_add_(1, position[part], coefficient[part])
        gradient.addmm_(dense.T, hidden[part])
    return gradient
