"""What a proposed step of the whole model does to the policy at chosen tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from capo.core.errors import InputError
from capo.core.trust_region.divergence import Divergence, Reference
from capo.core.trust_region.trial import StepOf, StepTrial

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from capo.core.statistics.problem import Head

Depth = int | str
"""Layers that are seen to move: ``"all"``, or the last n and the head (0: the head alone)."""

DIFFERENCE = 0.01
"""Part of the step over which derivatives are differenced where there is no forward mode."""


class MeanShift(NamedTuple):
    """Weighted means over tokens: policy shift (nats) and objective shift (units of the advantage)."""

    policy: float
    objective: float


class Probe:
    """A policy at chosen tokens, before a step, after any part of it, and along it.

    Args:
        backbone: the model below the head.
        hidden: runs the backbone; ``[M, d]`` input of the head at the tokens' predicting positions.
        head: the head as the core sees it.
        head_parameter: the head's weight as the optimizer knows it.
        step_of: the proposed step, parameter by parameter.
        reference: the distributions before the step.
        hidden_before: what ``hidden()`` gave before the step, ``[M, d]``.
        weights: ``[M]`` weights of the tokens in every mean; None for equal ones.
        total: sums a tensor over the processes that hold tokens of the same step; None for one process.
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: Callable[[], Float[Tensor, "M d"]],
        head: Head,
        head_parameter: nn.Parameter,
        step_of: StepOf,
        reference: Reference,
        hidden_before: Float[Tensor, "M d"],
        weights: Float[Tensor, " M"] | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.backbone = backbone
        self.hidden = hidden
        self.head = head
        self.head_parameter = head_parameter
        self.step_of = step_of
        self.reference = reference
        self.hidden_before = hidden_before
        self.weights = weights
        self.total = total
        self.forward_mode = True  # until an operation is found to have none
        self.passes = 0

    @torch.no_grad()
    def after(self, scale: float) -> Divergence:
        """The exact divergence that ``scale`` times the step causes; one forward pass."""
        self.passes += 1
        hidden = StepTrial(self.backbone, self.step_of).after(scale, self.hidden)
        return self.reference.to(self._logits_after(hidden, scale))

    @torch.no_grad()
    def along(self, depth: Depth = "all") -> Divergence:
        """The divergence of the whole step to second order, seen from ``depth``.

        One forward pass with derivatives (about 2.5 plain ones), or two plain ones where the model has
        no forward mode; at depth 0 none at all.

        Raises:
            InputError: the model has fewer layers than ``depth``.
        """
        return self.reference.along(self.logit_tangent(depth))

    def logit_tangent(self, depth: Depth = "all") -> Float[Tensor, "M V"]:
        """Derivative of the logits (temperature applied) with respect to the factor on the step."""
        h = self.hidden_before.to(self.head.dtype)
        everything = slice(0, self.head.vocabulary)
        weight = self.head.weight.to(self.head.dtype)
        step = self.step_of(self.head_parameter)
        raw = torch.zeros(h.shape[0], self.head.vocabulary, dtype=h.dtype, device=h.device)
        if step is not None:
            raw += h @ step.to(self.head.dtype).T
        if depth != 0:
            raw += self._hidden_tangent(depth).to(self.head.dtype) @ weight.T
        slope = self.head.activate(self.head.raw(h, everything)).slope
        return raw * slope / self.head.temperature

    def mean(self, divergence: Divergence) -> MeanShift:
        """The weighted means over the tokens, those of all processes."""
        if self.total is not None:
            return self._global_mean(divergence, self.total)
        if divergence.policy_shift.numel() == 0:
            return MeanShift(0.0, 0.0)
        weights = self.weights
        if weights is None:
            weights = torch.ones_like(divergence.policy_shift)
        share = (weights / weights.sum()).to(divergence.policy_shift.dtype)
        both = torch.stack([divergence.policy_shift @ share, divergence.objective_shift @ share])
        return MeanShift(*both.tolist())

    def _global_mean(self, divergence: Divergence, total: Callable[[Tensor], Tensor]) -> MeanShift:
        shifts = torch.stack([divergence.policy_shift, divergence.objective_shift]).double()
        weights = torch.ones_like(shifts[0]) if self.weights is None else self.weights.double()
        *sums, weight = total(torch.cat([shifts @ weights, weights.sum()[None]])).tolist()
        return MeanShift(*(s / weight for s in sums)) if weight else MeanShift(0.0, 0.0)

    def _hidden_tangent(self, depth: Depth) -> Float[Tensor, "M d"]:
        trial = StepTrial(self.backbone, self.step_of, last_layers(self.backbone, depth))
        if self.forward_mode:
            try:
                self.passes += 1
                return trial.tangent(self.hidden)[1]
            except NotImplementedError:
                self.forward_mode = False
        self.passes += 1
        after = trial.after(DIFFERENCE, self.hidden)
        return (after.to(self.head.dtype) - self.hidden_before.to(self.head.dtype)) / DIFFERENCE

    def _logits_after(self, hidden: Float[Tensor, "M d"], scale: float) -> Float[Tensor, "M V"]:
        h = hidden.to(self.head.dtype)
        raw = self.head.raw(h, slice(0, self.head.vocabulary))
        step = self.step_of(self.head_parameter)
        if step is not None:
            raw += scale * (h @ step.to(self.head.dtype).T)
        return self.head.activate(raw).z


def last_layers(backbone: nn.Module, depth: Depth) -> list[nn.Module] | None:
    """The modules of the last ``depth`` layers and of what follows them; None for ``"all"``.

    The layers are the longest ``ModuleList`` among the backbone's children; what is neither they nor an
    embedding (the final norm) follows them.

    Raises:
        InputError: ``depth`` is neither ``"all"`` nor between 0 and the number of layers.
    """
    if depth == "all":
        return None
    lists = [m for m in backbone.children() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    if not isinstance(depth, int) or not 0 <= depth <= len(layers):
        raise InputError(
            "depth", f"must be 'all' or an integer from 0 to {len(layers)}, got {depth!r}."
        )
    after = [m for m in backbone.children() if m not in lists and not isinstance(m, nn.Embedding)]
    tops = [*layers[len(layers) - depth :], *after] if depth else []
    return [module for top in tops for module in top.modules()]
