"""Invented runs of real grids: TEST DATA, for the tests of the lab's figures only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from capo.lab.study.outcome import Evaluated
from capo.lab.sweep.execute import Ended, Mark
from capo.lab.sweep.grid import Grid
from capo.lab.sweep.point import Cell, Point
from capo.lab.sweep.reading import CellResult, GridResult, Run

SPACING = 192
Curve = Sequence[float]
Rows = Sequence[dict[str, Any]]
Made = tuple[Curve, Rows]


def invented(
    point: Point,
    accuracies: Curve,
    metrics: Rows = (),
    measured: Rows = (),
    *,
    ended: Ended = "steps",
    planned: int | None = None,
) -> Run:
    """A run with these accuracies, two steps of 96 apart; ``planned`` is where they end."""
    evaluations = tuple(
        Evaluated(2 * i, SPACING * i, value, 0.02) for i, value in enumerate(accuracies)
    )
    hardware = {"cpu": "A processor", "cores": 16 if point.seed else 2}
    provenance = {"git_commit": "0123456789abcdef", "git_dirty": False, "hardware": hardware}
    return Run(
        point=point,
        ended=ended,
        evaluations=evaluations,
        metrics=tuple(metrics),
        measured=tuple(measured),
        mark=Mark(point.fingerprint(), ended, 30.0, provenance),
        completions_per_step=96,
        spacing=SPACING,
        planned=SPACING * (len(accuracies) - 1) if planned is None else planned,
    )


def results(grid: Grid, of: Callable[[Cell, int], Run | None]) -> GridResult:
    """Every cell of a grid with what ``of`` makes of it and a seed."""
    cells = []
    for cell in grid.cells():
        runs = tuple(run for seed in cell.seeds if (run := of(cell, seed)) is not None)
        cells.append(CellResult(cell, runs, len(cell.seeds)))
    return GridResult(grid, tuple(cells))


def metric_rows(steps: int, **series: Callable[[int], float]) -> list[dict[str, Any]]:
    """Rows of metrics; the names' ``__`` are slashes."""
    return [
        {"step": step, "completions": 96 * step}
        | {name.replace("__", "/"): value(step) for name, value in series.items()}
        for step in range(1, steps + 1)
    ]
