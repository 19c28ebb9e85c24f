"""Completions to the target, collapse, medians and ratios, on outcomes with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from study_kit import evaluations, outcome

from capo.lab.study.outcome import held
from capo.lab.study.statistics import (
    Value,
    completions_to_target,
    exactly,
    median_estimate,
    median_of,
    ratio_of_medians,
)

INF = math.inf


def beyond(low: float) -> Value:
    return Value(low, INF)


def values(*numbers: float) -> list[Value]:
    return [exactly(number) for number in numbers]


# One run


def test_the_target_counts_at_the_third_evaluation_whose_mean_is_there():
    # Means of three: .53, .65, .75, so the fifth evaluation after the base policy's.
    assert outcome(0.5, 0.7, 0.7, 0.8, 0.75).to_target == 5 * 96
    assert outcome(0.5, 0.7, 0.7, 0.8, 0.7499).to_target is None


def test_a_mean_that_is_the_target_to_rounding_reaches_it():
    assert outcome(0.7, 0.75, 0.8).to_target == 3 * 96


def test_the_base_policys_evaluation_is_one_of_the_three():
    run = outcome(1.0, 1.0)
    assert run.evaluations[0].accuracy == 0.4
    assert run.to_target == 2 * 96


def test_one_lucky_evaluation_reaches_nothing():
    assert outcome(0.5, 1.0, 0.5, 0.5).to_target is None


def test_a_batch_larger_than_the_spacing_is_held_between_its_steps():
    # Every policy stands for evaluations at 0, 48 (and so on) after its step.
    run = outcome(0.6, 0.8, batch=96, spacing=48)
    points = held(run.evaluations, 96, 48)
    assert points == [(0, 0.4), (48, 0.4), (96, 0.6), (144, 0.6), (192, 0.8), (240, 0.8)]
    assert run.to_target is None  # (0.6 + 0.8 + 0.8) / 3 < 0.75
    assert outcome(0.7, 0.8, batch=96, spacing=48).to_target == 240
    # The conservative regime is judged by a single policy, at the third evaluation of it.
    assert outcome(0.6, 0.76, batch=1152, spacing=48).to_target == 2 * 1152 + 96


def test_a_batch_smaller_than_the_spacing_is_evaluated_once_a_spacing():
    points = held(evaluations(0.5, 0.6, every=48), 24, 48)
    assert points == [(0, 0.4), (48, 0.5), (96, 0.6)]


def test_collapse_is_three_in_a_row_below_half_the_base_policy():
    assert not outcome(0.19, 0.19, 0.2, 0.19, 0.19).collapsed
    assert outcome(0.9, 0.19, 0.19, 0.19, 0.9).collapsed
    assert not outcome(0.9, 0.1, 0.1).collapsed


def test_a_diverged_run_has_collapsed_to_nothing_and_never_gets_there():
    run = outcome(0.5, 0.5, ended="diverged")
    assert run.collapsed
    assert run.final_accuracy == 0.0
    assert completions_to_target(run) == beyond(4800)


def test_a_run_that_did_not_get_there_is_censored_at_what_it_consumed():
    assert completions_to_target(outcome(0.5, 0.6)) == beyond(192)
    assert completions_to_target(outcome(0.5, 1.0, 1.0)) == exactly(288)


# Over the seeds


def test_the_median_of_five_with_its_interval():
    estimate = median_estimate(values(5, 3, 1, 4, 2))
    assert (estimate.value, estimate.low, estimate.high) == (exactly(3), exactly(1), exactly(5))
    assert estimate.coverage == 1 - 2 / 32
    assert (estimate.n, estimate.censored) == (5, 0)
    assert estimate.text() == "3 [1, 5]"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8, 9, 13, 20])
def test_the_interval_covers_the_median_as_often_as_it_says(n):
    estimate = median_estimate(values(*range(n)))
    rng = np.random.default_rng(n)
    draws = np.sort(rng.normal(size=(200_000, n)), axis=1)
    low, high = int(estimate.low.low), int(estimate.high.low)
    covered = ((draws[:, low] < 0) & (draws[:, high] > 0)).mean()
    assert covered == pytest.approx(estimate.coverage, abs=0.005)
    assert estimate.coverage >= 0.9 or (low, high) == (0, n - 1)


def test_ties_are_no_trouble():
    estimate = median_estimate(values(96, 96, 96, 96, 96))
    assert estimate.text() == "96 [96, 96]"
    ratio = ratio_of_medians(values(192, 192, 192), values(96, 96, 96))
    assert ratio.text(".1f", " ×") == "2.0 × [2.0, 2.0]"


def test_a_few_censored_runs_leave_the_median_exact_and_open_the_interval():
    estimate = median_estimate([*values(1000, 1200, 1400), beyond(4800), beyond(4800)])
    assert estimate.value == exactly(1400)
    assert estimate.text() == "1,400 [1,000, > 4,800]"
    assert estimate.censored == 2


def test_a_run_censored_early_makes_the_median_a_bound():
    # Had the run that stopped at 500 gone on, the median could be anything from 1200 to 1400.
    assert median_of([*values(1000, 1200, 1400, 1600), beyond(500)]) == Value(1200, 1400)


def test_all_censored_is_a_lower_bound():
    estimate = median_estimate([beyond(4800)] * 5)
    assert estimate.value == beyond(4800)
    assert estimate.text() == "> 4,800 [4,800, > 4,800]"


def test_the_ratio_of_medians_and_its_interval():
    ratio = ratio_of_medians(values(10, 20, 30, 40, 50), values(1, 2, 3, 4, 5))
    assert ratio.value == exactly(10)
    assert ratio.low.exact
    assert 10 / 5 <= ratio.low.low < 10 < ratio.high.high <= 50
    assert ratio.coverage == 0.95


def test_the_bootstrap_interval_is_that_of_all_resamples():
    slow, fast = (30.0, 10.0, 20.0), (4.0, 1.0, 2.0)
    ratio = ratio_of_medians(values(*slow), values(*fast))
    triples = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T
    medians = [np.median(np.array(arm)[triples], axis=1) for arm in (slow, fast)]
    exact = np.sort((medians[0][:, None] / medians[1][None, :]).ravel())
    below, above = (np.searchsorted(exact, bound) / exact.size for bound in (0, 1e9))
    assert (below, above) == (0, 1)
    assert ratio.low.low == pytest.approx(np.quantile(exact, 0.025, method="lower"))
    assert ratio.high.high == pytest.approx(np.quantile(exact, 0.975, method="higher"))


def test_a_slow_arm_that_never_gets_there_is_at_least_so_many_times_slower():
    ratio = ratio_of_medians([beyond(18000)] * 5, values(*[1000] * 5))
    assert ratio.value == beyond(18)
    assert ratio.text(".1f", " ×") == "> 18.0 × [18.0, > 18.0]"


def test_a_fast_arm_that_never_gets_there_is_at_most_so_many_times_faster():
    ratio = ratio_of_medians(values(*[1000] * 5), [beyond(4000)] * 5)
    assert ratio.value == Value(0, 0.25)
    assert ratio.value.text(".2f") == "< 0.25"


def test_nobody_got_there_and_nothing_is_known():
    ratio = ratio_of_medians([beyond(4000)] * 5, [beyond(4000)] * 5)
    assert ratio.value == Value(0, INF)
    assert ratio.value.text() == "unknown"
