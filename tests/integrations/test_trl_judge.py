"""Judging inside training: steps, moments, metrics and records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

import capo
from capo.integrations._trl_head import read_head
from capo.integrations._trl_loss import LOSS_TYPES
from capo.integrations._trl_step import unwrapped_optimizer
from capo.integrations.trl import CAPOTrainer, TokenRecord

from . import trl_kit as kit

WATCH: dict[str, Any] = {"selection": {}, "curvature_top_k": None}  # judged, everything accepted
STRICT: dict[str, Any] = {"selection": {"objective_shift": [-0.15, 0.15], "denominator": "all"}}


def random_half(_: capo.TokenCurvature, mask: torch.Tensor) -> capo.Selection:
    """A rule that rejects whatever the shifts; sequences are renormalised over what they keep."""
    weights = (torch.rand(mask.shape) < 0.5).float() * mask
    rate = 1 - weights.sum() / mask.sum()
    return capo.Selection(weights, torch.zeros_like(mask).char(), rate, {}, "kept")


def head_state(instance: Any) -> dict[str, torch.Tensor]:
    optimizer = unwrapped_optimizer(instance.optimizer)
    state: dict[str, torch.Tensor] = optimizer.state[instance.model.lm_head.weight]
    return state


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 0.05},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "loss_type": "dapo"},
        {"temperature": 0.7, "loss_type": "dr_grpo"},
        {"importance_sampling_level": "sequence", "num_iterations": 3, "loss_type": "grpo"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_steps": 5},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()),
)
def test_simulated_moments_are_the_optimizers_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    """An untied head, nothing rejected: the simulation and AdamW see the same gradient."""
    instance = kit.trainer(tmp_path, **WATCH, **settings)
    instance.train()
    moments, real = instance._judge.step_model.moments, head_state(instance)
    assert real["exp_avg"].abs().max() > 0
    assert moments.step == int(real["step"]) == instance.state.global_step
    for name in ("exp_avg", "exp_avg_sq"):
        simulated = getattr(moments, name)
        atol = float(2e-5 * real[name].abs().max())
        torch.testing.assert_close(simulated, real[name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulated_gradient_is_the_heads(tmp_path: Path, loss_type: str, level: str) -> None:
    """Off-policy, with rejections, over two micro-batches: what the real head receives."""
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
    }
    instance = kit.ready(kit.trainer(tmp_path, **WATCH, **settings), 2)
    instance.create_optimizer()
    instance._judge.rule = random_half
    for seed in (3, 4):
        inputs = kit.micro_batch(instance, off_policy=0.3, seed=seed)
        instance._compute_loss(instance.model, inputs).backward()
    assert all(0.2 < rate < 0.8 for rate in instance._metrics["train"]["capo/rejection_rate"])
    real, simulated = instance.model.lm_head.weight.grad, instance._judge.step_model.moments.grad
    atol = float(2e-6 * real.abs().max())
    torch.testing.assert_close(simulated, real, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"activation_checkpointing": True, "cast_lm_head_to_fp32": True},
        {"entropy_coef": 0.01, "top_entropy_quantile": 0.5, "mask_truncated_completions": True},
        {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1, "delta": 2.0},
    ],
    ids=["grpo", "iterated dapo", "bf16", "checkpointed", "entropy", "off-policy mask"],
)
def test_accepting_everything_is_grpo_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Judging reads and never touches: neither the gradients nor the random numbers."""
    results = []
    for cls, selection in ((GRPOTrainer, {}), (CAPOTrainer, {"selection": {}})):
        options = {**selection, **({"curvature_top_k": 8} if selection else {})}
        instance = kit.trainer(tmp_path, cls=cls, **options, **settings)
        instance.train()
        results.append(kit.weights(instance))
    kit.assert_same_weights(*results)


def test_rejection_changes_the_weights(tmp_path: Path) -> None:
    results = []
    for options in ({}, {**STRICT, "curvature_top_k": 8}):
        instance = kit.trainer(tmp_path, **options)
        instance.train()
        results.append(kit.weights(instance))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_optimizer_moments_are_read_with_the_learning_rate_of_the_step(tmp_path: Path) -> None:
    seen: list[tuple[float, Any]] = []
    instance = kit.trainer(
        tmp_path,
        model=kit.policy(tied=True),
        **WATCH,
        moments="optimizer",
        adam_beta1=0.7,
        adam_epsilon=1e-5,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_steps=4,
    )
    build = instance._judge.step_model.step

    def spy(*args: Any) -> Any:
        step = build(*args)
        seen.append((instance.lr_scheduler.get_last_lr()[0], step))
        return step

    instance._judge.step_model.step = spy
    instance.train()
    assert [step.step for _, step in seen] == [0, 1, 2, 3]
    assert [step.lr for _, step in seen] == [lr for lr, _ in seen]
    assert len({step.lr for _, step in seen}) > 1
    assert seen[0][1].exp_avg is None  # before the first step the optimizer has no state
    last = seen[-1][1]
    assert (last.betas, last.eps, last.weight_decay) == ((0.7, 0.999), 1e-5, 0.1)
    # Read in place, not copied; with tied embeddings this is the embedding's state as well.
    real = unwrapped_optimizer(instance.optimizer).state[instance.model.lm_head.weight]
    assert last.exp_avg is real["exp_avg"]
    assert instance._judge.step_model.moments is None


