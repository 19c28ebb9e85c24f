"""Interval estimates over seeds: the interquartile mean with a stratified bootstrap.

R. Agarwal et al., Deep RL at the Edge of the Statistical Precipice, https://arxiv.org/abs/2108.13264.
`rliable`, their library, cannot be imported beside the current pandas, so the mean and the resampling are
SciPy's: several samples are resampled each within itself, which is the stratified bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 5_000
LEVEL = 0.95
SEED = 20251000


@dataclass(frozen=True)
class Interval:
    """An interquartile mean and its bootstrap interval.

    Attributes:
        value: the figure.
        low, high: percentile interval; equal to the value's where there is one run only, or none can be
            told apart.
        n: runs.
    """

    value: float
    low: float
    high: float
    n: int

    def text(self, form: str = ".3f") -> str:
        """``0.912 [0.890, 0.934]``; no interval of a single run."""
        if self.n < 2:
            return format(self.value, form)
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def iqm(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all values; of five runs, the middle three."""
    return np.asarray(stats.trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis))


def interval(*strata: Sequence[float]) -> Interval:
    """The interquartile mean of all values; each stratum (a task, a setting) is resampled within itself.

    Raises:
        ValueError: there is no value.
    """
    arrays = [np.asarray(each, dtype=float) for each in strata if len(each)]
    if not arrays:
        raise ValueError("an interval needs values")
    return _bootstrapped(arrays, iqm)


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Ratio of two interquartile means, both samples resampled.

    Raises:
        ValueError: a sample is empty.
    """
    top, bottom = (np.asarray(each, dtype=float) for each in (numerator, denominator))
    if not len(top) or not len(bottom):
        raise ValueError("a ratio needs values on both sides")

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(iqm(a, axis=axis) / iqm(b, axis=axis))

    return _bootstrapped([top, bottom], ratio)


def _bootstrapped(samples: list[np.ndarray], statistic: Callable[..., np.ndarray]) -> Interval:
    """The statistic of the samples, each resampled within itself; no interval where nothing could differ."""
    value = float(statistic(*samples))
    n = sum(map(len, samples))
    if min(map(len, samples)) < 2 or all(np.ptp(each) == 0 for each in samples):
        return Interval(value, value, value, n)
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), n)
