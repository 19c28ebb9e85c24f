"""The fused backend: logits, softmax and the moments of u in one kernel, never ``[N, V]``.

| step | full vocabulary | ``top_k`` |
|---|---|---|
| SGD, a given step | one pass | one pass, then the judged rows |
| momentum, SGD with decay, frozen Adam | two passes: π must be known before u | the same |
| exact Adam | the chunked loop: ``N·V·d`` elementwise work has nothing to gain | the same |

For the largest rivals a pass over a few tokens (``held`` logits at most) also writes their raw logits
and the largest of each vocabulary tile. The K − 1 largest logits lie in the K − 1 tiles with the largest
maxima, so only those are sorted: writing 4 bytes a logit beside 2·d operations costs little, and no
sorting network runs inside the product.

16-bit inputs are multiplied as they are and accumulated in float32; a float32 step beside 16-bit hidden
states in three TF32 products; float32 hidden states as ``torch.set_float32_matmul_precision`` says.
float64 goes to the chunked backend: whoever asks for float64 wants a reference.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import torch

from capo.core.errors import InputError
from capo.core.statistics import chunked, triton_launch
from capo.core.statistics.fused import AdamScalars
from capo.core.statistics.judged import Candidates, Sampled, judge_candidates, sgd_statistics
from capo.core.statistics.projection import adam_scalars, frozen_factors, gradient_scale
from capo.core.statistics.rest import ABSENT
from capo.core.statistics.result import Statistics
from capo.core.statistics.triton_launch import Keys, Moved, over_rows
from capo.core.steps import AdamStep, GivenStep, MomentumStep, SGDStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.statistics.problem import Problem

T = TypeVar("T")

JUDGED = 4096  # tokens whose rivals are judged together


class _State:
    failed: bool = False


def require(problem: Problem) -> None:
    """Raise :class:`InputError` unless the kernels can run here."""
    interpreted = triton_launch.interpreted()  # raises where triton is not installed
    if not (interpreted or problem.hidden.is_cuda):
        raise InputError(
            "impl",
            f"'triton' needs tensors on a CUDA device, got {problem.hidden.device.type} (or "
            "TRITON_INTERPRET=1 set before triton is first imported); use 'auto'.",
        )


def preferred(problem: Problem) -> bool:
    """Whether ``impl="auto"`` should run the kernels."""
    return problem.hidden.is_cuda and problem.dtype != torch.float64 and available()


def available() -> bool:
    """Whether triton is installed and has not failed in this process."""
    return not _State.failed and find_spec("triton") is not None


def compute_or_chunked(problem: Problem) -> Statistics:
    """What ``impl="auto"`` runs on a GPU."""
    return or_plain(lambda: compute(problem), lambda: chunked.compute(problem))


def or_plain(fused: Callable[[], T], plain: Callable[[], T]) -> T:
    """What a kernel makes; a broken tool chain must not end a training run."""
    try:
        return fused()
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _State.failed = True
        warnings.warn(
            f"Triton failed ({type(error).__name__}: {error}); CAPO goes on without its kernels.",
            RuntimeWarning,
            stacklevel=2,
        )
        return plain()


def compute(problem: Problem) -> Statistics:
    """Per-token statistics by fused kernels.

    Raises:
        InputError: triton is not installed, or neither a GPU nor its interpreter is there.
    """
    require(problem)
    step = problem.step
    exact_adam = isinstance(step, AdamStep) and step.preconditioner == "exact"
    if problem.dtype == torch.float64 or (exact_adam and problem.top_k is None):
        return chunked.compute(problem)
    if problem.top_k is not None:
        return _judge_top_k(problem)
    if isinstance(step, SGDStep) and not step.weight_decay:
        return _judge_sgd(problem, step)
    return _judge_projected(problem)


def _sampled(p: Problem) -> tuple[Sampled, Int[Tensor, "N 1"]]:
    """The sampled token's own logit, gathered rather than picked out of a tile."""
    rows = p.token_ids[:, None]
    y = over_rows("product", p.hidden, rows, first=p.head.weight)[:, 0]
    if p.head.bias is not None:
        y += p.head.bias[p.token_ids].to(y.dtype)
    z, slope, bend = p.head.activate(y)
    slopes = slope if isinstance(slope, torch.Tensor) else torch.full_like(z, slope)
    return Sampled(z, slopes, torch.zeros_like(z) if bend is None else bend), rows


