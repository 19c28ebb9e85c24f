"""The configuration: what is allowed, what is refused and how, and what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capo import InputError
from capo.lab.config import check_vocabulary, parse_config
from capo.lab.sources import load_config, preset_names, preset_text

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("**/*.toml"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_survives_json(name):
    config = load_config(name)
    assert config.steps >= 1
    assert preset_text(name).startswith("# ")  # `capo presets` shows the first line
    assert parse_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    assert load_config(path).steps >= 1


def test_there_are_shipped_configs():
    assert CONFIGS


def test_paper_presets_hold_the_paper_values():
    conservative, aggressive = load_config("paper-conservative"), load_config("paper-aggressive")
    assert conservative.capo.selection is None
    assert aggressive.capo.selection == "capo"
    assert (conservative.training.learning_rate, aggressive.training.learning_rate) == (
        3e-6,
        1.5e-5,
    )
    assert conservative.training.completions_per_step == 1152
    assert aggressive.training.completions_per_step == 96
    # One epoch of MATH's 7500 training problems, 144 prompts a step.
    assert (conservative.steps, aggressive.steps) == (52, 100)
    for config in (conservative, aggressive):
        training = config.training
        assert training.num_generations == 8
        assert (training.max_prompt_tokens, training.max_completion_tokens) == (512, 1024)
        assert (training.top_k, config.algorithm.beta, training.max_grad_norm) == (50, 0.0, 1.0)
        assert (training.adam_betas, training.adam_eps) == ((0.9, 0.999), 1e-8)
        assert (training.schedule, training.warmup_ratio) == ("cosine", 0.1)
        assert training.bf16
        assert training.gradient_checkpointing


def test_small_presets_keep_the_paper_ratios():
    conservative, aggressive = load_config("small-conservative"), load_config("small-aggressive")
    ratio = aggressive.training.learning_rate / conservative.training.learning_rate
    assert ratio == pytest.approx(5)
    assert (
        conservative.training.completions_per_step == 12 * aggressive.training.completions_per_step
    )
    with_capo = load_config("small-aggressive-capo")
    assert with_capo.capo.selection == "capo"
    assert with_capo.training == aggressive.training


@pytest.mark.parametrize(
    ("override", "field", "says"),
    [
        ("training.learning_rat=1", "training.learning_rat", "did you mean 'learning_rate'"),
        ("trainig.steps=1", "trainig", "did you mean 'training'"),
        ("training.zzz=1", "training.zzz", "allowed are learning_rate,"),
        ("training.learning_rate=fast", "training.learning_rate", "number, got 'fast'"),
        ("training.learning_rate=-1e-4", "training.learning_rate", "greater than 0, got -0.0001"),
        ("training.learning_rate=nan", "training.learning_rate", "finite number"),
        ("training.steps=0", "training.steps", "greater than or equal to 1, got 0"),
        ("training.steps=1.5", "training.steps", "integer, got 1.5"),
        ("training.steps=true", "training.steps", "integer, got True"),
        ("training.bf16=1", "training.bf16", "boolean, got 1"),
        ("training.adam_betas=[0.9]", "training.adam_betas.1", "is missing"),
        ("training.adam_betas=[0.9, 1.0]", "training.adam_betas.1", "less than 1, got 1.0"),
        (
            "training.completions_per_step=90",
            "training.completions_per_step",
            "multiple of training.num_generations (8), got 90",
        ),
        ("training.num_generations=1", "training.num_generations", "greater than or equal to 2"),
        ("training.micro_batch=36", "training.micro_batch", "must divide"),
        ("training.schedule=cosin", "training.schedule", "'cosine', 'linear'"),
        ("algorithm.name=ppo", "algorithm.name", "'grpo', 'dr_grpo' or 'reinforce', got 'ppo'"),
        ("algorithm.loss_type=luspo", "algorithm.importance_sampling_level", "'sequence'"),
        ("capo.selection=cappo", "capo.selection", "'capo', 'dr_capo', 'reincapo'"),
        (
            "capo.selection={policy_shift=-1.0}",
            "capo.selection.policy_shift",
            "greater than or equal to 0, got -1.0",
        ),
        (
            "capo.selection={objective_shift=[1.0, -1.0]}",
            "capo.selection.objective_shift",
            "low bound must not exceed the high bound",
        ),
        ("capo.selection={shift=1.0}", "capo.selection.shift", "unknown key"),
        ("capo.top_k=0", "capo.top_k", "greater than or equal to 1"),
        ("run.seed=-1", "run.seed", "greater than or equal to 0"),
        ("eval.problems=0", "eval.problems", "greater than or equal to 1"),
        ("training=1", "training=1", "section.key=value"),
        ("steps", "steps", "section.key=value"),
    ],
)
def test_bad_values_are_named_by_their_key(override, field, says):
    with pytest.raises(InputError) as error:
        load_config("small-aggressive-capo", [override])
    assert error.value.field == field
    assert says in error.value.message
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["capo.step_model=sgd", "capo.moments=optimizer"], "capo.moments"),
        (["training.optimizer=sgd", "capo.moments=optimizer"], "capo.moments"),
        (["algorithm.num_iterations=2", "training.save_every=3"], "training.save_every"),
    ],
)
def test_impossible_combinations_are_refused(overrides, field):
    with pytest.raises(InputError) as error:
        load_config("small-aggressive-capo", overrides)
    assert error.value.field == field


def test_steps_must_follow_from_something():
    with pytest.raises(InputError, match=r"training\.steps: must be given"):
        parse_config({})
    with pytest.raises(InputError, match=r"training\.epochs: must cover at least one step"):
        parse_config({"training": {"epochs": 1.0}, "task": {"train_problems": 11}})
    assert parse_config({"training": {"epochs": 1.0}, "task": {"train_problems": 25}}).steps == 2


@pytest.mark.parametrize("key", ["capo.top_k", "training.top_k"])
def test_top_k_must_fit_the_vocabulary(key):
    config = load_config("small-aggressive-capo", [f"{key}=65"])
    check_vocabulary(config, 65)
    with pytest.raises(InputError, match=f"{key}: must be at most .* 64, got 65"):
        check_vocabulary(config, 64)


def test_top_k_of_the_curvature_is_free_where_nothing_is_judged():
    check_vocabulary(load_config("small-aggressive", ["capo.top_k=1000"]), 64)


def test_toml_can_say_what_it_has_no_word_for():
    config = load_config("small-aggressive-capo", ["capo.selection=none", "capo.top_k=none"])
    assert config.capo.selection is None
    assert config.capo.top_k is None
    bounds = load_config("small-aggressive", ["capo.selection={objective_shift=[-inf, 0.5]}"])
    assert bounds.capo.selection.objective_shift == (None, 0.5)


def test_extends_a_preset_or_a_file_beside_it(tmp_path):
    (tmp_path / "base.toml").write_text('extends = "small-aggressive"\n[run]\nseed = 3\n')
    (tmp_path / "own.toml").write_text('extends = "base.toml"\n[training]\nsteps = 7\n')
    config = load_config(tmp_path / "own.toml", ["eval.problems=5"])
    assert (config.run.seed, config.steps, config.eval.problems) == (3, 7, 5)
    assert config.training.learning_rate == load_config("small-aggressive").training.learning_rate


def test_extends_in_a_circle_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(InputError, match="extends: goes in a circle"):
        load_config(tmp_path / "a.toml")


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="did you mean 'small-aggressive'"):
        load_config("small-agressive")
    broken = tmp_path / "broken.toml"
    broken.write_text("training = {")
    with pytest.raises(InputError, match="is not valid TOML"):
        load_config(broken)


def test_algorithms_say_what_they_are_in_trl_terms():
    def terms(name, *overrides):
        algorithm = load_config(
            "small-aggressive", [f"algorithm.name={name}", *overrides]
        ).algorithm
        return algorithm.loss_type, algorithm.scale_rewards

    assert terms("grpo") == ("grpo", "group")
    assert terms("dr_grpo") == ("dr_grpo", "none")
    assert terms("reinforce") == ("grpo", "none")
    assert terms("grpo", "algorithm.loss_type=dapo") == ("dapo", "group")


def test_iterations_reuse_completions():
    config = load_config("small-aggressive", ["algorithm.num_iterations=2", "training.steps=6"])
    consumed = [config.completions_after(step) for step in range(7)]
    assert consumed == [0, 96, 96, 192, 192, 288, 288]
    assert config.training.save_every % 2 == 0


def test_identity_is_the_configuration_not_the_name():
    named = load_config("small-aggressive", ["run.name=mine"])
    assert named.identity() == load_config("small-aggressive").identity()
    assert named.identity() != load_config("small-aggressive", ["run.seed=1"]).identity()


def test_other_selection_rules() -> None:
    config = load_config("small-aggressive", ['capo.selection={rule="soft", policy_shift=1e-4}'])
    assert config.capo.selection.model_dump(exclude_none=True) == {
        "rule": "soft",
        "policy_shift": 1e-4,
    }
    hard = load_config(
        "small-aggressive", ['capo.selection={rule="thresholds", policy_shift=1e-4}']
    )
    plain = load_config("small-aggressive", ["capo.selection={policy_shift=1e-4}"])
    assert hard.identity() == plain.identity()
    for override, field in (
        ('capo.selection={rule="nats"}', "capo.selection.budget"),
        ('capo.selection={rule="quantile", policy_shift=2.0}', "capo.selection.policy_shift"),
        ('capo.selection={rule="median"}', "capo.selection.rule"),
    ):
        with pytest.raises(InputError) as error:
            load_config("small-aggressive", [override])
        assert error.value.field == field


def test_token_rules_of_others_are_written_out():
    config = load_config("small-aggressive", ['capo.selection={rule="stapo", probability=0.1}'])
    table = config.capo.selection
    assert table.spec() == {"rule": "stapo", "probability": 0.1, "entropy_quantile": 0.05}
    again = parse_config(config.model_dump(mode="json"))
    assert again.identity() == config.identity()


def test_an_argument_that_a_token_rule_does_not_take_is_named():
    with pytest.raises(InputError, match=r"capo\.selection\.probabilty"):
        load_config("small-aggressive", ['capo.selection={rule="stapo", probabilty=0.1}'])


def test_lopti_needs_two_passes():
    with pytest.raises(InputError, match=r"algorithm\.num_iterations"):
        load_config("small-aggressive", ['capo.selection={rule="lopti"}'])


@pytest.mark.parametrize(
    ("preset", "fingerprint"),
    [
        ("small-capo", "db25e0c50879a1f7"),
        ("small-aggressive", "50e57b33854206d4"),
        ("small-aggressive-capo", "6393861cc02632fb"),
    ],
)
def test_recorded_runs_are_still_found(preset, fingerprint):
    """The fingerprint is over the resolved configuration: a new field would orphan every record."""
    from capo.lab.study.plan import load_plan

    assert load_plan().raced("check", preset, {}).job(0).fingerprint() == fingerprint
