"""The steps that are judged: what an optimizer would add to the head, given a gradient.

Every step here is an *ascent* step ``Δ`` on the objective (what the optimizer adds to ``W``), while
moments and buffers are in ``torch.optim``'s own convention: those of the *loss* gradient. A token's
loss gradient is ``G = -grad_scale · A · (D w) hᵀ / T`` (README, eq. 3).

Two views of the same step:

- ``of_gradient(G, rows)``: ``Δ`` for explicit loss-gradient rows ``[R, d]`` (sequence and batch);
- ``project_*`` in :mod:`capo.core.statistics.projection`: ``q = Δ h`` for every token's own step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from capo.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Rows = slice | torch.Tensor
"""Vocabulary rows: a contiguous block, or an index tensor."""

ALL_ROWS = slice(None)


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise InputError(name, message)


def _require_finite(value: float, name: str, *, minimum: float = -math.inf) -> None:
    ok = isinstance(value, int | float) and math.isfinite(value) and value >= minimum
    allowed = "a finite number" + (f" ≥ {minimum:g}" if minimum > -math.inf else "")
    _require(ok, name, f"must be {allowed}, got {value!r}.")


@dataclass(frozen=True)
class SGDStep:
    """Plain gradient ascent, ``Δ = lr · g``.

    Args:
        lr: learning rate α ≥ 0.
        weight_decay: λ of ``torch.optim.SGD`` (coupled): ``Δ = lr · (g − λ W)``.

    Source: arXiv 2510.00819, §4; README, eq. 9.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        _require_finite(self.lr, "lr", minimum=0.0)
        _require_finite(self.weight_decay, "weight_decay", minimum=0.0)

    def of_gradient(
        self, grad: Float[Tensor, "R d"], weight: Float[Tensor, "R d"], rows: Rows = ALL_ROWS
    ) -> Float[Tensor, "R d"]:
        """``Δ`` for loss-gradient rows ``grad`` at head rows ``weight``."""
        del rows
        return -self.lr * (grad + self.weight_decay * weight)


@dataclass(frozen=True)
class MomentumStep:
    """``torch.optim.SGD`` with momentum (and Nesterov momentum, dampening, coupled decay).

    Args:
        lr: learning rate ≥ 0.
        momentum: μ in [0, 1).
        momentum_buffer: ``[V, d]`` buffer of the loss gradient, or None before the first step (torch
            then sets the buffer to the gradient itself, without dampening).
        dampening: torch's dampening.
        nesterov: torch's Nesterov variant.
        weight_decay: coupled decay λ.
        grad_scale: factor on a token's own gradient, as in :class:`AdamStep`.
    """

    lr: float
    momentum: float
    momentum_buffer: Float[Tensor, "V d"] | None = field(default=None, repr=False)
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        _require_finite(self.lr, "lr", minimum=0.0)
        _require(0.0 <= self.momentum < 1.0, "momentum", f"must be in [0, 1), got {self.momentum}.")
        _require(
            not self.nesterov or (self.momentum > 0 and self.dampening == 0),
            "nesterov",
            "needs a momentum and zero dampening, as torch.optim.SGD does.",
        )
        _require_finite(self.weight_decay, "weight_decay", minimum=0.0)
        _require_finite(self.grad_scale, "grad_scale", minimum=0.0)

    @property
    def gradient_factor(self) -> float:
        """How often the fresh loss gradient enters the direction."""
        fresh = 1.0 if self.momentum_buffer is None else 1.0 - self.dampening
        return 1.0 + self.momentum * fresh if self.nesterov else fresh

    @property
    def buffer_factor(self) -> float:
        """How often the old buffer enters the direction."""
        if self.momentum_buffer is None:
            return 0.0
        return self.momentum**2 if self.nesterov else self.momentum

    def of_gradient(
        self, grad: Float[Tensor, "R d"], weight: Float[Tensor, "R d"], rows: Rows = ALL_ROWS
    ) -> Float[Tensor, "R d"]:
        """``Δ`` for loss-gradient rows ``grad`` at head rows ``weight``."""
        direction = self.gradient_factor * (grad + self.weight_decay * weight)
        if self.momentum_buffer is not None:
            direction = direction + self.buffer_factor * self.momentum_buffer[rows].to(grad.dtype)
        return -self.lr * direction


