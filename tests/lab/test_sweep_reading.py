"""What a run comes to, read from invented evaluations."""

from __future__ import annotations

import pytest
from lab_runs import SPACING, invented
from sweep_kit import GRID

from capo.lab.sweep.curves import curve_table
from capo.lab.sweep.grid import parse_grid
from capo.lab.sweep.point import Point
from capo.lab.sweep.reading import CellResult, Run, searched_mean

CELL = next(parse_grid(GRID).cells())
TEN = 10 * SPACING  # completions: ten evaluations after the base policy's


def diverged(*accuracies: float, planned: int = TEN) -> Run:
    return invented(Point(CELL, 0), accuracies, ended="diverged", planned=planned)


def test_a_diverged_run_is_at_0_for_the_rest_of_its_completions():
    fell = diverged(0.45, 0.6, 0.65)
    area = (0.45 + 0.6) / 2 + (0.6 + 0.65) / 2 + 0.65 / 2
    assert fell.mean_accuracy == pytest.approx(area / 10)
    stable = invented(Point(CELL, 0), [0.45, 0.45, *[0.475] * 4, *[0.5] * 5])
    one, other = (CellResult(CELL, (each,), 1) for each in (fell, stable))
    assert searched_mean(one) < searched_mean(other)
    drawn = curve_table([one])
    assert list(drawn["completions"]) == [0, SPACING, 2 * SPACING, 3 * SPACING, TEN]
    assert list(drawn["value"][-2:]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("accuracies", "planned", "mean"),
    [
        ((0.4,), SPACING, 0.2),
        ((0.4,), 2 * SPACING, 0.1),
        ((0.4, 0.6), SPACING + 96, (0.5 * SPACING + 0.3 * 96) / (SPACING + 96)),
        ((0.4, 0.6), SPACING, 0.5),  # in its last step
    ],
)
def test_the_fall_is_no_later_than_the_end(accuracies, planned, mean):
    run = diverged(*accuracies, planned=planned)
    assert run.mean_accuracy == pytest.approx(mean)
    assert run.curve[-1] == (planned, 0.0)
