"""Interval estimates over seeds, against what can be said by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capo.lab.sweep.intervals import interval, iqm, ratio_interval


def test_the_interquartile_mean_of_five_is_that_of_the_middle_three():
    assert interval([9.0, 0.0, 2.0, 3.0, 4.0]).value == pytest.approx(3.0)
    assert float(iqm(np.array([0.0, 1.0, 2.0, 100.0]))) == pytest.approx(1.5)


def test_the_interval_of_three_runs_is_that_of_all_their_resamples():
    """27 equally likely resamples; of three values none is trimmed."""
    values = [0.1, 0.5, 0.6]
    means = sorted(np.mean(each) for each in itertools.product(values, repeat=3))
    found = interval(values)
    assert found.value == pytest.approx(0.4)
    # The extreme resamples have probability 1/27 > 2.5 %, so they are the percentiles.
    assert found.low == pytest.approx(means[0])
    assert found.high == pytest.approx(means[-1])


def test_strata_are_resampled_each_within_itself():
    """Two settings that differ only between themselves: nothing varies, so the interval is a point."""
    found = interval([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    pooled = interval([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert pooled.low < 0.2
    assert pooled.high > 0.8
    half = interval([0.0, 0.2, 0.0], [1.0, 1.0, 1.0])
    assert half.high <= 0.7


def test_one_run_has_no_interval_and_none_no_figure():
    assert interval([0.3]).text() == "0.300"
    assert interval([0.3, 0.3]).text() == "0.300 [0.300, 0.300]"
    with pytest.raises(ValueError, match="values"):
        interval([])


def test_a_ratio_of_samples_without_spread_is_exact():
    found = ratio_interval([30.0, 30.0], [10.0, 10.0])
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)
    wide = ratio_interval([30.0, 60.0, 30.0, 30.0], [10.0, 10.0])
    assert wide.low == pytest.approx(3.0)
    assert wide.high > 3.0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_interval_holds_its_figure_and_lies_within_the_data(values):
    found = interval(values)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
