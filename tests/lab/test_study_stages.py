"""The parts of the study on invented outcomes: searches, narrowing, resuming, partial results."""

from __future__ import annotations

import json

import pytest
from study_kit import Fake, driven, outcome, racing, small_plan

from capo.lab.pool import Failure
from capo.lab.study.estimate import cost, estimate
from capo.lab.study.outcome import Store
from capo.lab.study.plan import load_plan
from capo.lab.study.pool import Driver, StudyWorkers
from capo.lab.study.stages import (
    conservative,
    grid_rate,
    lowest_collapsing,
    narrow,
    race,
    range_of,
    run_study,
    score,
)

LR = "training.learning_rate"


def falls_from(limit, seeds=(0, 1, 2, 3, 4)):
    """Runs collapse from this learning rate on, with these seeds."""

    def behave(job):
        fallen = job.config().training.learning_rate >= limit and job.seed in seeds
        return racing(job, collapses=fallen)

    return behave


# The √2 grid


@pytest.mark.parametrize(
    ("limit", "lowest"),
    [
        (3e-4, grid_rate(1e-4, 4)),  # above the start: 1, 1.41, 2, 2.83, 4
        (4e-4, grid_rate(1e-4, 4)),
        (1e-4, 1e-4),  # the start itself
        (3e-5, grid_rate(1e-4, -3)),  # below it: 7.07, 5, 3.54, 2.5
    ],
)
def test_the_search_finds_the_lowest_point_that_collapses(tmp_path, limit, lowest):
    search, _ = driven(lowest_collapsing(small_plan()), falls_from(limit), tmp_path)
    assert search.lowest == lowest
    assert [rate for rate, _, _ in search.points] == sorted(rate for rate, _, _ in search.points)


def test_the_grid_is_of_square_roots_of_two():
    assert [grid_rate(1e-4, index) for index in (-2, 0, 1, 2)] == [5e-5, 1e-4, 1.414e-4, 2e-4]


def test_four_of_five_seeds_are_enough_and_three_are_not(tmp_path):
    plan = small_plan()
    four, _ = driven(lowest_collapsing(plan), falls_from(2e-4, (0, 2, 3, 4)), tmp_path / "4")
    assert four.lowest == 2e-4
    assert (2e-4, 4, 5) in four.points
    limited = small_plan(collapse={"limit": 3})
    three, _ = driven(lowest_collapsing(limited), falls_from(2e-4, (0, 2, 3)), tmp_path / "3")
    assert three.lowest is None
    assert (2e-4, 3, 5) in three.points


def test_a_point_is_given_up_once_its_verdict_is_clear(tmp_path):
    search, fake = driven(lowest_collapsing(small_plan()), falls_from(2e-4), tmp_path)
    assert search.points == ((1e-4, 0, 2), (1.414e-4, 0, 2), (2e-4, 5, 5))
    assert len(fake.made) == 2 + 2 + 5


def test_the_search_ends_at_its_limit_either_way(tmp_path):
    plan = small_plan(collapse={"limit": 3})
    above, _ = driven(lowest_collapsing(plan), falls_from(1.0), tmp_path / "above")
    assert (above.lowest, len(above.points)) == (None, 4)
    below, _ = driven(lowest_collapsing(plan), falls_from(0.0), tmp_path / "below")
    assert (below.lowest, len(below.points)) == (None, 4)


def test_the_conservative_regime_follows_from_what_the_search_found(tmp_path):
    def behave(job):
        if job.arm.stage == "collapse":
            return falls_from(2e-4)(job)
        return racing(job, at=5856)

    result, _ = driven(conservative(small_plan()), behave, tmp_path)
    assert result.result is not None
    config = result.result.arm.job(0).config()
    assert config.training.learning_rate == pytest.approx(2e-4 / 5)
    assert config.training.completions_per_step == 1152
    assert [each.to_target for each in result.result.outcomes] == [5856] * 5


