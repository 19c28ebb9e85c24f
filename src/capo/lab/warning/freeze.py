"""How the constants of the early warning are chosen: on freezing runs, by a rule fixed beforehand.

A detector's *safety* on stable runs is its threshold over the largest sum that any of them reaches. Of the
candidates on a grid whose safety is at least `SAFETY`, the one with the largest median lead is taken, then
the largest smallest lead, then the largest safety; a collapse that is not warned of counts as a lead of
minus infinity.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from capo.core.early_warning import EarlyWarning, WarningConstants
from capo.lab.warning.watched import Watched

ALLOWANCES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
THRESHOLDS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
MOSTS = (1.5, 2.0, 3.0)
SAFETY = 2.0


@dataclass(frozen=True)
class Candidate:
    """Constants, and what they would have done on the freezing runs."""

    constants: WarningConstants
    safety: float
    median_lead: float
    smallest_lead: float

    @property
    def merit(self) -> tuple[float, float, float]:
        """In the order in which candidates are compared."""
        return self.median_lead, self.smallest_lead, min(self.safety, 1e9)


def lead(run: Watched, constants: WarningConstants) -> float:
    """Optimizer steps between the warning and the halving; minus infinity without a warning before it."""
    warned, halved = run.warned(constants), run.halved
    if warned is None or halved is None or warned > halved:
        return -math.inf
    return float(halved - warned)


def largest_sum(run: Watched, constants: WarningConstants) -> float:
    """The largest sum that the CUSUM reaches in a run."""
    watch = EarlyWarning(constants)
    largest = 0.0
    for excess in run.excess:
        if excess is not None:
            watch.feed(excess)
            largest = max(largest, watch.score * constants.threshold)
    return largest


def candidates(runs: Sequence[Watched]) -> list[Candidate]:
    """Every point of the grid, best first; those that are not safe come last."""
    stable = [run for run in runs if run.halved is None]
    fallen = [run for run in runs if run.halved is not None]
    found = []
    for allowance, most, threshold in itertools.product(ALLOWANCES, MOSTS, THRESHOLDS):
        if threshold <= most:
            continue  # one outlier alone must not warn
        constants = WarningConstants(allowance=allowance, threshold=threshold, most=most)
        worst = max((largest_sum(run, constants) for run in stable), default=0.0)
        leads = [lead(run, constants) for run in fallen]
        found.append(
            Candidate(
                constants,
                threshold / worst if worst > 0 else math.inf,
                statistics.median(leads) if leads else -math.inf,
                min(leads, default=-math.inf),
            )
        )
    return sorted(found, key=lambda one: (one.safety >= SAFETY, one.merit), reverse=True)
