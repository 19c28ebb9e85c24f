"""The kernels compile for GPUs that are not here; run by ``test_triton.py`` in its own process.

The interpreter runs any Python; a compiler does not. Each launch that the backend makes is caught with
its real arguments, and compiled to machine code for three generations of GPU, assembler included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import capo
from capo.core import step_kernel
from capo.core.adam_move import moved_by_kernel
from capo.core.statistics import triton_backend, triton_kernels, triton_row_kernels
from capo.core.statistics.problem import Head, Problem

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
N, V, d, K = 8, 512, 64, 4


class Recorder:
    """Stands for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(
                (self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | options)
            )

        return launch


def steps(dtype: torch.dtype) -> dict[str, Any]:
    m = torch.zeros(V, d, dtype=dtype)
    return {
        "sgd": capo.SGDStep(0.1),
        "given": capo.GivenStep(m),
        "momentum": capo.MomentumStep(0.1, 0.9, m, weight_decay=0.1),
        "adam": capo.AdamStep(0.1, (0.9, 0.99), 1e-8, m, m, 3, 0.1),
        "adam-empty": capo.AdamStep(0.1, (0.9, 0.99), 1e-8, None, None, 0),
        "adam-frozen": capo.AdamStep(0.1, (0.9, 0.99), 1e-8, m, m, 3, preconditioner="frozen"),
    }


def launches(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, top_k: int | None, softcap: bool
) -> list[tuple[Any, dict[str, Any]]]:
    """Every launch that a problem leads to."""
    caught: list[tuple[Any, dict[str, Any]]] = []
    for module, kernel in (
        (triton_kernels, "rest_kernel"),
        (triton_row_kernels, "rows_kernel"),
        (triton_row_kernels, "log_sum_kernel"),
        (triton_row_kernels, "held_kernel"),
    ):
        monkeypatch.setattr(module, kernel, Recorder(getattr(module, kernel), caught))
    monkeypatch.setattr(triton_backend, "require", lambda problem: None)
    monkeypatch.setattr(triton_backend.triton_launch, "interpreted", lambda: False)
    wide = torch.float32 if name.startswith("adam") else dtype
    weight = torch.zeros(V, d, dtype=dtype)
    head = Head(weight, weight[:, 0], 1.0, 1.0, 2.0 if softcap else None, torch.float32)
    hidden, token_ids = torch.zeros(N, d, dtype=dtype), torch.zeros(N, dtype=torch.int64)
    step = steps(wide)[name]
    triton_backend.compute(Problem(hidden, head, token_ids, torch.zeros(N), step, top_k, False))
    return caught


def compile_launch(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif kernel.params[index].is_constexpr or (value == 1 and "_" in name):  # unit strides
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {k: arguments[k] for k in ("num_warps", "num_stages") if k in arguments}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize(
    ("name", "dtype", "top_k", "softcap", "library"),
    [
        ("sgd", torch.bfloat16, None, False, 0),
        ("sgd", torch.bfloat16, None, True, 0),
        ("sgd", torch.float32, None, False, 0),
        ("given", torch.float16, None, True, 0),
        ("given", torch.float32, K, False, 0),
        ("momentum", torch.bfloat16, None, False, 0),
        ("adam", torch.bfloat16, K, True, 0),
        ("adam-empty", torch.bfloat16, K, False, 0),
        ("adam-frozen", torch.bfloat16, None, True, 0),
        ("adam-frozen", torch.bfloat16, K, False, 0),
        ("adam", torch.bfloat16, K, False, 1),
        ("adam", torch.float16, K, True, 1),
    ],
)
def test_every_launch_compiles(
    name: str,
    dtype: torch.dtype,
    top_k: int | None,
    softcap: bool,
    library: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with triton_backend.triton_launch.tiling(library=library):
        caught = launches(monkeypatch, name, dtype, top_k, softcap)
    assert any("total" in a and "maxima" in a and "weight" not in a for _, a in caught) == bool(
        library
    )
    for capability, limit in SHARED_MEMORY.items():
        for kernel, arguments in caught:
            compiled = compile_launch(kernel, arguments, GPUTarget("cuda", capability, 32))
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= limit
            if dtype != torch.float32 and "PRECISION" in arguments and capability == 90:
                assert "wgmma.mma_async" in compiled.asm["ptx"], "the product is on tensor cores"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_moved_parameter_compiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[tuple[Any, dict[str, Any]]] = []
    kernel = step_kernel.moved_by_adam_kernel
    monkeypatch.setattr(step_kernel, "moved_by_adam_kernel", Recorder(kernel, caught))
    w = torch.zeros(V, d, dtype=dtype)
    step = capo.AdamStep(0.1, (0.9, 0.99), 1e-8, w, w, 3, 0.1)
    moved_by_kernel(step, w, w, 0.5)
    ((_, arguments),) = caught
    for capability in SHARED_MEMORY:
        compiled = compile_launch(kernel, arguments, GPUTarget("cuda", capability, 32))
        assert compiled.asm["ptx"].count("ld.global") >= 4
        assert compiled.asm["cubin"]


def test_the_table_has_the_tiling_that_was_quickest_at_a_7b_head() -> None:
    """``results/gpu/core.json``: of its sweep, the quickest by more than noise."""
    record = json.loads((Path(__file__).parents[2] / "results/gpu/core.json").read_text())
    hidden, weight = (torch.zeros(N, d, dtype=torch.bfloat16) for _ in range(2))
    head = Head(weight, None, 1.0, 1.0, None, torch.float32)
    plan = triton_backend.triton_launch.choose(hidden, head)
    assert record["tiling"].items() <= vars(plan).items()