def _judge_sgd(p: Problem, step: SGDStep) -> Statistics:
    """SGD in closed form (README, eq. 9): values of degree 1 in π′."""
    rest, _ = triton_launch.rest(p, "proportional")
    sampled, _ = _sampled(p)
    return sgd_statistics(p, step.lr, _square_norm(p), sampled, rest)


def _judge_projected(p: Problem) -> Statistics:
    """Steps whose u is a matrix product, with or without the token's own gradient."""
    sampled, rows = _sampled(p)
    rest, moved = None, Moved()
    if isinstance(p.step, GivenStep):
        moved = Moved(matrix=p.step.delta)
    else:
        rest, _ = triton_launch.rest(p)
        # With V = 1 there is no rest: −∞ would meet the absent logit as ∞ − ∞.
        moved = _moved(p, torch.sigmoid(rest.lse - sampled.z), rest.lse.clamp_min(ABSENT))
    values, _ = triton_launch.rest(p, "projected", moved)
    lse, entropy = (values.lse, values.entropy) if rest is None else (rest.lse, rest.entropy)
    log_odds = sampled.z - lse
    temperature = p.head.temperature
    coefficient = p.advantages * sampled.slope * torch.sigmoid(-log_odds) / temperature
    q = project_rows(p, coefficient[:, None], rows)[:, 0]
    bend_gap = sampled.bend * q * q / temperature - values.bend
    u = q * sampled.slope / temperature
    return Statistics.full(log_odds, entropy, u, values.mean, values.var, bend_gap)


def _moved(p: Problem, r: Float[Tensor, "N"], lse: Float[Tensor, "N"]) -> Moved:
    """How q is made up over the rest, where a token's own gradient is ``c_k = −A r φ′ π′_k/T``."""
    step, own = p.step, -p.advantages * r / p.head.temperature
    match step:
        case SGDStep():
            return Moved(
                decay=step.lr * step.weight_decay,
                fresh=step.lr * _square_norm(p) * own,
                normaliser=lse,
            )
        case MomentumStep():
            factor = step.lr * step.gradient_factor
            return Moved(
                matrix=step.momentum_buffer,
                factor=-step.lr * step.buffer_factor,
                decay=factor * step.weight_decay,
                fresh=factor * step.grad_scale * _square_norm(p) * own,
                normaliser=lse,
            )
        case AdamStep():
            direction, fresh, inverse_correction = frozen_factors(step)
            return Moved(
                matrix=step.exp_avg,
                factor=direction,
                square=step.exp_avg_sq,
                inverse_correction=inverse_correction,
                eps=step.eps,
                decay=step.lr * step.weight_decay,
                fresh=fresh * own,
                normaliser=lse,
            )
    raise TypeError(f"no fused pass for {type(step).__name__}")


