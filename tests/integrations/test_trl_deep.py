"""Tokens judged, and lengths chosen, by the real step at full depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from capo.integrations._trl_deep import Quadratic, _halves
from capo.integrations.trl import TokenRecord

from . import trl_kit as kit

WATCH: dict[str, Any] = {"selection": {"denominator": "all"}, "curvature_top_k": 8}


def shifts_of_the_real_step(tmp_path: Path, **overrides: Any) -> tuple[Any, list[TokenRecord]]:
    records: list[TokenRecord] = []
    instance = kit.trainer(
        tmp_path, token_callbacks=[records.append], max_steps=1, **WATCH, **overrides
    )
    instance.train()
    return instance, records


@pytest.mark.parametrize("depth", ["all", 2])
def test_full_depth_foresees_what_the_step_does(tmp_path: Path, depth: int | str) -> None:
    """A step small enough for second order: ½ Var u against the KL of the step that was taken."""
    before = kit.policy()
    instance, (record,) = shifts_of_the_real_step(
        tmp_path, depth=depth, learning_rate=1e-4, model=kit.policy()
    )
    ids = torch.cat([record.prompt_ids, record.token_ids], 1)
    attention = torch.cat([record.prompt_mask.long(), record.mask.long()], 1)
    width = record.token_ids.size(1)

    def log_probs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = model.double()(input_ids=ids, attention_mask=attention).logits
        return torch.log_softmax(logits[:, -width - 1 : -1], -1)[record.mask]

    old, new = log_probs(before), log_probs(instance.model)
    truth = (old.exp() * (old - new)).sum(-1)
    found = record.policy_shift[record.mask].double()
    if depth == "all":
        torch.testing.assert_close(found, truth, rtol=0.05, atol=1e-3 * float(truth.max()))
    else:  # both layers, but not the embedding: not the whole step
        assert torch.corrcoef(torch.stack([found.log(), truth.log()]))[0, 1] > 0.5


def test_a_clipped_token_has_no_objective_at_depth(tmp_path: Path) -> None:
    """Ratio and clipping enter at depth as they do at the head: both are of the loss's own gradient."""
    records: list[TokenRecord] = []
    instance = kit.trainer(tmp_path, token_callbacks=[records.append], depth="all", **WATCH)
    instance.create_optimizer()
    inputs = kit.micro_batch(instance, off_policy=0.5)
    loss = instance._compute_loss
    kit.ready(instance)
    loss(instance.model, inputs)
    (record,) = records
    ratio = (record.log_prob - inputs["old_per_token_logps"].cpu()).exp()
    up = record.advantage > 0
    clipped = record.mask & torch.where(up, ratio > 1.2, ratio < 0.8)
    acting = record.mask & ~clipped
    assert clipped.any()
    assert acting.any()
    assert (record.objective_shift[clipped] == 0).all()
    assert (record.objective_shift[acting] != 0).all()
    assert (record.policy_shift[record.mask] > 0).all()  # the step moves it all the same


def test_judging_at_depth_changes_no_weight(tmp_path: Path) -> None:
    stock = kit.trainer(tmp_path / "stock", cls=GRPOTrainer, max_steps=2)
    stock.train()
    judged = kit.trainer(tmp_path / "judged", depth="all", max_steps=2, **WATCH)
    judged.train()
    kit.assert_same_weights(kit.weights(stock), kit.weights(judged))


def test_tokens_are_rejected_by_the_real_step(tmp_path: Path) -> None:
    own, (by_own,) = shifts_of_the_real_step(tmp_path / "own")
    deep, (by_real,) = shifts_of_the_real_step(tmp_path / "deep", depth="all")
    assert not torch.allclose(by_own.policy_shift, by_real.policy_shift)
    bound = float(by_real.policy_shift[by_real.mask].median())
    instance = kit.trainer(
        tmp_path / "cut",
        selection={"policy_shift": bound},
        depth="all",
        max_steps=1,
        curvature_top_k=8,
    )
    instance.train()
    (rate,) = [
        row["capo/rejection_rate"]
        for row in instance.state.log_history
        if "capo/rejection_rate" in row
    ]
    assert 0.3 < rate < 0.7
    del own, deep


def test_the_maximiser_of_a_quadratic() -> None:
    assert Quadratic(2.0, -0.5).maximiser == 2.0
    assert Quadratic(2.0, 0.5).maximiser == math.inf
    assert Quadratic(-1.0, -1.0).maximiser == 0.0
    assert Quadratic(-1.0, 1.0).maximiser == 0.0


def test_halves_keep_prompts_whole() -> None:
    prompts = torch.arange(5).repeat_interleave(3)[:, None]
    first, second = _halves(prompts, torch.Generator().manual_seed(0))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(15))
    assert not set(prompts[first, 0].tolist()) & set(prompts[second, 0].tolist())
    one = torch.zeros(6, 1, dtype=torch.long)
    assert [half.numel() for half in _halves(one, torch.Generator().manual_seed(0))] == [3, 3]


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_the_quadratic_shortens_and_never_lengthens(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    region = {"policy_shift": 5e-2, "sequences": None, "cruise": 1.0}
    rows = {}
    for rule in ("radius", "quadratic"):
        instance = kit.trainer(
            tmp_path / rule,
            trust_region={**region, "step_length": rule},
            learning_rate=1e-1,
            max_steps=3,
            **settings,
        )
        instance.train()
        rows[rule] = [r for r in instance.state.log_history if "capo/trust/scale" in r]
    first = [rows[rule][0] for rule in ("radius", "quadratic")]
    assert first[1]["capo/trust/scale"] <= first[0]["capo/trust/scale"] * (1 + 1e-6)
    found = [r["capo/trust/maximiser"] for r in rows["quadratic"] if "capo/trust/maximiser" in r]
    assert found
    for row in rows["quadratic"]:
        limit = row.get("capo/trust/maximiser", math.inf)
        if limit >= 0.1 * row["capo/trust/scale"] and limit < math.inf:
            assert row["capo/trust/scale"] <= max(limit, 0.1) * (1 + 1e-6)
        assert row["capo/trust/measured_policy_shift"] <= 5e-2 * 1.05


def test_the_cross_validated_slope_is_not_flattered(tmp_path: Path) -> None:
    """With rewards that are noise a batch's own slope along its step is large; the other half's is not."""
    import random

    rng = random.Random(0)

    def noise(completions: list[str], **_: Any) -> list[float]:
        return [rng.random() for _ in completions]

    own, crossed = [], []
    instance = kit.trainer(
        tmp_path,
        rewards=noise,
        trust_region={"step_length": "quadratic", "sequences": None},
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        max_steps=8,
    )
    assert instance._control is not None
    collect = instance._control.collect

    def keep(*args: Any, deep: Any, **kwargs: Any) -> None:
        everything = torch.arange(deep.mask.size(0))
        step = deep._step(None)
        ((_, probe),) = deep._probes(everything, step)
        found = probe.along("all")
        own.append(float((probe.reference.advantages * found.log_ratio).sum()))
        crossed.append(deep.quadratic("all", torch.Generator().manual_seed(0)).slope)
        collect(*args, deep=deep, **kwargs)

    instance._control.collect = keep
    instance.train()
    assert all(slope > 0 for slope in own)
    assert abs(sum(crossed)) < 0.5 * sum(own)
