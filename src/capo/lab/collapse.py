"""Early detection of collapse: from what every step logs, while there is still a run to save.

Two things are watched. A *step*: its policy shift is an outlier, in log space, against the steps
before it, and large: by |ΔJ| ≤ G √(Tδ/2) (docs/theorem.md; G = 1, the span of a reward in [0, 1])
it may have moved the accuracy by more than half. And a *level*: the mean reward of the batches, or
the accuracy of the evaluations, is significantly below its own best. The second kind also says
where the fall began.

Everything follows from the numbers fed, in their order: a run that is continued restores its watch
by feeding the rows it has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Literal

Kind = Literal["policy shift", "reward", "accuracy"]

SIGMA_OF_MAD = 1.4826  # of a normal variable: sigma over median absolute deviation


def possible_change(nats: float) -> float:
    """How far a step may move the accuracy: √(Tδ/2), at most 1.

    Args:
        nats: Tδ, the policy shift (KL) of a whole completion.
    """
    return min(1.0, math.sqrt(max(nats, 0.0) / 2))


@dataclass
class Outliers:
    """Steps that move the policy far, and far more than the steps before them did.

    Attributes:
        threshold: robust standard deviations of log policy shift above the median.
        least_spread: of one such deviation, in log units: steps that differ by less are alike.
        caution: the deviation of n steps is taken to be 1 + caution/√n times as large.
        least_history: steps that there must be to compare with.
        change: the accuracy that the step must have been able to move, see `possible_change`.
    """

    threshold: float = 4.0
    least_spread: float = 0.45
    caution: float = 0.5
    least_history: int = 3
    change: float = 0.5
    _logs: list[float] = field(default_factory=list, init=False)
    _out: bool = field(default=False, init=False)

    def observe(self, policy_shift: float, mean_length: float) -> float | None:
        """Take a step's policy shift (nats a token) and mean completion length (tokens).

        Returns:
            how many times the median of the steps before it, if that is an alarm. A step right after
            an outlier belongs to it, and is none of its own.
        """
        if not (policy_shift > 0 and math.isfinite(policy_shift)):
            return None  # the step of a learning rate of 0 says nothing about the others
        log, before = math.log(policy_shift), self._logs.copy()
        self._logs.append(log)
        if len(before) < self.least_history:
            return None
        middle = median(before)
        spread = SIGMA_OF_MAD * median([abs(one - middle) for one in before])
        spread = max(spread * (1 + self.caution / math.sqrt(len(before))), self.least_spread)
        was_out, self._out = (
            self._out,
            (
                log - middle > self.threshold * spread
                and possible_change(policy_shift * mean_length) > self.change
            ),
        )
        return math.exp(log - middle) if self._out and not was_out else None


@dataclass(frozen=True)
class Fallen:
    """A level that fell.

    Attributes:
        best, now: the two means that were compared.
        windows: values in each of them.
        errors: their distance in standard errors.
        before, first: positions of the last value of the old level, and of the first of the new one.
    """

    best: float
    now: float
    windows: tuple[int, int]
    errors: float
    before: int
    first: int


@dataclass
class Falls:
    """A level (a share, in [0, 1]) that falls significantly below its own best.

    The best mean of so many values in a row is compared with the mean of as many or more of the last
    ones, for several lengths: one value shows a sudden fall in large batches, many show a slow one in
    small batches. The standard error is binomial, times how much more than binomially neighbouring
    values differ, since answers to one problem are alike: from 1 to √alike times.

    Attributes:
        count: answers behind one value.
        alike: answers to one problem among them.
        threshold: standard errors between the two means.
        share, least: what must be lost as well, of the best and absolutely.
        windows: the lengths.
        least_groups: groups of answers that are alike (problems) behind a mean, at least: the mean of
            fewer is far from normal.
        caution: the spread seen in n pairs of neighbours is taken to be 1 + caution/√n times as large.
        least_pairs: pairs below which their spread is taken to be binomial.
    """

    count: int
    alike: int = 1
    threshold: float = 5.0
    share: float = 0.25
    least: float = 0.1
    windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    least_groups: int = 6
    caution: float = 1.5
    least_pairs: int = 5
    _values: list[float] = field(default_factory=list, init=False)
    _positions: list[int] = field(default_factory=list, init=False)
    _apart: list[float] = field(default_factory=list, init=False)  # neighbours, in standard errors
    _best: dict[int, tuple[float, int]] = field(default_factory=dict, init=False)
    _recovery: tuple[int, float] | None = field(default=None, init=False)

    def observe(self, position: int, value: float) -> Fallen | None:
        """Take the next value; None unless the level has just fallen.

        After a fall there is silence until half of it is made good; then all starts anew.
        """
        if not math.isfinite(value):
            return None
        if self._values:
            self._compare(self._values[-1], value)
        self._values.append(value)
        self._positions.append(position)
        if self._recovery is not None:
            window, level = self._recovery
            if self._mean(len(self._values) - window, window) < level:
                return None
            self._recovery = None
            del self._values[:-window], self._positions[:-window]
            self._apart.clear()
            for one, other in pairwise(self._values):
                self._compare(one, other)
            self._best.clear()
        fallen = max(self._candidates(), key=lambda one: one.errors, default=None)
        if fallen is not None:
            self._recovery = (fallen.windows[0], (fallen.best + fallen.now) / 2)
        return fallen

    def _candidates(self) -> Iterator[Fallen]:
        total = len(self._values)
        spread = self._spread()
        for early in self._windows():
            end = total - early  # of the latest window that leaves room for one as long
            if end < early:
                break
            mean = self._mean(end - early, early)
            if early not in self._best or mean > self._best[early][0]:
                self._best[early] = (mean, end)
            best, end = self._best[early]
            for late in self._windows():
                if early <= late <= total - end:
                    now = self._mean(total - late, late)
                    errors = (best - now) / (spread * self._error(best, early, now, late))
                    lost = best - now > max(self.share * best, self.least)
                    if lost and errors > self.threshold:
                        first = self._onset(end - early, (best + now) / 2)
                        places = self._positions[first - 1], self._positions[first]
                        yield Fallen(best, now, (early, late), errors, *places)

    def _windows(self) -> list[int]:
        groups = self.count / self.alike  # behind one value
        return [window for window in self.windows if window * groups >= self.least_groups]

    def _mean(self, start: int, window: int) -> float:
        return sum(self._values[start : start + window]) / window

    def _error(self, one: float, window: int, other: float, length: int) -> float:
        """Binomial standard error of the difference of two means: the larger of that of two levels and
        of one; not even that of 0 or 1 is 0.
        """

        def variance(level: float) -> float:
            return max(level * (1 - level), 1 / self.count) / self.count

        level = (one * window + other * length) / (window + length)
        apart = variance(one) / window + variance(other) / length
        return math.sqrt(max(apart, variance(level) * (1 / window + 1 / length)))

    def _compare(self, one: float, other: float) -> None:
        """Take note of how far two neighbours are apart; equal ones are at 0 or 1, or too few."""
        if one != other:
            self._apart.append(abs(other - one) / self._error(one, 1, other, 1))

    def _spread(self) -> float:
        """How many binomial standard errors neighbours typically differ by; at least 1."""
        pairs = len(self._apart)
        if not pairs:
            return 1.0
        typical = SIGMA_OF_MAD * median(self._apart) if pairs >= self.least_pairs else 1.0
        typical *= 1 + self.caution / math.sqrt(pairs)
        # More than the most is no noise: the policy itself goes up and down.
        return min(max(1.0, typical), math.sqrt(self.alike))

    def _onset(self, start: int, level: float) -> int:
        """The first value of the new level: the sum of the values above ``level`` is greatest there."""
        height, highest, onset = self._values[start] - level, -math.inf, start + 1
        for index in range(start + 1, len(self._values)):
            if height >= highest:
                highest, onset = height, index
            height += self._values[index] - level
        return onset


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        kind: what was out of line.
        began: the optimizer step that did it, as far as the numbers tell.
        sentence: what happened, for a reader.
    """

    kind: Kind
    began: int
    sentence: str


