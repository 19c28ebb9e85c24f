"""What the core costs: ratios against other ways to compute the same numbers, in one run.

    capo bench core [--output DIR]          (or: python -m capo.lab.bench_core)

Every competitor computes the paper's token-level Adam shifts (top-k, π renormalised) from the same
inputs, and is checked against ours before it is timed. Sizes default to Qwen2.5-0.5B's head (d = 896,
V = 151 936) with K = 50. Peak extra memory is that of the process above its level just before the call.

- *naive*: ``[N, K, d]`` gradients, dense moments, one gather, in place where it can;
- *dict of rows*: the published form, one tensor a vocabulary row in a Python dict, made dense per
  micro-batch (the authors' 12 sequences of 1024 tokens hold more than N here: one micro-batch).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import capo
from capo.core.statistics import chunked, options
from capo.core.statistics.judged import Candidates, Sampled, judge_candidates
from capo.core.statistics.options import current
from capo.core.statistics.problem import Head, Problem
from capo.core.statistics.rest import Rest, dot

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The benchmark's shapes."""

    tokens: int = 4096
    width: int = 896
    vocabulary: int = 151_936
    top_k: int = 50
    end_to_end_tokens: int = 512
    repeats: int = 5


@dataclass(frozen=True)
class Measurement:
    """One implementation at one size."""

    name: str
    tokens: int
    vocabulary: int
    seconds: float  # median
    fastest: float
    slowest: float
    peak_mb: float  # extra, above the inputs
    max_error: float = 0.0  # relative to ours, of the policy shift


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a benchmark; moments as after some training."""

    problem: Problem
    exp_avg: Tensor = field(repr=False)
    exp_avg_sq: Tensor = field(repr=False)


def make_inputs(sizes: Sizes, tokens: int, *, seed: int = 0) -> Inputs:
    """Unit-scale logits, a tenth of the tokens with advantage 0."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = tokens, sizes.width, sizes.vocabulary
    hidden = torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g).mul_(2.0 / d**0.5)
    exp_avg = torch.randn(v, d, generator=g).mul_(1e-5)
    exp_avg_sq = torch.rand(v, d, generator=g).mul_(1e-8)
    advantages = torch.randn(n, generator=g)
    advantages[torch.rand(n, generator=g) < 0.1] = 0.0
    step = capo.AdamStep(1e-6, (0.9, 0.999), 1e-8, exp_avg, exp_avg_sq, 20)
    head = Head(weight, None, 1.0, 1.0, None, torch.float32)
    token_ids = torch.randint(v, (n,), generator=g)
    problem = Problem(hidden, head, token_ids, advantages, step, sizes.top_k, renormalize=True)
    return Inputs(problem, exp_avg, exp_avg_sq)


# --- the competitors, given the logits of the judged rows -------------------------------------------


@dataclass(frozen=True)
class Given:
    """The logits, reduced to the judged rows: what every competitor starts from."""

    problem: Problem
    sampled: Sampled
    candidates: Candidates
    rest: Rest


def reduce_logits(problem: Problem) -> Given:
    """One pass over the logits (shared by all, timed on its own)."""
    pieces = [
        chunked.find_rivals(problem.chunk(slice(s, s + 256)))
        for s in range(0, problem.token_ids.shape[0], 256)
    ]
    rest, sampled = chunked.join([(r, s) for r, s, _ in pieces])
    return Given(problem, sampled, chunked.join_candidates([c for *_, c in pieces]), rest)


def ours(given: Given) -> Tensor:
    """Policy shifts by the core."""
    t = judge_candidates(
        given.problem, given.sampled, given.candidates, given.rest.lse, given.rest.entropy
    )
    return 0.5 * (torch.sigmoid(-t.judged_log_odds) * (t.u_sampled - t.u_mean)).square()


def _residuals(given: Given) -> tuple[Tensor, Tensor]:
    """``(w, rows)`` of the judged set, the sampled token last."""
    z = torch.cat([given.candidates.y, given.sampled.z[:, None]], dim=1)
    w = -torch.softmax(z, dim=1)
    w[:, -1] += 1.0
    return w, torch.cat([given.candidates.rows, given.problem.token_ids[:, None]], dim=1)


def _adam_shift(given: Given, w: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """``½ (wᵀΔh)²`` from materialised gradients and moments, ``[N, K, d]`` each, in place."""
    p = given.problem
    step: Any = p.step
    beta1, beta2 = step.betas
    correction1, correction2 = step.bias_corrections
    g = (p.advantages[:, None] * w)[:, :, None] * p.hidden[:, None, :]
    m.mul_(-beta1).add_(g, alpha=1.0 - beta1).div_(correction1)
    v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2).div_(correction2)
    m.div_(v.sqrt_().add_(step.eps)).mul_(step.lr)
    u = torch.einsum("nkd,nd->nk", m, p.hidden)
    return 0.5 * dot(w, u).square()


