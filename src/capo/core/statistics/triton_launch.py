"""Typed calls of the Triton kernels: block sizes, grids, and partial results merged in torch."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from capo.core.statistics.rest import Rest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.statistics.fused import AdamScalars
    from capo.core.statistics.problem import Head, Problem

NARROW = (torch.bfloat16, torch.float16)
LARGE_SHARED_MEMORY = 160 << 10  # bytes a block may use on A100, H100 and later
GROUP = 16  # token blocks that walk the vocabulary together


@dataclass(frozen=True)
class Tiling:
    """Block sizes of one launch (powers of two, ≥ 16), and the memory for held logits.

    Chosen by a table rather than by timing, so that a run repeats bit for bit on the same device.
    """

    tokens: int = 128
    rows: int = 128  # vocabulary rows a tile; with top_k also a group of which the largest is known
    width: int = 64  # of the hidden dimension, per step of the product
    warps: int = 8
    stages: int = 3
    splits: int | None = None  # slices of the vocabulary; None: enough to fill the device
    held: int = 1 << 26  # logits held at a time, elements (top_k only)
    library: int = (
        0  # 1: the vendor's product into the held logits, then a pass that reads them (top_k only)
    )


_OVERRIDE: ContextVar[dict[str, int | None]] = ContextVar("capo_triton_tiling", default={})  # noqa: B039


@contextmanager
def tiling(**changes: int | None) -> Iterator[None]:
    """Change block sizes inside a ``with`` block; None: from the table.

    ``tiling(tokens=64, rows=256, stages=4)``
    """
    token = _OVERRIDE.set(_OVERRIDE.get() | changes)
    try:
        yield
    finally:
        _OVERRIDE.reset(token)


Values = Literal["none", "proportional", "projected"]


@dataclass(frozen=True)
class Moved:
    """What ``q`` is made of (README, eq. 9–12): ``factor · M h − decay · W h + own gradient``.

    Args:
        matrix: M, ``[V, d]``: Δ, a momentum buffer, or (with ``square``) Adam's ``exp_avg``.
        square: ``exp_avg_sq`` of the frozen preconditioner ``P = 1/(√(v·inverse_correction) + eps)``;
            then ``factor · (M P) h`` stands for ``factor · M h``.
        fresh: ``[N]``, times ``φ′ π′_k`` (and ``P h²`` where frozen) the token's own gradient.
        normaliser: ``[N]`` log Σ exp z of the rest; needed with ``fresh``.
    """

    matrix: Tensor | None = None
    factor: float = 1.0
    square: Tensor | None = None
    inverse_correction: float = 1.0
    eps: float = 0.0
    decay: float = 0.0
    fresh: Tensor | None = None
    normaliser: Tensor | None = None


@dataclass(frozen=True)
class Keys:
    """Held logits of a few tokens, ``sign · y``, the sampled token and the padding absent."""

    keys: Float[Tensor, "n groups_x_size"]
    maxima: Float[Tensor, "n groups"]


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    from capo.core.statistics import triton_kernels

    return not isinstance(triton_kernels.rest_kernel, triton_kernels.triton.JITFunction)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _precision(hidden: Tensor) -> str:
    """How operands that meet in float32 are multiplied."""
    if hidden.dtype in NARROW:
        # Exact in TF32 (bf16 has 8 bits of mantissa, fp16 and TF32 11), so that the two halves into
        # which "tf32x3" splits the other operand keep 22 of its 24 bits, on the tensor cores.
        return "tf32x3"
    # float32 hidden states: as torch's own matmul is told to.
    try:
        said = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was said by torch's newer settings, as transformers' own `tf32` does
        said = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"highest": "ieee", "high": "tf32x3"}.get(said, "tf32")


def _cast(hidden: Tensor, other: Tensor) -> bool:
    """Whether two operands meet in float32; the interpreter cannot multiply bf16."""
    return hidden.dtype != other.dtype or hidden.dtype not in NARROW or interpreted()


def choose(hidden: Tensor, head: Head, moved: Moved | None = None) -> Tiling:
    """Block sizes for the given operands on the device they are on.

    Registers set the limit: 128 × 256 float32 accumulators leave room for the online softmax without
    spilling, but not for a second product or the soft-cap's derivatives (compiled for sm_90). With a tile
    half as wide one product was quicker all the same (measured).
    """
    matrix = None if moved is None else moved.matrix
    wide = _cast(hidden, head.weight) or (matrix is not None and _cast(hidden, matrix))
    large = True
    if hidden.is_cuda:
        properties: Any = torch.cuda.get_device_properties(hidden.device)
        large = getattr(properties, "shared_memory_per_block_optin", 0) >= LARGE_SHARED_MEMORY
    frozen = moved is not None and moved.square is not None  # three products
    if frozen or (wide and _precision(hidden) == "ieee"):  # "ieee": no tensor cores
        best = Tiling(tokens=64, rows=64, width=32, warps=8, stages=2)
    elif wide:
        best = Tiling(tokens=64, rows=128, width=32, warps=8, stages=2)
    elif not large:
        best = Tiling(tokens=64, rows=128, width=32, warps=4, stages=2)
    elif matrix is not None or head.softcap is not None:
        best = Tiling(tokens=128, rows=128, width=64, warps=8, stages=3)
    else:
        # One product of 16-bit operands. 6144 tokens, d 3584, V 152 064, K 50 on an H200 (results/gpu):
        # 21.6 ms; with held 2²⁶ or 2²⁸ 22.9; with 2²⁶, rows 256 and stages 3 26.0.
        best = Tiling(tokens=128, rows=128, width=64, warps=8, stages=4, held=1 << 27)
    changes = {name: value for name, value in _OVERRIDE.get().items() if value is not None}
    return replace(best, **changes)


def held_tokens(hidden: Tensor, head: Head) -> int:
    """How many tokens' logits may be held, a multiple of the token block where it can be."""
    plan = choose(hidden, head)
    count = plan.held // (-(-head.vocabulary // plan.rows) * plan.rows)
    return max(1, count - count % plan.tokens if count > plan.tokens else count)


