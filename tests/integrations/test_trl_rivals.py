"""Rules of others inside TRL: what they leave of the gradient, and that ratios do nothing at 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import trl_kit as kit

MEAN = {"loss_type": "grpo"}
TOKENS = {"loss_type": "dapo"}
RATIO_RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip 0.2": ({"epsilon": 0.2}, MEAN),
    "clip 0.02": ({"epsilon": 0.02}, MEAN),
    "clip 0.002": ({"epsilon": 0.002}, MEAN),
    "clip-higher": ({"epsilon": 0.2, "epsilon_high": 0.28}, MEAN),
    "two-sided": ({"epsilon": 0.2, "delta": 2.0}, MEAN),
    "gspo": ({"epsilon": 3e-4, "importance_sampling_level": "sequence"}, MEAN),
    "sapo": ({"loss_type": "sapo"}, MEAN),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, TOKENS),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, TOKENS),
}


def trained(path: Path, **settings: Any) -> torch.Tensor:
    """All weights after three steps of SGD, in which a gradient's size is seen."""
    instance = kit.trainer(path, optim="sgd", learning_rate=0.05, max_grad_norm=0.0, **settings)
    instance.train()
    return torch.cat([p.detach().flatten() for p in instance.model.parameters()])


@pytest.mark.parametrize("name", RATIO_RULES)
def test_on_policy_every_ratio_rule_is_grpo(tmp_path: Path, name: str) -> None:
    """With the loss's own normalisation held alike; off-policy, at three passes, they are not."""
    settings, normalisation = RATIO_RULES[name]
    plain = trained(tmp_path / "plain", epsilon=0.2, **normalisation)
    rule = trained(tmp_path / "rule", **{**normalisation, **settings})
    torch.testing.assert_close(rule, plain, rtol=0, atol=1e-6)
    start = torch.cat([p.detach().flatten() for p in kit.policy().parameters()])
    assert (plain - start).abs().max() > 1e-3  # something was learned at all


@pytest.mark.parametrize("name", ["clip 0.002", "gspo", "sapo", "cispo"])
def test_off_policy_ratio_rules_differ(tmp_path: Path, name: str) -> None:
    settings, normalisation = RATIO_RULES[name]
    plain = trained(tmp_path / "plain", epsilon=0.2, num_iterations=3, **normalisation)
    rule = trained(tmp_path / "rule", num_iterations=3, **{**normalisation, **settings})
    assert (rule - plain).abs().max() > 1e-4


def step_weights(path: Path, rule: dict[str, Any], **settings: Any) -> tuple[Any, list[Any]]:
    records: list[Any] = []
    instance = kit.trainer(
        path, selection=rule, curvature_top_k=None, token_callbacks=[records.append], **settings
    )
    instance.train()
    return instance, records


def test_lopti_splits_a_batch_between_its_two_passes(tmp_path: Path) -> None:
    _, records = step_weights(
        tmp_path, {"rule": "lopti", "probability": 0.1}, num_iterations=2, max_steps=4
    )
    for first, second in (records[0:2], records[2:4]):
        assert torch.equal(first.token_ids, second.token_ids)
        assert torch.equal(first.weight + second.weight, first.mask.float())
        unlikely = (first.log_prob.exp() <= 0.1) & first.mask
        assert torch.equal(first.weight, unlikely.float())
        assert unlikely.any()


def test_gtpo_sees_the_groups_of_the_batch(tmp_path: Path) -> None:
    _, records = step_weights(tmp_path, {"rule": "gtpo", "max_entropy": 100.0}, max_steps=6)
    weights = torch.cat([record.weight[record.mask] for record in records])
    assert set(weights.tolist()) >= {0.0, 1.0, 2.0}
    seen = 0
    for record in records:
        first = record.weight[:, 0]
        signs = record.advantage[:, 0].sign()
        for i in range(8):
            same = [
                j
                for j in range(8)
                if torch.equal(record.prompt_ids[i], record.prompt_ids[j])
                and record.token_ids[j, 0] == record.token_ids[i, 0]
            ]
            conflict = {1.0, -1.0} <= {float(signs[j]) for j in same} and signs[i] != 0
            if conflict:
                assert first[i] == 0 if signs[i] < 0 else first[i] >= 2
                seen += 1
    assert seen > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_kl_cov_adds_the_gradient_of_its_penalty(tmp_path: Path, accumulation: int) -> None:
    """Against autograd: GRPO's loss plus the penalty on every token, normalised as the loss is."""
    settings = {"gradient_accumulation_steps": accumulation, "epsilon": 100.0}
    rule = {"rule": "kl_cov", "share": 1.0, "coefficient": 0.3}
    instance = kit.trainer(tmp_path / "a", selection=rule, curvature_top_k=None, **settings)
    instance = kit.ready(instance, accumulation)
    instance.create_optimizer()
    inputs = kit.micro_batch(instance, off_policy=0.3, seed=3)
    instance._compute_loss(instance.model, dict(inputs)).backward()
    got = instance.model.lm_head.weight.grad.clone()

    plain = kit.ready(kit.trainer(tmp_path / "b", selection=None, **settings), accumulation)
    plain.create_optimizer()
    loss = plain._compute_loss(plain.model, dict(inputs))
    mask = inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
    log_prob = plain._get_per_token_logps_and_entropies(plain.model, ids, attention, mask.size(1))[
        0
    ]
    distance = (log_prob - inputs["old_per_token_logps"]).abs() * mask
    penalty = (distance.sum(-1) / mask.sum(-1)).mean() / accumulation
    (loss + 0.3 * penalty).backward()
    torch.testing.assert_close(got, plain.model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    assert float(penalty.detach()) > 0


@pytest.mark.parametrize("rule", ["gtpo", "stapo", "reweight", "clip_cov", "kl_cov", "same_rate"])
def test_rules_train(tmp_path: Path, rule: str) -> None:
    instance, records = step_weights(tmp_path, {"rule": rule}, num_iterations=2, max_steps=4)
    assert len(records) == 4
    assert all(bool(torch.isfinite(parameter).all()) for parameter in instance.model.parameters())
