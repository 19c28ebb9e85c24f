"""The watch for collapse: what it must see, when, and how seldom it may cry wolf."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capo.lab.collapse import CollapseWatch, Falls, Outliers, possible_change

LENGTH = 20.0  # tokens of a completion


def batches(rng, levels, *, prompts=12, alike=0.0, generations=8):
    """Mean rewards of batches; ``alike`` is the correlation of completions of one prompt."""
    rewards = []
    for level in levels:
        chances = np.full(prompts, level)
        if alike and 0 < level < 1:
            spread = (1 - alike) / alike
            chances = rng.beta(level * spread, (1 - level) * spread, prompts)
        rewards.append(rng.binomial(generations, chances).mean() / generations)
    return rewards


def first_fall(falls, values):
    for position, value in enumerate(values, start=1):
        fallen = falls.observe(position, value)
        if fallen is not None:
            return position, fallen
    return None


def test_what_a_step_can_change_is_the_usable_bound():
    # docs/theorem.md: a step with Tδ ≤ 2 x² cannot cost more than x.
    for x in (0.07, 0.5, 1.0):
        assert possible_change(2 * x**2) == pytest.approx(x)
    assert possible_change(50.0) == 1.0
    assert possible_change(-1e-9) == 0.0


def test_a_step_far_out_of_line_and_large_is_an_alarm():
    watch = CollapseWatch(96, 8, 512)
    for step, shift in enumerate([0.0, 2e-3, 3e-3, 2.5e-3, 1.5e-3, 2e-3], start=1):
        assert watch.step(step, shift, LENGTH) == []
    (alarm,) = watch.step(7, 0.1, LENGTH)
    assert (alarm.kind, alarm.began) == ("policy shift", 7)
    assert "0.1 nats a token, 50 × the median" in alarm.sentence
    assert "2 nats a completion" in alarm.sentence
    assert "up to 1.00" in alarm.sentence
    # The rest of the same excursion is no news; the next one is.
    assert watch.step(8, 0.2, LENGTH) == []
    assert watch.step(9, 2e-3, LENGTH) == []
    assert [one.began for one in watch.step(10, 0.2, LENGTH)] == [10]


@pytest.mark.parametrize(
    ("shifts", "why"),
    [
        ([1e-6, 1e-6, 1e-6, 1e-6, 1e-4], "far out of line, but small"),
        ([0.1, 0.11, 0.09, 0.1, 0.12], "large, but like the others"),
        ([1e-4, 1e-1, 1e-3, 1.0, 0.5], "large, but the run's steps differ that much"),
        ([1e-3, 1e-3, 0.5], "nothing yet to compare with"),
        ([0.0, 0.0, 0.0, 0.0, 0.5], "steps of learning rate 0 are nothing to compare with"),
        ([1e-3, 1e-3, 1e-3, 1e-3, math.nan], "not measured"),
    ],
)
def test_a_step_that_is_no_alarm(shifts, why):
    outliers = Outliers()
    assert [outliers.observe(shift, LENGTH) for shift in shifts][-1] is None, why


def share_of_runs_alarmed(middle, spread, runs=400):
    """Of runs of 100 steps whose policy shifts (nats a token) are log-normal and independent."""
    alarms = 0
    for seed in range(runs):
        outliers, rng = Outliers(), np.random.default_rng(seed)
        shifts = np.exp(rng.normal(math.log(middle), spread, 100))
        alarms += any(outliers.observe(shift, LENGTH) is not None for shift in shifts)
    return alarms / runs


@pytest.mark.parametrize(("spread", "rate"), [(0.3, 0.0), (0.6, 0.01), (1.0, 0.07)])
def test_false_alarms_of_steps_that_are_small(spread, rate):
    # 0.06 nats a completion at the median: measured of GRPO that learns, at 1/4 of the learning rate
    # at which it collapses. No budget holds these steps: with spread 1 most runs reach 12 times that.
    assert share_of_runs_alarmed(3e-3, spread) <= rate


@pytest.mark.parametrize(("spread", "rate"), [(0.3, 0.0), (0.6, 0.04), (1.0, 0.15)])
def test_false_alarms_where_every_step_is_large(spread, rate):
    # The worst case, 20 nats a completion.
    assert share_of_runs_alarmed(1.0, spread) <= rate


@pytest.mark.parametrize("alike", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("prompts", [1, 12, 144])
@pytest.mark.parametrize("shape", ["flat", "learns", "low"])
def test_false_alarms_of_healthy_rewards(alike, prompts, shape):
    x = np.linspace(0, 1, 100)
    levels = {
        "flat": np.full(100, 0.5),
        "learns": 0.45 + 0.5 * (1 - np.exp(-3 * x)),
        "low": np.full(100, 0.05),
    }[shape]
    runs = 100
    alarms = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        rewards = batches(rng, levels, prompts=prompts, alike=alike)
        alarms += first_fall(Falls(8 * prompts, 8), rewards) is not None
    assert alarms / runs <= 0.02  # over 1000 runs: at most 0.007


@pytest.mark.parametrize("at", [6, 30, 90])
def test_a_sudden_collapse_is_seen_within_four_batches_and_dated(at):
    late, off = [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        levels = np.where(np.arange(1, 101) < at, 0.6, 0.0)
        position, fallen = first_fall(Falls(96, 8), batches(rng, levels, alike=0.1))
        late.append(position - at)
        off.append(fallen.first - at)
    assert min(late) >= 0
    assert max(late) <= 3
    assert set(off) == {0}


def test_small_batches_take_longer_and_get_there():
    rng = np.random.default_rng(0)
    levels = np.where(np.arange(1, 201) < 100, 0.7, 0.1)
    position, fallen = first_fall(Falls(8, 8), batches(rng, levels, prompts=1, alike=0.2))
    assert 100 <= position <= 140
    assert abs(fallen.first - 100) <= 3
    assert min(fallen.windows) > 1


def test_a_slow_decline_is_dated_on_its_way():
    levels = np.concatenate([np.full(20, 0.8), np.linspace(0.8, 0.0, 20), np.zeros(20)])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        position, fallen = first_fall(Falls(96, 8), batches(rng, levels, alike=0.1))
        assert 21 <= fallen.first <= position <= 40


@pytest.mark.parametrize(
    ("best", "now"),
    [(0.9, 0.75), (0.12, 0.03)],
    ids=["less than a quarter of the best", "less than a tenth in all"],
)
def test_a_small_loss_is_no_collapse_however_sure(best, now):
    falls = Falls(100_000)
    assert first_fall(falls, [best] * 20 + [now] * 20) is None


def test_one_fall_is_one_alarm_until_it_is_made_good():
    falls = Falls(1000)
    levels = [0.6] * 10 + [0.1] * 10 + [0.0] * 10 + [0.6] * 10 + [0.1] * 10
    found = [p for p, level in enumerate(levels, start=1) if falls.observe(p, level)]
    assert found == [11, 41]


def test_rewards_that_are_missing_or_not_finite_are_passed_over():
    watch = CollapseWatch(1000, 8, 100)
    for step in range(1, 20):
        assert watch.batch(step, 0.6) == watch.batch(step, None) == []
        assert watch.batch(step, math.nan) == []
    assert watch.batch(20, 0.0)


def test_the_blamed_step_is_the_update_before_the_first_low_batch():
    watch = CollapseWatch(1000, 8, 100)
    for step in range(1, 11):
        assert watch.batch(step, 0.6) == []
    (alarm,) = watch.batch(11, 0.1)
    # The batch of step 11 was sampled after ten updates.
    assert (alarm.kind, alarm.began) == ("reward", 10)
    assert "mean reward fell from 0.60 (over 1 batch) to 0.10 (over 1 batch)" in alarm.sentence
    assert alarm.sentence.endswith("collapse began at step 10")


def test_among_several_updates_the_largest_is_blamed():
    # Evaluations after steps 8 and 12: one of the updates 9 to 12 it was.
    watch = CollapseWatch(96, 8, 512)
    watch.evaluation(0, 0.5)
    for step in range(1, 13):
        watch.step(step, 0.04 if step == 10 else 1e-3, LENGTH)
        found = watch.evaluation(step, 0.5 if step < 12 else 0.0) if step % 4 == 0 else []
    (alarm,) = found
    assert (alarm.kind, alarm.began) == ("accuracy", 10)
    # Without measured steps it is the last of them.
    blind = CollapseWatch(96, 8, 512)
    for step in (0, 4, 8):
        blind.evaluation(step, 0.5)
    assert [one.began for one in blind.evaluation(12, 0.0)] == [12]