# Narrowing


def test_a_run_that_misses_the_target_is_ranked_by_how_far():
    assert score(outcome(0.9, 0.9, 0.9), 1920) == 288
    assert score(outcome(0.65, 0.65, 0.65), 1920) == pytest.approx(1920 * 1.1)
    assert score(outcome(0.9, 0.0, 0.0, 0.0), 1920) == pytest.approx(1920 * 1.75)


def best_at(**wanted):
    """Runs whose settings are the wanted ones reach the target early, others late or never."""

    def behave(job):
        config = job.config()
        training = config.training
        right = [
            training.learning_rate == wanted["lr"],
            training.completions_per_step == wanted["batch"],
            training.schedule == wanted["schedule"],
        ]
        return racing(job, at={3: 960, 2: 1440}.get(sum(right)), final=0.5 + 0.05 * sum(right))

    return behave


def test_the_best_arm_wins_and_is_measured_on_fresh_seeds(tmp_path):
    plan = small_plan()
    behave = best_at(lr=2e-4, batch=24, schedule="constant")
    result, fake = driven(narrow(plan, plan.families[0], {}), behave, tmp_path)
    assert result.winner == {
        LR: 2e-4,
        "training.completions_per_step": 24,
        "schedule": "constant",
    }
    assert [len(arms) for arms in result.rounds] == [8, 4]
    assert [runs for _, _, runs in result.rounds[1]] == [3] * 4
    assert result.rounds[0][0][:2] == (result.winner, 960)
    assert [each.seed for each in result.result.outcomes] == [0, 1, 2, 3, 4]
    by_stage = {path.split("/")[0]: 0 for path in fake.paths}
    for path in fake.paths:
        by_stage[path.split("/")[0]] += 1
    assert by_stage == {"grpo": 8 * 1 + 4 * 2, "final": 5}
    screened = {job.seed for job in fake.made if job.arm.stage == "grpo"}
    assert not screened & {0, 1, 2, 3, 4}


def test_luck_in_the_first_round_does_not_win(tmp_path):
    plan = small_plan()

    def behave(job):
        training = job.config().training
        lucky = (training.learning_rate, training.completions_per_step) == (1e-4, 96)
        if job.seed == 100:
            return racing(job, at=480 if lucky else 960)
        return racing(job, at=1920 if lucky else 960)

    result, _ = driven(narrow(plan, plan.families[0], {}), behave, tmp_path)
    assert result.rounds[0][0][0]["training.completions_per_step"] == 96
    winner = result.winner
    assert (winner[LR], winner["training.completions_per_step"]) != (1e-4, 96)


def test_narrowing_at_a_batch_shares_the_runs(tmp_path):
    plan = small_plan()
    behave = best_at(lr=2e-4, batch=24, schedule="constant")
    fake = Fake(behave)
    driver = Driver(Store(tmp_path), fake)
    parts = {
        "all": narrow(plan, plan.families[0], {}),
        "same": narrow(plan, plan.families[0], {}, training__completions_per_step=96),
    }
    results = driver(parts)
    assert len(fake.paths) == len(set(fake.paths))
    assert results["all"].winner["training.completions_per_step"] == 24
    assert results["same"].winner == {
        LR: 2e-4,
        "training.completions_per_step": 96,
        "schedule": "constant",
    }
    assert results["same"].name == "grpo-same-batch"


def test_a_rule_starts_from_grpos_best_settings(tmp_path):
    plan = small_plan()
    behave = best_at(lr=1e-4, batch=24, schedule="constant")
    study = run_study(plan, Driver(Store(tmp_path), Fake(behave)))
    (rule,) = study.rules
    assert rule.narrowing.winner["training.completions_per_step"] == 24
    assert rule.narrowing.winner["schedule"] == "constant"
    assert rule.narrowing.winner[LR] == 1e-4
    # Its range is of the plain regime with nothing but the rule itself.
    overrides = rule.range.points[0][1].arm.overrides
    assert [each.partition("=")[0] for each in overrides] == [
        "training.max_grad_norm",
        "training.learning_rate",
    ]


