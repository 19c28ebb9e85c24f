"""The step that a real optimizer is about to take on one parameter, without taking it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from capo.core.adam_move import moved_by_adam
from capo.core.errors import InputError
from capo.core.steps import AdamStep, MomentumStep, SGDStep

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from torch.optim import Optimizer


def proposed_step(
    optimizer: Optimizer, parameter: Float[Tensor, "V d"], grad: Float[Tensor, "V d"] | None = None
) -> Float[Tensor, "V d"]:
    """What ``optimizer.step()`` would add to ``parameter``, from its gradient and its state.

    SGD, Adam and AdamW are written out (no copy of the state); any other optimizer, Muon for one, takes
    its step on a copy of this parameter alone. Nothing is changed.

    Args:
        optimizer: a ``torch.optim`` optimizer that holds the parameter.
        parameter: ``[V, d]``, for instance the LM head's weight.
        grad: gradient to use in place of ``parameter.grad``.

    Returns:
        ``Δ``, in float32 (float64 for a float64 parameter), for :class:`capo.GivenStep`.

    Raises:
        InputError: the optimizer does not hold the parameter, or there is no gradient.
    """
    group = _group_of(optimizer, parameter)
    return _proposed(optimizer, group, parameter, grad)


class ProposedStep:
    """The step that an optimizer is about to take, parameter by parameter, computed when asked for.

    Args:
        optimizer: between ``backward`` (gradients as they will be used: unscaled, clipped) and ``step``.
        gradients: by ``id`` of the parameter, to be used in place of ``.grad``; a parameter that is not
            among them has none.
    """

    def __init__(self, optimizer: Optimizer, gradients: dict[int, Tensor] | None = None) -> None:
        self.optimizer = optimizer
        self._gradients = gradients
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def __call__(self, parameter: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """``Δ`` of one parameter; None where the optimizer does not hold it or it has no gradient."""
        found = self._of(parameter)
        if found is None:
            return None
        group, gradient = found
        with torch.no_grad():
            return _proposed(self.optimizer, group, parameter, gradient)

    @torch.no_grad()
    def moved(
        self, parameter: Float[Tensor, "..."], current: Float[Tensor, "..."], scale: float
    ) -> Float[Tensor, "..."] | None:
        """``current + scale · Δ`` in the dtype of ``current``; None where there is no step.

        Equal to adding what calling this returns, to rounding; of Adam in half as many passes over memory.
        """
        found = self._of(parameter)
        if found is None:
            return None
        group, gradient = found
        value = current.detach()
        state = self.optimizer.state.get(parameter, {})
        adam = _plain_adam(type(self.optimizer), group, state)
        moved = None if adam is None else moved_by_adam(adam, value, gradient.detach(), scale)
        if moved is not None:
            return moved
        step = _proposed(self.optimizer, group, parameter, gradient)
        return torch.add(value.to(step.dtype), step, alpha=scale).to(value.dtype)

    def _of(self, parameter: Tensor) -> tuple[dict[str, Any], Tensor] | None:
        """Group and gradient of a parameter that will be stepped."""
        group = self._groups.get(id(parameter))
        gradient = parameter.grad
        if self._gradients is not None:
            gradient = self._gradients.get(id(parameter))
        return None if group is None or gradient is None else (group, gradient)


def _proposed(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, grad: Tensor | None
) -> Tensor:
    grad = parameter.grad if grad is None else grad
    if grad is None:
        raise InputError("parameter", "must have a gradient: call this between backward and step.")
    if grad.shape != parameter.shape:
        raise InputError("grad", f"must be {tuple(parameter.shape)}, got {tuple(grad.shape)}.")
    with torch.no_grad():
        state = optimizer.state.get(parameter, {})
        step = step_from_state(type(optimizer), group, state, parameter, grad)
        return _on_a_copy(optimizer, group, parameter, grad) if step is None else step


def step_from_state(
    kind: type, group: dict[str, Any], state: dict[str, Any], parameter: Tensor, grad: Tensor
) -> Tensor | None:
    """The written-out step of SGD, Adam or AdamW on a parameter or any part of it.

    Args:
        kind: the optimizer's class.
        group: its settings for the parameter.
        state: its state, shaped like ``parameter``.
        parameter, grad: value and gradient, of one shape.

    Returns:
        ``Δ`` in float32 or wider; None for an optimizer that is not written out.
    """
    step = _written_out(kind, group, state)
    if step is None:
        return None
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    loss_grad = grad.detach().to(dtype)
    if group.get("maximize", False):
        loss_grad = -loss_grad
    weight = parameter.detach().to(dtype)
    if _couples_decay(kind, group):
        loss_grad = loss_grad + group["weight_decay"] * weight  # coupled, unlike AdamW's
    return step.of_gradient(loss_grad, weight)


def _plain_adam(kind: type, group: dict[str, Any], state: dict[str, Any]) -> AdamStep | None:
    """Adam or AdamW with moments, and nothing but decoupled decay beside them."""
    if "exp_avg" not in state or group.get("maximize", False) or _couples_decay(kind, group):
        return None
    step = _written_out(kind, group, state)
    return step if isinstance(step, AdamStep) else None


def _couples_decay(kind: type, group: dict[str, Any]) -> bool:
    """Whether weight decay is a part of the gradient, as in Adam unless it is asked not to be."""
    decoupled = group.get("decoupled_weight_decay", False)
    return kind is torch.optim.Adam and bool(group["weight_decay"]) and not decoupled


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    raise InputError("parameter", "must be one of the optimizer's parameters.")


def _written_out(
    kind: type, group: dict[str, Any], state: dict[str, Any]
) -> SGDStep | MomentumStep | AdamStep | None:
    """The optimizer as a step model, where it is one."""
    if kind is torch.optim.SGD:
        lr, decay = float(group["lr"]), group["weight_decay"]
        if not group["momentum"]:
            return SGDStep(lr, decay)
        return MomentumStep(
            lr,
            group["momentum"],
            state.get("momentum_buffer"),
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            weight_decay=decay,
        )
    if kind in (torch.optim.Adam, torch.optim.AdamW) and not group["amsgrad"]:
        return AdamStep(
            float(group["lr"]),
            tuple(float(b) for b in group["betas"]),  # type: ignore[arg-type]
            group["eps"],
            state.get("exp_avg"),
            state.get("exp_avg_sq"),
            int(state.get("step", 0)),
            weight_decay=0.0 if _couples_decay(kind, group) else group["weight_decay"],
        )
    return None


def _on_a_copy(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, grad: Tensor
) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    double = parameter.detach().to(dtype).clone().requires_grad_()
    double.grad = grad.detach().to(dtype).clone()
    options = {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
    kind: Any = type(optimizer)
    twin = kind([{"params": [double], **options}])
    state = optimizer.state.get(parameter, {})
    twin.state[double] = {
        k: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in state.items()
    }
    twin.step()
    return double.detach() - parameter.detach().to(dtype)
