"""What points left behind, read from their run directories."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from capo.lab.rundir import RunDirectory
from capo.lab.study.outcome import Evaluated, collapse_at, reached
from capo.lab.sweep.execute import MEASURED, Ended, Mark, mark_of
from capo.lab.sweep.grid import Grid
from capo.lab.sweep.point import Cell, Point


@dataclass(frozen=True)
class Run:
    """A point that is over.

    Attributes:
        point: which.
        ended: how.
        evaluations: in order, that of the base policy first.
        metrics: a row per optimizer step.
        measured: rows of the measurement beside it, if it was one.
        mark: seconds and provenance.
        completions_per_step: the batch.
        spacing: completions between evaluations.
        planned: completions of the whole run.
    """

    point: Point
    ended: Ended
    evaluations: tuple[Evaluated, ...]
    metrics: tuple[dict[str, Any], ...]
    measured: tuple[dict[str, Any], ...]
    mark: Mark
    completions_per_step: int
    spacing: int
    planned: int

    @property
    def base_accuracy(self) -> float:
        """Of the base policy."""
        return self.evaluations[0].accuracy

    @property
    def final_accuracy(self) -> float:
        """At the last evaluation; 0 for a policy that cannot be sampled from any more."""
        return 0.0 if self.ended == "diverged" else self.evaluations[-1].accuracy

    @property
    def best_accuracy(self) -> float:
        """At any evaluation."""
        return max(each.accuracy for each in self.evaluations)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Completions and accuracy; 0 from where it diverged to where it was to end."""
        points = [(each.completions, each.accuracy) for each in self.evaluations]
        if self.ended == "diverged" and points:
            fell = min(points[-1][0] + self.spacing, self.planned)
            points += [(at, 0.0) for at in dict.fromkeys((fell, self.planned))]
        return points

    @property
    def mean_accuracy(self) -> float:
        """Over training: the area under the curve over its length."""
        points = self.curve
        length = points[-1][0] - points[0][0]
        if not length:
            return points[-1][1]
        pairs = itertools.pairwise(points)
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs) / length

    @cached_property
    def collapsed(self) -> bool:
        """Diverged, three evaluations in a row below half the base policy's, or the last one below."""
        if self.ended == "diverged":
            return True
        return collapse_at([each.accuracy for each in self.evaluations]) is not None

    @property
    def collapse_began(self) -> Evaluated | None:
        """The first evaluation below half the base policy's after which it never recovered to it."""
        half, began = 0.5 * self.base_accuracy, None
        for each in self.evaluations:
            if each.accuracy >= half:
                began = None
            elif began is None:
                began = each
        return began

    def to_target(self, target: float) -> int | None:
        """Completions at which three evaluations in a row average the target; None: not reached."""
        return reached(self.evaluations, self.completions_per_step, self.spacing, target)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Step and value of a metric, where it was logged as a number."""
        return [
            (int(row["step"]), float(row[key])) for row in self.metrics if row.get(key) is not None
        ]


@dataclass(frozen=True)
class CellResult:
    """A cell with its runs that are over.

    Attributes:
        cell: which.
        runs: in the order of the seeds.
        wanted: seeds that the grid asks for.
    """

    cell: Cell
    runs: tuple[Run, ...]
    wanted: int

    @property
    def complete(self) -> bool:
        """Whether every seed is there."""
        return len(self.runs) == self.wanted


@dataclass(frozen=True)
class GridResult:
    """All cells of a grid, in its order.

    Attributes:
        grid: with what its searches have found.
        cells: as the grid has them.
        searches: the candidates of every search, by the name of the cell that it is for.
    """

    grid: Grid
    cells: tuple[CellResult, ...]
    searches: dict[str, tuple[CellResult, ...]] = field(default_factory=dict)

    def target(self, condition: str) -> float | None:
        """Accuracy, completions to which are reported; None where it is not known yet."""
        if self.grid.target != "halfway":
            return self.grid.target
        found = [
            run.base_accuracy
            for each in self.cells
            if each.cell.condition == condition
            for run in each.runs
            if run.evaluations
        ]
        return (1 + fmean(found)) / 2 if found else None

    def of(self, variant: str, **at: Any) -> CellResult:
        """The cell of a variant; ``at`` are last parts of its axes' keys, with their values.

        Raises:
            KeyError: there is no such cell, or more than one.
        """
        found = self.all(variant, **at)
        if len(found) != 1:
            raise KeyError(f"{len(found)} cells are {variant} at {at}")
        return found[0]

    def all(self, variant: str | None = None, **at: Any) -> list[CellResult]:
        """The cells of a variant at these values."""
        return [
            each
            for each in self.cells
            if variant in (None, each.cell.variant)
            and all(_axis(each.cell, key) == value for key, value in at.items())
        ]

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def complete(self) -> bool:
        """Whether every point is there."""
        return all(cell.complete for cell in self.cells)


def _axis(cell: Cell, name: str) -> Any:
    return next((value for key, value in cell.at.items() if key.rpartition(".")[2] == name), None)


def read_run(point: Point, runs: Path) -> Run | None:
    """The point's run, None while it is not over."""
    directory = RunDirectory(runs / point.folder())
    mark = mark_of(directory, point)
    if mark is None:
        return None
    config = point.config(runs)
    every = config.eval.every_completions
    assert every is not None, "a resolved configuration says how often it evaluates"
    evaluations = tuple(
        Evaluated(row["step"], row["completions"], row["accuracy"], row["stderr"])
        for row in directory.rows("evals.jsonl")
    )
    measured = directory.path / MEASURED
    rows = json.loads(measured.read_text(encoding="utf-8"))["rows"] if measured.is_file() else []
    return Run(
        point=point,
        ended=mark.ended,
        evaluations=evaluations,
        metrics=tuple(directory.rows("metrics.jsonl")),
        measured=tuple(rows),
        mark=mark,
        completions_per_step=config.training.completions_per_step,
        spacing=every,
        planned=config.completions_after(config.steps),
    )


