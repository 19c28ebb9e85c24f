"""The batch's step judged from what the tokens' judgement left: the same as with a pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import capo
from capo.core.batch_shift import batch_shift

N, V, D, K = 41, 90, 12, 7


def steps(dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    m = (0.1 * torch.randn(V, D, generator=g)).to(dtype)
    square = ((0.2 * torch.randn(V, D, generator=g)).square() + 1e-4).to(dtype)
    return {
        "sgd": capo.SGDStep(0.3, 0.1),
        "momentum": capo.MomentumStep(0.3, 0.9, m, grad_scale=0.5),
        "adam": capo.AdamStep(0.01, (0.9, 0.99), 1e-6, m, square, 7, 0.1),
        "adam, empty": capo.AdamStep(0.01, (0.9, 0.99), 1e-6, None, None, 0),
        "given": capo.GivenStep(m),
    }


def problem(dtype: torch.dtype, spread: float = 1.0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    hidden = spread * torch.randn(4, N, D, generator=g, dtype=dtype)
    mask = torch.rand(4, N, generator=g) < 0.8
    hidden[~mask] = torch.nan  # never read
    return {
        "hidden": hidden,
        "head_weight": torch.randn(V, D, generator=g, dtype=dtype),
        "token_ids": torch.randint(V, (4, N), generator=g),
        "advantages": torch.randn(4, N, generator=g, dtype=dtype),
        "mask": mask,
    }


def both(given: dict[str, Any], step: Any, fisher: str, **options: Any) -> tuple[Any, Any]:
    """``(from the tokens' support, with a pass of its own)``, ``[policy, objective]`` each."""
    judged = capo.token_curvature(**given, step=step, top_k=K, **options)
    rest = {n: v for n, v in options.items() if n != "head_bias"}
    found = batch_shift(**given, step=step, support=judged.support, fisher=fisher, **rest)  # type: ignore[arg-type]
    whole = capo.token_curvature(
        **given, step=step, top_k=K, fisher=fisher, granularity="batch", **options
    )
    first = given["mask"].flatten().int().argmax()
    expected = [whole.policy_shift.flatten()[first], whole.objective_shift.flatten()[first]]
    return torch.stack(tuple(found)), torch.stack(expected)


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "logit_scale": 1.5}, {"logit_scale": -0.8}, {"bias": True}],
    ids=str,
)
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adam, empty", "given"])
def test_is_that_of_a_pass_of_its_own(name: str, options: dict[str, Any], fisher: str) -> None:
    options = dict(options)
    if options.pop("bias", False):
        options["head_bias"] = torch.linspace(-1, 1, V, dtype=torch.float64)
    given = problem(torch.float64)
    found, expected = both(given, steps(torch.float64)[name], fisher, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("spread", [1.0, 8.0])  # 8: most tokens are all but certain
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_float32_keeps_its_precision(name: str, spread: float) -> None:
    given = problem(torch.float32, spread)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    found, _ = both(given, steps(torch.float32)[name], "sampled")
    _, exact = both(wide, steps(torch.float64)[name], "sampled")
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_nothing_to_judge_is_no_shift() -> None:
    given = problem(torch.float32)
    given["mask"] = torch.zeros_like(given["mask"])
    empty = capo.core.statistics.result.Support(torch.empty(0, K).long(), torch.empty(0, K))
    found = batch_shift(**given, step=capo.SGDStep(0.1), support=empty)
    assert [float(x) for x in found] == [0.0, 0.0]


def test_other_tokens_are_refused() -> None:
    given = problem(torch.float32)
    judged = capo.token_curvature(**given, step=capo.SGDStep(0.1), top_k=K)
    given["mask"] = ~given["mask"]
    with pytest.raises(capo.InputError) as caught:
        batch_shift(**given, step=capo.SGDStep(0.1), support=judged.support)  # type: ignore[arg-type]
    assert caught.value.field == "support"