def test_sgd_step_model(tmp_path: Path) -> None:
    instance = kit.trainer(tmp_path, **WATCH, step_model="sgd", optim="sgd", learning_rate=0.1)
    instance.train()
    step = instance._judge.step_model.step(read_head(instance.model, 1.0), instance._engine())
    assert step == capo.SGDStep(0.1)
    assert instance._judge.step_model.state_dict() is None


def test_tokens_of_vllm_are_judged_with_trls_correction(tmp_path: Path) -> None:
    records: list[TokenRecord] = []
    instance = kit.trainer(
        tmp_path, **WATCH, step_model="sgd", optim="sgd", token_callbacks=[records.append]
    )
    instance.create_optimizer()
    inputs = kit.micro_batch(kit.ready(instance))
    instance._compute_loss(instance.model, inputs)
    instance.use_vllm = True  # as far as the loss is concerned
    ratio = torch.full(inputs["completion_mask"].shape, 0.5)
    instance._compute_loss(instance.model, {**inputs, "importance_sampling_ratio": ratio})
    plain, corrected = records
    counted = plain.mask & (plain.advantage != 0)
    torch.testing.assert_close(
        corrected.policy_shift[counted], 0.25 * plain.policy_shift[counted], rtol=1e-4, atol=0
    )
    assert (plain.policy_shift[counted] > 0).any()


def test_an_optimizer_whose_epsilon_is_no_number(tmp_path: Path) -> None:
    """Adafactor keeps a pair of another meaning under that name: Adam's own is used."""
    instance = kit.trainer(tmp_path, **WATCH, optim="adafactor")
    instance.train()
    model = instance._judge.step_model
    assert model.moments.adam_step(1.0).eps == instance.args.adam_epsilon


def test_frozen_head_is_judged_by_its_simulated_step(tmp_path: Path) -> None:
    model = kit.policy()
    model.lm_head.weight.requires_grad_(False)
    instance = kit.trainer(tmp_path, model=model, **WATCH)
    instance.train()
    assert instance._judge.step_model.moments.step == 3


METRICS = (
    "rejection_rate",
    "rejection_rate/policy_shift",
    "rejection_rate/objective_low",
    "rejection_rate/objective_high",
    "policy_shift/p50",
    "policy_shift/p90",
    "policy_shift/p99",
    "policy_shift/max",
    "objective_shift/p01",
    "objective_shift/p50",
    "objective_shift/p99",
    "batch/policy_shift",
    "batch/objective_shift",
    "tokens",
)


def test_metrics_and_records_agree(tmp_path: Path) -> None:
    records: list[TokenRecord] = []
    instance = kit.trainer(
        tmp_path,
        selection={"policy_shift": 0.002, "objective_shift": [-0.05, 0.1]},
        curvature_top_k=8,
        token_callbacks=[records.append],
    )
    instance.train()
    rows = [row for row in instance.state.log_history if "capo/tokens" in row]
    assert len(rows) == len(records) == 3
    assert [record.step for record in records] == [0, 1, 2]
    for row, record in zip(rows, records, strict=True):
        assert {f"capo/{name}" for name in METRICS} <= row.keys()
        assert all(math.isfinite(row[f"capo/{name}"]) for name in METRICS)
        mask = record.mask
        assert row["capo/tokens"] == mask.sum()
        reasons = record.reason[mask]
        assert row["capo/rejection_rate"] == pytest.approx(float((reasons > 0).float().mean()))
        for reason, name in ((1, "policy_shift"), (2, "objective_low"), (3, "objective_high")):
            rate = row[f"capo/rejection_rate/{name}"]
            assert rate == pytest.approx(float((reasons == reason).float().mean()))
        assert row["capo/policy_shift/max"] == pytest.approx(float(record.policy_shift.max()))
        kept = (record.policy_shift <= 0.002) & (record.objective_shift <= 0.1)
        kept &= (record.objective_shift >= -0.05) & mask
        assert torch.equal(kept.float(), record.weight)
        assert (record.log_prob[mask] < 0).all()
        assert row["entropy"] == pytest.approx(float(record.entropy[mask].mean()), rel=1e-4)
        assert record.advantage.shape == record.token_ids.shape == mask.shape == (8, mask.size(1))
        assert record.prompt_ids.shape == record.prompt_mask.shape
    assert any(row["capo/rejection_rate"] > 0 for row in rows)