def naive(given: Given, inputs: Inputs) -> Tensor:
    """Vectorised, dense moments, one gather."""
    w, rows = _residuals(given)
    return _adam_shift(given, w, inputs.exp_avg[rows], inputs.exp_avg_sq[rows])


def dict_of_rows(given: Given, m: dict[int, Tensor], v: dict[int, Tensor]) -> Tensor:
    """The published form: rows looked up in dicts and made dense, then as above."""
    w, rows = _residuals(given)
    used, position = torch.unique(rows, return_inverse=True)
    keys = used.tolist()
    dense_m = torch.stack([m[k] for k in keys])[position]
    dense_v = torch.stack([v[k] for k in keys])[position]
    return _adam_shift(given, w, dense_m, dense_v)


def log_prob_and_entropy(problem: Problem) -> Tensor:
    """The pass that every trainer makes anyway: chunked log-probability and entropy."""
    out = []
    size = current(problem.hidden.device).tokens(problem.head.vocabulary)
    for start in range(0, problem.token_ids.shape[0], size):
        rest, sampled = chunked.normalise(problem.chunk(slice(start, start + size)))
        out.append(sampled.z - rest.lse)
    return torch.cat(out)


# --- measuring ---------------------------------------------------------------------------------------


def _status_kb(key: str) -> float:
    with Path("/proc/self/status").open() as f:
        for line in f:
            if line.startswith(key):
                return float(line.split()[1])
    return float("nan")


