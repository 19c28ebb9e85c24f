"""Chunk sizes by device: a GPU's are larger, and change no result beyond rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import capo
from capo.core.statistics import options
from capo.core.statistics.options import ON_GPU, current

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_blocks_are_larger_on_a_gpu_unless_told_otherwise() -> None:
    assert current(CPU).vocab_chunk == 1024
    assert {name: getattr(current(CUDA), name) for name in ON_GPU} == ON_GPU
    # The head of a 7 B model, 4096 tokens: 38 blocks where there were 2384.
    assert current(CUDA).tokens(152_064) >= 4096
    with options(vocab_chunk=64), options(token_chunk=8):
        for device in (CPU, CUDA):
            assert current(device).vocab_chunk == 64
            assert current(device).tokens(1000) == 8
    assert current(CUDA).vocab_chunk == ON_GPU["vocab_chunk"]


def problem() -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    n, v, d = 70, 5003, 24
    return {
        "hidden": torch.randn(n, d, generator=g),
        "head_weight": 2.0 * torch.randn(v, d, generator=g) / d**0.5,
        "token_ids": torch.randint(v, (n,), generator=g),
        "advantages": torch.randn(n, generator=g),
        "m": 1e-3 * torch.randn(v, d, generator=g),
    }


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("top_k", [None, 50])
@pytest.mark.parametrize("granularity", ["token", "batch"])
@pytest.mark.parametrize("name", ["sgd", "frozen", "adam", "given"])
def test_a_gpus_blocks_give_the_same(
    name: str, granularity: str, top_k: int | None, compile: bool
) -> None:
    given = problem()
    m = given.pop("m")
    square = 1e-6 + m.square()
    adam = capo.AdamStep(1e-3, (0.9, 0.99), 1e-8, m, square, 7)
    step: Any = {
        "sgd": capo.SGDStep(0.1),
        "frozen": capo.AdamStep(1e-3, (0.9, 0.99), 1e-8, m, square, 7, preconditioner="frozen"),
        "adam": adam,
        "given": capo.GivenStep(m),
    }[name]
    arguments = given | {"step": step, "top_k": top_k, "granularity": granularity}
    exact = capo.token_curvature(
        **{
            k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for k, x in arguments.items()
        }
    )
    with options(**ON_GPU, compile=compile):
        found = capo.token_curvature(**arguments, impl="chunked")
    small = capo.token_curvature(**arguments, impl="chunked")
    for field in ("objective_shift", "policy_shift", "log_prob", "entropy", "s", "variance"):
        want = getattr(exact, field).double()
        off = [(getattr(c, field).double() - want).norm() / want.norm() for c in (found, small)]
        assert off[0] <= max(1e-5, 4 * off[1]), (field, off)
