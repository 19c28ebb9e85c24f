"""The ratio of what a step did to what was predicted of it, learned while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SHIFT_FLOOR = 1e-12
"""Nats: below this a shift is rounding (a step of zero advantage), and no ratio is learned from it."""


class Calibration:
    """A running factor on a predictor: exponentially averaged in log space, robust to outliers.

    A ratio further than ``surprise`` scale units from the running one (the scale is the running mean
    absolute deviation) moves it as far as one at that distance would: an outlier shifts the factor, but
    never by its whole size. Until something was measured there is no factor.

    Args:
        weight: share of a new measurement, in (0, 1].
        surprise: clip of a new log-ratio, in running mean absolute deviations.

    Attributes:
        log_ratio: running log of measured / predicted, or None before the first measurement.
        deviation: running mean absolute deviation of the log-ratio, in nats of log space.
    """

    def __init__(self, weight: float = 0.3, surprise: float = 3.0) -> None:
        self.weight = weight
        self.surprise = surprise
        self.log_ratio: float | None = None
        self.deviation = 1.0

    @property
    def factor(self) -> float | None:
        """What to multiply a raw prediction by; None before the first measurement."""
        return None if self.log_ratio is None else math.exp(self.log_ratio)

    def observe(self, predicted: float, measured: float) -> None:
        """Learn from one step; a shift that is not finite, or is mere rounding, teaches nothing."""
        if not (math.isfinite(predicted) and math.isfinite(measured)):
            return
        if predicted < SHIFT_FLOOR or measured < SHIFT_FLOOR:
            return
        seen = math.log(measured / predicted)
        if self.log_ratio is None:
            self.log_ratio = seen
            return
        error = seen - self.log_ratio
        clip = self.surprise * self.deviation
        self.deviation += self.weight * (min(abs(error), clip) - self.deviation)
        self.log_ratio += self.weight * max(-clip, min(clip, error))

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from."""
        return {"log_ratio": self.log_ratio, "deviation": self.deviation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.log_ratio, self.deviation = state["log_ratio"], float(state["deviation"])
