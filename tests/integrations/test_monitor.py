"""`CurvatureMonitor` around stock trainers: it sees rightly, and changes nothing."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer, SFTTrainer

from capo import CurvatureMonitor, InputError
from capo.integrations._trl_observe import StepObserver
from capo.integrations.trl import CAPOTrainer

from . import trl_kit as kit
from .test_trl_trust import AroundSteps

TIMING = ("time", "per_second", "runtime")
NUMBERS = ("predicted_policy_shift", "measured_policy_shift", "head_policy_shift", "entropy")


def lora_policy() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "up_proj"])
    return peft.get_peft_model(kit.policy(), config)


def dropout_policy() -> Any:
    model = kit.policy("phi (bias)")
    model.config.attention_dropout = model.config.resid_pdrop = 0.3
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def stock(tmp_path: Path, *, model: Any = None, cls: Any = GRPOTrainer, **settings: Any) -> Any:
    built = model() if callable(model) and not isinstance(model, torch.nn.Module) else model
    return kit.trainer(tmp_path, cls=cls, model=built, **settings)


def monitored(tmp_path: Path, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    instance = stock(tmp_path, **settings)
    return instance, CurvatureMonitor(instance, **(options or {}))


def history(trainer: Any) -> list[dict[str, str]]:
    """What a trainer logged without the monitor's own keys and the clock's."""
    return [
        {
            key: repr(value)
            for key, value in row.items()
            if not key.startswith("capo/monitor/") and not any(t in key for t in TIMING)
        }
        for row in trainer.state.log_history
    ]


def rows(trainer: Any) -> list[dict[str, float]]:
    """The monitor's readings, step by step."""
    found = [
        {
            key.removeprefix("capo/monitor/"): value
            for key, value in row.items()
            if key.startswith("capo/monitor/")
        }
        for row in trainer.state.log_history
    ]
    return [row for row in found if row]


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
    "rmsprop": {"optim": "rmsprop"},
    "accumulation and passes": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "dapo, several batches a generation": {"loss_type": "dapo", "steps_per_generation": 4},
    "sequence level": {"importance_sampling_level": "sequence"},
    "lora, kl": {"model": lora_policy, "beta": 0.04},
    "bf16, no clipping": {"bf16": True, "max_grad_norm": 0.0},
    "tied": {"model": lambda: kit.policy(tied=True), "weight_decay": 0.1},
    "dropout": {"model": dropout_policy},
    "lora with dropout": {"model": lora_policy},
    "gradient checkpointing": {"activation_checkpointing": True, "learning_rate": 1e-3},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
}


@pytest.mark.parametrize("options", [{}, {"depth": "all", "every": 2}], ids=["default", "deep"])
@pytest.mark.parametrize("case", CASES)
def test_no_bit_changes(tmp_path: Path, case: str, options: dict[str, Any]) -> None:
    settings = {"max_steps": 4, **CASES[case]}
    plain = stock(tmp_path / "plain", **settings)
    before = kit.weights(plain)
    torch.manual_seed(5)
    plain.train()
    state = torch.get_rng_state()
    watched, _ = monitored(tmp_path / "watched", options, **settings)
    torch.manual_seed(5)
    watched.train()
    kit.assert_same_weights(kit.weights(plain), kit.weights(watched))
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(before[n], w) for n, w in kit.weights(plain).items())
    assert history(watched) == history(plain)
    found = rows(watched)
    assert len(found) == 4 // options.get("every", 1)
    assert any(row["measured_policy_shift"] > 0 for row in found)


def test_a_touch_of_the_random_state_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stock(tmp_path / "plain")
    plain.train()
    judge = StepObserver.micro_batch

    def careless(self: StepObserver, *args: Any, **kwargs: Any) -> None:
        torch.rand(1)
        judge(self, *args, **kwargs)

    monkeypatch.setattr(StepObserver, "micro_batch", careless)
    watched, _ = monitored(tmp_path / "watched")
    watched.train()
    with pytest.raises(AssertionError, match="weights differ"):
        kit.assert_same_weights(kit.weights(plain), kit.weights(watched))


