"""The trust region inside a real trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback
from trl import GRPOTrainer

from capo import InputError
from capo.integrations.trl import CAPOTrainer, ShiftRecord

from . import trl_kit as kit

BUDGET = 2e-3
ALL: dict[str, Any] = {"policy_shift": BUDGET, "sequences": None}


class AroundSteps(TrainerCallback):  # type: ignore[misc]
    """The full policy's log-probabilities around every step, computed by nothing of CAPO's."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.inputs: list[dict[str, Any]] = []
        self.shifts: list[float] = []
        self.rates: list[float] = []

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        compute = trainer._compute_loss

        def keep(model: Any, inputs: dict[str, Any]) -> Any:
            self.inputs.append(inputs)
            return compute(model, inputs)

        trainer._compute_loss = keep
        # Before CAPO's own callback, which changes the learning rates.
        trainer.callback_handler.callbacks.insert(0, self)

    def log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for inputs in self.inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            with torch.no_grad():
                logits = self.trainer.model(input_ids=ids, attention_mask=attention).logits
            width = inputs["completion_ids"].size(1)
            logits = logits[:, -width - 1 : -1].double() / self.trainer.temperature
            found.append(F.log_softmax(logits, -1)[inputs["completion_mask"].bool()])
        return torch.cat(found), torch.ones(0)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.log_probs()[0]
        self.rates.append(float(self.trainer.optimizer.param_groups[0]["lr"]))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        after = self.log_probs()[0]
        self.shifts.append(float((self.before.exp() * (self.before - after)).sum(-1).mean()))
        self.inputs = []


def run(tmp_path: Path, **overrides: Any) -> tuple[Any, AroundSteps, list[dict[str, Any]]]:
    watch = AroundSteps()
    instance = kit.trainer(tmp_path, **overrides)
    watch.attach(instance)
    instance.train()
    rows = [row for row in instance.state.log_history if "capo/trust/scale" in row]
    return instance, watch, rows


@pytest.mark.parametrize("predictor", ["measured", "deep", "head"])
@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_every_step_stays_within_the_budget(tmp_path: Path, predictor: str, lr: float) -> None:
    instance, watch, rows = run(
        tmp_path,
        trust_region={**ALL, "predictor": predictor},
        learning_rate=lr,
        max_steps=6,
    )
    assert len(rows) == len(watch.shifts) == 6
    measured = [row["capo/trust/measured_policy_shift"] for row in rows]
    assert measured == pytest.approx(watch.shifts, rel=2e-2, abs=1e-7)
    # The head predicts from what it has learned so far; the others are held to their word.
    allowed = {"measured": 1.02, "deep": 1.5, "head": 20.0}[predictor]
    assert max(watch.shifts) <= BUDGET * allowed
    if lr == 1e-1:
        assert max(row["capo/trust/scale"] for row in rows) < 0.5
        assert max(watch.shifts) > BUDGET / 50  # it is not stopped either
    assert {float(group["lr"]) for group in instance.optimizer.param_groups} == {lr}
    assert set(watch.rates) == {lr}  # what the scheduler set was restored before the next step


def test_the_planted_fault_is_caught(tmp_path: Path) -> None:
    """Without the trust region the same run breaks the budget: the test above can fail."""
    _, watch, rows = run(
        tmp_path, trust_region={**ALL, "policy_shift": None}, learning_rate=1e-1, max_steps=6
    )
    assert max(watch.shifts) > 20 * BUDGET
    measured = [row["capo/trust/measured_policy_shift"] for row in rows]
    assert measured == pytest.approx(watch.shifts, rel=2e-2)
    assert all("capo/trust/budget" not in row for row in rows)


@pytest.mark.parametrize("iterations", [1, 2])
def test_measuring_alone_changes_no_weight(tmp_path: Path, iterations: int) -> None:
    stock = kit.trainer(tmp_path / "stock", cls=GRPOTrainer, num_iterations=iterations, max_steps=4)
    stock.train()
    watched = kit.trainer(
        tmp_path / "watched",
        trust_region={"policy_shift": None},
        num_iterations=iterations,
        max_steps=4,
    )
    watched.train()
    kit.assert_same_weights(kit.weights(stock), kit.weights(watched))
    assert watched.last_policy_shift > 0