@dataclass(frozen=True)
class AdamStep:
    """Adam or AdamW from given moments, which are read and never changed.

    With ``m' = β₁ m + (1−β₁) G`` and ``v' = β₂ v + (1−β₂) G²``,
    ``Δ = −lr · (m'/(1−β₁^{t+1})) / (√(v'/(1−β₂^{t+1})) + ε) − lr λ W``.

    Before the first step (``step=0``; moments None or zero) this is what Adam does with the gradient
    alone: ``Δ = −lr · G/(|G| + ε)``, a sign step. (The authors' code judges the raw gradient there.)

    Args:
        lr: learning rate α ≥ 0.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε > 0.
        exp_avg: ``[V, d]`` first moment of the *loss* gradient (torch's convention), or None.
        exp_avg_sq: ``[V, d]`` second moment, or None (both or neither).
        step: t, the number of steps already taken.
        weight_decay: decoupled decay λ (AdamW).
        grad_scale: factor on a token's own gradient before it meets the moments. The moments of a real
            optimizer are of the loss-normalised gradient, while a token enters as a batch of one.
        preconditioner: ``"exact"`` updates v with the token's gradient; ``"frozen"`` keeps it at v (two
            matmuls over the full vocabulary; undefined at step 0, and too large by up to 3 × where one
            token's gradient dwarfs √v).

    Source: arXiv 2510.00819, Algorithm 1; README, eq. 10–12.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    exp_avg: Float[Tensor, "V d"] | None = field(repr=False)
    exp_avg_sq: Float[Tensor, "V d"] | None = field(repr=False)
    step: int
    weight_decay: float = 0.0
    grad_scale: float = 1.0
    preconditioner: Literal["exact", "frozen"] = "exact"

    def __post_init__(self) -> None:
        """Check the hyper-parameters and that the moments belong together."""
        _require_finite(self.lr, "lr", minimum=0.0)
        _require(
            len(self.betas) == 2 and all(0.0 <= b < 1.0 for b in self.betas),
            "betas",
            f"must be two numbers in [0, 1), got {self.betas!r}.",
        )
        _require_finite(self.eps, "eps", minimum=0.0)
        _require(int(self.step) == self.step and self.step >= 0, "step", "must be an integer ≥ 0.")
        _require_finite(self.weight_decay, "weight_decay", minimum=0.0)
        _require_finite(self.grad_scale, "grad_scale", minimum=0.0)
        _require(
            self.preconditioner in ("exact", "frozen"),
            "preconditioner",
            f"must be 'exact' or 'frozen', got {self.preconditioner!r}.",
        )
        _require(
            (self.exp_avg is None) == (self.exp_avg_sq is None),
            "exp_avg_sq",
            "must be given together with exp_avg.",
        )
        if self.exp_avg is None:
            _require(self.step == 0, "step", "must be 0 when there are no moments yet.")
            _require(
                self.preconditioner == "exact",
                "preconditioner",
                "'frozen' needs moments: it is undefined before the first step.",
            )
        else:
            _require(
                self.preconditioner == "exact" or self.step > 0,
                "preconditioner",
                "'frozen' is undefined at step 0, where v is empty; use 'exact'.",
            )

    @property
    def bias_corrections(self) -> tuple[float, float]:
        """``(1 − β₁^{t+1}, 1 − β₂^{t+1})``."""
        return 1.0 - self.betas[0] ** (self.step + 1), 1.0 - self.betas[1] ** (self.step + 1)

    def of_gradient(
        self, grad: Float[Tensor, "R d"], weight: Float[Tensor, "R d"], rows: Rows = ALL_ROWS
    ) -> Float[Tensor, "R d"]:
        """``Δ`` for loss-gradient rows ``grad`` at head rows ``weight``."""
        beta1, beta2 = self.betas
        correction1, correction2 = self.bias_corrections
        # In place from here on: a whole model's step passes through.
        update, second = (1.0 - beta1) * grad, (1.0 - beta2) * grad
        second.mul_(grad)
        if self.exp_avg is not None and self.exp_avg_sq is not None:
            update.add_(self.exp_avg[rows].to(grad.dtype), alpha=beta1)
            old = self.exp_avg_sq[rows].to(grad.dtype)
            # Frozen: v̂ is the moment of the last step, with that step's bias correction.
            second = (
                second.add_(old, alpha=beta2) if self.preconditioner == "exact" else old.clone()
            )
        if self.preconditioner == "frozen":
            correction2 = 1.0 - beta2**self.step
        update.div_(second.sqrt_().div_(math.sqrt(correction2)).add_(self.eps))
        update.mul_(-self.lr / correction1)
        return (
            update.sub_(weight, alpha=self.lr * self.weight_decay) if self.weight_decay else update
        )


@dataclass(frozen=True)
class GivenStep:
    """A step of the head that is already known, the same for every token.

    Args:
        delta: ``[V, d]``, what is added to ``head_weight`` (see :func:`capo.proposed_step`).
    """

    delta: Float[Tensor, "V d"] = field(repr=False)

    def of_gradient(
        self, grad: Float[Tensor, "R d"], weight: Float[Tensor, "R d"], rows: Rows = ALL_ROWS
    ) -> Float[Tensor, "R d"]:
        """``Δ``, whatever the gradient."""
        del weight
        return self.delta[rows].to(grad.dtype)


Step = SGDStep | MomentumStep | AdamStep | GivenStep


def check_step_shape(step: Step, vocabulary: int, width: int) -> None:
    """Raise :class:`InputError` unless the step's tensors are ``[V, d]``."""
    tensors: dict[str, Tensor | None] = {}
    match step:
        case AdamStep():
            tensors = {"exp_avg": step.exp_avg, "exp_avg_sq": step.exp_avg_sq}
        case MomentumStep():
            tensors = {"momentum_buffer": step.momentum_buffer}
        case GivenStep():
            tensors = {"delta": step.delta}
        case SGDStep():
            pass
        case _:
            raise InputError("step", f"must be one of CAPO's step models, got {type(step)!r}.")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _require(
            tuple(tensor.shape) == (vocabulary, width),
            f"step.{name}",
            f"must have head_weight's shape ({vocabulary}, {width}), got {tuple(tensor.shape)}.",
        )
