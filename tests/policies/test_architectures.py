"""Every recipe makes a policy, and the curvature of every architecture is the oracle's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from capo import AdamStep, InputError, SGDStep, token_curvature
from capo.integrations._trl_head import capture_hidden, predicting_positions, read_head
from capo.policies import Policy, load_policy, sample_completions
from capo.policies.architectures import ARCHITECTURES, LOGIT_SCALE, SOFTCAP, build_model
from capo.policies.lessons import task_of
from capo.policies.pretrain import PretrainConfig, pretrain
from capo.policies.recipes import recipe_names, recipe_settings, recipe_title
from capo.policies.tokenizer import build_tokenizer

TINY: dict[str, Any] = {"steps": 3, "batch_size": 4, "sorted_batches": 2, "warmup_steps": 1}
TINY |= {"layers": 2, "hidden_size": 16, "intermediate_size": 24, "heads": 2}
TINY |= {"eval_problems": 4, "eval_k": 2, "learning_rate": 1e-2}
# What each family's head is, written down from its documentation.
TRAITS: dict[str, dict[str, float]] = {
    "qwen2": {},
    "llama": {},
    "gpt_neox": {},
    "gemma2": {"logit_softcap": 30.0},
    "cohere": {"logit_scale": 0.25},
}
TIED = {"gemma2", "cohere"}


def tiny(architecture: str) -> Policy:
    config = PretrainConfig.from_dict(TINY | {"architecture": architecture})
    tokenizer = build_tokenizer(config.positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = build_model(config, tokenizer).eval().double()
    with torch.no_grad():  # logits as large as a trained policy's
        model.get_output_embeddings().weight.mul_(60)
    return Policy(model=model, tokenizer=tokenizer, source=architecture)


def forward(policy: Policy, text: str, length: int) -> tuple[torch.Tensor, ...]:
    """Hidden states that predict the last tokens, these tokens, and the model's own logits there."""
    ids = policy.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad(), capture_hidden(policy.model) as passes:
        logits = policy.model(input_ids=ids).logits
    hidden = predicting_positions(torch.cat(passes), length)[0]
    return hidden, ids[0, -length:], logits[0, :-1][-length:]


def test_every_architecture_has_its_traits_here() -> None:
    assert set(TRAITS) == set(ARCHITECTURES)
    assert TRAITS["gemma2"]["logit_softcap"] == SOFTCAP
    assert TRAITS["cohere"]["logit_scale"] == LOGIT_SCALE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_curvature_of_a_real_forward_pass_is_the_oracles(architecture: str) -> None:
    policy = tiny(architecture)
    model = policy.model
    head = read_head(model, 1.0)
    tied = head.parameter is model.get_input_embeddings().weight
    assert tied == (architecture in TIED)
    hidden, tokens, logits = forward(policy, "37+58+26?37+58=95 95+26=121", 5)
    truth = oracle.Head(head.weight, **TRAITS[architecture])
    spread = logits.std(dim=-1).min()
    assert spread > 0.5  # the soft-cap and the scale matter
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3], dtype=torch.float64)
    for row in range(5):  # the oracle's policy is the model's
        torch.testing.assert_close(
            truth.log_policy(truth.weight, hidden[row]),
            torch.log_softmax(logits[row], 0),
            rtol=1e-9,
            atol=1e-9,
        )
    m, v = torch.randn_like(head.weight) * 1e-2, torch.rand_like(head.weight) * 1e-3
    steps = [
        (SGDStep(0.05), oracle.SGD(0.05)),
        (
            AdamStep(1e-2, (0.9, 0.999), 1e-8, m, v, 3),
            oracle.Adam(1e-2, exp_avg=m, exp_avg_sq=v, step=3),
        ),
    ]
    for ours, theirs in steps:
        judged = token_curvature(
            hidden, head.weight, tokens, advantages, step=ours, top_k=8, **head.logit_options
        )
        for row in range(5):
            said = oracle.judge_token(
                truth, hidden[row], int(tokens[row]), float(advantages[row]), theirs, top_k=8
            )
            for field, expected in (
                ("objective_shift", said.objective_shift),
                ("policy_shift", said.sampled_shift),
                ("s", said.s),
                ("variance", said.variance),
                ("log_prob", said.log_prob),
                ("entropy", said.entropy),
            ):
                torch.testing.assert_close(
                    getattr(judged, field)[row], expected, rtol=1e-7, atol=1e-10, msg=field
                )


@pytest.mark.parametrize("architecture", [name for name, traits in TRAITS.items() if traits])
def test_a_trait_that_is_overlooked_shows(architecture: str) -> None:
    """The planted fault of the test above: the head read without its soft-cap or its scale."""
    policy = tiny(architecture)
    head = read_head(policy.model, 1.0)
    hidden, tokens, _ = forward(policy, "37+58+26?37+58=95", 3)
    advantages = torch.ones(3, dtype=torch.float64)

    def judged(of: Any) -> torch.Tensor:
        return token_curvature(
            hidden, head.weight, tokens, advantages, step=SGDStep(0.05), **of.logit_options
        ).policy_shift

    plain = replace(head, logit_scale=1.0, logit_softcap=None)
    assert ((judged(head) - judged(plain)).abs() > 1e-3 * judged(head)).all()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_and_its_policy_is_judged(name: str, tmp_path: Path) -> None:
    config = PretrainConfig.from_dict(recipe_settings(name) | TINY)
    report = pretrain(config, tmp_path)
    assert len(report.losses) == 3
    policy = load_policy(tmp_path)
    assert policy.model.config.model_type == config.architecture
    assert len(policy.tokenizer) == (config.vocabulary or 64) == policy.model.config.vocab_size
    [problem] = task_of(config).eval_problems(1, 0)
    [[completion]] = sample_completions(policy, [problem.prompt], 1, 1.0, 8, seed=0)
    hidden, tokens, _ = forward(policy, problem.prompt + completion, 4)
    head = read_head(policy.model, 1.0)
    judged = token_curvature(
        hidden, head.weight, tokens, torch.ones(4), step=SGDStep(0.05), **head.logit_options
    )
    assert judged.policy_shift.isfinite().all()
    assert (judged.policy_shift > 0).all()
    assert json.loads((tmp_path / "recipe.json").read_text())["config"] == config.model_dump(
        mode="json"
    )


def test_recipes_cover_the_families_and_the_kinds_of_tasks() -> None:
    configs = {name: PretrainConfig.from_dict(recipe_settings(name)) for name in recipe_names()}
    assert {config.architecture for config in configs.values()} == set(ARCHITECTURES)
    datasets = {config.task.params.get("dataset") for config in configs.values()} - {None}
    assert len(datasets) >= 6
    assert PretrainConfig.from_toml("sums") == PretrainConfig()
    for name in configs:
        assert recipe_title(name).endswith(".")
    words = configs["gsm_symbolic"]
    assert words.vocabulary is not None
    assert words.vocabulary >= 1000


def test_unknown_recipe_has_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean 'spell_backward'"):
        recipe_settings("spell_backwards")
    with pytest.raises(InputError, match="recipes by name are aiw, "):
        PretrainConfig.from_toml("spell_backwards")
