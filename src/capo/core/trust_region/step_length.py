"""How much of a proposed step to take, from trials of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from capo.core.trust_region.calibration import SHIFT_FLOOR

Trial = Callable[[float], float]
"""The policy shift (nats a token) that a factor on the proposed step is predicted to cause."""

MAX_TRIALS = 8
AIM = 0.9
"""What is aimed at when a step is shortened, as a share of the longest that might fit."""
NEAR = 0.5
"""The first step's trials end when the shift is at least this share of the pace."""


@dataclass(frozen=True)
class StepChoice:
    """The factor on one step.

    Attributes:
        scale: factor in [0, 1]; 0 where the model did not stay finite after any part of the step.
        proposed: predicted policy shift (nats a token) of the whole step, to second order.
        predicted: predicted policy shift of the step as taken.
        trials: trials that were made.
        capped: whether the budget, and not the pace, decided.
    """

    scale: float
    proposed: float
    predicted: float
    trials: int
    capped: bool


class StepLength:
    """Keeps every step within a budget, and the typical one at a steady pace inside it.

    The policy shift of a step grows with the square of its length, ``κ (scale · lr)²``. The pace
    follows a running geometric mean of ``κ``, so that the shift of a *typical* step is ``cruise`` times
    the budget: steps keep the relative lengths that the optimizer gave them. Scaling each to one and
    the same shift would shorten those that move decisions (high curvature, much signal) and lengthen
    the noise. Only a step that would exceed the budget itself is shortened on its own account.

    Args:
        cruise: share of the budget that a typical step uses, in (0, 1]; 1 takes every step to its
            budget.
        memory: weight of the newest ``κ`` in the running mean, in (0, 1].

    Attributes:
        learns: whether the step that is to be chosen is one of those that the running mean is of. A
            step of mere momentum is not: its direction is mostly spent, its curvature small, and a pace
            set by it would be too fast for the next batch that says something.
        log_curvature: running mean of ``log κ`` (nats a token per squared learning rate), or None.
    """

    def __init__(self, cruise: float = 0.25, memory: float = 0.1) -> None:
        self.cruise = cruise
        self.memory = memory
        self.learns = True
        self.log_curvature: float | None = None

    def choose(self, trial: Trial, budget: float, lr: float) -> StepChoice:
        """Choose the factor on the step that is proposed.

        Args:
            trial: predicts the policy shift of a factor; may return what is not finite.
            budget: δ, nats a token.
            lr: the learning rate of the proposed step, in whose units the pace is remembered.
        """
        search = _Search(trial)
        if lr <= 0:
            return StepChoice(1.0, 0.0, 0.0, 0, capped=False)
        first = self.log_curvature is None
        if first:
            scale = search.reach(1.0, self.cruise * budget, NEAR)
        else:
            scale = self._pace(budget, lr)
            search.shift_at(scale)
        curvature = search.curvature
        if curvature is not None:
            if first or self.learns:
                self._remember(curvature / lr**2)
            exact = min(1.0, math.sqrt(self.cruise * budget / curvature))
            if first and exact <= scale / math.sqrt(NEAR):  # else it is out of the trials' reach
                scale = exact
        shift = search.predicted(scale)
        capped = not shift <= budget
        if capped:
            scale = search.reach(scale, budget)
            shift = search.predicted(scale)
        proposed = math.nan if search.curvature is None else search.curvature
        return StepChoice(scale, proposed if scale else math.inf, shift, search.trials, capped)

    def _pace(self, budget: float, lr: float) -> float:
        assert self.log_curvature is not None
        log_scale = 0.5 * (math.log(self.cruise * budget) - self.log_curvature) - math.log(lr)
        return math.exp(min(0.0, log_scale))

    def _remember(self, curvature: float) -> None:
        seen = math.log(curvature)
        if self.log_curvature is None:
            self.log_curvature = seen
        else:
            self.log_curvature += self.memory * (seen - self.log_curvature)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from."""
        return {"log_curvature": self.log_curvature}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.log_curvature = state["log_curvature"]


class _Search:
    """Trials of one step, remembered."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._seen: dict[float, float] = {}

    @property
    def trials(self) -> int:
        return len(self._seen)

    @property
    def curvature(self) -> float | None:
        """``κ lr²``: the shift of the whole step to second order, from the shortest finite trial.

        None where every trial was lost to overflow or moved nothing but the last bits.
        """
        finite = [s for s, k in self._seen.items() if math.isfinite(k) and k > SHIFT_FLOOR]
        return self._seen[min(finite)] / min(finite) ** 2 if finite else None

    def shift_at(self, scale: float) -> float:
        if scale not in self._seen:
            self._seen[scale] = self._trial(scale)
        return self._seen[scale]

    def predicted(self, scale: float) -> float:
        """The shift at a scale: as tried, or to second order from the nearest shorter trial."""
        if scale in self._seen:
            return self._seen[scale]
        curvature = self.curvature
        return 0.0 if curvature is None else curvature * scale**2

    def reach(self, scale: float, target: float, at_least: float = 0.0) -> float:
        """Shorten ``scale`` until a trial's shift is at most ``target``; 0 if it never is.

        With ``at_least``, an overshot trial is lengthened again until its shift is that share of it.
        """
        for _ in range(MAX_TRIALS):
            shift = self.shift_at(scale)
            if shift <= target:
                if scale == 1.0 or shift <= SHIFT_FLOOR or shift >= at_least * target:
                    return scale
                scale = min(1.0, scale * min(4.0, math.sqrt(AIM * target / shift)))
                continue
            # A long step's shift saturates, so that second order shortens it too little.
            ratio = math.sqrt(target / shift) if math.isfinite(shift) else 0.1
            scale *= max(1e-3, AIM * ratio)
        return scale if self.shift_at(scale) <= target else 0.0