@pytest.mark.parametrize("overrides", [{}, {"gradient_accumulation_steps": 2}, {"beta": 0.1}])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_budget_that_never_binds_trains_as_trl_does_with_a_pass_less(
    tmp_path: Path, iterations: int, overrides: dict[str, Any]
) -> None:
    """TRL's pass for the sampling policy's log-probabilities is left out, and nothing else is."""
    options = {"num_iterations": iterations, "max_steps": 6, "loss_type": "grpo", **overrides}
    unused = {"policy_shift": 1e9, "cruise": 1.0}
    kit.policy().save_pretrained(
        tmp_path / "policy"
    )  # with a KL penalty the reference is read again
    made, passes = [], []
    for cls, own in ((GRPOTrainer, {}), (CAPOTrainer, {"trust_region": unused})):
        instance = kit.trainer(
            tmp_path / cls.__name__, cls=cls, model=str(tmp_path / "policy"), **options, **own
        )
        inner, counted = instance._get_per_token_logps_and_entropies, []

        def count(
            *args: Any, inner: Any = inner, counted: list[int] = counted, **kwargs: Any
        ) -> Any:
            result = inner(*args, **kwargs)
            counted.append(result[0] is not None)
            return result

        instance._get_per_token_logps_and_entropies = count
        instance.train()
        made.append(kit.weights(instance))
        passes.append(sum(counted))
    for name, weight in made[0].items():
        torch.testing.assert_close(made[1][name], weight, rtol=1e-6, atol=1e-7)
    assert passes[0] - passes[1] == (6 // iterations if iterations > 1 else 0)


def test_the_step_is_the_optimizers_own_made_shorter(tmp_path: Path) -> None:
    """One step with scale s is AdamW's step at learning rate s · lr, weight decay included."""
    instance, _, rows = run(
        tmp_path / "a", trust_region=ALL, max_steps=1, weight_decay=0.1, learning_rate=0.05
    )
    scale = rows[0]["capo/trust/scale"]
    assert 0 < scale < 1
    stock = kit.trainer(
        tmp_path / "b", cls=GRPOTrainer, max_steps=1, weight_decay=0.1, learning_rate=0.05 * scale
    )
    stock.train()
    ours, theirs = kit.weights(instance), kit.weights(stock)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_does_not_matter(tmp_path: Path) -> None:
    ends = []
    for lr in (0.02, 0.2):
        instance, _, rows = run(tmp_path / str(lr), trust_region=ALL, learning_rate=lr, max_steps=5)
        assert all(row["capo/trust/scale"] < 1 for row in rows)
        ends.append(kit.weights(instance))
    start = kit.policy().state_dict()
    for name in ends[0]:
        moved = (ends[0][name] - start[name]).norm()
        apart = (ends[0][name] - ends[1][name]).norm()
        assert apart <= 0.1 * moved + 1e-6, name


def test_accumulated_micro_batches_are_one_step(tmp_path: Path) -> None:
    _, watch, rows = run(
        tmp_path,
        trust_region=ALL,
        learning_rate=1e-1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    measured = [row["capo/trust/measured_policy_shift"] for row in rows]
    assert measured == pytest.approx(watch.shifts, rel=2e-2, abs=1e-7)
    assert max(watch.shifts) <= BUDGET * 1.02


def test_several_passes_are_seen_again_for_free(tmp_path: Path) -> None:
    _, watch, rows = run(
        tmp_path, trust_region=ALL, learning_rate=1e-1, num_iterations=4, max_steps=8
    )
    trials = [row["capo/trust/trials"] for row in rows]
    assert [t > 0 for t in trials] == [True, False, False, False] * 2
    for i, row in enumerate(rows):
        if i % 4:  # the pass over the same completions shows what the step before did
            seen = row["capo/trust/last_measured_policy_shift"]
            assert seen == pytest.approx(watch.shifts[i - 1], rel=2e-2, abs=1e-7)
    assert max(watch.shifts) <= 2 * BUDGET


def test_clipping_comes_first_and_schedules_go_on(tmp_path: Path) -> None:
    instance, watch, rows = run(
        tmp_path,
        trust_region=ALL,
        learning_rate=1e-1,
        max_grad_norm=1e-2,
        lr_scheduler_type="linear",
        max_steps=5,
    )
    assert watch.rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    assert max(watch.shifts) <= BUDGET * 1.02
    measured = [row["capo/trust/measured_policy_shift"] for row in rows]
    assert measured == pytest.approx(watch.shifts, rel=2e-2, abs=1e-7)
    assert instance.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_batches_whose_rewards_are_all_alike_earn_nothing(
    tmp_path: Path, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So little that it is what is earned that decides, not what is safe.
    monkeypatch.setattr("capo.core.trust_region.options.ENTROPY_PER_COMPLETION", 1e-5)
    calls = 0

    def reward(completions: list[Any], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [float(i % 2) if calls <= 2 else 1.0 for i, _ in enumerate(completions)]

    model = kit.policy()
    model.save_pretrained(tmp_path / "policy")
    model.config._name_or_path = str(tmp_path / "policy")  # where the reference policy is found
    _, watch, rows = run(
        tmp_path,
        model=model,
        trust_region={"sequences": None},
        rewards=reward,
        learning_rate=1e-2,
        beta=beta,
        max_steps=6,
    )
    # In shares of the first: the policy's own entropy hardly changes within six such steps.
    budgets = [row["capo/trust/budget"] / rows[0]["capo/trust/budget"] for row in rows]
    if beta:  # the penalty gives every completion a gradient
        assert min(budgets) > 0.7
        return
    weights, left = [], 0.0
    for step in range(1, 7):  # Adam's first moment of gradients 1, 1, 0, 0, 0, 0
        left = 0.9 * left + 0.1 * (step <= 2)
        weights.append(left / (1 - 0.9**step))
    assert budgets == pytest.approx(weights, rel=0.3)
    assert budgets[5] < 0.6 * budgets[1]
    assert all(
        shift <= row["capo/trust/budget"] for shift, row in zip(watch.shifts, rows, strict=True)
    )


def test_with_selection(tmp_path: Path) -> None:
    _, watch, rows = run(
        tmp_path,
        selection={"policy_shift": 0.02, "objective_shift": [-0.1, 0.1]},
        curvature_top_k=8,
        trust_region=ALL,
        learning_rate=1e-1,
        max_steps=4,
    )
    assert max(watch.shifts) <= BUDGET * 1.02
    assert all(row["capo/rejection_rate"] > 0 for row in rows)


@pytest.mark.parametrize("family", list(kit.CONFIGS))
def test_every_kind_of_head(tmp_path: Path, family: str) -> None:
    _, watch, rows = run(
        tmp_path,
        model=kit.policy(family),
        trust_region=ALL,
        learning_rate=3e-2,
        temperature=0.8,
        max_steps=3,
    )
    measured = [row["capo/trust/measured_policy_shift"] for row in rows]
    assert measured == pytest.approx(watch.shifts, rel=3e-2, abs=1e-7)
    assert max(watch.shifts) <= BUDGET * 1.02


def test_a_gradient_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    class Poison(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 1:
                next(iter(instance.model.parameters())).grad.fill_(math.nan)
            elif state.global_step == 2:
                self.weights = kit.weights(instance)
                self.state = copy.deepcopy(instance.optimizer.state_dict()["state"])

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 1:
                self.before = kit.weights(instance)

    poison = Poison()
    instance = kit.trainer(tmp_path, trust_region=ALL, max_steps=3)
    instance.callback_handler.callbacks.insert(0, poison)
    instance.train()
    kit.assert_same_weights(poison.before, poison.weights)
    assert all(
        bool(torch.isfinite(v).all())
        for entry in poison.state.values()
        for v in entry.values()
        if torch.is_tensor(v)
    )
    scales = [r["capo/trust/scale"] for r in instance.state.log_history if "capo/trust/scale" in r]
    assert scales[1] == 0.0
    assert scales[2] > 0


@pytest.mark.parametrize("predictor", ["measured", "head"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_resumed_weights_are_the_same(tmp_path: Path, predictor: str, iterations: int) -> None:
    settings: dict[str, Any] = {
        "trust_region": {**ALL, "predictor": predictor, "sequences": 3},
        "learning_rate": 5e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "num_iterations": iterations,
    }
    whole = kit.trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = kit.trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    kit.assert_same_weights(kit.weights(whole), kit.weights(resumed))
    forgetful = kit.trainer(tmp_path / "forgetful", **settings)
    forgetful._control.load_state_dict = lambda _: None
    forgetful.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = kit.weights(forgetful), kit.weights(whole)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("sequences", [None, 4])
def test_truncated_completions_are_left_out(tmp_path: Path, sequences: int | None) -> None:
    """Micro-batches without a token that counts, and whole steps without one."""

    class Look(TrainerCallback):  # type: ignore[misc]
        tokens = 0

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.before = kit.weights(instance)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after = kit.weights(instance)
            moved = any(not torch.equal(w, after[name]) for name, w in self.before.items())
            found.append((self.tokens, moved))
            self.tokens = 0

    look, found = Look(), []
    instance = kit.trainer(
        tmp_path,
        trust_region={**ALL, "sequences": sequences},
        selection={"denominator": "all"},
        curvature_top_k=8,
        mask_truncated_completions=True,
        learning_rate=1e-1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=10,
    )
    compute = instance._compute_loss

    def count(model: Any, inputs: dict[str, Any]) -> Any:
        tokens = int(inputs["completion_mask"].sum())
        look.tokens += tokens
        empty.append(tokens == 0)
        return compute(model, inputs)

    empty: list[bool] = []
    instance._compute_loss = count
    instance.callback_handler.callbacks.insert(0, look)
    instance.train()
    assert any(empty)
    assert not all(empty)
    assert any(tokens == 0 for tokens, _ in found[1:])  # when Adam has a momentum
    for tokens, moved in found:
        assert moved == (tokens > 0)
    shifts = [
        row["capo/trust/measured_policy_shift"]
        for row in instance.state.log_history
        if "capo/trust/measured_policy_shift" in row
    ]
    assert len(shifts) == sum(tokens > 0 for tokens, _ in found)
    assert max(shifts) <= BUDGET * 1.02


def test_a_step_that_is_dropped_leaves_the_simulated_moments(tmp_path: Path) -> None:
    class Poison(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 1:
                next(iter(instance.model.parameters())).grad.fill_(math.nan)
                self.before = copy.deepcopy(instance._judge.step_model.moments.state_dict())

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                self.after = copy.deepcopy(instance._judge.step_model.moments.state_dict())

    poison = Poison()
    instance = kit.trainer(
        tmp_path,
        trust_region=ALL,
        selection={"denominator": "all"},
        curvature_top_k=8,
        max_steps=3,
    )
    instance.callback_handler.callbacks.insert(0, poison)
    instance.train()
    assert poison.after["step"] == poison.before["step"] == 1
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(poison.after[name], poison.before[name])
    assert "grad" not in poison.after


@pytest.mark.parametrize("rate", ["attention", "module"])
def test_dropout_is_no_shift_of_the_policy(tmp_path: Path, rate: str) -> None:
    """A training pass with dropout is no reference for a trial without: its noise is no shift."""

    def dropped() -> Any:
        model = kit.policy()
        if rate == "attention":
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.3
        else:
            model.model.norm.register_module("drop", torch.nn.Dropout(0.3))
            model.model.norm.register_forward_hook(lambda norm, _, out: norm.drop(out))
        return model

    measured = []
    for lr in (1e-7, 1e-1):
        _, _, rows = run(
            tmp_path / str(lr),
            model=dropped(),
            trust_region=ALL,
            learning_rate=lr,
            num_iterations=2,
            max_steps=4,
        )
        assert all(row["capo/trust/scale"] > 0 for row in rows)
        measured.append([row["capo/trust/measured_policy_shift"] for row in rows])
        assert max(measured[-1]) <= BUDGET * 1.02
    assert max(measured[0]) < 1e-6
    assert min(measured[1]) > BUDGET / 50


def test_what_an_interrupted_step_has_left_is_forgotten(tmp_path: Path) -> None:
    class Stop(TrainerCallback):  # type: ignore[misc]
        stops = True

        def on_substep_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if self.stops and state.global_step == 1:
                self.stops = False
                raise KeyboardInterrupt

    settings: dict[str, Any] = {
        "trust_region": ALL,
        "selection": {"denominator": "all"},
        "curvature_top_k": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
    }
    instance = kit.trainer(tmp_path, **settings)
    instance.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        instance.train()
    assert instance._control._collector._now.samples
    counts: list[int] = []
    take = instance._control._collector.take

    def counted() -> Any:
        now = take()
        counts.append(len(now.samples))
        return now

    instance._control._collector.take = counted
    instance.train()
    assert counts == [2, 2, 2]


def test_images_are_refused(tmp_path: Path) -> None:
    instance = kit.ready(kit.trainer(tmp_path, trust_region=ALL))
    instance.create_optimizer()
    inputs = kit.micro_batch(instance)
    instance._compute_loss(instance.model, inputs)
    inputs["pixel_values"] = torch.zeros(4, 3, 8, 8)
    compute = GRPOTrainer._compute_loss
    with pytest.MonkeyPatch.context() as patch:  # the tiny policy itself has no eyes

        def blind(self: Any, model: Any, given: dict[str, Any]) -> Any:
            return compute(self, model, {k: v for k, v in given.items() if k != "pixel_values"})

        patch.setattr(GRPOTrainer, "_compute_loss", blind)
        with pytest.raises(InputError, match=r"^train_dataset: must hold no images"):
            instance._compute_loss(instance.model, inputs)


def test_with_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(kit.policy(), config)
    _, watch, rows = run(tmp_path, model=model, trust_region=ALL, learning_rate=0.3, max_steps=4)
    measured = [row["capo/trust/measured_policy_shift"] for row in rows]
    assert measured == pytest.approx(watch.shifts, rel=2e-2, abs=1e-7)
    assert max(watch.shifts) <= BUDGET * 1.02
    assert max(watch.shifts) > BUDGET / 50


def test_mixed_precision(tmp_path: Path) -> None:
    _, watch, _ = run(tmp_path, trust_region=ALL, learning_rate=1e-1, bf16=True, max_steps=3)
    assert max(watch.shifts) <= 1.3 * BUDGET  # the trial rounds to bfloat16, the check does not


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_scaled_loss_changes_nothing(tmp_path: Path, max_grad_norm: float) -> None:
    made = []
    for scaled in (False, True):
        instance = kit.trainer(
            tmp_path / str(scaled),
            trust_region=ALL,
            learning_rate=1e-1,
            max_grad_norm=max_grad_norm,
        )
        if scaled:
            kit.scale_loss(instance)
        instance.train()
        made.append(kit.weights(instance))
    for name, weight in made[0].items():
        torch.testing.assert_close(made[1][name], weight, rtol=1e-5, atol=1e-7)


def test_records_name_the_tokens(tmp_path: Path) -> None:
    records: list[ShiftRecord] = []
    instance = CAPOTrainer(
        model=kit.policy(),
        reward_funcs=kit.reward,
        args=kit.arguments(kit.CAPOConfig, tmp_path, trust_region={"sequences": 5}),
        train_dataset=kit.dataset(),
        processing_class=kit.tokenizer(),
        shift_callbacks=[records.append],
    )
    instance.train()
    assert [record.step for record in records] == [1, 2, 3]
    rows = [r for r in instance.state.log_history if "capo/trust/measured_policy_shift" in r]
    for record, row in zip(records, rows, strict=True):
        assert record.token_ids.shape[0] == 5
        kl = record.divergence[record.mask]
        assert (kl >= 0).all()
        assert record.divergence[~record.mask].isnan().all()
        measured = row["capo/trust/measured_policy_shift"]
        assert kl.min() <= measured <= kl.max()  # a weighted mean of them


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"trust_region": "sometimes"}, "trust_region"),
        ({"trust_region": {"predictor": "tarot"}}, "trust_region.predictor"),
        ({"trust_region": {"predictor": "deep", "depth": 3}}, "depth"),
    ],
)
def test_bad_options(tmp_path: Path, overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        kit.trainer(tmp_path, **overrides)
    assert error.value.field.endswith(field)
