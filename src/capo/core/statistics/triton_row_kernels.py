# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels that read a token's own rows: gathered rows of a matrix, held logits."""

from __future__ import annotations

from capo.core.statistics.triton_kernels import ABSENT, activate, tl, triton


@triton.jit
def rows_kernel(
    hidden,  # [N, D]
    rows,  # [N, K]
    coefficient,  # [N, K]
    first,  # [V, D] the matrix, or exp_avg
    second,  # [V, D] exp_avg_sq
    out,  # [N, K]
    K,
    D,
    hidden_n,
    hidden_d,
    rows_n,
    rows_k,
    coefficient_n,
    coefficient_k,
    first_v,
    first_d,
    second_v,
    second_d,
    momentum,
    own,
    keep,
    new,
    eps,
    KIND: tl.constexpr,  # "product" | "adam" | "adam_empty" | "frozen"
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``q[i, j] = Δ_i[rows[i, j]] · h_i``: gathers each row once and reduces over d as it reads."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    i = (program // blocks_k).to(tl.int64)
    k = (program % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    live_k = k < K
    row = tl.load(rows + i * rows_n + k * rows_k, mask=live_k, other=0).to(tl.int64)
    if KIND != "product":
        c = tl.load(coefficient + i * coefficient_n + k * coefficient_k, mask=live_k, other=0.0)
    accumulated = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        live_d = d < D
        inside = live_k[:, None] & live_d[None, :]
        h = tl.load(hidden + i * hidden_n + d * hidden_d, mask=live_d, other=0.0).to(tl.float32)
        if KIND != "product":
            x = c[:, None] * h[None, :]
        if KIND == "adam_empty":
            update = x / (tl.abs(x) * new + eps)
        else:
            a = tl.load(
                first + row[:, None] * first_v + d[None, :] * first_d, mask=inside, other=0.0
            ).to(tl.float32)
            if KIND == "product":
                update = a
            else:
                b = tl.load(
                    second + row[:, None] * second_v + d[None, :] * second_d, mask=inside, other=1.0
                ).to(tl.float32)
                grown = keep * b
                if KIND == "adam":
                    grown += new * x * x
                update = (momentum * a + own * x) / (tl.sqrt_rn(grown) + eps)
        accumulated += tl.where(inside, update * h[None, :], 0.0)
    tl.store(out + i * K + k, tl.sum(accumulated, axis=1), mask=live_k)


@triton.jit(do_not_specialize=["N", "splits", "slice_tiles", "tiles"])
def held_kernel(
    keys,  # [N, tiles · BLOCK_V] ± raw logits; the sampled token and the padding are marked absent
    token_ids,  # [N]
    top,  # outputs, all [splits, N]: maximum, Σe, Σe(max − z)
    total,
    spread,
    maxima,  # output [N, tiles]
    N,
    V,
    splits,
    slice_tiles,
    tiles,
    sign,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What ``rest_kernel`` says of the tokens that were not sampled, from logits that are held already.

    One token × one slice of the vocabulary; every lane keeps its own statistics, and they merge at the end.
    """
    program = tl.program_id(0)
    n = (program // splits).to(tl.int64)
    piece = program % splits
    token = tl.load(token_ids + n)
    last = tl.minimum((piece + 1) * slice_tiles, tiles)
    row = keys + n * tiles * BLOCK_V
    top_l = tl.full([BLOCK_T, BLOCK_V], ABSENT, tl.float32)
    total_l = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    spread_l = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(piece * slice_tiles, last, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        live = tile < last
        v = tile[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        key = tl.load(row + v, mask=live[:, None], other=0.0)
        absent = (v == token) | (v >= V) | (live[:, None] == 0)
        key = tl.where(absent, ABSENT, key)
        tl.store(row + v, key, mask=absent & live[:, None])
        tl.store(maxima + n * tiles + tile, tl.max(key, axis=1), mask=live)
        y = tl.where(absent, 0.0, key) * sign
        z = tl.where(absent, ABSENT, activate(y, inner, outer, 1.0, 1.0, SOFTCAP)[0])
        new_top = tl.maximum(top_l, z)
        e = tl.where(absent, 0.0, tl.exp(z - new_top))
        shrink = tl.exp(top_l - new_top)
        spread_l = shrink * (spread_l + (new_top - top_l) * total_l) + e * (new_top - z)
        total_l = shrink * total_l + e
        top_l = new_top
    highest = tl.max(tl.max(top_l, axis=1), axis=0)
    shrink = tl.exp(top_l - highest)
    whole = tl.sum(tl.sum(shrink * total_l, axis=1), axis=0)
    wide = shrink * (spread_l + (highest - top_l) * total_l)
    out = piece.to(tl.int64) * N + n
    tl.store(top + out, highest)
    tl.store(total + out, whole)
    tl.store(spread + out, tl.sum(tl.sum(wide, axis=1), axis=0))


@triton.jit
def log_sum_kernel(
    keys, out, width, keys_n, sign, inner, outer, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """``log Σ exp z`` over one row of held logits, absent entries left out; −∞ where none is left."""
    n = tl.program_id(0).to(tl.int64)
    # Every lane keeps its own maximum and sum: one reduction at the end.
    top = tl.full([BLOCK], ABSENT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = tl.load(keys + n * keys_n + column, mask=column < width, other=ABSENT)
        absent = key <= ABSENT
        y = tl.where(absent, 0.0, key) * sign
        z = activate(y, inner, outer, 1.0, 1.0, SOFTCAP)[0]
        z = tl.where(absent, ABSENT, z)
        new_top = tl.maximum(top, z)
        e = tl.where(absent, 0.0, tl.exp(z - new_top))
        total = total * tl.exp(top - new_top) + e
        top = new_top
    highest = tl.max(top, axis=0)
    everything = tl.sum(total * tl.exp(top - highest), axis=0)
    empty = everything == 0.0
    lse = highest + tl.log(tl.where(empty, 1.0, everything))
    tl.store(out + n, tl.where(empty, float("-inf"), lse))