@pytest.mark.parametrize(
    "settings",
    [
        {"trust_region": "auto", "num_iterations": 2},
        {"selection": {"policy_shift": 1e-3}, "curvature_top_k": None},
        {"trust_region": {"policy_shift": 1e-3, "step_length": "quadratic"}},
    ],
    ids=["trust region", "masks", "quadratic"],
)
def test_capos_own_trainer_is_not_disturbed_either(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 4, "cls": CAPOTrainer, **settings}
    plain = stock(tmp_path / "plain", **settings)
    plain.train()
    watched, _ = monitored(tmp_path / "watched", **settings)
    watched.train()
    kit.assert_same_weights(kit.weights(plain), kit.weights(watched))
    assert history(watched) == history(plain)
    assert len(rows(watched)) == 4


@pytest.mark.parametrize("passes", [1, 2])
def test_the_measured_shift_is_the_kl_of_the_step(tmp_path: Path, passes: int) -> None:
    """Against the whole policy's distributions before and after, computed by nothing of CAPO's."""
    around = AroundSteps()
    instance = stock(tmp_path, num_iterations=passes, gradient_accumulation_steps=2, max_steps=4)
    around.attach(instance)
    CurvatureMonitor(instance, sequences=None)
    instance.train()
    measured = [row["measured_policy_shift"] for row in rows(instance)]
    assert measured == pytest.approx(around.shifts, rel=2e-2)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_a_scaled_loss_is_seen_as_it_is(tmp_path: Path, max_grad_norm: float) -> None:
    found = []
    for scaled in (False, True):
        watched, _ = monitored(tmp_path / str(scaled), max_grad_norm=max_grad_norm)
        if scaled:
            kit.scale_loss(watched)
        watched.train()
        found.append([row["predicted_policy_shift"] for row in rows(watched)])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_the_prediction_at_depth_foresees_small_steps(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-4, "max_steps": 4, "optim": "sgd"}
    deep, _ = monitored(tmp_path / "deep", {"depth": "all", "sequences": None}, **settings)
    deep.train()
    for row in rows(deep):
        assert row["predicted_policy_shift"] == pytest.approx(
            row["measured_policy_shift"], rel=0.02
        )
        assert row["head_policy_shift"] < row["predicted_policy_shift"]
        assert row["predicted_objective_shift"] == pytest.approx(
            row["observed_objective_shift"], rel=0.05
        )
    shallow, _ = monitored(tmp_path / "head", {"sequences": None}, **settings)
    shallow.train()
    for one, other in zip(rows(shallow), rows(deep), strict=True):
        assert one["predicted_policy_shift"] == one["head_policy_shift"]
        assert one["head_policy_shift"] == pytest.approx(other["head_policy_shift"])


def test_token_shifts_are_those_of_the_optimizers_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the definition, in float64: Δ of Adam for one token's gradient, u = Δh, s = w·u."""
    defined: list[torch.Tensor] = []
    judge = StepObserver.micro_batch

    def compare(self: StepObserver, inputs: Any, judged: Any, engine: Any, **kw: Any) -> None:
        head = engine.head()
        group = instance.optimizer.param_groups[0]
        state = instance.optimizer.optimizer.state.get(head.parameter, {})
        (beta1, beta2), t = group["betas"], int(state.get("step", 0)) + 1
        shifts = []
        for b, i in judged.mask.nonzero().tolist():
            h, weight = judged.hidden[b, i].double(), head.weight.double()
            w = -torch.softmax(weight @ h, 0)
            w[judged.token_ids[b, i]] += 1
            # On-policy, one gradient step on these completions: the ratio is 1, nothing is clipped.
            g = inputs["advantages"][b].double() * torch.outer(w, h)
            zero = torch.zeros_like(g)
            m = beta1 * -state.get("exp_avg", zero).double() + (1 - beta1) * g
            v = beta2 * state.get("exp_avg_sq", zero).double() + (1 - beta2) * g**2
            delta = group["lr"] * m / (1 - beta1**t)
            delta /= (v / (1 - beta2**t)).sqrt() + group["eps"]
            shifts.append(0.5 * (w @ (delta @ h)) ** 2)
        defined.append(torch.stack(shifts))
        judge(self, inputs, judged, engine, **kw)

    monkeypatch.setattr(StepObserver, "micro_batch", compare)
    instance, _ = monitored(tmp_path)
    instance.train()
    for row, shifts in zip(rows(instance), defined, strict=True):
        assert row["policy_shift/mean"] == pytest.approx(float(shifts.mean()), rel=2e-3)
        assert row["policy_shift/max"] == pytest.approx(float(shifts.max()), rel=2e-3)
        rejected = float((shifts > 1e-4).double().mean())
        assert row["rejection_rate/policy_shift"] == pytest.approx(rejected, abs=0.03)


