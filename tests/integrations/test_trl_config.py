"""The configuration: what stands for what, and one clear sentence for what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from trl import GRPOConfig

import capo
from capo import InputError
from capo.integrations._trl_layout import check_head, check_layout, check_replicated
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
    changed = {"learning_rate", "num_iterations"}  # by the trust region, see below
    for name, field in theirs.items():
        assert ours[name].default == (None if name in changed else field.default)


@pytest.mark.parametrize(
    ("trust_region", "expected"),
    [
        ("auto", (1e-4, 4)),
        ("1e-3", (1e-4, 4)),
        (None, (1e-6, 1)),
        ({"policy_shift": None}, (1e-6, 1)),  # only measures
    ],
)
def test_without_a_trust_region_the_defaults_are_trls(
    tmp_path: Path, trust_region: Any, expected: tuple[float, int]
) -> None:
    common = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    }
    made = CAPOConfig(trust_region=trust_region, **common)
    assert (made.learning_rate, made.num_iterations) == expected
    own = CAPOConfig(trust_region=trust_region, learning_rate=3e-6, num_iterations=2, **common)
    assert (own.learning_rate, own.num_iterations) == (3e-6, 2)
    plain = GRPOConfig(**common)
    assert expected[1] == 4 or expected == (plain.learning_rate, plain.num_iterations)


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


def layout(kind: DistributedType, *, fsdp2: bool = True, **sizes: int) -> Any:
    return SimpleNamespace(
        distributed_type=kind, is_fsdp2=fsdp2, parallelism_config=SimpleNamespace(**sizes)
    )


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (layout(DistributedType.FSDP, fsdp2=False), r"^selection: needs FSDP2, not FSDP1; .*=None"),
        (
            layout(DistributedType.MEGATRON_LM),
            r"^selection: needs DDP, .* not MEGATRON_LM; .*=None",
        ),
        (layout(DistributedType.FSDP, tp_size=2), r"^selection: .* set tp_size to 1 .*=None"),
        (layout(DistributedType.MULTI_GPU, cp_size=4), r"^selection: .* set cp_size to 1 .*=None"),
    ],
)
def test_layouts_that_cannot_be_seen_through_are_refused(accelerator: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_layout(accelerator, "selection")


def peft_head(*, trained: bool) -> Any:
    import peft

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"] if trained else None
    )
    return peft.get_peft_model(kit.policy(), config)


def test_a_head_that_fsdp2_trains_apart_is_refused() -> None:
    with pytest.raises(InputError, match=r"^selection: cannot be used with FSDP2 and an LM head"):
        check_head(layout(DistributedType.FSDP), peft_head(trained=True), "selection")
    check_head(layout(DistributedType.FSDP), peft_head(trained=False), "selection")
    check_head(layout(DistributedType.FSDP), kit.policy(), "selection")
    check_head(layout(DistributedType.DEEPSPEED), peft_head(trained=True), "selection")


def test_vllm_is_configured_as_in_trl(tmp_path: Path) -> None:
    served = kit.arguments(
        CAPOConfig,
        tmp_path,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://localhost:8000",
        selection="capo",
    )
    assert (served.use_vllm, served.vllm_mode) == (True, "server")
    assert served.vllm_server_base_url == "http://localhost:8000"
    assert served.rule() is not None


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_micro_batchs_own_gradient_is_not_to_be_had_of_shards(kind: DistributedType) -> None:
    with pytest.raises(InputError, match=r"^depth: takes the gradient of one micro-batch"):
        check_replicated(layout(kind), "depth")


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_replicated_layouts_are_taken(kind: DistributedType) -> None:
    check_layout(layout(kind, tp_size=1), "depth")
    check_replicated(layout(kind), "depth")


def test_infinite_hidden_states_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    instance = kit.ready(kit.trainer(tmp_path, selection={}, curvature_top_k=8))
    instance.create_optimizer()
    with torch.no_grad():
        instance.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"must be finite"):
        instance._compute_loss(instance.model, kit.micro_batch(instance))