def test_shifts_are_those_of_the_core_on_the_trainers_tokens(tmp_path: Path) -> None:
    records: list[TokenRecord] = []
    instance = kit.ready(kit.trainer(tmp_path, **WATCH, token_callbacks=[records.append]))
    instance.create_optimizer()
    inputs = kit.micro_batch(instance)
    instance._compute_loss(instance.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].size(1)
    with torch.no_grad():
        hidden = instance.model.model(ids, attention_mask=attention).last_hidden_state
        expected = capo.token_curvature(
            hidden[:, -width - 1 : -1],
            instance.model.lm_head.weight,
            inputs["completion_ids"],
            inputs["advantages"][:, None],
            step=capo.AdamStep(1e-2, (0.9, 0.999), 1e-8, None, None, 0),
            mask=inputs["completion_mask"].bool(),
        )
    (record,) = records
    for name in ("objective_shift", "policy_shift", "log_prob", "entropy"):
        torch.testing.assert_close(
            getattr(record, name), getattr(expected, name), rtol=1e-3, atol=1e-5
        )


def test_records_outlive_the_trainers_buffers(tmp_path: Path) -> None:
    records: list[TokenRecord] = []
    instance = kit.ready(kit.trainer(tmp_path, **WATCH, token_callbacks=[records.append]))
    instance.create_optimizer()
    inputs = kit.micro_batch(instance)
    instance._compute_loss(instance.model, inputs)
    before = records[0].token_ids.clone()
    inputs["completion_ids"].zero_()
    assert torch.equal(records[0].token_ids, before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batch_shift_is_that_of_the_step_taken(tmp_path: Path, accumulation: int) -> None:
    """SGD on the head alone: the predicted mean shift is the real one to second order."""
    model = kit.policy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    records: list[TokenRecord] = []
    instance = kit.trainer(
        tmp_path,
        model=model,
        token_callbacks=[records.append],
        **STRICT,
        curvature_top_k=None,
        fisher="exact",
        step_model="sgd",
        optim="sgd",
        learning_rate=0.02,
        gradient_accumulation_steps=accumulation,
    )
    kit.ready(instance, accumulation).create_optimizer()
    inputs = kit.micro_batch(instance)
    before_loss = [instance._compute_loss(model, inputs) for _ in range(accumulation)]
    sum(before_loss).backward()
    metrics = {name: values[0] for name, values in instance._metrics["train"].items()}
    before = log_policy(model, inputs)
    with torch.no_grad():
        model.lm_head.weight.sub_(0.02 * model.lm_head.weight.grad)
    after, mask = log_policy(model, inputs), inputs["completion_mask"].bool()
    kl = (before.exp() * (before - after)).sum(-1)[mask].mean()
    assert metrics["capo/rejection_rate"] > 0
    assert metrics["capo/batch/policy_shift"] == pytest.approx(float(kl), rel=0.05)
    # The objective: −loss of the accepted tokens, per-sequence means.
    chosen = inputs["completion_ids"].unsqueeze(-1)
    gain = (after - before).gather(-1, chosen).squeeze(-1).exp() - 1
    per_sequence = (gain * inputs["advantages"][:, None] * records[0].weight).sum(1) / mask.sum(1)
    predicted = metrics["capo/batch/objective_shift"]
    assert predicted > 0
    assert predicted == pytest.approx(float(per_sequence.mean()), rel=0.05)


def log_policy(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].size(1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batch_shift_is_asked_for_only_where_it_is_logged(
    tmp_path: Path, accumulation: int
) -> None:
    settings: dict[str, Any] = STRICT | {
        "max_steps": 4,
        "gradient_accumulation_steps": accumulation,
        "curvature_top_k": 8,
    }
    each = kit.trainer(tmp_path / "each", **settings, logging_steps=1)
    each.train()
    other = kit.trainer(tmp_path / "other", **settings, logging_steps=2)
    asked: list[int] = []
    inner = other._judge.batch_shifts

    def batch_shifts(*args: Any) -> Any:
        asked.append(other.state.global_step)
        return inner(*args)

    other._judge.batch_shifts = batch_shifts
    other.train()
    assert asked == [1] * accumulation + [3] * accumulation
    name = "capo/batch/policy_shift"
    rows = [[row for row in t.state.log_history if name in row] for t in (each, other)]
    assert [row["step"] for row in rows[1]] == [2, 4]
    # Of that step alone, and the training is the same.
    assert [row[name] for row in rows[1]] == [row[name] for row in rows[0][1::2]]
    for a, b in zip(each.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batch_shift_of_a_large_vocabulary_uses_the_judged_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capo.integrations._trl_judge.SMALL_VOCABULARY", 1)
    instance = kit.ready(kit.trainer(tmp_path, **STRICT, curvature_top_k=8))
    instance.create_optimizer()
    inner, pairs = instance._judge.batch_shifts, []

    def batch_shifts(*args: Any) -> Any:
        found = inner(*args)
        pairs.append((found, inner(*args[:-1])))  # without the judgement: a pass of its own
        return found

    instance._judge.batch_shifts = batch_shifts
    instance._compute_loss(instance.model, kit.micro_batch(instance))
    ((found, expected),) = pairs
    assert all(bool(x != 0) for x in found)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-9)
