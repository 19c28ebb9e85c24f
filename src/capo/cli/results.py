"""``capo compare`` and ``capo report``: what came out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capo.cli.training import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from capo.lab.report.summary import Summary

MOST_COLUMNS = 4  # runs side by side on a terminal of 80 columns

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")]
Target = Annotated[float, typer.Option(help="Accuracy to be reached.", min=0, max=1)]


def compare(runs: Runs, target: Target = 0.75, as_json: AsJson = False) -> None:
    """Put runs side by side: accuracy, completions to a target, rejected tokens."""
    summaries = summarise_runs(runs, target)
    if as_json:
        typer.echo(json.dumps([summary_row(summary) for summary in summaries], indent=2))
        return
    from rich.console import Console

    Console(width=None if len(runs) <= MOST_COLUMNS else 200).print(table_of(summaries, target))


def report(
    runs: Runs,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The HTML file; figures go beside it.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the report.")] = "CAPO report",
    target: Target = 0.75,
) -> None:
    """Write one self-contained HTML report, and its figures as PNG, on one or more runs."""
    from capo.lab.report import build_report

    typer.echo(str(build_report(runs, output, title=title, target_accuracy=target)))


def summarise_runs(runs: list[Path], target: float) -> list[Summary]:
    """Read and summarise run directories.

    Raises:
        InputError: one of them is no run.
    """
    from capo.lab.report.reading import read_runs
    from capo.lab.report.summary import summarise

    return [summarise(run, target) for run in read_runs(runs)]


def summary_row(summary: Summary) -> dict[str, Any]:
    """The figures of a run, None where it does not say."""
    return {
        "run": summary.run.name,
        "path": str(summary.run.path),
        "state": summary.run.state,
        "algorithm": summary.algorithm,
        "learning_rate": summary.learning_rate,
        "completions_per_step": summary.completions_per_step,
        "base_accuracy": summary.base.accuracy if summary.base else None,
        "best_accuracy": summary.best.accuracy if summary.best else None,
        "final_accuracy": summary.final.accuracy if summary.final else None,
        "final_stderr": summary.final.stderr if summary.final else None,
        "collapsed": summary.collapsed,
        "completions": int(summary.completions),
        "completions_to_target": summary.completions_to_target,
        "rejection_mean": summary.rejection_mean,
        "rejection_peak": summary.rejection_peak,
        "seconds": summary.seconds,
    }


def table_of(summaries: list[Summary], target: float) -> Table:
    """The comparison as a table: a column a run where that fits a terminal, else a row a run."""
    from rich.box import SIMPLE
    from rich.table import Table

    cells = [_cells(summary_row(summary), target) for summary in summaries]
    upright = len(cells) <= MOST_COLUMNS
    lines = [[name, *(cell[name] for cell in cells)] for name in cells[0]]
    head, *body = lines if upright else zip(*lines, strict=True)
    table = Table(box=SIMPLE, padding=(0, 1))
    for title in head:
        table.add_column(title, overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def _cells(row: dict[str, Any], target: float) -> dict[str, str]:
    final = _figure(row["final_accuracy"], ".3f")
    if row["final_stderr"] is not None and row["final_accuracy"] is not None:
        final += f" ± {row['final_stderr']:.3f}"
    rejected = _figure(row["rejection_mean"], ".1%")
    if row["rejection_peak"] is not None:
        rejected += f" (peak {row['rejection_peak']:.1%})"
    return {
        "run": row["run"] + ("" if row["state"] == "finished" else f" ({row['state']})"),
        "algorithm": row["algorithm"],
        "learning rate": _figure(row["learning_rate"], "g"),
        "completions a step": _figure(row["completions_per_step"], "d"),
        "base accuracy": _figure(row["base_accuracy"], ".3f"),
        "best accuracy": _figure(row["best_accuracy"], ".3f"),
        "final accuracy": final,
        "collapsed": {True: "yes", False: "no", None: "-"}[row["collapsed"]],
        "completions": _figure(row["completions"], ",d"),
        f"completions to {target:g}": _figure(
            row["completions_to_target"], ",.0f", missing="not reached"
        ),
        "tokens rejected": rejected,
        "training seconds": _figure(row["seconds"], ".0f"),
    }


def _figure(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None or not math.isfinite(value) else format(value, form)


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(compare)
    app.command()(report)
