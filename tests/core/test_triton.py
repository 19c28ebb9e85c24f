"""``impl="triton"``: who may ask for it, and the suites that need a process of their own.

Triton decides once, when it is first imported, whether its kernels are compiled or interpreted; other
tests may have imported it already. On a machine with a GPU the same suite runs on the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import capo
from capo.core.statistics import chunked, triton_backend
from core.cases import CASES, FULL, MODES, cast
from core.subject import FIELDS, arguments, curvature

HERE = Path(__file__).parent
SGD = next(c for c in CASES if c.name == "sgd")


def run_suite(name: str, tmp_path: Path, **environment: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--timeout=600", str(HERE / name)],
        cwd=HERE.parent.parent,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.engine
def test_equals_the_plain_backend(tmp_path: Path) -> None:
    interpret = "0" if torch.cuda.is_available() else "1"
    run_suite("triton_suite.py", tmp_path, TRITON_INTERPRET=interpret)


@pytest.mark.slow
@pytest.mark.engine
def test_compiles_for_absent_gpus(tmp_path: Path) -> None:
    run_suite("triton_compile.py", tmp_path, TRITON_INTERPRET="0")


@pytest.mark.parametrize("granularity", ["token", "batch"])
def test_says_so_where_triton_is_not_installed(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_kernels", "triton_row_kernels"):
        monkeypatch.delitem(sys.modules, f"capo.core.statistics.{name}", raising=False)
        monkeypatch.delattr(capo.core.statistics, name, raising=False)
    with pytest.raises(capo.InputError, match="not installed") as caught:
        curvature(SGD.batch, impl="triton", granularity=granularity)
    assert caught.value.field == "impl"


def test_says_so_where_no_gpu_holds_the_tensors() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(capo.InputError, match="CUDA device, got cpu") as caught:
        curvature(SGD.batch, impl="triton")
    assert caught.value.field == "impl"


def test_auto_on_cpu_is_the_chunked_backend() -> None:
    for mode in MODES:
        given = arguments(cast(SGD.batch, torch.float32), mode, torch.float32)
        auto, other = (
            curvature(SGD.batch, mode, torch.float32, **given, impl=impl)
            for impl in ("auto", "chunked")
        )
        for name in FIELDS:
            assert torch.equal(getattr(auto, name), getattr(other, name))


def test_a_broken_tool_chain_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` on a GPU whose compiler fails goes on with the chunked backend, and says so once."""

    def broken(problem: Any) -> Any:
        raise RuntimeError("no C compiler")

    calls = []

    def on_gpu(problem: Any) -> bool:
        calls.append(problem)
        return not triton_backend._State.failed

    monkeypatch.setattr(triton_backend, "compute", broken)
    monkeypatch.setattr(triton_backend, "preferred", on_gpu)
    monkeypatch.setattr(triton_backend._State, "failed", False)
    expected = curvature(SGD.batch, FULL, impl="chunked")
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        first = curvature(SGD.batch, FULL)
    second = curvature(SGD.batch, FULL)  # a warning would be an error
    assert len(calls) == 2
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(expected, name))
        assert torch.equal(getattr(second, name), getattr(expected, name))


def test_bad_input_and_full_memory_are_not_taken_for_a_broken_tool_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unexpected(problem: Any) -> Any:
        raise AssertionError("the chunked backend was asked")

    monkeypatch.setattr(chunked, "compute", unexpected)
    monkeypatch.setattr(triton_backend, "preferred", lambda problem: True)
    for error in (capo.InputError("hidden", "is bad."), torch.OutOfMemoryError("full")):

        def failing(problem: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(triton_backend, "compute", failing)
        with pytest.raises(type(error)):
            curvature(SGD.batch, FULL)
