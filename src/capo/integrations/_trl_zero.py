"""The policy and its optimizer under DeepSpeed ZeRO-1, 2 and 3.

DeepSpeed steps within `accelerator.backward`, where no callback of the trainer comes between, and keeps
gradients, optimizer state and float32 weights in flat partitions of its own. What is read of them here is
what `deepspeed.utils.safe_get_…` reads: each process computes the step on its partition, and what is
gathered is one parameter's step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from capo.core.errors import InputError
from capo.core.proposed import step_from_state
from capo.integrations._trl_head import LMHead, read_head
from capo.integrations._trl_sharded import WRITTEN_OUT, Engine, through_the_model
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.trust_region.trial import StepOf

_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class ZeroEngine(Engine):
    """DeepSpeed ZeRO: the optimizer is `DeepSpeedZeroOptimizer`, or its stage-3 counterpart.

    Args:
        policy: the model inside the DeepSpeed engine.
        optimizer: DeepSpeed's, around the torch optimizer.
        temperature: the trainer's sampling temperature.
        world: the processes.

    Raises:
        InputError: the torch optimizer is not SGD, Adam or AdamW, or there is no ZeRO optimizer around it.
    """

    sharded = True
    steps_in_backward = True

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        temperature: float,
        world: World,
    ) -> None:
        super().__init__(policy, optimizer, temperature, world)
        zero: Any = optimizer
        groups = getattr(zero, "bit16_groups", None) or getattr(zero, "fp16_groups", None)
        if groups is None:
            raise InputError(
                "deepspeed",
                f"must use ZeRO stage 1, 2 or 3 (zero_optimization.stage), got {_name(optimizer)}.",
            )
        self.zero = zero
        self.inner: torch.optim.Optimizer = zero.optimizer
        if type(self.inner) not in WRITTEN_OUT:
            names = ", ".join(kind.__name__ for kind in WRITTEN_OUT)
            raise InputError(
                "optim",
                f"must be one of torch's {names} where parameters are sharded, got "
                f"{_name(self.inner)}; leave `optimizer` out of the DeepSpeed configuration and set "
                "its zero_force_ds_cpu_optimizer to false.",
            )
        # ZeRO-3 cuts a parameter group into several.
        of_group = getattr(zero, "sub_group_to_group_id", {})
        self._group_of = {
            id(p): of_group.get(i, i) for i, group in enumerate(groups) for p in group
        }

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's parameter groups, whose learning rates the step follows."""
        return self.inner.param_groups

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        """The optimizer's settings for a parameter; None where it does not train it."""
        index = self._group_of.get(id(parameter))
        return None if index is None else self.groups[index]

    def head(self) -> LMHead:
        """The head, all of it: gathered at every call under ZeRO-3."""
        head = read_head(self.policy, self.temperature)
        if not hasattr(head.parameter, "ds_id"):
            return head
        bias = None if head.bias is None else _gathered(head.bias)
        return dataclasses.replace(head, gathered=_gathered(head.parameter), bias=bias)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of a parameter, gathered; empty before the first step."""
        steps = self._steps_taken()
        if not steps or id(parameter) not in self._group_of:
            return {}
        own_state = self._moments(parameter)
        state: dict[str, Any] = {"step": steps}
        for name in self._state_names(parameter):
            own = None if own_state is None else own_state[name]
            state[name] = _whole(parameter, own, torch.float32)
        return state

    def proposed_step(self) -> StepOf:
        """The step, computed on the partitions and gathered parameter by parameter."""
        return _ZeroStep(self)

    def forward(
        self, input_ids: Int[Tensor, "n L"], attention_mask: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n L d"]:
        """The backbone's last hidden states, by way of the whole model, which knows how to gather."""
        return through_the_model(self.policy, input_ids, attention_mask)

    def drop_gradients(self) -> None:
        """Make the coming step none at all, in the way in which ZeRO leaves one out: as an overflow."""
        self.zero.check_grad_overflow = True
        parameter = next(p for p in self.policy.parameters() if id(p) in self._group_of)
        if (part := self.part(parameter)) is not None:
            part.grad.fill_(float("inf"))

    def around_step(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `before` when ZeRO is about to step, and `after` before DeepSpeed's scheduler does."""
        step = getattr(self.zero.step, "original", self.zero.step)

        def foreseen(*args: Any, **kwargs: Any) -> Any:
            before()
            result = step(*args, **kwargs)
            after()
            return result

        foreseen.original = step  # type: ignore[attr-defined]
        self.zero.step = foreseen

    def gradient_scale(self) -> float:
        """What ZeRO will multiply the gradients with: the loss scale taken off, and the norm clipped."""
        scale = 1.0 / float(self.zero.loss_scale)
        if limit := float(self.zero.clip_grad):
            norm = self._norm() * scale
            scale *= norm if math.isnan(norm) else min(1.0, limit / (norm + 1e-6))
        return scale

    def step_on_part(self, parameter: nn.Parameter, part: Part, scale: float) -> Tensor:
        """The step on this process's part of a parameter."""
        group = self.group_of(parameter)
        assert group is not None
        steps = self._steps_taken()
        state: dict[str, Any] = {"step": steps, **part.state} if steps else {}
        step = step_from_state(
            type(self.inner), group, state, part.value, part.grad.float() * scale
        )
        assert step is not None  # the constructor has seen to it
        return step

    def part(self, parameter: Any) -> Part | None:
        """This process's part of a parameter that is trained; None where it holds nothing of it."""
        state = self._moments(parameter)
        if state is None:
            return None
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

            value = safe_get_local_fp32_param(parameter).detach()
            return Part(value, safe_get_local_grad(parameter), state)
        held = parameter._hp_mapping
        here, at = held.hp_fragment_address, held.lp_fragment_address
        grad = held.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        if grad.numel() == parameter.numel() != here.numel:
            grad = grad[at.start : at.start + at.numel]
        return Part(held.get_hp_fragment().detach(), grad, state)

    def _moments(self, parameter: Any) -> dict[str, Tensor] | None:
        """The optimizer's state of this process's part; None where it holds nothing of the parameter."""
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_optimizer_state

            state = {}
            for name in _STATE:
                try:
                    state[name] = safe_get_local_optimizer_state(parameter, name)
                except (KeyError, AttributeError):  # another optimizer's, or none yet
                    continue
            return state
        held = parameter._hp_mapping
        if held is None:
            return None
        # Not through `safe_get_…`, which knows the state of the first parameter group only.
        flat = self.zero.single_partition_of_fp32_groups[held.param_group_index]
        here = held.hp_fragment_address
        return {
            name: value[here.start : here.start + here.numel]
            for name, value in self.inner.state.get(flat, {}).items()
            if name in _STATE and value is not None
        }

    def _norm(self) -> float:
        if hasattr(self.zero, "scaled_global_norm"):  # ZeRO-1 and 2
            return float(self.zero.scaled_global_norm())
        own = [self.part(p) for p in self.policy.parameters() if id(p) in self._group_of]
        squares = torch.stack([part.grad.double().square().sum() for part in own if part])
        return float(self.world.total(squares.sum()).sqrt())

    def _steps_taken(self) -> int:
        return max((int(state.get("step", 0)) for state in self.inner.state.values()), default=0)

    def _state_names(self, parameter: nn.Parameter) -> list[str]:
        group = self.group_of(parameter) or {}
        if "betas" in group:
            return ["exp_avg", "exp_avg_sq"]
        return ["momentum_buffer"] if group.get("momentum") else []


class Part(NamedTuple):
    """One process's part of a parameter, flat, as its optimizer holds it.

    Attributes:
        value: float32 weights, ``[n]``.
        grad: their gradient, averaged over the processes, not yet unscaled and clipped, ``[n]``.
        state: the optimizer's moments, ``[n]`` each; empty before the first step.
    """

    value: Float[Tensor, " n"]
    grad: Float[Tensor, " n"]
    state: dict[str, Float[Tensor, " n"]]


class _ZeroStep:
    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine
        self._scale = engine.gradient_scale()

    def __call__(self, parameter: nn.Parameter) -> Tensor | None:
        return self._gathered(parameter, 0.0, 1.0, torch.float32)

    def moved(self, parameter: nn.Parameter, current: Tensor, scale: float) -> Tensor | None:
        """The parameter after a part of the step, in the dtype in which the model runs.

        From the optimizer's own value: to add a small step to a copy in bfloat16 is to lose it.
        """
        return self._gathered(parameter, 1.0, scale, current.dtype)

    def _gathered(
        self, parameter: nn.Parameter, start: float, scale: float, dtype: torch.dtype
    ) -> Tensor | None:
        """``start`` times the parameter and ``scale`` times its step, whole."""
        if self._engine.group_of(parameter) is None:
            return None
        part, moved = self._engine.part(parameter), None
        if part is not None:
            step = self._engine.step_on_part(parameter, part, self._scale)
            moved = torch.add(start * part.value, step, alpha=scale).to(dtype)
        return _whole(parameter, moved, dtype)


def _whole(parameter: Any, part: Tensor | None, dtype: torch.dtype) -> Tensor:
    """All of a parameter's parts, in its shape."""
    if hasattr(parameter, "ds_id"):
        assert part is not None
        group = parameter.ds_process_group
        flat = part.new_empty(part.numel() * dist.get_world_size(group=group))
        dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)
    whole = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    if part is not None:
        at = parameter._hp_mapping.lp_fragment_address
        whole[at.start : at.start + at.numel] = part
    dist.all_reduce(whole, group=parameter._dp_group)
    return whole.view_as(parameter)


def _gathered(parameter: Any) -> Tensor:
    """A parameter under ZeRO-3, as the model runs with it."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        present: Tensor = parameter.detach().clone()
        return present
    with deepspeed.zero.GatheredParameters([parameter]):
        whole: Tensor = parameter.detach().clone()
    return whole


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__
