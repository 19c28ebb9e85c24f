"""What a sweep says while it is at work: a live view on a terminal, a line a point in a pipe."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from capo.lab.rundir import RunDirectory
from capo.lab.sweep.execute import Mark
from capo.lab.sweep.point import Point


class Watcher:
    """Hears of a sweep and keeps the time. This one is silent.

    The time left follows from what the points were expected to take and how fast those that are made
    have been; half-finished points count by their steps.
    """

    def __init__(self) -> None:
        """Nothing has begun."""
        self.expected: dict[str, float] = {}
        self.names: dict[str, str] = {}
        self.runs, self.jobs = Path(), 1
        self.before: dict[str, float] = {}
        self.over: set[str] = set()
        self.failures = 0
        self.began = time.monotonic()

    def begin(
        self, expected: dict[str, float], names: dict[str, str], runs: Path, jobs: int
    ) -> None:
        """Points are to be made, by folder: expected seconds, and names."""
        self.expected, self.names, self.runs, self.jobs = expected, names, runs, jobs
        self.began = time.monotonic()
        self.before = {folder: self._share(folder) for folder in expected}

    def finished(self, point: Point, mark: Mark) -> None:
        """A point is over."""
        self.over.add(point.folder())

    def failed(self, point: Point, message: str) -> None:
        """A point failed."""
        self.over.add(point.folder())
        self.failures += 1

    def tick(self) -> None:
        """Time has passed."""

    def end(self) -> float:
        """All is over, one way or another; the seconds it took."""
        return time.monotonic() - self.began

    @property
    def total(self) -> float:
        """Expected core seconds of all points that were missing."""
        return sum(self.expected.values())

    def done(self, *, now: bool = True) -> float:
        """Expected core seconds of what is there, or was when it began."""
        if not now:
            return sum(self.expected[f] * self.before[f] for f in self.expected)
        return sum(
            seconds * (1.0 if folder in self.over else self._share(folder))
            for folder, seconds in self.expected.items()
        )

    def left(self) -> float | None:
        """Seconds still to go; None before anything can be said."""
        there, before = self.done(), self.done(now=False)
        passed = time.monotonic() - self.began
        if there <= before or passed <= 0:
            return None
        return (self.total - there) * passed / (there - before)

    def _share(self, folder: str) -> float:
        status = RunDirectory(self.runs / folder).read("status.json")
        steps = status.get("steps") or 0
        return min(1.0, status.get("step", 0) / steps) if steps else 0.0


class Lines(Watcher):
    """A line for every point that is over, for pipes and log files."""

    def __init__(self, console: Console) -> None:
        """Print nothing yet."""
        super().__init__()
        self.console = console

    def finished(self, point: Point, mark: Mark) -> None:
        """See `Watcher.finished`."""
        super().finished(point, mark)
        self.say(f"{point.name}: {outcome_words(self.runs, point, mark)}, {mark.seconds:.0f} s")

    def failed(self, point: Point, message: str) -> None:
        """See `Watcher.failed`."""
        super().failed(point, message)
        self.say(f"{point.name}: FAILED, {message}")

    def say(self, words: str) -> None:
        """A line with the count before it and the time left behind it."""
        left = self.left()
        after = "" if left is None or left <= 0 else f"; about {clock(left)} left"
        self.console.print(
            f"[{len(self.over)} of {len(self.expected)}] {words}{after}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def outcome_words(runs: Path, point: Point, mark: Mark) -> str:
    """``accuracy 0.43 → 0.91``."""
    if mark.ended == "diverged":
        return "diverged"
    evals = RunDirectory(runs / point.folder()).rows("evals.jsonl")
    if not evals:
        return "measured"
    return f"accuracy {evals[0]['accuracy']:.2f} → {evals[-1]['accuracy']:.2f}"


def clock(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 10 s``, ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


def make_watcher(quiet: bool = False) -> Watcher:
    """The watcher that suits standard error: silent, a live view, or lines."""
    from capo.lab.sweep.live import View

    if quiet:
        return Watcher()
    console = Console(stderr=True)
    return View(console) if console.is_terminal else Lines(console)