def test_everything_is_logged_where_trackers_listen(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):  # as those of TensorBoard, trackio and W&B are
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    instance, _ = monitored(tmp_path)
    instance.add_callback(Tracker())
    instance.train()
    expected = {f"capo/monitor/{name}" for name in NUMBERS} | {
        f"capo/monitor/{name}"
        for name in (
            *(f"policy_shift/{q}" for q in ("mean", "p50", "p90", "p99", "max")),
            *(f"objective_shift/{q}" for q in ("mean", "p01", "p50", "p99", "max")),
            *("rejection_rate", "gradient_noise", "excess", "warning", "warning_score", "overhead"),
        )
    }
    logged = {key for row in seen for key in row if key.startswith("capo/monitor/")}
    assert expected <= logged
    glossary = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [key for key in logged if f"| `{key}` |" not in glossary] == []
    for row in seen[:-1]:
        assert all(math.isfinite(v) for k, v in row.items() if k.startswith("capo/monitor/"))


def test_a_step_too_long_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="capo.monitor"):
        instance, monitor = monitored(tmp_path, learning_rate=0.3, max_steps=6)
        instance.train()
    (first, *_) = monitor.warnings
    assert sum(first.sentence == record.message for record in caplog.records) == 1
    assert any(row["warning"] == 1.0 for row in rows(instance))
    calm, silent = monitored(tmp_path / "calm", learning_rate=1e-5, max_steps=6)
    calm.train()
    assert silent.warnings == []
    assert all(row["warning"] == 0.0 for row in rows(calm))


def test_a_growing_learning_rate_is_reckoned_with(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-3, "max_steps": 5}
    flat, _ = monitored(tmp_path / "flat", **settings)
    flat.train()
    warm = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}
    growing, monitor = monitored(tmp_path / "warm", **warm, **settings)
    factors = []
    foreseen = monitor._foreseen_growth
    monitor._foreseen_growth = lambda: factors.append(foreseen()) or factors[-1]
    growing.train()
    # Step 1 is at 0, steps 2, 3, 4 at 1/4, 2/4, 3/4 of the full rate.
    assert factors == pytest.approx([1.0, 4.0, 2.0, 4 / 3, 1.0])
    assert "excess" not in rows(growing)[0]
    assert "excess" in rows(flat)[0]


def test_nearly_all_rejected_is_diagnosed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="capo.monitor"):
        instance, monitor = monitored(
            tmp_path, {"thresholds": {"policy_shift": 1e-30}}, max_steps=8
        )
        instance.train()
    (found,) = [one for one in monitor.diagnoses if one.kind == "thresholds too tight"]
    assert found.step == 5
    assert [r.message for r in caplog.records].count(found.sentence) == 1


