"""The thresholds that runs selected by, for the rule lines of the shift figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import capo
from capo.lab.report.reading import Run
from capo.lab.report.summary import Series


@dataclass(frozen=True)
class Limits:
    """Keep iff low ≤ m_H ≤ high and m_F ≤ policy_shift; None is no bound."""

    policy_shift: float | None
    objective_shift: tuple[float | None, float | None]


def limits_of(run: Run) -> Limits | None:
    """The thresholds of a run's config, or None where it selects nothing (or unknowably)."""
    selection: Any = run.setting("capo.selection")
    if isinstance(selection, str):
        named = capo.PAPER_THRESHOLDS.get(selection)
        if named is None:
            return None
        return Limits(named.policy_shift, named.objective_shift)
    if not isinstance(selection, dict) or selection.get("rule", "soft") != "soft":
        return None  # quantiles and budgets have no fixed threshold
    low, high = (*(selection.get("objective_shift") or ()), None, None)[:2]
    return Limits(selection.get("policy_shift"), (low, high))


def thresholds_of(series: Sequence[Series]) -> dict[str, Limits]:
    """Distinct thresholds, keyed by the first series that uses them."""
    found: dict[str, Limits] = {}
    for one in series:
        limits = limits_of(one.runs[0])
        if limits is not None and limits not in found.values():
            found[one.name] = limits
    return found
