"""What a run says while it is at work: a live view on a terminal, plain lines in a pipe."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from capo.lab.config import Config
from capo.lab.readings import describe

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

    def warned(self, message: str) -> None:
        """The run is in trouble, or about to be."""
        self.said(message)

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


def make_progress(quiet: bool = False) -> Progress:
    """The progress that suits standard error: silent, a live view, or lines."""
    from capo.lab.live import View

    if quiet:
        return Progress()
    console = Console(stderr=True)
    return View(console) if console.is_terminal else Lines(console)
