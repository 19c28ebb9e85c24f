# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel that walks the vocabulary; the only file that imports triton, and only on demand.

Shapes in comments: n tokens and v vocabulary rows of one tile, d the hidden width. Every kernel
accumulates in float32 and writes each element of its outputs exactly once, whatever the shape.
"""

from __future__ import annotations

from capo.core.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError(
        "impl", "'triton' needs the triton package, which is not installed; use 'auto'."
    ) from error

__all__ = ["ABSENT", "activate", "rest_kernel", "tl", "triton"]

ABSENT = tl.constexpr(-1.0e30)  # as in rest.py: −∞ where 0 · (−∞) must be 0


@triton.jit
def _tanh(x):
    """``(tanh x, 1 − tanh² x)``, both with a small *relative* error; same code on every device."""
    magnitude = tl.abs(x)
    near = tl.minimum(magnitude, 0.5)
    s = near * near
    # Padé [7/6]: exact to float32 for |x| ≤ ½, where 1 − e^(−2|x|) would cancel.
    quotient = (135135.0 + s * (17325.0 + s * (378.0 + s))) / (
        135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0))
    )
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    small = magnitude < 0.5
    t = tl.where(small, x * quotient, tl.where(x < 0, -far, far))
    return t, tl.where(small, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def activate(y, inner, outer, scale, bend_scale, SOFTCAP: tl.constexpr):
    """``(z, φ′, φ″)`` of raw logits (README, §2); the caller folds the constants (see ``launch``)."""
    if SOFTCAP:
        t, complement = _tanh(y * inner)
        slope = scale * complement
        return t * outer, slope, bend_scale * t * slope
    else:
        return y * outer, tl.zeros_like(y) + scale, tl.zeros_like(y)


@triton.jit
def _products(
    hidden,  # pointers to the first element of each token's row, [n, 1]
    weight,  # of each vocabulary row, [1, v]
    matrix,
    square,
    live_n,
    live_v,
    D,
    hidden_d,
    weight_d,
    matrix_d,
    square_d,
    inverse_correction,
    eps,
    MATRIX: tl.constexpr,
    CAST_WEIGHT: tl.constexpr,
    CAST_MATRIX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``(W h, M h, P h²)`` of one tile; ``(m P) h`` in place of ``M h`` where P is frozen."""
    raw = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    moved = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    curved = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        live_d = d < D
        inside = live_d[:, None] & live_v[None, :]
        h = tl.load(
            hidden + d[None, :] * hidden_d, mask=live_n[:, None] & live_d[None, :], other=0.0
        )
        w = tl.load(weight + d[:, None] * weight_d, mask=inside, other=0.0)
        if CAST_WEIGHT:
            raw = tl.dot(h.to(tl.float32), w.to(tl.float32), raw, input_precision=PRECISION)
        else:
            raw = tl.dot(h, w, raw)
        if MATRIX != "none":
            m = tl.load(matrix + d[:, None] * matrix_d, mask=inside, other=0.0)
            if MATRIX == "frozen":
                v = tl.load(square + d[:, None] * square_d, mask=inside, other=1.0).to(tl.float32)
                inverse = 1.0 / (tl.sqrt_rn(v * inverse_correction) + eps)
                wide = h.to(tl.float32)
                step = m.to(tl.float32) * inverse
                moved = tl.dot(wide, step, moved, input_precision=PRECISION)
                curved = tl.dot(wide * wide, inverse, curved, input_precision=PRECISION)
            elif CAST_MATRIX:
                moved = tl.dot(h.to(tl.float32), m.to(tl.float32), moved, input_precision=PRECISION)
            else:
                moved = tl.dot(h, m, moved)
    return raw, moved, curved


