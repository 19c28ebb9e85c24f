"""Medians, intervals and ratios of completions, some of which are only known to be larger.

A run that did not reach the target within its completions is right-censored: its value lies
somewhere between those completions and infinity. Every figure is therefore computed twice, with
all censored values at their low end and with all at infinity; where the two agree, censoring did
not matter, and where they do not, the figure is a lower (or upper) bound and is shown as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from capo.lab.study.outcome import Outcome

RESAMPLES = 20_000
COVERAGE = 0.9  # of an order-statistic interval, at least where the seeds allow it


@dataclass(frozen=True)
class Value:
    """A number known to lie in ``[low, high]``; exactly known where the two are equal."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        """Whether censoring leaves no doubt."""
        return self.low == self.high

    def text(self, form: str = ",.0f") -> str:
        """``1,344``, ``> 4,800``, or ``> 3.1 and < 5.0`` of a ratio."""
        if self.exact:
            return "∞" if math.isinf(self.low) else format(self.low, form)
        parts = [f"> {format(self.low, form)}"] if self.low > 0 else []
        if math.isfinite(self.high):
            parts.append(f"< {format(self.high, form)}")
        return " and ".join(parts) or "unknown"


def exactly(number: float) -> Value:
    """A value without doubt."""
    return Value(number, number)


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: the figure.
        low, high: the interval's ends; each may be a bound itself.
        n: runs.
        censored: runs of them that are only known to be larger.
        coverage: of the interval, nominal.
    """

    value: Value
    low: Value
    high: Value
    n: int
    censored: int
    coverage: float

    def text(self, form: str = ",.0f", unit: str = "") -> str:
        """``1,344 [1,200, 1,536]``; an end that is infinite or censored is shown with ``>``."""
        ends = f"[{_end(self.low, form, upper=False)}, {_end(self.high, form, upper=True)}]"
        return f"{self.value.text(form)}{unit} {ends}"


def _end(end: Value, form: str, *, upper: bool) -> str:
    if math.isinf(end.low):
        return "∞"
    if upper and math.isinf(end.high):
        return f"> {format(end.low, form)}"
    return format(end.high if upper else end.low, form)  # the far end of what is possible


def completions_to_target(outcome: Outcome) -> Value:
    """Of one run; beyond what it consumed where it did not get there.

    A policy whose weights are no numbers any more gets nowhere: it counts as its whole horizon.
    """
    at = outcome.to_target
    if at is not None:
        return exactly(at)
    consumed = outcome.horizon if outcome.ended == "diverged" else outcome.completions
    return Value(consumed, math.inf)


def median_of(values: Sequence[Value]) -> Value:
    """The median of partly censored values.

    Raises:
        ValueError: there is none.
    """
    return Value(median(v.low for v in values), median(v.high for v in values))


def median_estimate(values: Sequence[Value]) -> Estimate:
    """The median with the shortest symmetric interval of order statistics of 90 % or more.

    It is free of assumptions about the distribution (H. A. David, Order Statistics, 1981, §2.5):
    with five values it runs from the smallest to the largest and covers 93.75 %. With fewer than
    five it runs as far and covers less; ``coverage`` says how much.
    """
    n = len(values)
    rank, coverage = _ranks(n)
    lows, highs = sorted(v.low for v in values), sorted(v.high for v in values)
    return Estimate(
        value=median_of(values),
        low=Value(lows[rank], highs[rank]),
        high=Value(lows[n - 1 - rank], highs[n - 1 - rank]),
        n=n,
        censored=sum(not v.exact for v in values),
        coverage=coverage,
    )


def _ranks(n: int) -> tuple[int, float]:
    """The largest ``r`` such that the interval from rank ``r`` to ``n − 1 − r`` covers enough."""
    best = (0, 1 - 2 * 0.5**n)
    for rank in range(1, (n + 1) // 2):
        outside = 2 * sum(math.comb(n, k) for k in range(rank + 1)) * 0.5**n
        if 1 - outside < COVERAGE:
            break
        best = (rank, 1 - outside)
    return best


def ratio_of_medians(slow: Sequence[Value], fast: Sequence[Value]) -> Estimate:
    """Median of ``slow`` over median of ``fast``, with a 95 % bootstrap interval over the seeds.

    Both arms are resampled independently (percentile method, fixed random numbers). The lower end
    takes censored runs of ``slow`` at their low end and of ``fast`` at infinity, the upper end the
    other way round.
    """
    rng = np.random.default_rng(20251000)
    picks = [rng.integers(0, len(arm), (RESAMPLES, len(arm))) for arm in (slow, fast)]

    def resampled(which: int, end: str) -> np.ndarray:
        arm = (slow, fast)[which]
        return _medians(np.array([getattr(v, end) for v in arm])[picks[which]])

    lows = _over(resampled(0, "low"), resampled(1, "high"))
    highs = _over(resampled(0, "high"), resampled(1, "low"))
    s, f = median_of(slow), median_of(fast)
    ends = [
        Value(float(np.quantile(lows, q, method=side)), float(np.quantile(highs, q, method=side)))  # type: ignore[call-overload]
        for q, side in ((0.025, "lower"), (0.975, "higher"))
    ]
    return Estimate(
        value=Value(
            float(_over(np.array(s.low), np.array(f.high))),
            float(_over(np.array(s.high), np.array(f.low))),
        ),
        low=ends[0],
        high=ends[1],
        n=len(slow) + len(fast),
        censored=sum(not v.exact for v in (*slow, *fast)),
        coverage=0.95,
    )


def _medians(values: np.ndarray) -> np.ndarray:
    """Row medians; `numpy.median` makes inf − inf of two infinite middles."""
    ordered = np.sort(values, axis=1)
    n = ordered.shape[1]
    low, high = ordered[:, (n - 1) // 2], ordered[:, n // 2]
    return np.where(low == high, low, 0.5 * low + 0.5 * high)


def _over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """A quotient of positive numbers, where infinite over infinite is a lower bound of 0.

    Used for the lower end only in that case: at the upper end the denominator is finite.
    """
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(denominator), 0.0, numerator / denominator)
