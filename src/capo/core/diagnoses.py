"""What can be wrong with thresholds, depth or cost of a monitored run, named in one sentence each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["thresholds too tight", "head too shallow", "thresholds too loose", "overhead"]


@dataclass(frozen=True)
class DiagnosisLimits:
    """From where on something is said to be wrong.

    Attributes:
        window: observed steps that are judged together.
        nearly_all: share of tokens rejected.
        nearly_none: share of tokens rejected.
        shallow: measured policy shift over that which the head foresees.
        fallen: share of its best below which the mean reward has collapsed.
        batches: of completions that a mean reward is over.
        overhead: seconds of the monitor over those of the rest of the run.
        settling: observed steps whose seconds do not count, since kernels are compiled in them.
    """

    window: int = 5
    nearly_all: float = 0.9
    nearly_none: float = 0.01
    shallow: float = 30.0
    fallen: float = 0.5
    batches: int = 8
    overhead: float = 0.25
    settling: int = 2


@dataclass(frozen=True)
class Diagnosis:
    """One diagnosis.

    Attributes:
        kind: what is wrong.
        step: the optimizer step after which it was found.
        sentence: what was seen and what to do, for a reader.
    """

    kind: Kind
    step: int
    sentence: str


class Diagnoses:
    """Finds each kind once, from the readings of observed steps in order.

    Args:
        every: the monitor looks at every so many steps, which divides its cost.
        limits: see :class:`DiagnosisLimits`.
        deep: whether steps are foreseen at depth, which could be spared.
    """

    def __init__(
        self, every: int = 1, limits: DiagnosisLimits | None = None, *, deep: bool = False
    ) -> None:
        self.every = every
        self.deep = deep
        self.limits = limits or DiagnosisLimits()
        self.found: list[Diagnosis] = []
        self._seen: deque[Mapping[str, float]] = deque(maxlen=self.limits.window)
        self._overheads: list[float] = []
        self._rewards: deque[float] = deque(maxlen=self.limits.batches)
        self._best_reward = -math.inf

    def observe(self, step: int, readings: Mapping[str, float], *, warned: bool) -> list[Diagnosis]:
        """Take a step's readings (keys as the monitor logs them); the new diagnoses.

        Args:
            step: optimizer steps taken.
            readings: ``rejection_rate`` and its reasons, ``measured_policy_shift``, ``reward``,
                ``overhead``, and ``head_policy_shift`` where the head is trained.
            warned: whether an early warning stands.
        """
        self._seen.append(readings)
        self._overheads.append(readings["overhead"] / self.every)
        before, fallen = len(self.found), self._fallen(readings.get("reward", math.nan))
        if len(self._seen) == self.limits.window:
            self._thresholds(step, collapsing=fallen or warned)
        self._overhead(step)
        return self.found[before:]

    def _mean(self, key: str) -> float:
        values = [row[key] for row in self._seen if math.isfinite(row.get(key, math.nan))]
        return sum(values) / len(values) if values else math.nan

    def _add(self, kind: Kind, step: int, sentence: str) -> None:
        if all(one.kind != kind for one in self.found):
            self.found.append(Diagnosis(kind, step, f"step {step}: {sentence}"))

    def _fallen(self, reward: float) -> bool:
        """A step that used its completions again has no reward of its own: NaN."""
        if math.isfinite(reward):
            self._rewards.append(reward)
        if len(self._rewards) < self.limits.batches:
            return False
        mean = sum(self._rewards) / len(self._rewards)
        self._best_reward = max(self._best_reward, mean)
        return self._best_reward > 0 and mean < self.limits.fallen * self._best_reward

    def _thresholds(self, step: int, *, collapsing: bool) -> None:
        rejected, limits = self._mean("rejection_rate"), self.limits
        if rejected > limits.nearly_all:
            reasons = {
                "policy_shift": "policy shifts above their bound",
                "objective_low": "objective shifts below their lower bound",
                "objective_high": "objective shifts above their upper bound",
            }
            reason = max(reasons, key=lambda name: self._mean(f"rejection_rate/{name}"))
            self._add(
                "thresholds too tight",
                step,
                f"nearly all tokens would be rejected ({rejected:.0%} over {limits.window} steps, most "
                f"for {reasons[reason]}), so that nothing would be learned: the thresholds are too "
                f"tight; half of all policy shifts are above {self._mean('policy_shift/p50'):.2g} nats.",
            )
        measured, head = self._mean("measured_policy_shift"), self._mean("head_policy_shift")
        if not (collapsing and rejected < limits.nearly_none and math.isfinite(measured)):
            return
        began = f"the run is collapsing although {_share(rejected)} would be rejected"
        if math.isnan(head) or measured > limits.shallow * head:
            sees = "does not move" if math.isnan(head) else f"foresees {head:.2g}"
            self._add(
                "head too shallow",
                step,
                f"{began}: the head is too shallow a judge, it {sees} where the whole model moves "
                f"{measured:.2g} nats a token; judge tokens at depth, or set a trust region.",
            )
        else:
            self._add(
                "thresholds too loose",
                step,
                f"{began}, and the head foresees the steps ({head:.2g} of {measured:.2g} nats a token): "
                f"the thresholds are too loose; 1 % of all policy shifts are above "
                f"{self._mean('policy_shift/p99'):.2g} nats.",
            )

    def _overhead(self, step: int) -> None:
        settled = self._overheads[self.limits.settling :]
        if len(settled) < self.limits.window:
            return
        overhead = sum(settled) / len(settled)
        if overhead > self.limits.overhead:
            every = math.ceil(self.every * overhead / self.limits.overhead)
            less = ", or through the head alone (depth=0)" if self.deep else ""
            self._add(
                "overhead",
                step,
                f"the monitor takes {overhead:.0%} of the time of the rest of the run, more than "
                f"{self.limits.overhead:.0%}: look less often (every={max(every, self.every + 1)}) or "
                f"at fewer completions (sequences=8){less}.",
            )


def _share(rejected: float) -> str:
    return "no token" if rejected == 0 else f"only {rejected:.1%} of the tokens"
