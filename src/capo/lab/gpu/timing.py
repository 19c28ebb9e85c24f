"""Times by device events, peak memory, and a record that is on disk as soon as it has a number."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capo.lab.bench_core import peak_extra_mb

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Timing:
    """One call, timed after a warm-up."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int
    peak_mb: float  # extra memory, above what was there before the call


def device() -> torch.device:
    """The device that is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Marks in the device's own queue of work; host time where there is no GPU."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()

    def mark(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has done all its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks; :meth:`wait` first."""
        return float(start.elapsed_time(end)) if self.cuda else 1e3 * (end - start)


def release() -> None:
    """Give unused memory back, so that the next call finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_of(call: Callable[[], object]) -> float:
    """Extra memory at the peak of a call, MB."""
    if not torch.cuda.is_available():
        return peak_extra_mb(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGABYTE


def measure(call: Callable[[], object], repeats: int, *, seconds: float = 4.0) -> Timing:
    """Median of up to ``repeats`` calls, as many as fit into ``seconds`` (three at least)."""
    clock = Clock()
    call()  # compiles, allocates
    peak = peak_of(call)
    clock.wait()
    start = time.perf_counter()
    call()
    clock.wait()
    once = time.perf_counter() - start
    count = max(3, min(repeats, int(seconds / max(once, 1e-6))))
    marks = []
    for _ in range(count):
        begin = clock.mark()
        call()
        marks.append((begin, clock.mark()))
    clock.wait()
    times = [clock.milliseconds(*pair) for pair in marks]
    return Timing(statistics.median(times), min(times), max(times), count, peak)


class Record:
    """A stage's numbers, written after every addition: a stage that is cut off keeps what it had."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path = path
        self.values: dict[str, Any] = {**head, "complete": False}
        self.write()

    def add(self, name: str, value: Any, *, quiet: bool = False) -> None:
        """Keep a value and say it."""
        if isinstance(value, Timing):
            value = asdict(value)
        self.values[name] = value
        self.write()
        if not quiet:
            print(f"  {name}: {_short(value)}", flush=True)

    def fail(self, name: str, error: Exception) -> None:
        """A part that could not be done; the others go on."""
        text = f"{type(error).__name__}: {str(error).strip()[:400]}"
        self.values.setdefault("failed", {})[name] = text
        self.write()
        print(f"  {name}: FAILED {text}", flush=True)

    def finish(self) -> None:
        """Nothing is missing."""
        self.values["complete"] = "failed" not in self.values
        self.write()

    def write(self) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.values, indent=2) + "\n")
        os.replace(part, self.path)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
