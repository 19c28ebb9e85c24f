"""The runs that are compared with one another, as data."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = 8


@dataclass(frozen=True)
class Case:
    """One run of verl's training worker.

    Args:
        name: of the run.
        capo: ``fsdp_config.capo`` as on a command line; None: not said at all.
        vendor: ``VERL_ENGINE_VENDOR``, or None.
        save: a checkpoint's name, written after the first update.
        resume: a checkpoint's name, read before the first.
        policy: which of :func:`verl_engine.job.prepare`'s.
        optimizer: of torch.optim.
        after_death: whether it resumes what a killed run left.
        die: whether the last process is killed, as by the kernel, after the first update.
    """

    name: str
    capo: str | None
    vendor: str | None = "capo"
    epochs: int = 2
    mini_batch: int = 4
    micro_batch: int = 2
    temperature: float = 0.9
    remove_padding: bool = False
    dynamic: bool = False
    dtype: str = "fp32"
    optimizer: str = "AdamW"
    overrides: tuple[str, ...] = ()
    updates: int = 1
    save: str | None = None
    resume: str | None = None
    policy: str = "policy"
    after_death: bool = False
    die: bool = False


THRESHOLDS = "{selection:{policy_shift:3e-4,objective_shift:[-0.02,0.02]},curvature_top_k:20}"
QUANTILES = "{selection:{rule:quantile,policy_shift:0.8,denominator:all},moments:optimizer}"
TRUST = "{trust_region:{policy_shift:2e-3,sequences:4}}"
STEP = "{trust_region:{policy_shift:5e-6,sequences:null}}"
BOTH = "{selection:{policy_shift:8e-5},curvature_top_k:null,trust_region:auto,fisher:exact}"
TIGHT = "{selection:{policy_shift:8e-6}}"
FAST = ("actor_rollout_ref.actor.optim.lr=1e-1",)
MONITOR = "{monitor:{thresholds:{policy_shift:3e-4},sequences:null}}"
LOW = "{selection:{policy_shift:1e-4},trust_region:{predictor:head,policy_shift:1e-3}}"

_ALL = [
    Case("stock", None, vendor=None),
    Case("off", None),
    Case("empty", "{}"),
    Case("first", THRESHOLDS, epochs=1, mini_batch=8, micro_batch=8),
    Case("thresholds", THRESHOLDS),
    Case("thresholds-packed", THRESHOLDS, remove_padding=True),
    Case("quantiles", QUANTILES, mini_batch=8, micro_batch=4),
    Case("sgd", "{selection:{policy_shift:1e-6},step_model:sgd}", epochs=1),
    Case("step", STEP, epochs=1, mini_batch=8, micro_batch=8),
    Case("step-tied", STEP, epochs=1, mini_batch=8, micro_batch=8, policy="tied"),
    Case(
        "step-gathered",
        STEP,
        epochs=1,
        mini_batch=8,
        micro_batch=8,
        overrides=("actor_rollout_ref.actor.fsdp_config.reshard_after_forward=False",),
    ),
    Case("trust", TRUST, mini_batch=8, micro_batch=4),
    Case("both", BOTH),
    Case("bfloat16", BOTH, dtype="bf16", epochs=1),
    Case(
        "gspo",
        THRESHOLDS,
        overrides=(
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
            "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
        ),
    ),
    Case("monitored", "{monitor:true}"),
    Case("monitored-all", MONITOR, mini_batch=8, micro_batch=8),
    Case("stock-all", None, vendor=None, mini_batch=8, micro_batch=8),
    Case("monitored-tied", MONITOR, policy="tied"),
    Case("stock-tied", None, vendor=None, policy="tied"),
    Case("monitored-lora", MONITOR, overrides=("actor_rollout_ref.model.lora_rank=4",)),
    Case("stock-lora", None, vendor=None, overrides=("actor_rollout_ref.model.lora_rank=4",)),
    Case("monitored-packed", MONITOR, remove_padding=True, dynamic=True),
    Case("stock-packed", None, vendor=None, remove_padding=True, dynamic=True),
    Case("monitored-bfloat16", MONITOR, dtype="bf16"),
    Case("stock-bfloat16", None, vendor=None, dtype="bf16"),
    Case("monitored-sgd", MONITOR, optimizer="SGD", overrides=FAST),
    Case("stock-sgd", None, vendor=None, optimizer="SGD", overrides=FAST),
    Case("monitored-through", MONITOR, updates=2, mini_batch=8),
    Case("monitored-first-half", MONITOR, save="monitored-half", mini_batch=8),
    Case("monitored-second-half", MONITOR, resume="monitored-half", mini_batch=8),
    Case("through", BOTH, updates=2),
    Case("first-half", BOTH, save="half"),
    Case("second-half", BOTH, resume="half"),
    Case("killed", BOTH, updates=2, save="killed", die=True),
    Case("after-killed", BOTH, resume="killed", after_death=True),
    Case("dynamic", THRESHOLDS, remove_padding=True, dynamic=True),
    Case("tied", TIGHT, policy="tied"),
    Case("lora", LOW, overrides=("actor_rollout_ref.model.lora_rank=4",)),
    Case(
        "fused",
        TIGHT,
        policy="tied",
        overrides=(
            "actor_rollout_ref.model.use_fused_kernels=True",
            "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
        ),
    ),
]
CASES = {case.name: case for case in _ALL}