def peak_extra_mb(call: Callable[[], object]) -> float:
    """Peak resident memory during a call above the level before it (Linux), in MB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not hide what the call needs
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return float("nan")
    before = _status_kb("VmRSS")
    call()
    return max(0.0, _status_kb("VmHWM") - before) / 1024.0


def measure(
    calls: dict[str, Callable[[], Tensor]], repeats: int, sizes: tuple[int, int]
) -> list[Measurement]:
    """Each call checked against the first, then timed in turn (A B C A B C …) after a warm-up."""
    reference = next(iter(calls.values()))().double()
    errors, peaks, seconds = {}, {}, {name: list[float]() for name in calls}
    for name, call in calls.items():
        result = call().double()
        errors[name] = float(((result - reference).abs() / reference.abs().mean()).max())
        if not errors[name] < 1e-3:
            raise SystemExit(f"{name} disagrees with the core by {errors[name]:.1e}: nothing timed")
        del result
        peaks[name] = peak_extra_mb(call)
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return [
        Measurement(name, *sizes, statistics.median(t), min(t), max(t), peaks[name], errors[name])
        for name, t in seconds.items()
    ]


def bench_adam(sizes: Sizes) -> list[Measurement]:
    """Adam top-k statistics given the logits."""
    inputs = make_inputs(sizes, sizes.tokens)
    given = reduce_logits(inputs.problem)
    rows = torch.unique(_residuals(given)[1]).tolist()
    m = {k: inputs.exp_avg[k].clone() for k in rows}
    v = {k: inputs.exp_avg_sq[k].clone() for k in rows}
    calls: dict[str, Callable[[], Tensor]] = {
        "CAPO, fused": lambda: _with_options(given, compiled=True),
        "CAPO, not compiled": lambda: _with_options(given, compiled=False),
        "naive [N,K,d]": lambda: naive(given, inputs),
        "dict of rows": lambda: dict_of_rows(given, m, v),
    }
    return measure(calls, sizes.repeats, (sizes.tokens, sizes.vocabulary))


def _with_options(given: Given, *, compiled: bool) -> Tensor:
    with options(compile=compiled):
        return ours(given)


def bench_end_to_end(sizes: Sizes) -> list[Measurement]:
    """The same with the logits, from hidden states to shifts."""
    inputs = make_inputs(sizes, sizes.end_to_end_tokens)
    p = inputs.problem

    def full_naive() -> Tensor:
        logits = p.hidden @ p.head.weight.T
        rest = logits.scatter(1, p.token_ids[:, None], -torch.inf)
        y, rows = rest.topk(sizes.top_k - 1, dim=1)
        lse = torch.logsumexp(rest, dim=1)
        z = logits.gather(1, p.token_ids[:, None])[:, 0]
        zero = torch.zeros_like(lse)
        given = Given(
            p,
            Sampled(z, zero, zero),
            Candidates(y, rows, zero),
            Rest(lse, zero, zero, zero, zero),
        )
        return naive(given, inputs)

    calls: dict[str, Callable[[], Tensor]] = {
        "CAPO, hidden states to shifts": lambda: ours(reduce_logits(p)),
        "naive, hidden states to shifts": full_naive,
        "logits alone": lambda: _logits_only(p),
    }
    # The bare logits are no competitor: they are what both contain.
    alone = calls.pop("logits alone")
    size = (sizes.end_to_end_tokens, sizes.vocabulary)
    result = measure(calls, sizes.repeats, size)
    return result + measure({"logits alone": alone}, sizes.repeats, size)


def _logits_only(p: Problem) -> Tensor:
    total = p.hidden.new_zeros(p.hidden.shape[0])
    for block in chunked.vocabulary_blocks(p.head):
        total += p.head.raw(p.hidden, block)[:, 0]
    return total


def bench_sgd(sizes: Sizes) -> list[Measurement]:
    """SGD statistics against one chunked log-probability and entropy pass."""
    p = make_inputs(sizes, sizes.end_to_end_tokens).problem
    sgd = Problem(
        p.hidden, p.head, p.token_ids, p.advantages, capo.SGDStep(1e-3), None, renormalize=True
    )
    calls = {
        "log-probability and entropy": lambda: log_prob_and_entropy(p),
        "the same + SGD statistics": lambda: chunked.compute(sgd).log_odds,
    }
    return measure(calls, sizes.repeats, (sizes.end_to_end_tokens, sizes.vocabulary))


def bench_scaling(sizes: Sizes) -> list[Measurement]:
    """Time and memory over N at fixed V and over V at fixed N (Adam top-k and SGD)."""
    out: list[Measurement] = []
    small = Sizes(width=128, vocabulary=16_384, top_k=50, repeats=3)
    grid = [(n, small.vocabulary) for n in (512, 1024, 2048, 4096, 8192)]
    grid += [(1024, v) for v in (8_192, 32_768, 65_536, 131_072)]
    for n, v in grid:
        inputs = make_inputs(Sizes(width=small.width, vocabulary=v), n)
        p = inputs.problem
        sgd = Problem(p.hidden, p.head, p.token_ids, p.advantages, capo.SGDStep(1e-3), None, True)
        given = reduce_logits(p)
        calls: dict[str, Callable[[], Tensor]] = {
            "SGD, with the logits": lambda sgd=sgd: chunked.compute(sgd).log_odds,  # type: ignore[misc]
        }
        out += measure(calls, small.repeats, (n, v))
        calls = {"Adam top-k, given the logits": lambda given=given: ours(given)}  # type: ignore[misc]
        out += measure(calls, small.repeats, (n, v))
    return out


def ratios(rows: list[Measurement], base: str) -> dict[str, tuple[float, float]]:
    """Time and memory of every row over those of ``base``."""
    ours_row = next(r for r in rows if r.name == base)
    return {
        r.name: (r.seconds / ours_row.seconds, r.peak_mb / max(ours_row.peak_mb, 1e-3))
        for r in rows
    }


def table(title: str, rows: list[Measurement], base: str) -> str:
    """A text table of one benchmark."""
    lines = [
        f"\n{title}",
        f"{'':34s}{'median s':>10s}{'min–max':>18s}{'extra MB':>10s}{'time ×':>9s}{'memory ×':>10s}",
    ]
    over = ratios(rows, base)
    for r in rows:
        t, m = over[r.name]
        spread = f"{r.fastest:.3f}–{r.slowest:.3f}"
        lines.append(
            f"{r.name:34s}{r.seconds:10.3f}{spread:>18s}{r.peak_mb:10.1f}{t:9.2f}{m:10.1f}"
        )
    return "\n".join(lines)


def run(sizes: Sizes, output: Path | None = None, *, scaling: bool = True) -> dict[str, Any]:
    """All benchmarks; prints the tables and returns (and writes) the numbers."""
    print(
        f"d = {sizes.width}, V = {sizes.vocabulary}, K = {sizes.top_k}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    adam = bench_adam(sizes)
    print(table(f"Adam statistics given the logits, N = {sizes.tokens}", adam, "CAPO, fused"))
    whole = bench_end_to_end(sizes)
    title = f"With the logits, N = {sizes.end_to_end_tokens}"
    print(table(title, whole, "CAPO, hidden states to shifts"))
    sgd = bench_sgd(sizes)
    title = f"SGD on top of log-probability and entropy, N = {sizes.end_to_end_tokens}"
    print(table(title, sgd, "log-probability and entropy"))
    grown = bench_scaling(sizes) if scaling else []
    result = {
        "sizes": asdict(sizes),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "adam_given_logits": [asdict(r) for r in adam],
        "end_to_end": [asdict(r) for r in whole],
        "sgd": [asdict(r) for r in sgd],
        "scaling": [asdict(r) for r in grown],
    }
    if output is not None:
        from capo.lab.bench_core_report import write

        write(result, output)
        print(f"\nwritten to {output}")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="capo bench core", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="completion tokens")
    parser.add_argument("--repeats", type=int, default=Sizes.repeats, help="timings of each")
    parser.add_argument("--output", type=Path, default=None, help="directory")
    parser.add_argument("--no-scaling", action="store_true", help="only at the one size")
    a = parser.parse_args(argv)
    run(Sizes(tokens=a.tokens, repeats=a.repeats), a.output, scaling=not a.no_scaling)
    return 0


if __name__ == "__main__":
    sys.exit(main())