def rest(
    problem: Problem,
    values: Values = "none",
    moved: Moved | None = None,
    *,
    keys_sign: float | None = None,
) -> tuple[Rest, Keys | None]:
    """One fused pass over the vocabulary: statistics of the tokens that were not sampled.

    Args:
        problem: the tokens (hidden states in their own dtype).
        values: ``"proportional"``: values ``φ′²π′`` (degree 1); ``"projected"``: ``u = D q/T``.
        moved: what q is made of; with ``"projected"`` only.
        keys_sign: also return the raw logits times this sign (a few tokens at a time: ``[n, V]``).
    """
    from capo.core.statistics import triton_kernels

    head, hidden, weight = problem.head, problem.hidden, problem.head.weight
    moved = moved or Moved()
    matrix = weight if moved.matrix is None else moved.matrix
    square = matrix if moved.square is None else moved.square
    plan = choose(hidden, head, moved)
    if plan.library and keys_sign is not None and not _cast_on_device(hidden, weight):
        return _library_rest(problem, plan, keys_sign)
    n, (v, d) = hidden.shape[0], weight.shape
    blocks, tiles = -(-n // plan.tokens), -(-v // plan.rows)
    slice_tiles = -(-tiles // min(tiles, plan.splits or _splits(hidden, blocks)))
    splits = -(-tiles // slice_tiles)
    partial = hidden.new_empty(6 if values != "none" else 3, splits, n, dtype=torch.float32)
    columns = [*partial, *[partial[0]] * (6 - partial.shape[0])]
    keys, maxima = partial, partial
    if keys_sign is not None:
        keys = hidden.new_empty(n, tiles * plan.rows, dtype=torch.float32)
        maxima = hidden.new_empty(n, tiles, dtype=torch.float32)
    matrix_kind = "none" if moved.matrix is None else "plain" if moved.square is None else "frozen"
    bias = weight if head.bias is None else head.bias
    inner, outer, bend_scale = _constants(head)
    with on_device_of(hidden):
        triton_kernels.rest_kernel[(blocks * splits,)](
            hidden,
            weight,
            bias,
            problem.token_ids.contiguous(),
            matrix,
            square,
            columns[0] if moved.normaliser is None else moved.normaliser.contiguous(),
            columns[0] if moved.fresh is None else moved.fresh.contiguous(),
            *columns,
            keys,
            maxima,
            n,
            v,
            d,
            splits,
            slice_tiles,
            tiles,
            *hidden.stride(),
            *weight.stride(),
            bias.stride(0),
            *matrix.stride(),
            *square.stride(),
            inner,
            outer,
            head.scale,
            bend_scale,
            1.0 / head.temperature,
            keys_sign or 1.0,
            float(moved.factor),
            float(moved.decay),
            float(moved.inverse_correction),
            float(moved.eps),
            SOFTCAP=head.softcap is not None,
            BIAS=head.bias is not None,
            VALUES=values,
            MATRIX=matrix_kind,
            FRESH=moved.fresh is not None,
            DECAY=moved.decay != 0.0,
            KEYS=keys_sign is not None,
            CAST_WEIGHT=_cast(hidden, weight),
            CAST_MATRIX=_cast(hidden, matrix),
            PRECISION=_precision(hidden),
            BLOCK_N=plan.tokens,
            BLOCK_V=plan.rows,
            BLOCK_D=plan.width,
            GROUP_N=GROUP,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    return _merge(partial, values), None if keys_sign is None else Keys(keys, maxima)


def _cast_on_device(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the vendor's product would need a copy of an operand."""
    return hidden.dtype != weight.dtype


def _library_rest(problem: Problem, plan: Tiling, sign: float) -> tuple[Rest, Keys]:
    """As :func:`rest` with keys: one product that holds the logits, and one pass that reads them.

    Twice the traffic of the fused pass (8 bytes a logit), for a product at the matrix ceiling.
    """
    from capo.core.statistics import triton_row_kernels

    head, hidden = problem.head, problem.hidden
    n, v = hidden.shape[0], head.vocabulary
    tiles = -(-v // plan.rows)
    keys = _product(hidden, head.weight)
    if head.bias is not None:
        keys += head.bias.float()
    if sign != 1.0:
        keys *= sign
    if keys.shape[1] < tiles * plan.rows:
        keys = torch.nn.functional.pad(keys, (0, tiles * plan.rows - v))  # left out by the kernel
    processors = 1
    if hidden.is_cuda:
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    together = 2048 // plan.rows if hidden.is_cuda else 2  # tiles read at a time
    slice_tiles = -(-tiles // max(1, min(tiles, -(-16 * processors // max(1, n)))))
    splits = -(-tiles // slice_tiles)
    partial = hidden.new_empty(3, splits, n, dtype=torch.float32)
    maxima = hidden.new_empty(n, tiles, dtype=torch.float32)
    inner, outer, _ = _constants(head)
    with on_device_of(hidden):
        triton_row_kernels.held_kernel[(n * splits,)](
            keys,
            problem.token_ids.contiguous(),
            *partial,
            maxima,
            n,
            v,
            splits,
            slice_tiles,
            tiles,
            sign,
            inner,
            outer,
            SOFTCAP=head.softcap is not None,
            BLOCK_T=together,
            BLOCK_V=plan.rows,
            num_warps=8,
        )
    return _merge(partial, "none"), Keys(keys, maxima)


def _product(hidden: Float[Tensor, "n d"], weight: Float[Tensor, "V d"]) -> Float[Tensor, "n V"]:
    """Logits in float32 from operands of one dtype."""
    if hidden.is_cuda and hidden.dtype in NARROW:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def _splits(hidden: Tensor, blocks: int) -> int:
    """Slices of the vocabulary that give a group of token blocks four rounds of programs."""
    processors = 1
    if hidden.is_cuda:
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    return max(1, -(-4 * processors // min(GROUP, blocks)))


def _constants(head: Head) -> tuple[float, float, float]:
    """``(inner, outer, bend_scale)``: z = outer·tanh(inner·y), or outer·y; φ″ = bend_scale·t·φ′."""
    if head.softcap is None:
        return 1.0, head.scale / head.temperature, 0.0
    inner = head.scale / head.softcap
    return inner, head.softcap / head.temperature, -2.0 * inner


def _merge(partial: Float[Tensor, "c s n"], values: Values) -> Rest:
    """The slices' running sums as statistics of the whole, merged as the kernel merges tiles."""
    top, total, spread = partial[:3]
    highest = top.amax(dim=0)
    shrink = (top - highest).exp()
    weight = shrink * total
    everything = weight.sum(dim=0)
    alone = everything == 0  # NaN is not 0: it must come out as NaN
    safe = torch.where(alone, 1.0, everything)
    lse = (highest + safe.log()).masked_fill(alone, -torch.inf)
    entropy = safe.log() + (shrink * (spread + (highest - top) * total)).sum(dim=0) / safe
    zero = torch.zeros_like(lse)
    if values == "none":
        return Rest(lse, entropy, zero, zero, zero)
    mean, var, bend = partial[3:]
    degree = 0
    if values == "proportional":  # from multiples of the slice's e to multiples of π′ = e/Σe
        degree, unit = 1, shrink / safe
        mean, var, bend = unit * mean, unit**2 * var, unit**2 * bend
    f = weight / safe
    whole = (f * mean).sum(dim=0)
    var = (f * (var + (mean - whole) ** 2)).sum(dim=0)
    return Rest(lse, entropy, whole, var, (f * bend).sum(dim=0), degree)


def log_sum(keys: Float[Tensor, "n w"], head: Head, sign: float) -> Float[Tensor, "n"]:
    """``log Σ exp z`` of each row of held logits, without its absent entries."""
    from capo.core.statistics import triton_row_kernels

    out = keys.new_empty(keys.shape[0])
    inner, outer, _ = _constants(head)
    with on_device_of(keys):
        triton_row_kernels.log_sum_kernel[(keys.shape[0],)](
            keys,
            out,
            keys.shape[1],
            keys.stride(0),
            sign,
            inner,
            outer,
            SOFTCAP=head.softcap is not None,
            BLOCK=2048 if keys.is_cuda else 32,
            num_warps=8,
        )
    return out


Kind = Literal["product", "adam", "adam_empty", "frozen"]


def over_rows(
    kind: Kind,
    hidden: Float[Tensor, "n d"],
    rows: Int[Tensor, "n k"],
    coefficient: Float[Tensor, "n k"] | None = None,
    first: Float[Tensor, "V d"] | None = None,
    second: Float[Tensor, "V d"] | None = None,
    scalars: AdamScalars | None = None,
) -> Float[Tensor, "n k"]:
    """A sum over d for each token's own rows, in one gathering pass; never ``[n, k, d]``.

    With ``x = c h_j``: ``product``: ``Σ_j M_j h_j``; ``adam``: ``Σ_j h_j (a m + b x)/(√(β v + β̄ x²) + ε)``;
    ``adam_empty``: ``Σ_j h_j x/(β̄ |x| + ε)``; ``frozen``: as ``adam`` without ``x²`` in the root.
    """
    from capo.core.statistics import triton_row_kernels

    n, k = rows.shape
    out = hidden.new_empty(n, k, dtype=torch.float32)
    if out.numel() == 0:
        return out
    coefficient = out if coefficient is None else coefficient
    first = hidden if first is None else first
    second = first if second is None else second
    numbers = (
        (1.0,) * 5
        if scalars is None
        else (scalars.momentum, scalars.fresh, scalars.keep, scalars.new, scalars.eps)
    )
    block_k, block_d = (8, 256) if hidden.is_cuda else (16, 16)
    with on_device_of(hidden):
        triton_row_kernels.rows_kernel[(n * -(-k // block_k),)](
            hidden,
            rows,
            coefficient,
            first,
            second,
            out,
            k,
            hidden.shape[1],
            *hidden.stride(),
            *rows.stride(),
            *coefficient.stride(),
            *first.stride(),
            *second.stride(),
            *map(float, numbers),
            KIND=kind,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out