@triton.jit
def _projections(
    raw,
    moved,
    curved,
    z,
    slope,
    lse_n,
    fresh_n,
    matrix_factor,
    decay,
    MATRIX: tl.constexpr,
    FRESH: tl.constexpr,
    DECAY: tl.constexpr,
):
    """``q = factor · M h − decay · W h + fresh · φ′ π′_k (· P h²)`` of one tile (README, eq. 9–12)."""
    q = tl.zeros_like(raw)
    if MATRIX != "none":
        q += matrix_factor * moved
    if DECAY:
        q -= decay * raw
    if FRESH:
        own = fresh_n[:, None] * slope * tl.exp(z - lse_n[:, None])
        if MATRIX == "frozen":
            own *= curved
        q += own
    return q


@triton.jit
def _merge_moments(e, x, tile_total, old_total, mean_n, var_n):
    """Mean and variance of x, centred tile by tile and merged (Chan); never ``E[x²] − E[x]²``."""
    tile_safe = tl.where(tile_total == 0.0, 1.0, tile_total)
    tile_mean = tl.sum(e * x, axis=1) / tile_safe
    centred = x - tile_mean[:, None]
    tile_var = tl.sum(e * centred * centred, axis=1) / tile_safe
    total = old_total + tile_total
    safe = tl.where(total == 0.0, 1.0, total)
    f = old_total / safe
    g = tile_total / safe
    gap = tile_mean - mean_n
    return f * mean_n + g * tile_mean, f * var_n + g * tile_var + f * g * gap * gap


