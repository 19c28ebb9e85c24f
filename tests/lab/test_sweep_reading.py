"""What a run comes to, read from invented evaluations."""

from __future__ import annotations

import pytest
from lab_runs import SPACING, invented
from sweep_kit import GRID

from capo.lab.sweep.curves import curve_table
from capo.lab.sweep.grid import parse_grid
from capo.lab.sweep.point import Point
from capo.lab.sweep.reading import CellResult, Run, searched_mean
from capo.lab.sweep.table import completions_to_target, row_of
from capo.lab.sweep.table import shown as in_words

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


def gets_there(at: int | None, planned: int = TEN) -> Run:
    """At the target of 0.75 after so many completions, or never."""
    last = planned // SPACING
    first = last if at is None else at // SPACING - 2
    return invented(
        Point(CELL, 0), [0.45 if i < first else 0.75 for i in range(last + 1)], planned=planned
    )


@pytest.mark.parametrize(
    ("at", "shown"),
    [
        ((3, 9), "1,152"),
        ((3, 4, 9), "768"),
        ((3, 4, None), "768"),
        ((3, 9, None, None), "> 1,824"),  # half of them: (9 + 10) / 2 spacings at least
        ((3, None), "> 1,248"),
        ((None, None, 9), "> 1,920"),
        ((None, None), "> 1,920"),
    ],
)
def test_completions_to_the_target_are_the_median_over_all_seeds(at, shown):
    runs = tuple(gets_there(None if each is None else each * SPACING) for each in at)
    row = row_of(CellResult(CELL, runs, len(runs)), "", 0.75)
    assert row["reached"] == sum(each is not None for each in at)
    assert type(row["completions_to_target"]["value"]) is int
    assert in_words(row, 0.75)["completions to 0.75"] == shown


def test_a_diverged_run_would_not_have_got_there():
    assert completions_to_target(diverged(0.45, 0.6), 0.75).low == TEN
