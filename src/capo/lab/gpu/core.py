"""The core at a 7 B model's head: time, memory, share of the ceilings, and what others need for the same.

From hidden states to policy shifts, every competitor on the same inputs and checked against ours before
it is timed:

- *chunked*: the plain backend, any device;
- *naive*: whole logits, ``[N, K, d]`` gradients and moments, at the most tokens that fit into memory;
- *dict of rows*: the published form, one tensor a vocabulary row in a Python dict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import capo
from capo.core.batch_shift import batch_shift
from capo.core.statistics.judged import Candidates, Sampled
from capo.core.statistics.problem import Head, Problem
from capo.core.statistics.rest import Rest
from capo.core.statistics.result import Support
from capo.core.statistics.triton_launch import tiling
from capo.lab.bench_core import Given, Inputs, dict_of_rows, naive
from capo.lab.gpu import checks
from capo.lab.gpu.ceilings import ceilings
from capo.lab.gpu.sizes import Core, Sizes
from capo.lab.gpu.timing import Record, Timing, device, measure, release

AGREEMENT = 1e-2
"""Of policy shifts, relative to their mean: near-ties for the last rows may be broken otherwise."""


@dataclass(frozen=True)
class Case:
    """The inputs on the device."""

    sizes: Core
    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    advantages: Tensor
    step: capo.AdamStep

    def arguments(self, tokens: int | None = None, **changes: Any) -> dict[str, Any]:
        """Of ``capo.token_curvature``, for the first ``tokens`` tokens."""
        return {
            "hidden": self.hidden[:tokens],
            "head_weight": self.weight,
            "token_ids": self.token_ids[:tokens],
            "advantages": self.advantages[:tokens],
            "step": self.step,
            "top_k": self.sizes.top_k,
        } | changes

    def judge(
        self, tokens: int | None = None, impl: str = "triton", **changes: Any
    ) -> capo.TokenCurvature:
        """The core on the first ``tokens`` tokens."""
        return checks.judge(self.arguments(tokens, **changes), impl)


def make(sizes: Core, seed: int = 0) -> Case:
    """Random inputs: 16-bit hidden states and head, float32 moments as after some training."""
    on = device()
    g = torch.Generator(on).manual_seed(seed)
    n, d, v = sizes.tokens, sizes.width, sizes.vocabulary
    narrow = {"generator": g, "device": on, "dtype": torch.bfloat16}
    exp_avg = torch.randn(v, d, generator=g, device=on).mul_(1e-5)
    exp_avg_sq = torch.rand(v, d, generator=g, device=on).mul_(1e-8)
    advantages = torch.randn(n, generator=g, device=on)
    advantages[torch.rand(n, generator=g, device=on) < 0.1] = 0.0
    return Case(
        sizes,
        torch.randn(n, d, **narrow),  # type: ignore[call-overload]
        torch.randn(v, d, **narrow).mul_(2.0 / d**0.5),  # type: ignore[call-overload]
        torch.randint(v, (n,), generator=g, device=on),
        advantages,
        capo.AdamStep(1e-6, (0.9, 0.999), 1e-8, exp_avg, exp_avg_sq, 20),
    )


def run(sizes: Sizes, record: Record) -> None:
    """All of the core's numbers; a part that fails leaves the others."""
    record.add("ceilings", limits := ceilings(sizes))
    case = make(sizes.core)
    record.add(
        "sizes", {k: getattr(sizes.core, k) for k in ("tokens", "width", "vocabulary", "top_k")}
    )
    _check(case, record)
    best = _sweep(case, record)
    with tiling(**best):
        _parts(case, record, limits)
        for name, part in {
            "chunked": _chunked,
            "dict of rows": _dict_of_rows,
            "naive": _naive,
        }.items():
            release()
            try:
                record.add(name, part(case, best))
            except (RuntimeError, ValueError) as error:
                record.fail(name, error)


