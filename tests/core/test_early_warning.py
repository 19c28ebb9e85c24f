"""The CUSUM of the early warning: what warns, what does not, and what is said."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo import EarlyWarning, StepReading, WarningConstants, auto_policy_shift

PLAIN = WarningConstants(allowance=2.0, threshold=4.0, most=3.0)
READING = StepReading(
    policy_shift=1e-2, entropy=0.2, completions=24, iterations=1, mean_length=12.0
)


def first_warning(excesses: list[float], constants: WarningConstants = PLAIN) -> int | None:
    watch = EarlyWarning(constants)
    return next((i for i, excess in enumerate(excesses, start=1) if watch.feed(excess)), None)


def test_excess_is_the_shift_over_what_the_batch_justifies() -> None:
    budget = auto_policy_shift(0.2, 24, 1, 12.0)
    assert READING.excess == pytest.approx(1e-2 / budget)
    growing = dataclasses.replace(READING, growth=3.0)
    assert growing.excess == pytest.approx(9 * READING.excess)
    shrinking = dataclasses.replace(READING, growth=0.1)
    assert shrinking.excess == READING.excess


@pytest.mark.parametrize("shift", [0.0, math.nan, math.inf, -1.0])
def test_no_step_has_no_excess(shift: float) -> None:
    assert math.isnan(dataclasses.replace(READING, policy_shift=shift).excess)


def test_steps_too_long_one_after_the_other_warn() -> None:
    assert first_warning([1.0, 10.0, 10.0, 10.0]) == 4  # log 5 each: 1.6, 3.2, 4.8


def test_one_outlier_does_not_warn_however_large() -> None:
    assert first_warning([1.0] * 5 + [1e9] + [1.0] * 50) is None


def test_steps_within_the_allowance_take_the_sum_back() -> None:
    assert first_warning([10.0, 0.4, 10.0, 0.4] * 20) is None


@given(st.lists(st.floats(1e-6, 2.0), max_size=50))
def test_steps_within_the_allowance_never_warn(excesses: list[float]) -> None:
    assert first_warning(excesses) is None


@given(st.lists(st.floats(1e-3, 1e3), max_size=30), st.floats(1.0, 10.0))
def test_longer_steps_never_warn_later(excesses: list[float], factor: float) -> None:
    late = first_warning(excesses)
    soon = first_warning([factor * excess for excess in excesses])
    assert late is None or (soon is not None and soon <= late)


def test_nothing_is_learned_from_numbers_that_are_none() -> None:
    assert first_warning([10.0, math.nan, 0.0, math.inf, 10.0, -1.0, 10.0]) == 7


def test_a_warning_is_one_until_it_is_over() -> None:
    watch = EarlyWarning(PLAIN)
    long = dataclasses.replace(READING, policy_shift=1.0)
    short = dataclasses.replace(READING, policy_shift=1e-9)
    for step in range(1, 6):
        watch.observe(step, long)
    assert [one.step for one in watch.warned] == [2]
    assert watch.active
    assert watch.score > 1
    watch.observe(6, short)
    assert not watch.active
    for step in range(7, 10):
        watch.observe(step, long)
    assert [one.step for one in watch.warned] == [2, 8]


def test_the_sentence_names_step_batch_and_remedy() -> None:
    watch = EarlyWarning(PLAIN)
    reading = dataclasses.replace(READING, policy_shift=0.5, growth=4.0)
    watch.observe(1, reading)
    warned = watch.observe(2, reading)
    assert warned is not None
    for part in ("step 2", "24 completions", "0.5 nats", "4 ×", "trust region"):
        assert part in warned.sentence