class CollapseWatch:
    """Watches the steps and the level of one run.

    Args:
        completions: of one batch, behind its mean reward.
        generations: completions of one prompt among them.
        problems: of one evaluation, behind its accuracy; each answered once.
    """

    def __init__(self, completions: int, generations: int, problems: int) -> None:
        self._outliers = Outliers()
        self._rewards = Falls(completions, generations)
        self._accuracies = Falls(problems)
        self._nats: dict[int, float] = {}  # of a completion, by step

    def step(self, step: int, policy_shift: float | None, mean_length: float | None) -> list[Alarm]:
        """The policy shift (nats a token) and mean completion length of an optimizer step."""
        if policy_shift is None or mean_length is None or not math.isfinite(policy_shift):
            return []
        nats = self._nats[step] = policy_shift * mean_length
        ratio = self._outliers.observe(policy_shift, mean_length)
        if ratio is None:
            return []
        sentence = (
            f"step {step} moved the policy by {policy_shift:.2g} nats a token, {ratio:.0f} × the "
            f"median of the steps before it; that is {nats:.2g} nats a completion, which can change "
            f"the accuracy by up to {possible_change(nats):.2f}"
        )
        return [Alarm("policy shift", step, sentence)]

    def batch(self, step: int, reward: float | None) -> list[Alarm]:
        """The mean reward of the batch of an optimizer step, sampled before that step."""
        fallen = None if reward is None else self._rewards.observe(step, reward)
        if fallen is None:
            return []
        began = self._furthest(fallen.before, fallen.first - 1)
        return [Alarm("reward", began, _sentence("mean reward", "batch", fallen, began))]

    def evaluation(self, step: int, accuracy: float | None) -> list[Alarm]:
        """The accuracy measured after an optimizer step (0: of the base policy)."""
        fallen = None if accuracy is None else self._accuracies.observe(step, accuracy)
        if fallen is None:
            return []
        began = self._furthest(fallen.before + 1, fallen.first)
        return [Alarm("accuracy", began, _sentence("accuracy", "evaluation", fallen, began))]

    def measured(self, step: int) -> bool:
        """Whether the policy shift of ``step`` has been fed."""
        return step in self._nats

    def _furthest(self, first: int, last: int) -> int:
        """The step from ``first`` to ``last`` that moved the policy most; the last, if not known."""
        steps = range(min(first, last), last + 1)
        return max(steps, key=lambda step: (self._nats.get(step, -1.0), step))


def _sentence(what: str, unit: str, fallen: Fallen, began: int) -> str:
    early, late = fallen.windows
    return (
        f"the {what} fell from {fallen.best:.2f} (over {_count(early, unit)}) to {fallen.now:.2f} "
        f"(over {_count(late, unit)}), {fallen.errors:.1f} standard errors: collapse began at step "
        f"{began}"
    )


def _count(number: int, unit: str) -> str:
    plural = "es" if unit == "batch" else "s"
    return f"{number} {unit}{plural * (number != 1)}"
