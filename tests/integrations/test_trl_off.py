"""With selection off, CAPOTrainer is GRPOTrainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from capo.integrations.trl import CAPOTrainer

from . import trl_kit as kit


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"importance_sampling_level": "sequence", "steps_per_generation": 2},
    ],
    ids=["grpo", "iterated dapo", "sequence level"],
)
def test_off_is_grpo_bit_for_bit(tmp_path: Path, overrides: dict[str, object]) -> None:
    weights, histories = [], []
    for cls in (GRPOTrainer, CAPOTrainer):
        instance = kit.trainer(tmp_path / cls.__name__, cls=cls, **overrides)
        before = kit.weights(instance)
        instance.train()
        weights.append(kit.weights(instance))
        histories.append(instance.state.log_history)
        assert any(not torch.equal(before[n], weights[-1][n]) for n in before)
    kit.assert_same_weights(*weights)
    timing = ("time", "per_second", "runtime")
    stock, ours = (
        [{k: v for k, v in row.items() if not any(t in k for t in timing)} for row in history]
        for history in histories
    )
    assert ours == stock


def test_plain_grpo_config_selects_nothing(tmp_path: Path) -> None:
    instance = kit.trainer(tmp_path, config=GRPOConfig, max_steps=1)
    instance.train()
    assert not any(key.startswith("capo/") for row in instance.state.log_history for key in row)
