"""What a run says while it is at work: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from capo.lab.config import Config

PLAIN_LINES = 20  # a piped run prints about so many lines between its evaluations


class Progress:
    """Receives a run's events. This one is silent."""

    def started(self, config: Config, step: int) -> None:
        """Training begins, or continues, after ``step`` optimizer steps."""

    def stepped(self, row: dict[str, Any]) -> None:
        """An optimizer step was taken; ``row`` is its line in ``metrics.jsonl``."""

    def evaluated(self, row: dict[str, Any]) -> None:
        """The policy was evaluated; ``row`` is its line in ``evals.jsonl``."""

    def said(self, message: str) -> None:
        """Something worth a line of its own."""

    def stopped(self) -> None:
        """Training is over, one way or another."""


class Lines(Progress):
    """Plain lines, for pipes and log files.

    Args:
        console: where to print; one that is no terminal.
    """

    def __init__(self, console: Console) -> None:
        """Print nothing yet."""
        self.console = console
        self.prefix = ""
        self.steps = 0

    def started(self, config: Config, step: int) -> None:
        """See `Progress.started`."""
        self.steps = config.steps
        self.prefix = f"{config.run.name}: " if config.run.name else ""
        if step:
            self.said(f"continuing after step {step}")

    def stepped(self, row: dict[str, Any]) -> None:
        """See `Progress.stepped`."""
        if row["step"] % max(1, self.steps // PLAIN_LINES) == 0:
            self.said(
                f"step {row['step']}/{self.steps}, {row['completions']} completions, "
                f"{describe(row)}, {row['seconds']:.0f} s"
            )

    def evaluated(self, row: dict[str, Any]) -> None:
        """See `Progress.evaluated`."""
        self.said(
            f"step {row['step']}/{self.steps}, accuracy {row['accuracy']:.3f} "
            f"± {row['stderr']:.3f} on {row['problems']} held-out problems"
        )

    def said(self, message: str) -> None:
        """See `Progress.said`."""
        self.console.print(f"{self.prefix}{message}", highlight=False, markup=False, soft_wrap=True)


class Bar(Progress):
    """One bar with the time left, for a terminal. It may span several runs, one after another.

    The unit is the completion, since that is what takes the time.

    Args:
        console: a terminal.
        total: completions of all runs together; None for those of the one run.
    """

    def __init__(self, console: Console, total: int | None = None) -> None:
        """Show nothing yet."""
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.fields[facts]}"),
            console=console,
        )
        self.total = total
        self.before = 0  # completions of the runs that are over
        self.accuracy = ""
        self.config: Config | None = None
        self.task: TaskID | None = None

    def started(self, config: Config, step: int) -> None:
        """See `Progress.started`."""
        self.config = config
        own = config.completions_after(config.steps)
        name = config.run.name or config.algorithm.name
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task(name, total=self.total or own, facts="")
        self.accuracy = ""
        self._show(step, "", description=name)

    def stepped(self, row: dict[str, Any]) -> None:
        """See `Progress.stepped`."""
        self._show(row["step"], describe(row))

    def evaluated(self, row: dict[str, Any]) -> None:
        """See `Progress.evaluated`."""
        self.accuracy = f"accuracy {row['accuracy']:.2f}  "

    def said(self, message: str) -> None:
        """See `Progress.said`."""
        self.bar.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def skipped(self, config: Config) -> None:
        """A run of this bar needs no training: it is done already."""
        self.before += config.completions_after(config.steps)

    def stopped(self) -> None:
        """See `Progress.stopped`."""
        if self.config is not None:
            self.before += self.config.completions_after(self.config.steps)
            self.config = None
        if self.total is None or self.before >= self.total:
            self.close()

    def close(self) -> None:
        """Leave the terminal as it was found."""
        self.bar.stop()

    def _show(self, step: int, facts: str, **fields: Any) -> None:
        assert self.config is not None
        assert self.task is not None
        steps = self.config.steps
        self.bar.update(
            self.task,
            completed=self.before + self.config.completions_after(step),
            facts=f"step {step}/{steps}  {self.accuracy}{facts}",
            **fields,
        )


def describe(row: dict[str, Any]) -> str:
    """The facts of a step that fit on a line."""
    facts = [f"reward {row['reward']:.2f}"] if row.get("reward") is not None else []
    if row.get("capo/rejection_rate") is not None:
        facts.append(f"rejected {row['capo/rejection_rate']:.1%}")
    return ", ".join(facts)


def make_progress(quiet: bool = False) -> Progress:
    """The progress that suits standard error: silent, a bar, or lines."""
    if quiet:
        return Progress()
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines(console)
