"""How a trainer lays its model out over processes: which engine that is, and what it cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from capo.core.errors import InputError
from capo.integrations._trl_head import causal_lm
from capo.integrations._trl_sharded import Engine, ShardedEngine
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    import torch

_KNOWN = (
    DistributedType.NO,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    *(kind for kind in DistributedType if kind.name.startswith("MULTI_")),
)


def check_layout(accelerator: Any, field: str) -> None:
    """Refuse a layout that CAPO cannot see through.

    Args:
        accelerator: the trainer's.
        field: the setting that needs to.

    Raises:
        InputError: FSDP1, Megatron, or a model split by tensor, context, sequence or pipeline.
    """
    off = f"or set {field}=None."
    kind = accelerator.distributed_type
    if kind not in _KNOWN:
        raise InputError(field, f"needs DDP, FSDP2 or DeepSpeed, not {kind.value}; use one {off}")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(field, f"needs FSDP2, not FSDP1; set fsdp_version: 2 {off}")
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if config is not None and (getattr(config, name, 1) or 1) > 1:
            raise InputError(field, f"needs whole sequences and layers; set {name} to 1 {off}")


def check_head(accelerator: Any, policy: nn.Module, field: str) -> None:
    """Refuse a head whose gradient TRL leaves unreduced, so that every process trains another.

    A head in PEFT's `modules_to_save` is outside accelerate's FSDP2 units; TRL 1.16 gathers it with
    `DTensor.full_tensor`, whose gradient is the process's own.

    Raises:
        InputError: such a head under FSDP2.
    """
    if accelerator.distributed_type != DistributedType.FSDP or causal_lm(policy) is policy:
        return
    weight = getattr(causal_lm(policy).get_output_embeddings(), "weight", None)
    if weight is not None and weight.requires_grad:
        raise InputError(
            field,
            "cannot be used with FSDP2 and an LM head in PEFT's modules_to_save, whose gradient "
            "TRL does not average over the processes; use DDP or DeepSpeed, or leave the head frozen.",
        )


def check_replicated(accelerator: Any, field: str) -> None:
    """Refuse what needs a micro-batch's own gradient where gradients are sharded.

    Raises:
        InputError: FSDP or DeepSpeed.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            field,
            "takes the gradient of one micro-batch by itself, which "
            f"{kind.value} does not give; use DDP or leave it at its default.",
        )


def make_engine(
    accelerator: Any,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    temperature: float,
    world: World,
) -> Engine:
    """The view of a prepared policy and its optimizer."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from capo.integrations._trl_zero import ZeroEngine

        return ZeroEngine(policy, optimizer, temperature, world)
    if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        return ShardedEngine(policy, optimizer, temperature, world)
    return Engine(policy, optimizer, temperature, world)
