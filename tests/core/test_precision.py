"""Low-precision input, poisoned allocations, and a fuzz run over shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import capo
from capo.core.statistics import options
from core.subject import IMPLEMENTATIONS

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
FIELDS = ("objective_shift", "policy_shift", "log_prob", "entropy", "s", "variance")


def inputs(n: int, vocabulary: int, width: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(n, width, generator=g).to(dtype),
        "head_weight": (torch.randn(vocabulary, width, generator=g) * 3 / width**0.5).to(dtype),
        "token_ids": torch.randint(vocabulary, (n,), generator=g),
        "advantages": torch.randn(n, generator=g),
    }


def adam(vocabulary: int, width: int, seed: int, dtype: torch.dtype) -> capo.AdamStep:
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(vocabulary, width, generator=g).mul(1e-3).to(dtype)
    v = torch.rand(vocabulary, width, generator=g).mul(1e-5).to(dtype)
    return capo.AdamStep(1e-3, (0.9, 0.999), 1e-8, m, v, 7)


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def naive_bf16(a: dict[str, Any], lr: float) -> torch.Tensor:
    """What a straightforward bf16 program makes of ``½ s²`` under SGD."""
    h, w = a["hidden"], a["head_weight"]
    pi = torch.softmax(h @ w.T, dim=1)
    residual = torch.nn.functional.one_hot(a["token_ids"], w.shape[0]).to(pi.dtype) - pi
    norms = h.square().sum(1) * residual.square().sum(1)
    return 0.5 * (lr * a["advantages"].to(h.dtype) * norms).square()


@each_impl
def test_bf16_stays_within_the_error_of_the_naive_bf16_program(impl: str) -> None:
    """``|ours − fp64| ≤ |naive bf16 − fp64|`` in sum, and each within fp32's own accuracy."""
    a = inputs(200, 301, 64, seed=3, dtype=torch.bfloat16)
    lr = 0.1
    step = capo.SGDStep(lr)
    exact = capo.token_curvature(**in_float64(a), step=step, impl="eager").policy_shift
    ours = capo.token_curvature(**a, step=step, impl=impl).policy_shift
    naive = naive_bf16(a, lr).double()
    assert ours.dtype == torch.float32
    ours_error, naive_error = (ours.double() - exact).abs(), (naive - exact).abs()
    assert ours_error.sum() < 1e-3 * naive_error.sum()
    assert (ours_error <= naive_error + 1e-4 * exact).all()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every allocation that promises nothing comes full of NaN."""
    count = [0]

    def poison(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = real(*args, **kwargs)
            count[0] += 1
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return allocate

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    return count


STEPS: dict[str, Callable[[int, int], Any]] = {
    "sgd": lambda v, d: capo.SGDStep(0.1),
    "sgd-decay": lambda v, d: capo.SGDStep(0.1, weight_decay=0.01),
    "momentum": lambda v, d: capo.MomentumStep(
        0.1, 0.9, torch.arange(v)[:, None].expand(v, d).cos()
    ),
    "adam": lambda v, d: adam(v, d, 1, torch.float32),
    "adam-empty": lambda v, d: capo.AdamStep(1e-3, (0.9, 0.999), 1e-8, None, None, 0),
    "given": lambda v, d: capo.GivenStep(0.01 * torch.arange(v)[:, None].expand(v, d).sin()),
}


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("step", STEPS)
def test_nothing_uninitialised_is_read(step: str, top_k: int | None, poisoned: list[int]) -> None:
    a = inputs(33, 71, 16, seed=4, dtype=torch.float32)
    made = STEPS[step](71, 16)
    for renormalize in (True, False):
        expected = capo.token_curvature(
            **a, step=made, top_k=top_k, renormalize=renormalize, impl="eager"
        )
        with options(token_chunk=7, vocab_chunk=13, logit_buffer=200, elementwise_block=50):
            actual = capo.token_curvature(
                **a, step=made, top_k=top_k, renormalize=renormalize, impl="chunked"
            )
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(actual, name), getattr(expected, name), rtol=2e-3, atol=1e-9
            )
    if top_k is not None or step not in ("sgd", "given"):  # those two allocate nothing raw
        assert poisoned[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_fuzz(seed: int) -> None:
    """Random shapes, dtypes, masks, chunk sizes and options: chunked equals eager, all is finite."""
    g = torch.Generator().manual_seed(1000 + seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=g))]

    shape = pick((0,), (1,), (5, 3), (2, 0), (2, 3, 4), (17,))
    vocabulary, width = pick(1, 2, 3, 33, 128, 257), pick(1, 2, 7, 64)
    dtype = pick(torch.float64, torch.float32, torch.bfloat16, torch.float16)
    count = int(torch.Size(shape).numel())
    a = inputs(count, vocabulary, width, seed, dtype)
    a["hidden"] = a["hidden"].reshape(*shape, width)
    a["token_ids"] = a["token_ids"].reshape(shape)
    a["advantages"] = (a["advantages"] * pick(0.0, 1.0, 100.0)).reshape(shape)
    mask = torch.rand(shape, generator=g) < pick(0.0, 0.5, 1.0)
    a["hidden"][~mask] = torch.nan
    step = pick(*STEPS.values())(vocabulary, width)
    top_k = pick(None, 1, min(2, vocabulary), vocabulary)
    granularity = pick("token", "token", "batch")
    kwargs: dict[str, Any] = {
        "step": step,
        "mask": mask,
        "top_k": top_k,
        "renormalize": pick(True, False) if granularity == "token" else True,
        "temperature": pick(1.0, 0.3, 2.0),
        "logit_softcap": pick(None, 2.0, 30.0),
        "logit_scale": pick(1.0, 0.1),
        "fisher": pick("sampled", "exact"),
        "granularity": granularity,
    }
    sizes = {"token_chunk": pick(1, 3, 1024), "vocab_chunk": pick(1, 40, 4096)}
    sizes |= {"logit_buffer": pick(1, 1 << 20), "elementwise_block": pick(1, 1 << 16)}
    with options(**sizes):
        ours = capo.token_curvature(**a, **kwargs, impl="chunked")
    # The judged set must not hang on rounding: the reference sees the same numbers.
    reference = capo.token_curvature(**in_float64(a), **kwargs, impl="eager")
    for name in FIELDS:
        actual, expected = getattr(ours, name), getattr(reference, name)
        assert torch.isfinite(actual).all()
        assert actual.shape == torch.Size(shape)
        assert (actual[~mask] == 0).all()
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        tolerance = 1e-8 if dtype == torch.float64 else 5e-4
        torch.testing.assert_close(
            actual.double(), expected, rtol=tolerance, atol=tolerance * scale + 1e-12
        )
