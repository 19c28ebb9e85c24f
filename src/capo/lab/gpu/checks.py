"""Is the fused backend right on this device? No figure is taken where it is not.

Every field against float64 on fresh random inputs, at odd sizes and at the tiles that are used, with every
output buffer full of NaN beforehand. The bound is a relative norm: float32 sums of exact 16-bit products
lie below 1e-5, TF32 products near 3e-4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

import capo
from capo.core.adam_move import moved_by_adam, moved_by_kernel
from capo.lab.gpu.sizes import Sizes
from capo.lab.gpu.timing import Record, device

FIELDS = ("objective_shift", "policy_shift", "log_prob", "entropy", "s", "variance")
BOUND = 1e-4
OTHER_ROWS = 0.02
"""Share of the tokens whose last judged row may be another: float32 breaks near-ties as it likes."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh buffers hold NaN (integers: the least one) instead of what was there."""
    plain = torch.Tensor.new_empty

    def fill(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        fresh = plain(self, *shape, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh.fill_(-(2**31))

    torch.Tensor.new_empty = fill  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = plain  # type: ignore[method-assign]


def in_float64(x: Any) -> Any:
    """The same numbers in float64, tensors of a step included."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if hasattr(x, "of_gradient"):
        return replace(x, **{f.name: in_float64(getattr(x, f.name)) for f in fields(x)})
    return x


def problem(
    kind: str, tokens: int, vocabulary: int, width: int, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Arguments of ``capo.token_curvature``: random, on the device."""
    on = device()
    g = torch.Generator(on).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=on)

    m = 1e-3 * normal(vocabulary, width)
    square = 1e-6 * normal(vocabulary, width).square() + 1e-12
    adam = capo.AdamStep(1e-4, (0.9, 0.999), 1e-8, m, square, 20)
    step: Any = {
        "sgd": capo.SGDStep(1e-3),
        "given": capo.GivenStep((1e-3 * m).to(dtype)),
        "momentum": capo.MomentumStep(1e-3, 0.9, m, weight_decay=0.1),
        "frozen": replace(adam, preconditioner="frozen"),
        "adam": adam,
        "adam, 16-bit moments": replace(adam, exp_avg=m.to(dtype), exp_avg_sq=square.to(dtype)),
    }[kind]
    return {
        "hidden": normal(tokens, width).to(dtype),
        "head_weight": (2.0 * normal(vocabulary, width) / width**0.5).to(dtype),
        "token_ids": torch.randint(vocabulary, (tokens,), generator=g, device=on),
        "advantages": normal(tokens),
        "step": step,
        "top_k": min(50, vocabulary) if kind.startswith("adam") else None,
    }


def distances(found: capo.TokenCurvature, exact: capo.TokenCurvature) -> dict[str, float]:
    """``‖found − exact‖ / ‖exact‖`` of every field.

    With ``top_k`` over the tokens whose judged rows are the same: float32 may break a near-tie for the last
    row otherwise, which is no error. ``"other rows"`` is the share of those that are left out.
    """
    ours_of, theirs_of = ({n: getattr(c, n).double() for n in FIELDS} for c in (found, exact))
    out = {}
    if found.support is not None and exact.support is not None:
        rows = [c.support.rows.sort(dim=1).values for c in (found, exact) if c.support is not None]
        same = (rows[0] == rows[1]).all(dim=1)
        out["other rows"] = 1.0 - float(same.double().mean())
        ours_of, theirs_of = ({n: x[same] for n, x in of.items()} for of in (ours_of, theirs_of))
    for name in FIELDS:
        ours, theirs = ours_of[name], theirs_of[name]
        out[name] = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))
    return out


def is_red(off: dict[str, float]) -> bool:
    """Whether a distance is out of bounds; NaN always is."""
    return not all(
        value <= (OTHER_ROWS if name == "other rows" else BOUND) for name, value in off.items()
    )


KINDS = ("adam", "frozen", "momentum", "sgd", "given", "adam, 16-bit moments")


def run(sizes: Sizes, record: Record) -> None:
    """Every step kind at every size; raises SystemExit where one is out of bounds."""
    red = []
    seed = int(torch.seed() % (1 << 31))
    record.add("seed", seed)
    record.add("bound", BOUND)
    dtypes = [torch.bfloat16] if sizes.scale == "quick" else [torch.bfloat16, torch.float32]
    jobs = [(sizes, kind, dtype, seed) for dtype in dtypes for kind in KINDS]
    for found in _each(jobs, workers=1 if sizes.scale == "tiny" else 6):
        for name, off in found.items():
            record.add(name, off)
            if is_red(off):
                red.append(name)
    for narrow in dtypes:
        name = f"moved parameter, {str(narrow).removeprefix('torch.')} gradient and moments"
        off = {"moved": moved_distance(narrow, seed)}
        record.add(name, off)
        if is_red(off):
            red.append(name)
    record.add("red", red)
    if red:
        raise SystemExit(f"out of bounds: {', '.join(red)}")


def _each(jobs: list[Any], workers: int) -> Iterator[dict[str, dict[str, float]]]:
    """Most of the time goes to the compiler, so that several processes share it."""
    if workers == 1:
        yield from map(_distance, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_distance, jobs)


def _distance(job: tuple[Sizes, str, torch.dtype, int]) -> dict[str, dict[str, float]]:
    sizes, kind, dtype, seed = job
    out = {}
    for tokens in sizes.check_tokens:
        given = problem(
            kind, tokens, sizes.check_vocabulary, sizes.check_width, dtype, seed + tokens
        )
        with poisoned():
            found = judge(given, "triton")
        exact = judge({k: in_float64(v) for k, v in given.items()}, "eager")
        name = f"{kind}, {str(dtype).removeprefix('torch.')}, {tokens} tokens"
        out[name] = distances(found, exact)
    return out


def judge(given: dict[str, Any], impl: str) -> capo.TokenCurvature:
    """``capo.token_curvature`` of such a problem."""
    given = dict(given)
    first = [given.pop(n) for n in ("hidden", "head_weight", "token_ids", "advantages")]
    return capo.token_curvature(*first, **given, impl=impl)


def moved_distance(narrow: torch.dtype, seed: int, length: int = 100_003) -> float:
    """``‖found − exact‖ / ‖exact‖`` of a float32 parameter moved by half of a long step of AdamW."""
    g = torch.Generator(device()).manual_seed(seed)
    value, grad, first, root = (torch.randn(length, generator=g, device=device()) for _ in range(4))
    grad, first, second = grad.to(narrow), first.to(narrow), root.square().to(narrow)
    step = capo.AdamStep(0.1, (0.9, 0.999), 1e-8, first, second, 6, 0.3)
    with poisoned():
        found = moved_by_kernel(step, value, grad, 0.5).double()
    exact = moved_by_adam(in_float64(step), value.double(), grad.double(), 0.5)
    assert exact is not None
    return float((found - exact).norm() / exact.norm())


def small() -> None:
    """One small pass through every kernel, for a memory checker to watch."""
    for kind in ("sgd", "frozen", "adam"):
        given = problem(kind, 33, 1003, 72, torch.bfloat16, 1)
        found = judge(given, "triton")
        assert bool(torch.isfinite(found.policy_shift).all())
    assert moved_distance(torch.bfloat16, 1, length=5003) < BOUND
    print("small: done")
