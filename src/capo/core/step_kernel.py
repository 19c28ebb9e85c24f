# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernel that displaces a parameter by a part of Adam's coming step."""

from __future__ import annotations

from capo.core.statistics.triton_kernels import tl, triton


@triton.jit
def moved_by_adam_kernel(
    value,
    grad,
    exp_avg,
    exp_avg_sq,
    out,  # all flat, of one length and any float dtype
    length,
    keep,  # 1 − η λ: what decoupled weight decay leaves
    first_new,  # 1 − β₁
    second_kept,  # β₂
    second_new,  # 1 − β₂
    eps,  # ε √(1 − β₂ᵗ)
    rate,  # η √(1 − β₂ᵗ) / (1 − β₁ᵗ)
    BLOCK: tl.constexpr,
):
    """``out = keep · value − rate · m / (√v + eps)`` in float32, each tensor read or written once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < length
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + at, mask=live, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=live, other=0.0).to(tl.float32)
    w = tl.load(value + at, mask=live, other=0.0).to(tl.float32)
    m += first_new * (g - m)
    v = second_kept * v + second_new * g * g
    moved = keep * w - rate * m / (tl.sqrt(v) + eps)
    tl.store(out + at, moved.to(out.dtype.element_ty), mask=live)