def _check(case: Case, record: Record) -> None:
    """Some of the tokens of the very run that is timed, against float64."""
    n = case.sizes.tokens
    some = torch.linspace(0, n - 1, min(48, n), device=case.hidden.device).long()
    found = _at(case.judge(), some)
    given = case.arguments()
    for name in ("hidden", "token_ids", "advantages"):
        given[name] = given[name][some]
    exact = checks.judge({k: checks.in_float64(v) for k, v in given.items()}, "eager")
    off = checks.distances(found, exact)
    record.add("distance from float64", off)
    if checks.is_red(off):
        raise SystemExit(f"the core is off by {off}: nothing timed")
    del found, exact
    release()


def _at(curvature: capo.TokenCurvature, some: Tensor) -> capo.TokenCurvature:
    """The curvature of some of the tokens."""
    support = curvature.support
    assert support is not None
    columns = {name: getattr(curvature, name)[some] for name in (*checks.FIELDS, "mask")}
    rows = Support(support.rows[some], support.residual[some])
    return replace(curvature, **columns, support=rows)


def _sweep(case: Case, record: Record) -> dict[str, int]:
    """The quickest of a few tilings, the table's own among them, and of a few sizes of what is held."""
    n = min(case.sizes.sweep_tokens, case.sizes.tokens)
    rows: dict[str, Any] = {}
    best, quickest = dict[str, int](), float("inf")

    def attempt(changes: dict[str, int]) -> None:
        nonlocal best, quickest
        name = ", ".join(f"{k} {v}" for k, v in changes.items()) or "the table's"
        release()
        try:
            with tiling(**changes):
                timing = measure(lambda: case.judge(n), 5, seconds=0.4)
        except Exception as error:  # a tile that does not fit the chip is an answer too
            rows[name] = f"{type(error).__name__}: {str(error)[:120]}"
            return
        rows[name] = {"ms": timing.median_ms, "peak_mb": timing.peak_mb}
        if timing.median_ms < quickest * 0.97:  # no change for noise
            best, quickest = changes, timing.median_ms

    for changes in case.sizes.sweep:
        attempt(changes)
        record.add("tilings", rows, quiet=True)
    tile = best
    for held in case.sizes.held:
        attempt(tile | {"held": held})
    for held in case.sizes.held:
        attempt(tile | {"held": held, "library": 1})
    record.add("tilings", rows)
    record.add("tiling", best)
    return best


def _parts(case: Case, record: Record, limits: dict[str, float]) -> None:
    """The core whole and in parts, and what is judged beside it."""
    core, step = case.sizes, case.step
    narrow = replace(step, exp_avg=step.exp_avg.bfloat16(), exp_avg_sq=step.exp_avg_sq.bfloat16())  # type: ignore[union-attr]
    moments = capo.LastLayerMoments((core.vocabulary, core.width), device=case.hidden.device)
    judged = case.judge()
    first = (case.hidden, case.weight, case.token_ids, case.advantages / core.tokens)

    def shift() -> object:
        assert judged.support is not None
        return batch_shift(
            case.hidden,
            case.weight,
            case.token_ids,
            case.advantages,
            step=case.step,
            support=judged.support,
            mask=judged.mask,
        )

    def accumulate() -> None:
        moments.accumulate(*first, top_k=core.top_k, support=judged.support)

    def advance() -> None:
        accumulate()
        moments.advance(1.0)

    calls: dict[str, Callable[[], object]] = {
        "core": case.judge,
        "core, 16-bit moments": lambda: case.judge(step=narrow),
        "log-probability and entropy alone": lambda: case.judge(
            step=capo.SGDStep(1e-6), top_k=None
        ),
        "batch-level shift": lambda: case.judge(granularity="batch"),
        "batch-level shift of judged tokens": shift,
        "simulated gradient": accumulate,
        "simulated gradient and moments": advance,
    }
    for name, call in calls.items():
        release()
        try:
            timing = measure(call, core.repeats, seconds=2.5)
        except (RuntimeError, ValueError) as error:
            record.fail(name, error)
            continue
        record.add(name, timing)
        if name == "core":
            flops = 2.0 * core.tokens * core.vocabulary * core.width
            element = step.exp_avg.element_size()  # type: ignore[union-attr]
            gathered = core.tokens * core.top_k * core.width * 2.0 * element
            seconds = timing.median_ms / 1e3
            record.add(
                "share of the ceilings",
                {
                    "matrix": flops / seconds / 1e12 / limits["matmul_tflops"],
                    "copy": gathered / seconds / 1e12 / limits["copy_tbps"],
                    "floor_ms": 1e3
                    * max(
                        flops / 1e12 / limits["matmul_tflops"],
                        gathered / 1e12 / limits["copy_tbps"],
                    ),
                    "both_ms": 1e3
                    * (
                        flops / 1e12 / limits["matmul_tflops"]
                        + gathered / 1e12 / limits["copy_tbps"]
                    ),
                },
            )
    moments.grad = None


