"""Looking at the tokens of a run that selects none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from capo import InputError
from capo.integrations.trl import CAPOTrainer, TokenRecord

from . import trl_kit as kit

OWN: dict[str, Any] = {"moments": "optimizer", "curvature_top_k": None}


def watched(tmp_path: Path, steps: set[int], callback: Any = None, **settings: Any) -> Any:
    """A trainer that tells of these steps, and the records that it will tell of."""
    records: list[TokenRecord] = []

    class Watching(CAPOTrainer):
        def __init__(self, **kwargs: Any) -> None:
            told = [records.append, *([callback] if callback else [])]
            super().__init__(token_callbacks=told, token_watch=lambda step: step in steps, **kwargs)

    return kit.trainer(tmp_path, cls=Watching, **{**OWN, **settings}), records


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"trust_region": "auto", "num_iterations": 2},
        {"trust_region": {"policy_shift": 1e-3, "step_length": "quadratic"}},
        {"optim": "sgd", "step_model": "sgd"},
        {"advantage_baseline": "none", "bf16": True},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()) or "grpo",
)
def test_watching_changes_no_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"max_steps": 4, **settings}
    plain = kit.trainer(tmp_path / "plain", **settings)
    plain.train()
    instance, records = watched(tmp_path / "watched", {0, 2}, **settings)
    instance.train()
    kit.assert_same_weights(kit.weights(plain), kit.weights(instance))
    assert {record.step for record in records} == {0, 2}
    timing = ("time", "per_second", "runtime")
    one, other = (
        [
            {k: repr(v) for k, v in row.items() if not any(t in k for t in timing)}
            for row in trainer.state.log_history
        ]
        for trainer in (plain, instance)
    )
    assert one == other  # no metric is added either
    for record in records:
        assert (record.weight[record.mask] == 1).all()
        assert (record.reason[record.mask] == 0).all()
        assert (record.policy_shift[record.mask] > 0).any()


def test_shifts_are_those_of_the_optimizers_own_step(tmp_path: Path) -> None:
    """From the definition, in float64: Δ of Adam for one token's gradient, u = Δh, s = w·u."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def compare(record: TokenRecord) -> None:
        head = instance.model.lm_head.weight
        group = instance.optimizer.param_groups[0]
        state = instance.optimizer.optimizer.state[head]
        (beta1, beta2), t = group["betas"], int(state["step"]) + 1
        ids = torch.cat([record.prompt_ids, record.token_ids], 1)
        attention = torch.cat([record.prompt_mask, record.mask], 1).long()
        with torch.no_grad():
            hidden = instance.model.model(ids, attention).last_hidden_state
        hidden = hidden[:, record.prompt_ids.size(1) - 1 : -1].double()
        for b, i in record.mask.nonzero().tolist():
            h, weight = hidden[b, i], head.detach().double()
            w = -torch.softmax(weight @ h, 0)
            w[record.token_ids[b, i]] += 1
            g = record.advantage[b, i].double() * torch.outer(w, h)
            m = beta1 * -state["exp_avg"].double() + (1 - beta1) * g
            v = beta2 * state["exp_avg_sq"].double() + (1 - beta2) * g**2
            corrected = m / (1 - beta1**t)
            delta = group["lr"] * corrected / ((v / (1 - beta2**t)).sqrt() + group["eps"])
            s = w @ (delta @ h)
            found.append((record.policy_shift[b, i], 0.5 * s**2))

    instance, _ = watched(tmp_path, {2}, compare, max_steps=3)
    instance.train()
    ours, defined = (torch.stack(values).double() for values in zip(*found, strict=True))
    assert len(ours) > 8
    torch.testing.assert_close(ours, defined, rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize("baseline", ["group", "none"])
def test_every_completion_has_its_own_reward(tmp_path: Path, baseline: str) -> None:
    """Through TRL's shuffling and splitting of a generation batch."""
    settings = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    instance, records = watched(tmp_path, {0, 1}, advantage_baseline=baseline, **settings)
    instance.train()
    tokenizer, seen = instance.processing_class, set()
    assert len(records) == 4
    for record in records:
        texts = tokenizer.batch_decode(
            [ids[mask] for ids, mask in zip(record.token_ids, record.mask, strict=True)],
            skip_special_tokens=True,
        )
        expected = torch.tensor(kit.reward(texts))
        torch.testing.assert_close(record.reward, expected)
        seen |= set(expected.tolist())
        if baseline == "none":
            torch.testing.assert_close(record.advantage[:, 0], record.reward)
    assert len(seen) > 2


def test_a_reward_that_nobody_computed_is_not_a_number(tmp_path: Path) -> None:
    instance, records = watched(tmp_path, {0})
    kit.ready(instance).create_optimizer()
    instance._compute_loss(instance.model, kit.micro_batch(instance))
    assert records[0].reward.isnan().all()


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"moments: must be 'optimizer' with token_watch"):
        watched(tmp_path, {0}, moments="simulated")
    with pytest.raises(InputError, match=r"token_watch: needs args to be a CAPOConfig"):
        CAPOTrainer(
            model=kit.policy(),
            reward_funcs=kit.reward,
            args=kit.arguments(GRPOConfig, tmp_path),
            train_dataset=kit.dataset(),
            processing_class=kit.tokenizer(),
            token_watch=lambda step: True,
        )


def test_a_run_that_selects_tells_every_step(tmp_path: Path) -> None:
    instance, records = watched(tmp_path, {1}, selection={"policy_shift": 1e-6}, max_steps=3)
    instance.train()
    assert [record.step for record in records] == [0, 1, 2]
    assert any(float(r.weight[r.mask].min()) == 0 for r in records)
