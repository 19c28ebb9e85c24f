"""The plan: what is refused, and what its arms resolve to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from study_kit import small_plan

from capo import InputError
from capo.lab.sections import validate
from capo.lab.study.jobs import Job, micro_batch, overrides_of, slug
from capo.lab.study.plan import Plan, Round, load_plan


def test_the_shipped_plan_can_be_run():
    plan = load_plan()
    for family in plan.families:
        for each in plan.rounds:
            for settings in family.combinations():
                plan.screened(family, each, {**family.set, **settings}).job(0).config()


def test_the_shipped_plan_is_as_wide_as_the_issue_asks():
    plan = load_plan()
    grpo = plan.family("grpo")
    assert grpo is not None
    assert len(grpo.axes["training.learning_rate"]) >= 5
    assert len(grpo.axes["training.completions_per_step"]) >= 3
    assert len(plan.measure.seeds) >= 5
    rates = plan.range.learning_rates
    assert (rates[0], rates[-1], len(rates)) == (1e-4, 1e-2, 5)
    names = {family.name for family in plan.rules}
    assert names == {"gradient-clip", "skip-on-spike", "ppo-clip", "kl-penalty", "kl-adaptive"}
    capo = plan.family("capo")
    if capo is not None:  # every value that CAPO was tried with, GRPO was too
        for key, values in capo.axes.items():
            assert set(values) <= set(grpo.axes[key]), key
    default = plan.default_config()
    assert default.algorithm.num_iterations in grpo.axes["algorithm.num_iterations"]
    assert default.training.completions_per_step in grpo.axes["training.completions_per_step"]
    assert default.training.schedule in grpo.axes["schedule"]


def test_a_presets_name_replaces_that_of_the_plan():
    assert load_plan(preset="small-conservative").preset == "small-conservative"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": [{"seeds": [4], "budget": 10}]}, r"rounds\.0\.seeds: must be fresh"),
        (
            {"rounds": [{"seeds": [9], "budget": 10}, {"seeds": [9], "budget": 10}]},
            r"rounds\.1\.seeds: must be fresh",
        ),
        ({"measure": {"spacing": 97}}, r"measure\.spacing"),
        ({"range": {"learning_rates": [1e-3, 1e-4]}}, r"range\.learning_rates: must ascend"),
        ({"collapse": {"needed": 6}}, r"collapse\.needed: must be at most the 5 seeds"),
        (
            {
                "families": [
                    {"name": "a", "label": "a", "kind": "rule", "axes": {"schedule": ["linear"]}}
                ]
            },
            r"families\.a\.axes\.schedule: must be one of constant, cosine, got 'linear'",
        ),
        (
            {"families": [{"name": "a", "label": "a", "kind": "rule", "axes": {"x": []}}]},
            r"families\.a\.axes\.x: must not be empty",
        ),
        (
            {
                "families": [
                    {"name": name, "label": "a", "kind": "grpo", "axes": {"x.y": [1]}}
                    for name in "ab"
                ]
            },
            "at most one may be of kind 'grpo'",
        ),
        ({"seeds": [1]}, "seeds: unknown key"),
    ],
)
def test_what_makes_no_honest_study_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        small_plan(**changes)


def test_a_plan_that_is_no_file_or_no_toml_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--plan: .* is no file"):
        load_plan(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("= 1")
    with pytest.raises(InputError, match="--plan: is not valid TOML"):
        load_plan(tmp_path / "bad.toml")


def test_settings_resolve_to_a_run():
    plan = small_plan()
    settings = {
        "training.learning_rate": 2e-4,
        "training.completions_per_step": 24,
        "algorithm.num_iterations": 4,
        "schedule": "constant",
    }
    config = plan.raced("some", plan.plain, settings).job(3).config()
    training = config.training
    assert (training.learning_rate, training.completions_per_step) == (2e-4, 24)
    assert (training.schedule, training.warmup_ratio) == ("constant", 0.0)
    assert training.micro_batch == 24
    assert config.steps == 4800 // 24 * 4
    assert config.completions_after(config.steps) == 4800
    assert (config.run.seed, config.run.threads) == (3, 1)
    assert (config.eval.every_completions, config.eval.problems) == (48, 512)
    assert not config.records.tokens


def test_the_conservative_regime_is_the_papers():
    plan = small_plan()
    config = plan.conservative_arm(5e-4).job(0).config()
    assert config.training.completions_per_step == 12 * 96
    assert config.training.learning_rate == pytest.approx(1e-4)
    assert config.steps == 16  # the preset's


def test_the_range_overrides_nothing_but_the_learning_rate_and_the_length():
    plan = small_plan()
    config = plan.ranged("capo", plan.preset, {}, 1e-2, rule=False).job(0).config()
    default = plan.default_config()
    assert config.training.learning_rate == 1e-2
    assert config.steps == 100
    assert config.capo == default.capo
    assert config.algorithm == default.algorithm
    assert config.training.schedule == default.training.schedule


def test_the_fingerprint_follows_what_decides_the_run():
    job = small_plan().raced("some", "small-aggressive", {}).job(0)
    same = small_plan().raced("some", "small-aggressive", {}).job(0)
    assert job.fingerprint() == same.fingerprint()
    others = [
        job.arm.job(1),
        Job(replace(job.arm, overrides=("algorithm.beta=0.1",)), 0),
        Job(replace(job.arm, stop_at="never"), 0),
        Job(replace(job.arm, budget=96), 0),
        Job(replace(job.arm, spacing=96), 0),
        Job(replace(job.arm, target=0.7), 0),
    ]
    assert len({each.fingerprint() for each in (job, *others)}) == 7
    assert replace(job.arm, name="other").job(0).fingerprint() == job.fingerprint()


def test_rounds_keep_a_share_but_not_too_few():
    each: Round = validate(Round, {"seeds": [9], "budget": 10, "share": 0.25, "at_least": 3})
    assert [each.kept(arms) for arms in (2, 4, 12, 13, 100)] == [2, 3, 3, 4, 25]


def test_combinations_can_be_held_at_a_value():
    family = small_plan().families[0]
    assert len(list(family.combinations())) == 8
    held = list(family.combinations(training__completions_per_step=96))
    assert len(held) == 4
    assert {settings["training.completions_per_step"] for settings in held} == {96}
    assert slug(held[0]) == slug(
        next(c for c in family.combinations() if c["training.completions_per_step"] == 96)
    )


def test_names_are_for_people():
    settings = {
        "training.learning_rate": 3.162e-4,
        "training.completions_per_step": 96,
        "schedule": "cosine",
        "training.max_grad_norm": 0.03,
    }
    assert slug(settings) == "lr3.16e-04-b96-cosine-max-grad-norm=0.03"
    assert overrides_of({"schedule": "cosine", "rival.rule": "none"}) == (
        'training.schedule="cosine"',
        "training.warmup_ratio=0.1",
        'rival.rule="none"',
    )


@pytest.mark.parametrize(
    ("batch", "micro"), [(8, 8), (96, 96), (288, 288), (384, 192), (1152, 288)]
)
def test_a_micro_batch_divides_the_batch(batch, micro):
    assert micro_batch(batch) == micro


def test_a_plan_survives_its_own_json():
    plan = small_plan()
    assert validate(Plan, plan.model_dump(mode="json")) == plan