def read_grid(grid: Grid, runs: Path) -> GridResult:
    """Every cell of a grid with the runs that are over, and its searches."""
    searches = {
        name: tuple(_read_cell(cell, runs) for cell in cells)
        for name, cells in grid.candidates().items()
    }
    grid = grid.model_copy(update={"choices": _found(searches)})
    cells = tuple(_read_cell(cell, runs) for cell in grid.cells())
    return GridResult(grid, cells, searches)


def settle(grid: Grid, runs: Path) -> Grid:
    """The grid with the choices of those searches that are over."""
    return read_grid(grid, runs).grid if grid.candidates() else grid


def _found(searches: Mapping[str, Sequence[CellResult]]) -> dict[str, dict[str, Any]]:
    """Of every search that is over the candidate of the highest mean accuracy over training."""
    return {
        name: max(candidates, key=searched_mean).cell.at
        for name, candidates in searches.items()
        if all(each.complete and any(r.evaluations for r in each.runs) for each in candidates)
    }


def searched_mean(candidate: CellResult) -> float:
    """What a search goes by: mean accuracy over training, over its seeds."""
    return fmean(run.mean_accuracy if run.evaluations else 0.0 for run in candidate.runs)


def _read_cell(cell: Cell, runs: Path) -> CellResult:
    found = [] if cell.open else [read_run(Point(cell, seed), runs) for seed in cell.seeds]
    return CellResult(cell, tuple(run for run in found if run is not None), len(cell.seeds))


def labels(cells: Sequence[Cell]) -> list[str]:
    """A name for each of the cells, for people: the variant, and whatever tells them apart."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.at))
    told = [key for key in keys if len({repr(cell.at.get(key)) for cell in cells}) > 1]
    places = {cell.where for cell in cells}
    return [
        ", ".join(
            [
                *([cell.where] if len(places) > 1 else []),
                cell.label,
                *(_value(k, cell.at[k]) for k in told if k in cell.at),
            ]
        )
        for cell in cells
    ]


def _value(key: str, value: Any) -> str:
    name = key.rpartition(".")[2].replace("_", " ")
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
