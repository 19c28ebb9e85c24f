"""Completions from vLLM: judged with TRL's correction, sent the weights of finished steps only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from capo.integrations._trl_judge import PolicyPass
from capo.integrations.trl import CAPOTrainer

from . import trl_kit as kit
from . import vllm_kit

BOTH: dict[str, Any] = {
    "selection": {"rule": "quantile", "policy_shift": 0.8},
    "trust_region": {"policy_shift": 1e-3},
    "curvature_top_k": 8,
    "learning_rate": 0.1,
}
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOSSES = ("dapo", "dr_grpo", "bnpo", "cispo", "sapo")


class Weights(TrainerCallback):
    """The policy's weights after every step."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.after = [self.now()]

    def now(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.policy.named_parameters()}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after.append(self.now())


def served_trainer(output: Path, **settings: Any) -> Any:
    with vllm_kit.served():
        return kit.trainer(output, **vllm_kit.SETTINGS, **settings)


def test_the_server_is_sent_the_weights_of_finished_steps_only(tmp_path: Path) -> None:
    instance = served_trainer(tmp_path, **BOTH, num_iterations=2, max_steps=4)
    weights = Weights(instance.model)
    instance.add_callback(weights)
    instance.train()
    server = instance.vllm_generation.vllm_client
    assert server.sampled == 2 * 8
    assert len(server.received) == 2
    for received, step in zip(server.received, (0, 2), strict=True):
        kit.assert_same_weights(received, weights.after[step])
    log = [row for row in instance.state.log_history if "loss" in row]
    assert all(0 < row["capo/trust/scale"] < 1 for row in log)
    assert all(0 < row["capo/rejection_rate"] < 1 for row in log)
    assert log[0]["sampling/importance_sampling_ratio/max"] > 1.0


def corrections(
    logs: torch.Tensor, mask: torch.Tensor, mode: str, least: float, most: float
) -> Any:
    """TRL's factor, as its documentation says it: π / π_vLLM, of tokens or sequences, bounded."""
    ratio = (logs * mask).exp() if mode.startswith("token") else (logs * mask).sum(1).exp()[:, None]
    if mode.endswith("truncate"):
        return ratio.clamp(least, most)
    return torch.where((ratio < least) | (ratio > most), 0.0, ratio)


@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [*((mode, "grpo") for mode in MODES), *(("token_truncate", loss) for loss in LOSSES)],
)
def test_a_token_is_judged_by_its_advantage_times_the_correction(
    tmp_path: Path, mode: str, loss_type: str
) -> None:
    least, most = 0.6, 1.4
    instance = served_trainer(
        tmp_path,
        selection={},
        curvature_top_k=8,
        loss_type=loss_type,
        epsilon_high=5.0,  # of CISPO a bound on the ratio itself
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=least,
        vllm_importance_sampling_clip_max=most,
        max_steps=1,
    )
    seen: list[tuple[PolicyPass, dict[str, Any], torch.Tensor]] = []
    judge, compute = instance._judge.judge, instance._compute_loss
    current: dict[str, Any] = {}

    def computing(model: Any, inputs: dict[str, Any]) -> Any:
        current["inputs"] = inputs
        return compute(model, inputs)

    def judging(policy_pass: PolicyPass, *args: Any) -> Any:
        inputs = current["inputs"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = kit.causal_logits(instance.model, ids, attention)
        width = inputs["completion_ids"].size(1)
        scores = torch.log_softmax(logits[:, -width - 1 : -1], -1)
        own = scores.gather(-1, inputs["completion_ids"][..., None])[..., 0]
        seen.append((policy_pass, inputs, own))
        return judge(policy_pass, *args)

    instance._compute_loss, instance._judge.judge = computing, judging
    instance.train()
    ((policy_pass, inputs, own),) = seen
    mask = inputs["completion_mask"]
    factor = corrections(own - inputs["sampling_per_token_logps"], mask, mode, least, most)
    expected = (inputs["advantages"][:, None] * factor).expand_as(mask)
    counted = mask.bool()
    torch.testing.assert_close(
        policy_pass.effective_advantage[counted], expected[counted], rtol=2e-4, atol=1e-6
    )
    factors = factor.expand_as(mask)[counted]
    assert (factors == (0.0 if mode.endswith("mask") else most)).any()  # some are out of bounds
    assert ((factors > least) & (factors < most)).any()


def test_off_is_the_stock_trainer_bit_for_bit(tmp_path: Path) -> None:
    weights, losses = [], []
    for cls in (GRPOTrainer, CAPOTrainer):
        instance = served_trainer(tmp_path / cls.__name__, cls=cls, max_steps=3)
        instance.train()
        weights.append(kit.weights(instance))
        losses.append([row.get("loss") for row in instance.state.log_history])
    kit.assert_same_weights(*weights)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss_type", ["vespo", "luspo"])
def test_sequence_losses_train_with_the_correction(tmp_path: Path, loss_type: str) -> None:
    extra = {"vespo": {"vllm_importance_sampling_mode": "token_truncate"}}.get(
        loss_type, {"importance_sampling_level": "sequence"}
    )
    instance = served_trainer(tmp_path, **BOTH, loss_type=loss_type, max_steps=2, **extra)
    before = kit.weights(instance)
    instance.train()
    after = kit.weights(instance)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
