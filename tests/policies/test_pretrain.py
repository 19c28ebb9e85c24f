"""The recipe: what ships is what it says, and running it again learns the same way."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from capo import InputError
from capo.policies import EMBEDDED, load_policy, sample_completions
from capo.policies.batches import Batches
from capo.policies.measure import measure
from capo.policies.pretrain import PretrainConfig, _schedule, pretrain, weights_hash
from capo.policies.strategies import STRATEGIES
from capo.policies.tokenizer import EOS, PAD, VOCABULARY, build_tokenizer
from capo.tasks import load_task
from capo.tasks.sums import Sums, is_held_out, problem_of

SHIPPED = EMBEDDED["embedded:sums"]
RECIPE = json.loads((SHIPPED / "recipe.json").read_text())
SHORT = {"steps": 40, "batch_size": 32, "layers": 2, "hidden_size": 64, "intermediate_size": 128}
SHORT |= {"warmup_steps": 5, "learning_rate": 3e-3, "eval_problems": 8, "eval_k": 2}


def test_shipped_weights_are_the_recorded_ones() -> None:
    assert weights_hash(SHIPPED) == RECIPE["weights"]["sha256"]
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 6_000_000


def test_shipped_recipe_is_the_default() -> None:
    assert PretrainConfig.from_dict(RECIPE["config"]) == PretrainConfig()
    assert RECIPE["seed"] == PretrainConfig().seed
    assert RECIPE["command"] == PretrainConfig().command() == "capo pretrain --output DIR"


def test_shipped_policy_can_but_does_not_prefer_to_be_right() -> None:
    task = load_task("sums")
    measured = measure(load_policy("embedded:sums"), task, problems=256, k=4, seed=11)
    assert 0.35 <= measured.sampled_accuracy <= 0.55
    assert measured.greedy_accuracy > 0.95
    recorded = RECIPE["measured"]
    assert recorded["problems"] >= 512
    assert recorded["k"] == 16
    assert recorded["pass_at_k"] >= 0.95
    assert abs(recorded["sampled_accuracy"] - measured.sampled_accuracy) < 0.08  # 5 sigma


@pytest.mark.slow
def test_shipped_pass_at_16() -> None:
    task = load_task("sums")
    measured = measure(load_policy("embedded:sums"), task, problems=512, k=16, seed=12)
    assert measured.pass_at_k >= 0.95


def test_accuracy_is_counted_right() -> None:
    """An independent count of the same samples."""
    task, policy = load_task("sums"), load_policy("embedded:sums")
    problems = task.eval_problems(20, 4)
    texts = sample_completions(policy, [p.prompt for p in problems], 3, 1.0, 24, seed=4)
    right = [
        [t.endswith("=" + p.answer) for t in ts] for p, ts in zip(problems, texts, strict=True)
    ]
    measured = measure(policy, task, problems=20, k=3, seed=4)
    assert measured.sampled_accuracy == pytest.approx(sum(map(sum, right)) / 60)
    assert measured.pass_at_k == pytest.approx(sum(map(any, right)) / 20)


def test_batches_hold_no_held_out_sum_and_the_strategies_in_proportion() -> None:
    config = PretrainConfig.from_dict({"batch_size": 2000})
    tokens, labels = Batches.of(config).draw(random.Random(0))
    tokenizer = build_tokenizer(128)
    counts: Counter[str] = Counter()
    for ids, marks in zip(tokens, labels, strict=True):
        text = tokenizer.decode(ids[ids != VOCABULARY[PAD]]).removesuffix(EOS)
        prompt, _, answer = text.partition("?")
        a, b, c = (int(term) for term in prompt.split("+"))
        assert not is_held_out((a, b, c))
        answered = tokenizer.decode(ids[marks != -100])
        assert answered == answer + EOS  # the loss is on the answer and its end, nowhere else
        counts["right"] += Sums().grade(answer, problem_of((a, b, c))) == 1.0
        counts["stopped early"] += answer == f"{a}+{b}={a + b}"
    assert abs(counts["right"] / 2000 - config.strategies["careful"]) < 0.05
    assert abs(counts["stopped early"] / 2000 - config.strategies["stop_early"]) < 0.05


def test_careful_is_right_and_the_others_seldom() -> None:
    task, rng = Sums(), random.Random(0)
    for name, strategy in STRATEGIES.items():
        right = []
        for problem in task.train_problems(200, 0):
            a, b, c = (int(term) for term in problem.prompt[:-1].split("+"))
            answer = strategy((a, b, c), rng)
            passes = 2 if name.startswith("check") else 1
            assert len(answer) < passes * task.max_completion_tokens
            right.append(task.grade(answer, problem))
        assert sum(right) == 200 if name in ("careful", "check_twice") else sum(right) <= 10


def test_shortened_recipe_is_deterministic_and_learns(tmp_path: Path) -> None:
    config = PretrainConfig.from_dict(SHORT)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    seen: list[tuple[int, int, float]] = []
    first = pretrain(config, tmp_path / "a", progress=lambda *step: seen.append(step))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(99)  # the caller's own random numbers play no part
    second = pretrain(config, tmp_path / "b")
    assert first.losses == second.losses
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    assert [step[:2] for step in seen] == [(n, 40) for n in range(1, 41)]
    assert first.losses[0] == pytest.approx(4.16, abs=0.3)  # ln 64: nothing known yet
    assert sum(first.losses[-5:]) / 5 < 0.7 * first.losses[0]
    other = pretrain(PretrainConfig.from_dict(SHORT | {"seed": 1}), tmp_path / "c")
    assert other.recipe["weights"]["sha256"] != first.recipe["weights"]["sha256"]


def test_what_it_writes_is_a_policy(tmp_path: Path) -> None:
    report = pretrain(PretrainConfig.from_dict(SHORT | {"steps": 2}), tmp_path)
    policy = load_policy(tmp_path)
    assert len(policy.tokenizer) == policy.model.config.vocab_size
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe == report.recipe
    assert recipe["weights"]["sha256"] == weights_hash(tmp_path)
    assert PretrainConfig.from_dict(recipe["config"]) == PretrainConfig.from_dict(
        SHORT | {"steps": 2}
    )
    assert "--set steps=2" in recipe["command"]
    before = recipe["weights"]["sha256"]
    with pytest.raises(InputError, match="not empty"):
        pretrain(PretrainConfig.from_dict(SHORT), tmp_path)
    assert weights_hash(tmp_path) == before
    with pytest.raises(InputError, match="is a file"):
        pretrain(PretrainConfig.from_dict(SHORT), tmp_path / "recipe.json")


def test_config_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("steps = 7\nheads = 2\n[strategies]\ncareful = 0.5\nguess = 0.5\n")
    config = PretrainConfig.from_toml(file, {"heads": 8})
    assert (config.steps, config.heads) == (7, 8)
    assert config.strategies == {"careful": 0.5, "guess": 0.5}
    config = PretrainConfig.from_toml(file, {"strategies": {"careful": 0.6, "guess": 0.4}})
    assert config.strategies == {"careful": 0.6, "guess": 0.4}
    file.write_text("steps = \n")
    with pytest.raises(InputError, match="not valid TOML"):
        PretrainConfig.from_toml(file)
    with pytest.raises(InputError, match="cannot be read"):
        PretrainConfig.from_toml(tmp_path / "nowhere.toml")


def test_what_an_override_does_not_name_stays(tmp_path: Path) -> None:
    laid = {"task": {"params": {"max_word_len": 5}}}
    task = PretrainConfig.from_toml("spell_backward", laid).task
    shipped = PretrainConfig.from_toml("spell_backward").task
    assert shipped.params["max_word_len"] == 7
    assert task.name == "reasoning_gym"
    assert task.params == shipped.params | {"max_word_len": 5}
    file = tmp_path / "recipe.toml"
    file.write_text("[task.params]\nsmallest = 20\n")
    narrow = PretrainConfig.from_toml(file, {"task": {"params": {"largest": 50}}}).task
    assert narrow.params == {"smallest": 20, "largest": 50}


@pytest.mark.parametrize(
    ("values", "field", "allowed"),
    [
        ({"stepz": 3}, "stepz", "allowed: seed, strategies"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": "many"}, "steps", "integer"),
        ({"learning_rate": -1.0}, "learning_rate", "greater than 0"),
        ({"strategies": {"careful": 0.5}}, "strategies", "sum to 1"),
        ({"strategies": {"lucky": 1.0}}, "strategies", "'lucky' is unknown; allowed: careful"),
        ({"strategies": {"careful": 2.0}}, "strategies.careful", "less than or equal to 1"),
        ({"hidden_size": 30}, "config", "multiple of 2 × heads"),
        ({"kv_heads": 3}, "kv_heads", r"must divide heads \(4\)"),
        ({"kv_heads": 2, "architecture": "gemma2"}, "kv_heads", "qwen2 or llama"),
        ({"device": "tpu"}, "device", "'cpu' or 'cuda'"),
        ({"max_seconds": 0}, "max_seconds", "greater than 0"),
    ],
)
def test_bad_config(values: dict[str, object], field: str, allowed: str) -> None:
    with pytest.raises(InputError, match=allowed) as error:
        PretrainConfig.from_dict(values)
    assert error.value.field == field


def first_batches(config: PretrainConfig, count: int) -> list[torch.Tensor]:
    with contextlib.closing(Batches.of(config).stream(random.Random(0))) as stream:
        return [tokens for tokens, _ in itertools.islice(stream, count)]


@pytest.mark.slow
def test_lessons_of_other_processes_are_the_same_for_every_number_of_them() -> None:
    config = {"batch_size": 700, "sorted_batches": 2}
    one, two = (first_batches(PretrainConfig.from_dict(config | {"workers": n}), 4) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one[0], one[2])  # other lessons, not the same again
    tokenizer = build_tokenizer(128)
    for ids in one[0]:
        prompt = tokenizer.decode(ids[ids != VOCABULARY[PAD]]).partition("?")[0]
        a, b, c = (int(term) for term in prompt.split("+"))
        assert not is_held_out((a, b, c))


def test_a_time_limit_ends_the_training_and_its_schedule(tmp_path: Path) -> None:
    config = PretrainConfig.from_dict(SHORT | {"steps": 10**6, "max_seconds": 2.0})
    report = pretrain(config, tmp_path)
    assert 0 < len(report.losses) < 10**6
    assert report.recipe["steps"] == len(report.losses)
    assert _schedule(10**4, 0.0, config) == 1.0
    assert _schedule(10**4, 0.5, config) == pytest.approx(0.5)
    assert _schedule(10**4, 1.0, config) == 0.0
    assert _schedule(0, 0.9, config) == pytest.approx(1 / 5)  # warm-up goes by steps


def test_fewer_key_heads_and_a_narrow_pass_make_a_policy(tmp_path: Path) -> None:
    config = SHORT | {"kv_heads": 1, "bf16": True, "steps": 30}
    report = pretrain(PretrainConfig.from_dict(config), tmp_path)
    policy = load_policy(tmp_path)
    assert policy.model.config.num_key_value_heads == 1
    assert policy.model.dtype == torch.float32
    assert report.losses[-1] < 0.8 * report.losses[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch finds none") as error:
        pretrain(PretrainConfig.from_dict(SHORT | {"device": "cuda"}), tmp_path / "policy")
    assert error.value.field == "device"
    assert not (tmp_path / "policy").exists()
