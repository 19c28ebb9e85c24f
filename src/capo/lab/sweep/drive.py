"""Makes the points of grids that are missing: bounded, resumable, nothing swallowed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from capo.lab.pool import Failure, working
from capo.lab.rundir import RunDirectory
from capo.lab.sweep.estimate import Rate, point_seconds
from capo.lab.sweep.execute import Mark, make_point, mark_of
from capo.lab.sweep.point import Point
from capo.lab.sweep.watching import Watcher

State = Literal["finished", "diverged", "half-finished", "failed", "missing"]

TICK = 1.0  # seconds between looks at what the workers are at


@dataclass
class Swept:
    """What a sweep came to.

    Attributes:
        made, found: points made now, and those that were over before.
        failed: name and message of those that failed, in order.
        seconds: wall clock.
    """

    made: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def then(self, later: Swept) -> Swept:
        """This and a later one, of the same points and others."""
        return Swept(
            made=self.made + later.made,
            found=later.found - self.made,
            failed=self.failed | later.failed,
            seconds=self.seconds + later.seconds,
        )


def distinct(points: Sequence[Point]) -> dict[str, Point]:
    """The points by run directory; those of one configuration are one run."""
    found: dict[str, Point] = {}
    for point in points:
        found.setdefault(point.folder(), point)
    return found


def sweep(
    points: Sequence[Point],
    runs: Path,
    jobs: int,
    watcher: Watcher,
    *,
    max_seconds: float | None = None,
    make: Callable[[Point, Path, dict[str, Any]], Mark] = make_point,
) -> Swept:
    """Make what is missing of the points, ``jobs`` at a time.

    Points that are over are never rerun, half-finished ones continue from their last checkpoint, and a
    point that fails stops no other.

    Args:
        points: of one grid or several.
        runs: the folder of all run directories.
        jobs: processes, each with one thread.
        watcher: hears of everything.
        max_seconds: after which it ends, whatever is at work; what is half-finished stays so.
        make: makes a point; importable by its name.

    Returns:
        what was made and what failed.

    Raises:
        KeyboardInterrupt: the same call continues.
    """
    from capo.lab.provenance import collect_provenance

    wanted = distinct(points)
    marks = {folder: mark_of(RunDirectory(runs / folder), each) for folder, each in wanted.items()}
    missing = {folder: each for folder, each in wanted.items() if marks[folder] is None}
    swept = Swept(found=len(wanted) - len(missing))
    rate = Rate.measured(wanted, marks)
    watcher.begin(
        {folder: point_seconds(each, rate) for folder, each in missing.items()},
        {folder: each.name for folder, each in missing.items()},
        runs,
        jobs,
    )
    runs.mkdir(parents=True, exist_ok=True)
    try:
        if missing:
            with working(min(jobs, len(missing)), make, runs, collect_provenance()) as workers:
                for each in missing.values():
                    workers.submit(each)
                until = math.inf if max_seconds is None else time.monotonic() + max_seconds
                while workers.running and time.monotonic() < until:
                    for point, result in workers.finished(TICK):
                        _note(point, result, swept, watcher, runs)
                    watcher.tick()
    finally:
        swept.seconds = watcher.end()
    return swept


def _note(point: Point, result: Mark | Failure, swept: Swept, watcher: Watcher, runs: Path) -> None:
    if isinstance(result, Failure):
        swept.failed[point.name] = result.message
        _remember(point, result, runs)
        watcher.failed(point, result.message)
        return
    swept.made += 1
    watcher.finished(point, result)


def _remember(point: Point, failure: Failure, runs: Path) -> None:
    """Leave a word for `state_of` where the run itself had no time to, or had not begun."""
    directory = RunDirectory(runs / point.folder())
    died = isinstance(failure.error, BrokenProcessPool)
    if directory.state == "running" and not died:
        return  # another sweep is at work there
    directory.path.mkdir(parents=True, exist_ok=True)
    step = int(directory.read("status.json").get("step", 0))
    directory.set_status("failed", step, point.resolved.steps, failure.message)


def state_of(point: Point, runs: Path) -> tuple[State, str]:
    """Where a point stands, and a word on it: the step, what went wrong, or that its time was over."""
    directory = RunDirectory(runs / point.folder())
    mark = mark_of(directory, point)
    if mark is not None and mark.ended == "diverged":
        return "diverged", ""
    if mark is not None:
        return "finished", "out of time" if mark.ended == "time" else ""
    status = directory.read("status.json")
    if status.get("state") == "failed":
        return "failed", str(status.get("message", ""))
    if not directory.exists:
        return "missing", ""
    return "half-finished", f"step {status.get('step', 0)} of {status.get('steps', '?')}"
