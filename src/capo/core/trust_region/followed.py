"""How many completions a step of an optimizer with momentum follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAST = 1e-3
"""Completions; what is earned is never nothing, so that a step always has a length."""


class Followed:
    """Mean number of informative completions behind a step, weighted as momentum weighs gradients.

    A completion with advantage 0 has no gradient. Where all rewards of a batch are alike, the step goes on
    in the direction of earlier batches: it has earned what is left of their weight, ``(1 - β) Σ β^i n_i``,
    and no more.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def step(self, completions: int, momentum: float) -> float:
        """Take the next step's number; return the mean.

        Args:
            completions: with a gradient, in the step's own batch.
            momentum: share of the first moment that is kept (Adam's β₁), in [0, 1).
        """
        self._sum = momentum * self._sum + (1 - momentum) * completions
        self._weight = momentum * self._weight + (1 - momentum)
        return max(self._sum / self._weight, LEAST)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._sum, self._weight = state["sum"], state["weight"]
