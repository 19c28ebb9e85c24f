"""A model as it would be after a step that has not been taken.

The step's tensors are as large as the model, so none of them is kept: a hook computes a module's part
of the step just before that module runs, puts the displaced parameter in the place of the real one, and
takes it out again when the module is done. The real parameters are never written to, so that nothing
has to be restored and no rounding is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.autograd.forward_ad as fwd
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch import Tensor

StepOf = Callable[[nn.Parameter], "Tensor | None"]
"""What a step would add to a parameter, in any float dtype; None where it would add nothing."""


@runtime_checkable
class Moves(Protocol):
    """A step that knows better than to be made and added: a shorter formula, or sharded parameters."""

    def __call__(self, parameter: nn.Parameter, /) -> Tensor | None:
        """As any :data:`StepOf`."""

    def moved(self, parameter: nn.Parameter, current: Tensor, scale: float) -> Tensor | None:
        """What to run with in place of ``current`` after ``scale`` times the step, in its dtype."""


Replace = Callable[[nn.Parameter, "Tensor"], "Tensor | None"]
"""What to run with in place of a parameter and its present value; None to leave it."""

T = TypeVar("T")

_NOT_CALLED: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


class StepTrial:
    """Runs a model after a part of a proposed step, or along its direction.

    Args:
        model: the module whose parameters the step is of.
        step_of: the step, parameter by parameter; asked anew at every use of a parameter.
        modules: the modules to which the step is confined (a tied parameter moves only where these use
            it); None for all.
    """

    def __init__(
        self, model: nn.Module, step_of: StepOf, modules: Iterable[nn.Module] | None = None
    ) -> None:
        self.model = model
        self.step_of = step_of
        chosen = None if modules is None else set(modules)
        # As the optimizer knows them: what a module runs with may be another tensor (a gathered shard).
        self._owners = {
            m: own
            for m in model.modules()
            if (chosen is None or m in chosen) and (own := _own_parameters(m))
        }
        # Modules whose parameters are read by others without a call (PEFT's parameter dicts), or not at
        # all (an adapter that is not active). A pass finds out, and so that not every trial's first is
        # made twice, all trials of a model remember.
        self._not_called = _NOT_CALLED.setdefault(model, WeakSet())

    def after(self, scale: float, call: Callable[[], T]) -> T:
        """``call()`` as the model would answer after ``scale`` times the step.

        The parameters' own dtype is kept, so that a narrow one rounds the step as it would be rounded.
        """

        def displaced(parameter: nn.Parameter, current: Tensor) -> Tensor | None:
            step = self.step_of(parameter)
            if step is None:
                return None
            value = current.detach()
            return torch.add(value.to(step.dtype), step, alpha=scale).to(value.dtype)

        replace: Replace = displaced
        if isinstance(step_of := self.step_of, Moves):
            move = step_of.moved

            def replace(parameter: nn.Parameter, current: Tensor) -> Tensor | None:
                return move(parameter, current, scale)

        with torch.no_grad():
            return self._run(replace, call)

    def tangent(self, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """``(call(), d call()/d scale)`` at scale 0, by forward-mode differentiation.

        Scaled-dot-product attention is made to use its plain kernel, the one that has a forward mode.

        Raises:
            NotImplementedError: an operation of the model has no forward mode (fused attention, custom
                kernels); use :meth:`after` at a small scale there.
        """

        def dual(parameter: nn.Parameter, current: Tensor) -> Tensor | None:
            step = self.step_of(parameter)
            if step is None:
                return None
            value = current.detach()
            made: Tensor = fwd.make_dual(value, step.to(value.dtype))  # type: ignore[no-untyped-call]
            return made

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fwd.dual_level():
            output = self._run(dual, call)
            primal, tangent = fwd.unpack_dual(output)  # type: ignore[no-untyped-call]
            return primal, torch.zeros_like(primal) if tangent is None else tangent

    def _run(self, replace: Replace, call: Callable[[], T]) -> T:
        called: set[nn.Module] = set()
        with _replaced(self._owners, replace, self._not_called, called):
            result = call()
        missed = set(self._owners) - called - set(self._not_called)
        self._not_called -= called
        if not missed:
            return result
        self._not_called |= missed
        return self._run(replace, call)


@contextmanager
def _replaced(
    owners: dict[nn.Module, dict[str, nn.Parameter]],
    replace: Replace,
    at_once: Container[nn.Module],
    called: set[nn.Module],
) -> Iterator[None]:
    """Swap the owners' parameters while each runs; those of ``at_once`` for the whole block."""
    real: dict[nn.Module, dict[str, nn.Parameter]] = {}
    handles: list[Any] = []

    def enter(module: nn.Module, _args: Any) -> None:
        called.add(module)
        swap(module)

    def swap(module: nn.Module) -> None:
        if module in real:  # re-entered
            return
        own = _own_parameters(module)
        swapped = {name: replace(p, own[name]) for name, p in owners[module].items() if name in own}
        real[module] = {name: own[name] for name, value in swapped.items() if value is not None}
        for name, value in swapped.items():
            if value is not None:
                module._parameters[name] = value  # type: ignore[assignment]

    def leave(module: nn.Module, *_: Any) -> None:
        for name, parameter in real.pop(module, {}).items():
            module._parameters[name] = parameter

    try:
        for module in owners:
            handles.append(module.register_forward_pre_hook(enter))
            if module in at_once:
                swap(module)
            else:
                # First of all hooks: a sharded module's own takes its parameters away afterwards.
                hook = module.register_forward_hook(leave, prepend=True, always_call=True)
                handles.append(hook)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(real):
            leave(module)


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}