@pytest.mark.parametrize("kind", ["head too shallow", "thresholds too loose"])
def test_a_collapse_without_rejections_is_diagnosed(tmp_path: Path, kind: str) -> None:
    """The rewards are made to fall; the policy's own steps say why no token was rejected."""
    calls = iter(range(1000))

    def falling(completions: list[str], **_: Any) -> list[float]:
        base = 1.0 if next(calls) < 9 else 0.01
        return [base * (1 + 0.1 * (i % 2)) for i in range(len(completions))]

    model = kit.policy()
    if kind == "thresholds too loose":  # only the head is trained: nothing moves unseen
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lm_head" in name)
    loose = {"thresholds": {"policy_shift": 1e9}}
    rate = 1e-3 if kind == "thresholds too loose" else 3e-3
    instance, monitor = monitored(
        tmp_path, loose, model=model, rewards=falling, max_steps=20, learning_rate=rate
    )
    instance.train()
    assert kind in [one.kind for one in monitor.diagnoses]


def test_overhead_is_diagnosed_by_the_clock(tmp_path: Path) -> None:
    instance, monitor = monitored(tmp_path, max_steps=10)
    seconds = iter(range(10**6))
    monitor._clock = lambda: float(next(seconds))  # every look at the clock takes a second
    instance.train()
    (found,) = [one for one in monitor.diagnoses if one.kind == "overhead"]
    assert "every=" in found.sentence


def test_a_policy_that_breaks_does_not_break_the_monitor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    instance, _ = monitored(tmp_path)
    inputs = kit.micro_batch(instance)
    kit.ready(instance).create_optimizer_and_scheduler(3)
    with torch.no_grad():
        instance.model.model.norm.weight.fill_(math.nan)
    monitor = instance.capo_monitor
    with caplog.at_level(logging.WARNING, logger="capo.monitor"):
        for _ in range(3):
            monitor.begin_step()
            loss = instance._compute_loss(instance.model, inputs)
            loss.backward()
            monitor.before_optimizer()
            monitor.after_optimizer()
            monitor.end_step()
    assert loss.isnan()
    assert caplog.text.count("could not be judged") == 1


def test_a_resumed_run_goes_on_with_its_warning(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.3}
    whole, first = monitored(tmp_path / "whole", **settings)
    whole.train()
    resumed, second = monitored(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert second._warning.score == pytest.approx(first._warning.score)
    assert first._warning.score > 0


def test_detached_the_trainer_is_as_it_was(tmp_path: Path) -> None:
    untouched = stock(tmp_path / "untouched")
    instance, monitor = monitored(tmp_path / "x")
    monitor.detach()
    assert set(vars(instance)) == set(vars(untouched))
    assert [type(c) for c in instance.callback_handler.callbacks] == [
        type(c) for c in untouched.callback_handler.callbacks
    ]
    instance.train()
    assert rows(instance) == []
    CurvatureMonitor(instance)  # may be monitored again


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    instance, _ = monitored(tmp_path, eval_strategy="no")
    kit.ready(instance)
    instance.model.eval()
    instance.capo_monitor.begin_step()
    instance._compute_loss(instance.model, kit.micro_batch(instance))
    assert instance.capo_monitor._observer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every: must be an integer ≥ 1"),
        ({"sequences": 0}, r"sequences: must be 'auto', an integer ≥ 1 or None"),
        ({"depth": 99}, r"depth: must be 'all' or an integer from 0 to 2"),
        ({"fisher": "other"}, r"fisher: must be 'sampled' or 'exact'"),
        ({"impl": "other"}, r"impl: must be one of"),
        ({"thresholds": "cappo"}, r"thresholds: "),
        ({"thresholds": None}, r"thresholds: "),
        ({"thresholds": {"policy_shift": -1.0}}, r"thresholds: "),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    instance = stock(tmp_path)
    with pytest.raises(InputError, match=message):
        CurvatureMonitor(instance, **options)
    assert "_compute_loss" not in vars(instance)  # nothing was touched


def test_trainers_that_cannot_be_monitored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trainer: must be a GRPOTrainer, got SFTTrainer"):
        CurvatureMonitor(SFTTrainer.__new__(SFTTrainer))
    instance, _ = monitored(tmp_path)
    with pytest.raises(InputError, match="trainer: is monitored already"):
        CurvatureMonitor(instance)
