"""One view of the policy and its optimizer, wherever their numbers lie.

CAPO asks five things of what it trains: the head, its optimizer state and learning rate, the step that is
about to be taken on a parameter, and the hidden states of some tokens. :class:`Engine` answers for one
process and for DDP, where every process holds everything; its subclasses gather for FSDP2 (below) and
DeepSpeed ZeRO (`_trl_zero.py`), one parameter at a time and only when asked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from capo.core.errors import InputError
from capo.core.proposed import ProposedStep
from capo.integrations._trl_head import (
    LMHead,
    capture_hidden,
    causal_lm,
    drops_out,
    read_head,
)
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.trust_region.trial import StepOf

WRITTEN_OUT = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose step on a shard is the shard of their step."""


class Engine:
    """A policy and its optimizer in one process, or replicated over several (DDP).

    Args:
        policy: the unwrapped model.
        optimizer: the torch optimizer.
        temperature: the trainer's sampling temperature.
        world: the processes.

    Attributes:
        sharded: whether a process holds only a part of the numbers.
        steps_in_backward: whether the optimizer steps within the backward pass, where no callback of the
            trainer comes between; then :meth:`around_step` does.
    """

    sharded = False
    steps_in_backward = False

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        temperature: float,
        world: World,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.temperature = temperature
        self.world = world

    @property
    def backbone(self) -> nn.Module:
        """The model below the head."""
        backbone: nn.Module = causal_lm(self.policy).base_model
        return backbone

    @functools.cached_property
    def exact_hidden(self) -> bool:
        """Whether another pass of the same tokens gives a training pass's hidden states.

        To rounding far below a step's effect, that is: in float32 and without dropout, and where the
        trainer's mixed precision does not come between.
        """
        dtype = read_head(self.policy, self.temperature).parameter.dtype
        return dtype in (torch.float32, torch.float64) and not drops_out(self.policy)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, whose learning rates the step follows."""
        return self.optimizer.param_groups

    def head(self) -> LMHead:
        """The head, all of it."""
        return read_head(self.policy, self.temperature)

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        """The optimizer's settings for a parameter; None where it does not train it."""
        for group in self.groups:
            if any(p is parameter for p in group["params"]):
                return group
        return None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of a parameter, all of it; empty before the first step."""
        state: dict[str, Any] = self.optimizer.state.get(parameter, {})
        return state

    def proposed_step(self) -> StepOf:
        """The step that the optimizer is about to take, parameter by parameter, all of each."""
        return ProposedStep(self.optimizer)

    def forward(
        self, input_ids: Int[Tensor, "n L"], attention_mask: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n L d"]:
        """The backbone's last hidden states."""
        output: Any = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def drop_gradients(self) -> None:
        """Make the coming step none at all: neither weights nor moments change."""
        for group in self.groups:
            for parameter in group["params"]:
                parameter.grad = None

    def around_step(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `before` between the last gradient and the step, and `after` right behind it.

        Only where the trainer has no callback there.
        """

    def reading(self) -> AbstractContextManager[None]:
        """A context in which the policy may be run apart from training."""
        return nullcontext()


class ShardedEngine(Engine):
    """FSDP2: parameters, gradients and optimizer state are DTensors.

    The optimizer's step is elementwise, so that every process computes it on its own shards; what is
    gathered is one parameter's step, when the module that owns it is about to run.
    """

    sharded = True

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        temperature: float,
        world: World,
    ) -> None:
        super().__init__(policy, optimizer, temperature, world)
        if type(optimizer) not in WRITTEN_OUT:
            names = ", ".join(kind.__name__ for kind in WRITTEN_OUT)
            raise InputError(
                "optim",
                f"must be one of torch's {names} where parameters are sharded, "
                f"got {type(optimizer).__name__}.",
            )
        self.reshard()
        # As the optimizer knows it: after a forward pass the model may hold the gathered one.
        self._head = read_head(policy, temperature)

    def reshard(self) -> None:
        """Give back what a forward pass without a backward pass has left gathered.

        The next pass would take the gathered parameters for the present ones, whatever a step has done
        to the shards meanwhile.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def head(self) -> LMHead:
        """The head, all of it: gathered at every call."""
        return dataclasses.replace(
            self._head,
            gathered=_full(self._head.parameter.detach()),
            bias=None if self._head.bias is None else _full(self._head.bias.detach()),
        )

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of a parameter, gathered; empty before the first step."""
        return {name: _full(value) for name, value in super().state_of(parameter).items()}

    def proposed_step(self) -> StepOf:
        """The step, computed on the shards and gathered parameter by parameter."""
        return _ShardedStep(self.optimizer)

    def forward(
        self, input_ids: Int[Tensor, "n L"], attention_mask: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n L d"]:
        """The backbone's last hidden states, by way of the whole model, which knows how to gather."""
        hidden = through_the_model(self.policy, input_ids, attention_mask)
        self.reshard()  # the last group stays gathered, so that its backward pass finds it
        return hidden

    def reading(self) -> AbstractContextManager[None]:
        """Shards on entry, shards on exit."""
        return _Resharded(self)


class _Resharded:
    def __init__(self, engine: ShardedEngine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        self._engine.reshard()

    def __exit__(self, *_: object) -> None:
        self._engine.reshard()


class _ShardedStep:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._local = ProposedStep(optimizer)

    def __call__(self, parameter: nn.Parameter) -> Tensor | None:
        step = self._local(parameter)
        return None if step is None else _full(step)

    def moved(self, parameter: nn.Parameter, current: Tensor, scale: float) -> Tensor | None:
        """The parameter after a part of the step, in the dtype in which the model runs.

        From the optimizer's own value: to add a small step to a copy in bfloat16 is to lose it.
        """
        step = self._local(parameter)
        if step is None:
            return None
        value = torch.add(parameter.detach().to(step.dtype), step, alpha=scale)
        gathered: Tensor = _full(value.to(current.dtype))
        return gathered


def through_the_model(
    policy: nn.Module, input_ids: Int[Tensor, "n L"], attention_mask: Int[Tensor, "n L"]
) -> Float[Tensor, "n L d"]:
    """Last hidden states from a pass of the whole model, the logits of one position included."""
    with capture_hidden(policy, detached=False) as passes:
        policy(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1
        )
    return passes[-1]


def _full(value: Any) -> Any:
    """A DTensor, gathered; anything else as it is."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