# The range


def test_a_rule_climbs_until_a_seed_collapses(tmp_path):
    plan = small_plan()
    part = range_of(plan, "rule", "a rule", plan.plain, {}, rule=True)
    result, fake = driven(part, falls_from(1e-3, seeds=(1,)), tmp_path)
    assert [rate for rate, _ in result.points] == [1e-4, 1e-3]
    assert result.ended
    assert result.survived == (1e-4, 1e-4)
    assert {job.arm.stop_at for job in fake.made} == {"collapse"}
    assert {job.config().completions_after(job.config().steps) for job in fake.made} == {4800}


def test_the_range_of_capo_and_grpo_is_measured_to_the_end(tmp_path):
    plan = small_plan()
    part = range_of(plan, "grpo", "GRPO", plan.plain, {}, rule=False)
    result, fake = driven(part, falls_from(1e-3), tmp_path)
    assert [rate for rate, _ in result.points] == [1e-4, 1e-3, 1e-2]
    assert {job.arm.stop_at for job in fake.made} == {"never"}
    assert len(fake.made) == 15
    assert result.survived == (1e-4, 1e-4)


def test_what_survives_is_a_stretch_of_neighbours(tmp_path):
    plan = small_plan(range={"learning_rates": [1e-5, 1e-4, 1e-3, 1e-2]})

    def behave(job):
        return racing(job, collapses=job.config().training.learning_rate == 1e-4)

    result, _ = driven(range_of(plan, "x", "x", plan.plain, {}, rule=False), behave, tmp_path)
    assert result.survived == (1e-3, 1e-2)


# Resuming, and what is missing


def outcomes_of(plan, root):
    driver = Driver(Store(root), None)
    return run_study(plan, driver), driver.known


def test_an_interrupted_study_continues_where_it_was(tmp_path):
    plan = small_plan()
    behave = best_at(lr=2e-4, batch=24, schedule="constant")
    whole = Fake(behave)
    run_study(plan, Driver(Store(tmp_path / "whole"), whole))
    first = Fake(behave, dies_after=11)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, Driver(Store(tmp_path / "cut"), first))
    second = Fake(behave)
    run_study(plan, Driver(Store(tmp_path / "cut"), second))
    assert sorted(first.paths + second.paths) == sorted(whole.paths)
    assert outcomes_of(plan, tmp_path / "cut")[0] == outcomes_of(plan, tmp_path / "whole")[0]
    third = Fake(behave)
    run_study(plan, Driver(Store(tmp_path / "cut"), third))
    assert not third.made


def test_a_torn_write_leaves_no_outcome(tmp_path):
    plan = small_plan()
    job = plan.raced("capo-default", plan.preset, {}).job(0)
    store = Store(tmp_path)
    path = store.save(racing(job, at=960))
    path.rename(path.with_name(f".{path.name}.tmp"))  # as a kill between writing and renaming
    assert store.load(job) is None


def test_an_outcome_survives_its_file(tmp_path):
    job = small_plan().raced("capo-default", "small-aggressive", {}).job(0)
    made = racing(job, at=960)
    store = Store(tmp_path)
    path = store.save(made)
    assert path == tmp_path / "final" / "capo-default" / "0.json"
    assert store.load(job) == made


def test_a_changed_arm_is_run_again_and_no_other(tmp_path):
    behave = best_at(lr=2e-4, batch=24, schedule="constant")
    run_study(small_plan(), Driver(Store(tmp_path), Fake(behave)))
    changed = small_plan(preset="small-aggressive")  # the default arm and its range
    again = Fake(behave)
    run_study(changed, Driver(Store(tmp_path), again))
    assert {path.rpartition("-lr")[0] or path for path in again.paths} == {
        "range/capo",
        *(f"final/capo-default/{seed}" for seed in range(5)),
    }


