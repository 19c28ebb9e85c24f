"""How much memory a call takes, by torch's own account of its allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Allocated(NamedTuple):
    """Bytes of tensors on the CPU, against the moment before the call.

    Attributes:
        peak: the most at any moment.
        net: what is still there after the call.
    """

    peak: float
    net: float


def allocations(call: Callable[[], T]) -> tuple[T, Allocated]:
    """``call()``, and every byte that torch's CPU allocator gave and took meanwhile."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    now = peak = 0.0
    inner: Any = profile.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, Allocated(peak, now)
