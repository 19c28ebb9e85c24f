"""The configuration: what stands for what, and one clear sentence for what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig

import capo
from capo import InputError
from capo.integrations.trl import CAPOConfig

from . import trl_kit as kit


def config(tmp_path: Path, **overrides: Any) -> CAPOConfig:
    return kit.arguments(CAPOConfig, tmp_path, **overrides)


def test_selection_stands_for_a_rule(tmp_path: Path) -> None:
    assert config(tmp_path).rule() is None
    for name, rule in capo.PAPER_THRESHOLDS.items():
        assert config(tmp_path, selection=name).rule() == rule
    custom = {"policy_shift": 0.1, "objective_shift": [None, 2], "denominator": "all"}
    assert config(tmp_path, selection=custom).rule() == capo.Thresholds(0.1, (None, 2), "all")
    # As from a command line
    assert config(tmp_path, selection='{"policy_shift": 0.1}').rule() == capo.Thresholds(0.1)


def test_other_rules_are_named(tmp_path: Path) -> None:
    for selection, rule in (
        ({"rule": "soft", "policy_shift": 0.1}, capo.SoftThresholds(0.1)),
        ({"rule": "quantile", "policy_shift": 0.9}, capo.QuantileThresholds(0.9)),
        ({"rule": "nats", "budget": 1e-4}, capo.NatsThreshold(1e-4)),
        ({"rule": "thresholds", "policy_shift": 0.1}, capo.Thresholds(0.1)),
    ):
        assert config(tmp_path, selection=selection).rule() == rule


def test_nothing_of_trls_is_renamed_or_redefined() -> None:
    theirs = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    ours = {field.name: field for field in dataclasses.fields(CAPOConfig)}
    changed = {"learning_rate": 1e-4, "num_iterations": 4}  # what the measurements support
    for name, field in theirs.items():
        assert ours[name].default == changed.get(name, field.default)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"selection": "cap"}, r"selection: must be one of 'capo', 'dr_capo', 'reincapo'.*'cap'"),
        ({"selection": {"kl": 1}}, r"selection: .*policy_shift, objective_shift, denominator"),
        ({"selection": {"rule": "hard"}}, r"selection\.rule: .*'soft', 'quantile', 'nats'.*'hard'"),
        ({"selection": {"rule": "nats"}}, r"selection\.budget: must be given"),
        ({"selection": {"rule": "soft", "sharpness": 0}}, r"selection\.sharpness: .*> 0"),
        ({"selection": {"policy_shift": -1.0}}, r"selection\.policy_shift: .*≥ 0.*-1\.0"),
        ({"selection": {"objective_shift": [1, -1]}}, r"selection\.objective_shift: low must be"),
        ({"selection": {"objective_shift": 1}}, r"selection\.objective_shift: .*pair"),
        ({"selection": {"denominator": "some"}}, r"selection\.denominator: .*'kept' or 'all'"),
        ({"step_model": "rmsprop"}, r"step_model: must be 'adam' or 'sgd', got 'rmsprop'"),
        ({"moments": "real"}, r"moments: must be 'simulated' or 'optimizer', got 'real'"),
        ({"fisher": "true"}, r"fisher: must be 'sampled' or 'exact'"),
        ({"advantage_baseline": "mean"}, r"advantage_baseline: must be 'group' or 'none'"),
        ({"impl": "cuda"}, r"impl: must be 'auto' or .*got 'cuda'"),
        ({"curvature_top_k": 0}, r"curvature_top_k: must be an integer ≥ 1 or None, got 0"),
        ({"grad_scale": 0.0}, r"grad_scale: must be positive, got 0\.0"),
        (
            {
                "advantage_baseline": "none",
                "multi_objective_aggregation": "normalize_then_sum",
            },
            r"advantage_baseline: 'none' needs multi_objective_aggregation",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="^" + message):
        config(tmp_path, **overrides)


def test_top_k_must_fit_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^curvature_top_k: .*vocabulary size 32.*got 33"):
        kit.trainer(tmp_path, selection={}, curvature_top_k=33)
    kit.trainer(tmp_path, curvature_top_k=33)  # off: nothing is judged


def test_optimizer_without_adam_state_is_refused(tmp_path: Path) -> None:
    for optim in ("sgd", "adagrad"):
        instance = kit.trainer(
            tmp_path, selection={}, curvature_top_k=8, moments="optimizer", optim=optim
        )
        with pytest.raises(InputError, match=r"^moments: 'optimizer' needs an Adam state"):
            instance.train()


def test_optimizer_that_does_not_train_the_head_is_refused(tmp_path: Path) -> None:
    model = kit.policy()
    model.lm_head.weight.requires_grad_(False)
    instance = kit.trainer(
        tmp_path, model=model, selection={}, curvature_top_k=8, moments="optimizer"
    )
    with pytest.raises(InputError, match=r"^moments: 'optimizer' needs"):
        instance.train()


def test_sharded_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = kit.trainer(tmp_path, selection={}, curvature_top_k=8)
    monkeypatch.setattr(instance, "is_fsdp_enabled", True)
    with pytest.raises(InputError, match=r"^selection: is not supported with FSDP"):
        instance._make_judge()


def test_infinite_hidden_states_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    instance = kit.ready(kit.trainer(tmp_path, selection={}, curvature_top_k=8))
    instance.create_optimizer()
    with torch.no_grad():
        instance.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"must be finite"):
        instance._compute_loss(instance.model, kit.micro_batch(instance))