def _judge_top_k(p: Problem) -> Statistics:
    """Normaliser and rivals of a few tokens at a time, then the judged rows of many."""
    size = triton_launch.held_tokens(p.hidden, p.head)
    judged = size * max(1, JUDGED // size)
    parts = []
    for start in range(0, p.token_ids.shape[0], judged):
        part = _tokens(p, start, start + judged)
        parts.append(
            judge_candidates(part.chunk(slice(None)), *rivals(part), partial(project_rows, part))
        )
    return Statistics.concatenate(parts)


def rivals(p: Problem) -> tuple[Sampled, Candidates, Float[Tensor, "N"], Float[Tensor, "N"]]:
    """The sampled tokens, their likeliest rivals, and ``(lse, entropy)`` of the rest.

    Args:
        p: the tokens, hidden states in their own dtype; ``top_k`` is given.
    """
    size = triton_launch.held_tokens(p.hidden, p.head)
    found = [
        _find_rivals(_tokens(p, first, first + size))
        for first in range(0, p.token_ids.shape[0], size)
    ]
    lse, entropy = (torch.cat(column) for column in zip(*(f[:2] for f in found), strict=True))
    return _sampled(p)[0], chunked.join_candidates([f[2] for f in found]), lse, entropy


def _tokens(p: Problem, start: int, stop: int) -> Problem:
    """Some of the tokens, hidden states left in their own dtype."""
    block = slice(start, stop)
    return replace(
        p, hidden=p.hidden[block], token_ids=p.token_ids[block], advantages=p.advantages[block]
    )


def _find_rivals(p: Problem) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Candidates]:
    """``(lse, entropy)`` of the rest and the K − 1 largest logits besides the sampled token's."""
    assert p.top_k is not None
    sign = 1.0 if p.head.scale >= 0 else -1.0  # φ is increasing, or decreasing: order by raw logits
    rest, held = triton_launch.rest(p, keys_sign=sign)
    assert held is not None
    top, rows = largest(held, p.top_k - 1)
    left_out = rest.lse
    if not p.renormalize:
        held.keys.scatter_(1, rows, -torch.inf)
        left_out = triton_launch.log_sum(held.keys, p.head, sign)
    return rest.lse, rest.entropy, Candidates(sign * top, rows, left_out)


def largest(held: Keys, k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest keys and their columns, sorting only the groups that can hold them."""
    n, groups = held.maxima.shape
    size = held.keys.shape[1] // groups
    chosen = held.maxima.topk(min(k, groups), dim=1, sorted=False).indices
    grouped = held.keys.view(n, groups, size)
    picked = grouped.gather(1, chosen[:, :, None].expand(-1, -1, size)).view(n, -1)
    top, order = picked.topk(k, dim=1)
    return top, chosen.gather(1, order // size) * size + order % size


def project_rows(
    p: Problem, coefficient: Float[Tensor, "n k"], rows: Int[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """``q[i, j] = Δ_i[rows[i, j]] · h_i``, as ``projection.project_gathered`` defines it."""
    step, hidden = p.step, p.hidden
    decay = 0.0
    match step:
        case GivenStep():
            return over_rows("product", hidden, rows, first=step.delta)
        case SGDStep():
            q = step.lr * _square_norm(p)[:, None] * coefficient
            decay = step.lr * step.weight_decay
        case MomentumStep():
            factor = step.lr * step.gradient_factor
            q = factor * step.grad_scale * _square_norm(p)[:, None] * coefficient
            if step.momentum_buffer is not None:
                old = over_rows("product", hidden, rows, first=step.momentum_buffer)
                q = q - (step.lr * step.buffer_factor) * old
            decay = factor * step.weight_decay
        case AdamStep():
            q = _adam_rows(step, hidden, coefficient, rows)
            decay = step.lr * step.weight_decay
    if decay:
        q = q - decay * over_rows("product", hidden, rows, first=p.head.weight)
    return q


def _adam_rows(
    step: AdamStep,
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    rows: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Adam on the given rows (README, eq. 10–12), bias corrections folded into five constants."""
    if step.preconditioner == "frozen":
        direction, fresh, inverse_correction = frozen_factors(step)
        scalars = AdamScalars(direction, fresh, inverse_correction, 0.0, step.eps)
        return over_rows(
            "frozen", hidden, rows, coefficient, step.exp_avg, step.exp_avg_sq, scalars
        )
    scalars = adam_scalars(step)
    scaled = coefficient * gradient_scale(step)
    if step.exp_avg is None:
        empty = replace(scalars, new=scalars.new**0.5)
        return over_rows("adam_empty", hidden, rows, scaled, scalars=empty) * scalars.fresh
    return over_rows("adam", hidden, rows, scaled, step.exp_avg, step.exp_avg_sq, scalars)


def _square_norm(p: Problem) -> Float[Tensor, "N"]:
    """``‖h‖²`` in float32, without a float32 copy of h."""
    norm: Tensor = torch.linalg.vector_norm(p.hidden, dim=1, dtype=torch.float32)
    return norm * norm
