"""The live view of a sweep on a terminal: how far all of it is, and what each running point is at."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from capo.lab.readings import POLICY_SHIFT, READINGS, REJECTED, REWARD, SCALE, Row, last_row
from capo.lab.rundir import RunDirectory
from capo.lab.sweep.watching import Lines, clock

COLUMNS = {"reward": REWARD, "policy shift": POLICY_SHIFT, "rejected": REJECTED, "scale": SCALE}
assert set(COLUMNS.values()) <= set(READINGS)


@dataclass(frozen=True)
class Running:
    """A point that is being made: its logs' last rows, and how many alarms it has raised."""

    name: str
    step: int
    steps: int
    metrics: Row
    accuracy: float | None
    alarms: int


def running_point(name: str, directory: RunDirectory, since: float) -> Running | None:
    """What a point is at; None where no process has been at it since that time (of the clock)."""
    path = directory.path / "status.json"
    try:
        if path.stat().st_mtime < since:
            return None
    except OSError:
        return None
    status = directory.read("status.json")
    if status.get("state") != "running":
        return None
    evaluated = last_row(directory.path / "evals.jsonl") or {}
    return Running(
        name,
        int(status.get("step", 0)),
        int(status.get("steps") or 0),
        last_row(directory.path / "metrics.jsonl") or {},
        evaluated.get("accuracy"),
        len(directory.rows("alarms.jsonl")),
    )


class View(Lines):
    """One bar with the time left, a line for each running point; what is over is printed above them."""

    def __init__(self, console: Console) -> None:
        """Show nothing yet."""
        super().__init__(console)
        self.bar = Progress(
            TextColumn("[bold]{task.fields[count]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            console=console,
            expand=True,
        )
        self.live = Live(self, console=console, refresh_per_second=2)
        self.task: TaskID | None = None
        self.since = time.time()
        self.at_work: list[Running] = []

    def begin(
        self, expected: dict[str, float], names: dict[str, str], runs: Path, jobs: int
    ) -> None:
        """See `Watcher.begin`."""
        super().begin(expected, names, runs, jobs)
        self.since = time.time()
        if expected:
            self.task = self.bar.add_task("", total=self.total, count="", facts="")
            self.tick()
            self.live.start()

    def tick(self) -> None:
        """See `Watcher.tick`."""
        if self.task is None:
            return
        self.at_work = [
            found
            for folder, name in self.names.items()
            if folder not in self.over
            and (found := running_point(name, RunDirectory(self.runs / folder), self.since))
        ]
        left = self.left()
        facts = "" if left is None else f"{clock(left)} left"
        if self.failures:
            facts += f"  {self.failures} failed"
        self.bar.update(
            self.task,
            completed=self.done(),
            count=f"{len(self.over)} of {len(self.expected)}",
            facts=facts,
        )

    def end(self) -> float:
        """See `Watcher.end`."""
        self.tick()
        self.at_work = []
        self.live.stop()
        return super().end()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar and the running points."""
        yield self.bar
        if self.at_work:
            yield _table(self.at_work)


def _table(points: list[Running]) -> Table:
    shown = {
        name: reading
        for name, reading in COLUMNS.items()
        if any(reading.of(point.metrics) is not None for point in points)
    }
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  running", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in ("step", "accuracy", *shown, "warnings"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        readings = (reading.of(point.metrics) for reading in shown.values())
        forms = (reading.form for reading in shown.values())
        table.add_row(
            f"  {point.name}",
            f"{point.step}/{point.steps}",
            "–" if point.accuracy is None else f"{point.accuracy:.3f}",
            *("–" if v is None else format(v, f) for v, f in zip(readings, forms, strict=True)),
            Text(str(point.alarms), style="bold yellow" if point.alarms else ""),
        )
    return table
