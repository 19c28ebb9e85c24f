"""The elementwise loops that cost something, fused by ``torch.compile`` where it pays.

- A token's exact Adam step on given rows, ``n·k·d``: gathered, divided and reduced in one loop, so that no
  ``[n, k, d]`` tensor exists. The plain form works through cache-sized pieces.
- The sums of a block of logits: one pass instead of ten.

Each is a few lines of torch (:func:`definition`, :func:`sums_definition`) that the compiler is handed;
without a compiler, or for small work, the callers' plain forms run.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

from capo.core.statistics.options import current
from capo.core.statistics.rest import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

WORTH_COMPILING = 1 << 22  # elements of work in one call


@dataclass(frozen=True)
class AdamScalars:
    """Adam's constants, with both bias corrections folded in."""

    momentum: float
    fresh: float
    keep: float
    new: float
    eps: float


def definition(
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    exp_avg: Float[Tensor, "R d"],
    exp_avg_sq: Float[Tensor, "R d"],
    rows: Int[Tensor, "n k"],
    scalars: Float[Tensor, "5"],
) -> Float[Tensor, "n k"]:
    """The operation itself; in eager mode it materialises ``[n, k, d]``."""
    x = coefficient[:, :, None] * hidden[:, None, :]
    m, v = exp_avg[rows].to(x.dtype), exp_avg_sq[rows].to(x.dtype)
    update = (scalars[0] * m + scalars[1] * x) / (
        (scalars[2] * v + scalars[3] * x * x).sqrt() + scalars[4]
    )
    return (update * hidden[:, None, :]).sum(-1)


def adam_rows(
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    exp_avg: Float[Tensor, "R d"],
    exp_avg_sq: Float[Tensor, "R d"],
    rows: Int[Tensor, "n k"],
    scalars: AdamScalars,
) -> Float[Tensor, "n k"]:
    """``Σ_j h_j (a m + b x) / (√(β₂ v + (1−β₂) x²) + ε̃)`` with ``x = c h_j``, for each token's rows."""
    n, k = rows.shape
    d = hidden.shape[1]
    constants = torch.tensor(astuple(scalars), dtype=hidden.dtype, device=hidden.device)
    if n and pays(n * k * d, hidden.device):
        arguments = (hidden, coefficient.contiguous(), exp_avg, exp_avg_sq, rows, constants)
        fused: Tensor | None = _run(definition, *arguments)
        if fused is not None:
            return fused
    out = hidden.new_empty(n, k)
    for part in current(hidden.device).pieces(n, k * d):
        out[part] = _piece(
            hidden[part], coefficient[part], exp_avg, exp_avg_sq, rows[part], scalars
        )
    return out


def _piece(
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    exp_avg: Float[Tensor, "R d"],
    exp_avg_sq: Float[Tensor, "R d"],
    rows: Int[Tensor, "n k"],
    scalars: AdamScalars,
) -> Float[Tensor, "n k"]:
    """:func:`definition` in place, on a piece small enough for the cache."""
    dtype = hidden.dtype
    shape = (*rows.shape, hidden.shape[1])
    index = rows.reshape(-1)
    x = coefficient[:, :, None] * hidden[:, None, :]
    numerator = exp_avg.index_select(0, index).to(dtype).view(shape)
    numerator.mul_(scalars.momentum).add_(x, alpha=scalars.fresh)
    denominator = exp_avg_sq.index_select(0, index).to(dtype).view(shape)
    denominator.mul_(scalars.keep).addcmul_(x, x, value=scalars.new).sqrt_().add_(scalars.eps)
    numerator.div_(denominator)
    return torch.bmm(numerator, hidden[:, :, None])[:, :, 0]


def adam_without_moments(
    hidden: Float[Tensor, "n d"], coefficient: Float[Tensor, "n k"], scalars: AdamScalars
) -> Float[Tensor, "n k"]:
    """The first step: ``Σ_j h_j b x / (√(1−β₂) |x| + ε̃)``."""
    n, k = coefficient.shape
    out = hidden.new_empty(n, k)
    for part in current(hidden.device).pieces(n, k * hidden.shape[1]):
        x = coefficient[part, :, None] * hidden[part, None, :]
        update = x / (x.abs().mul_(scalars.new**0.5).add_(scalars.eps))
        out[part] = torch.bmm(update, hidden[part, :, None])[:, :, 0]
    return out.mul_(scalars.fresh)


def _exponentials(
    z: Float[Tensor, "n v"], own: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"], Float[Tensor, "n v"]]:
    """``max``, ``e = exp(z − max)`` and ``e·(z − max)``, both 0 at the column ``own`` (−1: none)."""
    is_own = torch.arange(z.shape[1], device=z.device)[None, :] == own[:, None]
    top = torch.where(is_own, ABSENT, z).amax(1)
    x = z - top[:, None]
    e = torch.where(is_own, 0.0, x.exp())
    # The sampled token may be far above the rest, where its exponential overflows: keep it out.
    return top, e, torch.where(is_own, 0.0, e * x)


def sums_definition(
    z: Float[Tensor, "n v"], own: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], ...]:
    """``max, Σe, Σe·(z−max)`` over all columns but ``own`` (−1: none)."""
    top, e, energy = _exponentials(z, own)
    return top, e.sum(1), energy.sum(1)


def square_sums_definition(
    z: Float[Tensor, "n v"], own: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], ...]:
    """The same and ``Σe(e−1), Σe(e−1)²``."""
    top, e, energy = _exponentials(z, own)
    y = e * (e - 1.0)
    return top, e.sum(1), energy.sum(1), y.sum(1), (y * (e - 1.0)).sum(1)


def softmax_sums(
    z: Float[Tensor, "n v"], own: Int[Tensor, "n"], *, squares: bool
) -> tuple[Float[Tensor, "n"], ...] | None:
    """One fused pass over a block, or None where the compiler failed."""
    result = _run(square_sums_definition if squares else sums_definition, z, own)
    return None if result is None else tuple(result)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
_ready: set[Callable[..., Any]] = set()
_broken: list[str] = []


def pays(work: int, device: torch.device) -> bool:
    """Whether to fuse a call over that many elements."""
    wanted = current(device).compile
    if wanted is not None:
        return wanted and not _broken
    if _broken or work < WORTH_COMPILING or device.type not in ("cpu", "cuda"):
        return False
    compiler = os.environ.get("CXX") or "g++"
    return device.type == "cuda" or shutil.which(compiler) is not None


def _run(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """``function`` under torch.compile, one graph for every shape, so that a resumed run reuses it.

    None where the compiler failed: a broken tool chain must not end a training run.
    """
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True, fullgraph=True)
    fused = _compiled[function]
    if function in _ready:
        return fused(*arguments)
    try:
        with (
            warnings.catch_warnings()
        ):  # the compiler's own deprecations are no concern of the user's
            warnings.simplefilter("ignore")
            result = fused(*arguments)
    except Exception as error:
        _broken.append(repr(error))
        warnings.warn(
            f"torch.compile failed ({type(error).__name__}); CAPO's statistics go on unfused. "
            "Set capo.core.statistics.options(compile=False) to silence this.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    _ready.add(function)
    return result