def _chunked(case: Case, best: dict[str, int]) -> dict[str, Any]:
    n = min(case.sizes.chunked_tokens, case.sizes.tokens)
    return _compare(case, n, lambda: case.judge(n, impl="chunked").policy_shift, 5)


def _given(case: Case, n: int) -> Given:
    """Whole logits of the first tokens in one product, reduced to the judged rows."""
    hidden = case.hidden[:n].float()
    head = Head(case.weight, None, 1.0, 1.0, None, torch.float32)
    p = Problem(
        hidden, head, case.token_ids[:n], case.advantages[:n], case.step, case.sizes.top_k, True
    )
    logits = _logits(case.hidden[:n], case.weight)
    z = logits.gather(1, p.token_ids[:, None])[:, 0]
    logits.scatter_(1, p.token_ids[:, None], -torch.inf)
    y, rows = logits.topk(case.sizes.top_k - 1, dim=1)
    lse = torch.logsumexp(logits, dim=1)
    zero = torch.zeros_like(lse)
    rest = Rest(lse, zero, zero, zero, zero)
    return Given(p, Sampled(z, zero, zero), Candidates(y, rows, zero), rest)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """16-bit operands, float32 out: what rounds to 16 bits here has ties where the last rows are chosen."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def _naive(case: Case, best: dict[str, int]) -> dict[str, Any]:
    """At the most tokens that fit into memory, in steps of a quarter."""
    step = case.step
    assert step.exp_avg is not None
    assert step.exp_avg_sq is not None
    n = case.sizes.tokens
    moments = Inputs(None, step.exp_avg, step.exp_avg_sq)  # type: ignore[arg-type]
    while True:

        def call(n: int = n) -> Tensor:
            return naive(_given(case, n), moments)

        release()
        try:
            call()
            break
        except torch.OutOfMemoryError:
            n = n * 3 // 4
    release()
    return _compare(case, n, call, 3)


def _dict_of_rows(case: Case, best: dict[str, int]) -> dict[str, Any]:
    step = case.step
    assert step.exp_avg is not None
    assert step.exp_avg_sq is not None
    n = min(case.sizes.dict_tokens, case.sizes.tokens)
    first = _given(case, n)
    rows = torch.unique(torch.cat([first.candidates.rows, first.problem.token_ids[:, None]], dim=1))
    m = {k: step.exp_avg[k].clone() for k in rows.tolist()}
    v = {k: step.exp_avg_sq[k].clone() for k in rows.tolist()}
    return _compare(case, n, lambda: dict_of_rows(_given(case, n), m, v), 3)


def _compare(case: Case, n: int, other: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """A competitor and ours on the same tokens in turn, the competitor checked first."""
    ours = case.judge(n).policy_shift.double()
    theirs = other().double()
    off = float((ours - theirs).norm() / ours.norm())
    if not off <= AGREEMENT:
        raise ValueError(f"disagrees with the core by {off:.1e}: not timed")
    del ours, theirs
    release()
    theirs_timing = measure(other, repeats)
    release()
    ours_timing = measure(lambda: case.judge(n), repeats)
    return {
        "tokens": n,
        "distance": off,
        "theirs": _plain(theirs_timing),
        "ours": _plain(ours_timing),
        "times_slower": theirs_timing.median_ms / ours_timing.median_ms,
        "times_memory": theirs_timing.peak_mb / max(ours_timing.peak_mb, 1e-3),
    }


def _plain(timing: Timing) -> dict[str, float]:
    return dict(vars(timing))
