"""The live view of a run on a terminal: how far, how well, what its steps do, and what it was warned of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from capo.lab import progress
from capo.lab.config import Config
from capo.lab.readings import POLICY_SHIFT, Series, curve

NAME, VALUE = 21, 33  # columns of a reading's name, and of its value
CURVE = 40  # columns of a curve at most
LEAST = 8  # and at least: where there is no room for so many, there is none
BUDGET = "capo/trust/budget"


class View(progress.Progress):
    """One live view. It may span several runs, one after another.

    The bar's unit is the completion, since that is what takes the time.

    Args:
        console: a terminal.
        total: completions of all runs together; None for those of the one run.
    """

    def __init__(self, console: Console, total: int | None = None) -> None:
        """Show nothing yet."""
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left, {task.fields[facts]}"),
            console=console,
            expand=True,
        )
        self.live = Live(self, console=console, refresh_per_second=4)
        self.total = total
        self.before = 0  # completions of the runs that are over
        self.config: Config | None = None
        self.task: TaskID | None = None
        self._begin("")

    def _begin(self, name: str) -> None:
        self.name = name
        self.series = Series()
        self.accuracies: list[float] = []
        self.stderr = 0.0
        self.step = 0
        self.budget: float | None = None
        self.warnings: list[int] = []  # the steps at which they were raised

    # Events

    def started(self, config: Config, step: int) -> None:
        """See `Progress.started`."""
        self.config = config
        self._begin(config.run.name or config.algorithm.name)
        if self.task is None:
            total = self.total or config.completions_after(config.steps)
            self.task = self.bar.add_task(self.name, total=total, facts="")
            self.live.start()
        if step:
            self.said(f"continuing after step {step}")
        self._advance(step)

    def stepped(self, row: dict[str, Any]) -> None:
        """See `Progress.stepped`."""
        self.series.add(row)
        self.budget = row.get(BUDGET, self.budget)
        self._advance(row["step"])

    def evaluated(self, row: dict[str, Any]) -> None:
        """See `Progress.evaluated`."""
        self.accuracies.append(row["accuracy"])
        self.stderr = row["stderr"]

    def said(self, message: str) -> None:
        """See `Progress.said`."""
        self._print(message)

    def warned(self, message: str) -> None:
        """See `Progress.warned`."""
        self.warnings.append(self.step)
        self._print(message, style="yellow")

    def skipped(self, config: Config) -> None:
        """A run of this view needs no training: it is done already."""
        self.before += config.completions_after(config.steps)

    def stopped(self) -> None:
        """See `Progress.stopped`."""
        if self.config is not None:
            self.before += self.config.completions_after(self.config.steps)
            self.config = None
        if self.total is None or self.before >= self.total:
            self.close()
        elif len(self.accuracies) > 1:
            first, last = self.accuracies[0], self.accuracies[-1]
            self._print(f"{self.name}: accuracy {first:.3f} → {last:.3f} ± {self.stderr:.3f}")

    def close(self) -> None:
        """Leave the terminal as it was found, the last view on it."""
        self.live.stop()

    def _print(self, message: str, style: str = "") -> None:
        self.console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)

    def _advance(self, step: int) -> None:
        assert self.config is not None
        assert self.task is not None
        self.step = step
        self.bar.update(
            self.task,
            completed=self.before + self.config.completions_after(step),
            description=self.name,
            facts=f"step {step}/{self.config.steps}",
        )

    # The picture

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar and the readings."""
        if self.task is not None:
            width = 0 if options.ascii_only else options.max_width - NAME - VALUE - 4
            yield Group(self.bar, self._table(min(CURVE, width) if width >= LEAST else 0))

    def _table(self, width: int) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=NAME, no_wrap=True, style="dim")
        table.add_column(min_width=VALUE)
        table.add_column(no_wrap=True)
        if self.accuracies:
            past = f"base {self.accuracies[0]:.3f}, best {max(self.accuracies):.3f}"
            now = f"{self.accuracies[-1]:.3f} ± {self.stderr:.3f}"
            table.add_row("  accuracy", now, self._curve(self.accuracies, width))
            table.add_row("", past)
        for reading, values in self.series.values.items():
            text = reading.text(values[-1])
            if reading is POLICY_SHIFT and self.budget is not None:
                text += f" of {self.budget:.1e}"
            drawn = self._curve(values, width, log=reading.log)
            table.add_row(f"  {reading.name}", text, drawn)
        table.add_row("  warnings", self._warned())
        return table

    @staticmethod
    def _curve(values: Sequence[float], width: int, *, log: bool = False) -> Text:
        return Text(curve(values, width, log=log), style="cyan")

    def _warned(self) -> Text:
        if not self.warnings:
            return Text("none", style="green")
        last = self.warnings[-1]
        return Text(f"{len(self.warnings)}, the last at step {last}", style="bold yellow")
