"""The one elementwise kernel that costs ``n·k·d``: a token's exact Adam step on given rows.

Two forms of the same sum. The plain one works through cache-sized pieces; the fused one is the
three-line definition below handed to ``torch.compile``, which gathers, divides and reduces in one loop,
so that no ``[n, k, d]`` tensor exists. Fused is used where it pays and a compiler is at hand.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

from capo.core.statistics.options import current

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
    if n and _compile_pays(n * k * d, hidden.device):
        fused = _compiled()
        if fused is not None:
            try:
                arguments = (hidden, coefficient.contiguous(), exp_avg, exp_avg_sq, rows, constants)
                return _call(fused, *arguments)
            except Exception as error:  # a broken tool chain must not end a training run
                _disable(error)
    out = hidden.new_empty(n, k)
    size = max(1, current().elementwise_block // max(1, k * d))
    for start in range(0, n, size):
        part = slice(start, start + size)
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
    size = max(1, current().elementwise_block // max(1, k * hidden.shape[1]))
    for start in range(0, n, size):
        part = slice(start, start + size)
        x = coefficient[part, :, None] * hidden[part, None, :]
        update = x / (x.abs().mul_(scalars.new**0.5).add_(scalars.eps))
        out[part] = torch.bmm(update, hidden[part, :, None])[:, :, 0]
    return out.mul_(scalars.fresh)


class _State:
    function: Callable[..., Any] | None = None
    ready: bool = False
    failed: bool = False


def _compile_pays(work: int, device: torch.device) -> bool:
    wanted = current().compile
    if wanted is not None:
        return wanted and not _State.failed
    if _State.failed or work < WORTH_COMPILING or device.type not in ("cpu", "cuda"):
        return False
    compiler = os.environ.get("CXX") or "g++"
    return device.type == "cuda" or shutil.which(compiler) is not None


def _compiled() -> Callable[..., Tensor] | None:
    """``definition`` under torch.compile, one graph for every shape (so that a resumed run reuses it)."""
    if _State.function is None:
        _State.function = torch.compile(definition, dynamic=True, fullgraph=True)
    return _State.function


def _call(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    if _State.ready:
        return function(*arguments)
    with warnings.catch_warnings():  # the compiler's own deprecations are no concern of the user's
        warnings.simplefilter("ignore")
        out = function(*arguments)
    _State.ready = True
    return out


def _disable(error: Exception) -> None:
    _State.failed = True
    warnings.warn(
        f"torch.compile failed ({type(error).__name__}); CAPO's Adam statistics go on unfused. "
        "Set capo.core.statistics.options(compile=False) to silence this.",
        RuntimeWarning,
        stacklevel=3,
    )