def test_an_outcome_of_another_format_counts_as_missing(tmp_path):
    job = small_plan().raced("capo-default", "small-aggressive", {}).job(0)
    store = Store(tmp_path)
    path = store.save(racing(job))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    assert store.load(job) is None


def test_only_makes_no_other_runs_and_keeps_what_is_there(tmp_path):
    plan = small_plan()
    behave = best_at(lr=2e-4, batch=24, schedule="constant")
    fake = Fake(behave)
    study = run_study(plan, Driver(Store(tmp_path), fake, only="final/capo-*"))
    assert {job.arm.path for job in fake.made} == {"final/capo-default"}
    assert study.default is not None
    assert study.default.complete
    assert study.grpo is None
    assert study.rules == ()
    assert study.capo_range is not None
    assert not study.capo_range.complete
    rest = Fake(behave)
    run_study(plan, Driver(Store(tmp_path), rest))
    assert "final/capo-default/0" not in rest.paths


def test_looking_makes_nothing(tmp_path):
    study, known = outcomes_of(small_plan(), tmp_path / "nothing")
    assert known == []
    assert study.races == []
    assert not (tmp_path / "nothing").exists()


# The estimate


def test_the_estimate_counts_what_is_missing_and_writes_nothing(tmp_path):
    plan = small_plan()
    before = estimate(plan, Store(tmp_path))
    assert not list(tmp_path.iterdir())
    assert before.runs["range"] == 3 * 5 * 2 + 2 * 2  # the rule is guessed to fall at 1e-3
    run_study(plan, Driver(Store(tmp_path), Fake(lambda job: racing(job, at=960)), "final/capo-*"))
    after = estimate(plan, Store(tmp_path))
    assert sum(before.runs.values()) - sum(after.runs.values()) == 5
    only = estimate(plan, Store(tmp_path), "range/*")
    assert set(only.runs) == {"range"}


def test_the_shipped_plan_takes_an_evening_not_a_week(tmp_path):
    guess = estimate(load_plan(), Store(tmp_path))
    assert 0.5 < sum(guess.seconds.values()) / 3600 < 8


def test_a_run_costs_more_with_more_of_anything():
    plan = small_plan()
    arm = plan.raced("some", plan.plain, {})
    config = arm.job(0).config()
    passes = plan.raced("some", plan.plain, {"algorithm.num_iterations": 4}).job(0).config()
    assert cost(config, arm, 960) < cost(config, arm, 1920)
    assert cost(config, arm, 960) < cost(passes, arm, 960)


class Batches:
    """A pool that finishes so many jobs at once; those of one seed fail."""

    def __init__(self, size, fails):
        self.size, self.fails = size, fails
        self.running = []

    def submit(self, job):
        self.running.append(job)

    def finished(self, timeout=None):
        done, self.running = self.running[: self.size], self.running[self.size :]
        return [
            (job, Failure(OSError("disk")) if job.seed == self.fails else racing(job))
            for job in done
        ]


@pytest.mark.parametrize(("size", "kept"), [(1, [0]), (2, [0, 2, 3, 4]), (5, [0, 2, 3, 4])])
def test_runs_that_finish_with_one_that_fails_are_kept(tmp_path, size, kept):
    plan, store = small_plan(), Store(tmp_path)
    arm = plan.raced("capo-default", plan.preset, {})
    with pytest.raises(OSError, match="disk") as error:
        Driver(store, StudyWorkers(Batches(size, fails=1)))(
            {"default": race(arm, "CAPO", plan.measure.seeds)}
        )
    assert error.value.__notes__ == [f"in the run {arm.job(1).path} of the study"]
    assert [seed for seed in plan.measure.seeds if store.load(arm.job(seed)) is not None] == kept
