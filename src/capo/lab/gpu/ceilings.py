"""What the device can do at best, measured beside what is compared with it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

import capo
from capo.lab.gpu.sizes import Sizes
from capo.lab.gpu.timing import device, measure, release
from capo.lab.provenance import collect_provenance


def ceilings(sizes: Sizes) -> dict[str, float]:
    """Copy bandwidth (bytes read and written), 16-bit and float32 matrix products, on random data."""
    copy_ms = _copy_ms(sizes.copy_bytes)
    release()
    n = sizes.matmul
    product_ms = _product_ms(n)
    release()
    return {
        "copy_tbps": 2.0 * sizes.copy_bytes / copy_ms / 1e9,
        "matmul_tflops": 2.0 * n**3 / product_ms / 1e9,
    }


def _copy_ms(size: int) -> float:
    source = torch.randn(size // 4, device=device())
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), 20, seconds=1.0).median_ms


def _product_ms(n: int) -> float:
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return measure(lambda: a @ b, 20, seconds=1.0).median_ms


def about() -> dict[str, Any]:
    """The device and the versions, without the machine's name."""
    facts: dict[str, Any] = {"capo": capo.__version__, **collect_provenance()}
    del facts["command"]
    on = device()
    facts["device"] = on.type
    try:
        facts["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton"] = None
    if on.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["device_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
    return facts
