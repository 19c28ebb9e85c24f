"""ReinCAPO's advantages: the reward itself, neither centred nor scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import trl_kit as kit


def half(completions: list[str], **_: Any) -> list[float | None]:
    """A second reward, which declines to score completions that begin with a 1."""
    return [None if c.startswith("1") else float(len(c)) for c in completions]


@pytest.mark.parametrize("selection", [None, "reincapo"])
def test_advantage_is_the_weighted_reward(tmp_path: Path, selection: str | None) -> None:
    captured: list[dict[str, Any]] = []
    instance = kit.trainer(
        tmp_path,
        rewards=[kit.reward, half],
        reward_weights=[1.0, 0.25],
        advantage_baseline="none",
        selection=selection,
        curvature_top_k=8,
        max_steps=2,
        gradient_accumulation_steps=2,
    )
    inner = instance._compute_loss

    def spy(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        captured.append(inputs)
        return inner(model, inputs)

    instance._compute_loss = spy
    instance.train()
    assert len(captured) == 4
    for inputs in captured:
        texts = [
            instance.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
            for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        ]
        scores = zip(kit.reward(texts), half(texts), strict=True)
        expected = torch.tensor([a + 0.25 * (b or 0.0) for a, b in scores])
        torch.testing.assert_close(inputs["advantages"], expected)
    # What is logged with the completions is what was used.
    logged = list(instance._logs["advantages"])
    assert sorted(logged) == pytest.approx(
        sorted(torch.cat([i["advantages"] for i in captured[-2:]]).tolist())
    )


def test_group_baseline_is_left_to_trl(tmp_path: Path) -> None:
    instance = kit.trainer(tmp_path, max_steps=1)
    instance.train()
    assert sum(instance._logs["advantages"]) == pytest.approx(0.0, abs=1e-3)