@triton.jit(do_not_specialize=["N", "splits", "slice_tiles", "tiles"])
def rest_kernel(  # noqa: PLR0915 - one loop, its state in registers
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V]
    token_ids,  # [N]
    matrix,  # [V, D] Δ, a momentum buffer or exp_avg
    square,  # [V, D] exp_avg_sq
    normaliser,  # [N] log Σ_{k≠a} exp z_k
    fresh,  # [N] factor of the token's own gradient in q
    top,  # outputs, all [splits, N]: running maximum, Σe, Σe(max − z), mean, variance, bend
    total,
    spread,
    mean,
    var,
    bend,
    keys,  # output [N, tiles · BLOCK_V]: ± raw logits
    maxima,  # output [N, tiles]
    N,
    V,
    D,
    splits,
    slice_tiles,
    tiles,
    hidden_n,
    hidden_d,
    weight_v,
    weight_d,
    bias_v,
    matrix_v,
    matrix_d,
    square_v,
    square_d,
    inner,
    outer,
    scale,
    bend_scale,
    inverse_temperature,
    sign,
    matrix_factor,
    decay,
    inverse_correction,
    eps,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    VALUES: tl.constexpr,  # "none" | "proportional" (to φ′²π′: SGD) | "projected" (u = D q/T)
    MATRIX: tl.constexpr,  # "none" | "plain" (q ∋ M h) | "frozen" (q ∋ m P h + c P h²)
    FRESH: tl.constexpr,  # q contains the token's own gradient; the normaliser is known
    DECAY: tl.constexpr,
    KEYS: tl.constexpr,  # also write the raw logits and each tile's largest
    CAST_WEIGHT: tl.constexpr,  # multiply in float32 instead of the inputs' own 16 bits
    CAST_MATRIX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """Statistics of the tokens that were not sampled, one token block × one slice of the vocabulary.

    Walks its slice tile by tile: logits and projections by ``tl.dot``, then a centred merge into the
    running statistics (README, eq. 7), in units of ``exp(running maximum)``.
    """
    # Neighbouring programs share GROUP_N token blocks, so that both operands stay in the cache.
    program = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_n = (program // (GROUP_N * splits)) * GROUP_N
    group_n = tl.minimum(blocks_n - first_n, GROUP_N)
    within = program % (GROUP_N * splits)
    piece = within // group_n
    n = (first_n + within % group_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    n_wide = n.to(tl.int64)
    token = tl.load(token_ids + n, mask=live_n, other=-1)
    lse_n = tl.zeros([BLOCK_N], tl.float32)
    fresh_n = lse_n
    if FRESH:
        lse_n = tl.load(normaliser + n, mask=live_n, other=float("inf"))
        fresh_n = tl.load(fresh + n, mask=live_n, other=0.0)

    top_n = tl.full([BLOCK_N], ABSENT, tl.float32)
    total_n = tl.zeros([BLOCK_N], tl.float32)
    spread_n = tl.zeros([BLOCK_N], tl.float32)
    mean_n = tl.zeros([BLOCK_N], tl.float32)
    var_n = tl.zeros([BLOCK_N], tl.float32)
    bend_n = tl.zeros([BLOCK_N], tl.float32)

    for tile in range(piece * slice_tiles, tl.minimum((piece + 1) * slice_tiles, tiles)):
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        live_v = v < V
        v_wide = v.to(tl.int64)
        raw, moved, curved = _products(
            hidden + n_wide[:, None] * hidden_n,
            weight + v_wide[None, :] * weight_v,
            matrix + v_wide[None, :] * matrix_v,
            square + v_wide[None, :] * square_v,
            live_n,
            live_v,
            D,
            hidden_d,
            weight_d,
            matrix_d,
            square_d,
            inverse_correction,
            eps,
            MATRIX,
            CAST_WEIGHT,
            CAST_MATRIX,
            PRECISION,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        y = raw
        if BIAS:
            b = tl.load(bias + v_wide * bias_v, mask=live_v, other=0.0).to(tl.float32)
            y = raw + b[None, :]
        left_out = (v[None, :] == token[:, None]) | (v[None, :] >= V)
        if KEYS:
            key = tl.where(left_out, ABSENT, y * sign)
            # 32-bit offsets (held logits are few): 64-bit ones of a whole tile do not fit in registers.
            tl.store(
                keys + (n[:, None] * (tiles * BLOCK_V) + v[None, :]), key, mask=live_n[:, None]
            )
            tl.store(maxima + n_wide * tiles + tile, tl.max(key, axis=1), mask=live_n)
        z, slope, curve = activate(y, inner, outer, scale, bend_scale, SOFTCAP)
        z = tl.where(left_out, ABSENT, z)

        new_top = tl.maximum(top_n, tl.max(z, axis=1))
        e = tl.where(left_out, 0.0, tl.exp(z - new_top[:, None]))
        shrink = tl.exp(top_n - new_top)
        tile_total = tl.sum(e, axis=1)
        # H(π′) = log Σe + Σe(max − z)/Σe: sums of positive terms, rebased as the maximum grows.
        spread_n = shrink * (spread_n + (new_top - top_n) * total_n)
        spread_n += tl.sum(e * (new_top[:, None] - z), axis=1)
        old_total = shrink * total_n
        total_n = old_total + tile_total
        top_n = new_top

        if VALUES == "proportional":
            # The running values are multiples of exp(−maximum), and shrink with it.
            mean_n *= shrink
            var_n *= shrink * shrink
            bend_n *= shrink * shrink
            x = slope * slope * e
            bent = curve * x * e
        elif VALUES == "projected":
            q = _projections(
                raw,
                moved,
                curved,
                z,
                slope,
                lse_n,
                fresh_n,
                matrix_factor,
                decay,
                MATRIX,
                FRESH,
                DECAY,
            )
            x = q * slope * inverse_temperature
            bent = curve * q * q * inverse_temperature
        if VALUES != "none":
            mean_n, var_n = _merge_moments(e, x, tile_total, old_total, mean_n, var_n)
            if SOFTCAP:
                safe = tl.where(total_n == 0.0, 1.0, total_n)
                bend_n = (old_total * bend_n + tl.sum(e * bent, axis=1)) / safe

    out = piece.to(tl.int64) * N + n_wide
    tl.store(top + out, top_n, mask=live_n)
    tl.store(total + out, total_n, mask=live_n)
    tl.store(spread + out, spread_n, mask=live_n)
    if VALUES != "none":
        tl.store(mean + out, mean_n, mask=live_n)
        tl.store(var + out, var_n, mask=live_n)
        tl.store(bend + out, bend_n, mask=live_n)
