"""A grid's report: table, learning curves, and everything as JSON and CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capo.lab.rundir import write_text
from capo.lab.sweep.curves import save_figures, split_figures
from capo.lab.sweep.reading import GridResult, Run
from capo.lab.sweep.table import csv_text, markdown, shown, table_of


def write_report(result: GridResult, output: Path, title: str) -> list[dict[str, Any]]:
    """Write ``README.md``, ``table.csv``, ``table.json``, ``runs.csv`` and the curves; return the table."""
    output.mkdir(parents=True, exist_ok=True)
    rows = table_of(result)
    write_text(output / "table.json", json.dumps(rows, indent=1) + "\n")
    write_text(output / "table.csv", csv_text(rows))
    write_text(output / "runs.csv", csv_text(run_rows(result)))
    trained = [each for each in result.cells if any(run.evaluations for run in each.runs)]
    figures = save_figures(split_figures("curves", "Accuracy over completions", trained), output)
    target = result.grid.target
    pictures = [f"![{figure.title}]({figure.slug}.svg)\n\n{figure.caption}" for figure in figures]
    note = (
        "Interquartile means over the seeds with 95 % bootstrap intervals. Collapsed: accuracy below half "
        "the base policy's at three evaluations in a row or at the end, or diverged."
    )
    parts = [f"# {title}", note, markdown([shown(row, target) for row in rows]), *pictures]
    write_text(output / "README.md", "\n\n".join(parts) + "\n")
    return rows


def run_rows(result: GridResult) -> list[dict[str, Any]]:
    """A row a run."""
    return [
        {
            "cell": cell.cell.name,
            "variant": cell.cell.variant,
            **cell.cell.at,
            **(cell.cell.chosen or {}),
            "seed": run.point.seed,
            "folder": run.point.folder(),
            "ended": run.ended,
            "base_accuracy": run.base_accuracy if run.evaluations else None,
            "final_accuracy": run.final_accuracy if run.evaluations else None,
            "collapsed": run.collapsed if run.evaluations else None,
            "completions_to_target": _to_target(run, result) if run.evaluations else None,
            "seconds": run.mark.seconds,
        }
        for cell in (*(each for found in result.searches.values() for each in found), *result.cells)
        for run in cell.runs
    ]


def _to_target(run: Run, result: GridResult) -> int | None:
    target = result.target(run.point.cell.condition)
    return None if target is None else run.to_target(target)
