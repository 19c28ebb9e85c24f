"""The runs that are compared between one process and two, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from integrations import trl_kit as kit
from integrations.vllm_kit import SETTINGS as SERVER

BUDGET = 2e-3
REGION: dict[str, Any] = {"policy_shift": BUDGET, "sequences": None}
QUANTILES: dict[str, Any] = {
    "rule": "quantile",
    "policy_shift": 0.8,
    "objective_shift": [0.1, 0.95],
}


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: of the case.
        settings: the trainer's arguments.
        trainer: ``"capo"`` or ``"grpo"``.
        fixed: whether it is fed fixed batches, or generates its own.
        tied, moe, lora: kind of policy; `lora` is None or ``"frozen"`` or ``"adapted"``, of the head.
        infinite_at: step at which one advantage is infinite.
        resume: case and step of the checkpoint to go on from.
        die_at: step at which the last process is killed.
        corrected: whether the fixed batches come with vLLM's importance-sampling correction.
        served: whether completions come from a server, which is sent the weights.
        scheduled: whether the learning rate follows DeepSpeed's own scheduler.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: str = "capo"
    fixed: bool = True
    tied: bool = False
    moe: bool = False
    lora: str | None = None
    infinite_at: int | None = None
    resume: tuple[str, int] | None = None
    die_at: int | None = None
    corrected: bool = False
    served: bool = False
    scheduled: bool = False


def mixture() -> Any:
    """A tiny mixture of experts."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **kit._SMALL,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # sharper than the default initialisation, so that tokens differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def build_policy(case: Case) -> Any:
    """The policy that the case trains, the same in every process."""
    if case.moe:
        return mixture()
    model = kit.policy(tied=case.tied)
    if case.lora is None:
        return model
    import peft
    import torch

    torch.manual_seed(0)
    saved = ["lm_head"] if case.lora == "adapted" else None
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "up_proj"],
        modules_to_save=saved,
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


SELECTED: dict[str, Any] = {"selection": QUANTILES, "curvature_top_k": 8}
BOTH: dict[str, Any] = {
    **SELECTED,
    "trust_region": REGION,
    "learning_rate": 0.1,
    "max_steps": 3,
}
SAVING: dict[str, Any] = {**BOTH, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
OFF: dict[str, Any] = {"max_steps": 2, "num_iterations": 2, "gradient_accumulation_steps": 2}


def _both(name: str, *, tied: bool = False, lora: str | None = None, **changes: Any) -> Case:
    return Case(name, {**BOTH, **changes}, tied=tied, lora=lora)


def _region(**changes: Any) -> dict[str, Any]:
    return {**REGION, **changes}


EQUAL = [
    _both("both"),
    _both("optimizer moments", moments="optimizer", selection={"rule": "nats", "budget": 0.5}),
    _both("sgd", step_model="sgd", optim="sgd", max_grad_norm=0.0),
    _both("accumulated", gradient_accumulation_steps=2),
    _both("checkpointed", gradient_checkpointing=True),
    _both("iterated", num_iterations=3),
    _both("tied", tied=True),
    _both("lora frozen head", lora="frozen"),
    _both("lora adapted head", lora="adapted"),
    _both("some", trust_region=_region(policy_shift="auto", sequences=3), loss_type="dapo"),
    _both("deep", trust_region=_region(predictor="deep"), loss_type="dr_grpo", learning_rate=4e-3),
    _both("head", trust_region=_region(predictor="head"), weight_decay=0.1),
    Case("experts", BOTH, moe=True),
    Case("vllm correction", {**BOTH, "loss_type": "dapo"}, corrected=True),
    _both("plain", selection=None, trust_region=None, max_grad_norm=0.05),
]
REPLICATED = [_both("depth", depth="all", trust_region=_region(step_length="quadratic"))]
STOCK = [
    Case("off", OFF, fixed=False),
    Case("stock", OFF, fixed=False, trainer="grpo"),
]
WARMED: dict[str, Any] = {"max_steps": 4, "warmup_steps": 3}
SCHEDULED = [
    Case(
        "scheduled",
        {**WARMED, "trust_region": {"policy_shift": None}},
        fixed=False,
        scheduled=True,
    ),
    Case("scheduled stock", WARMED, fixed=False, trainer="grpo", scheduled=True),
]
RESUME = [Case("saving", SAVING), Case("resumed", SAVING, resume=("saving", 2))]
KILLED = [Case("killed", SAVING, die_at=3), Case("after the kill", SAVING, resume=("killed", 2))]
# A process balances its own tokens, so that two do not balance as one does: only against stock.
BALANCE: dict[str, Any] = {"max_steps": 2, "router_aux_loss_coef": 0.05, "num_iterations": 1}
LOOK: dict[str, Any] = {"selection": {"policy_shift": None, "objective_shift": [None, None]}}
BALANCED = [
    Case("balanced", {**BALANCE, **LOOK, "curvature_top_k": 8}, fixed=False, moe=True),
    Case("balanced stock", BALANCE, fixed=False, moe=True, trainer="grpo"),
]
SERVED = [
    Case(
        "served",
        {**BOTH, **SERVER, "max_steps": 4, "num_iterations": 2},
        fixed=False,
        served=True,
    )
]
INFINITE = [
    Case("infinite", {**BOTH, "selection": None}, infinite_at=1),
]
REFUSED = [_both("refused", lora="adapted")]
CASES = {
    case.name: case
    for case in (
        *EQUAL,
        *REPLICATED,
        *STOCK,
        *BALANCED,
        *SCHEDULED,
        *RESUME,
        *KILLED,
        *SERVED,
        *INFINITE,
        *REFUSED,
    )
}
