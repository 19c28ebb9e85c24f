"""A step between its choice and its measurement, and what is logged of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from capo.core.trust_region import Divergence, StepChoice
from capo.integrations._trl_batch import StepBatch

LEAST_SHARE = 0.1
"""Of the length that the budget allows, what the quadratic's maximiser leaves at least."""


@dataclass
class Pending:
    """A step between its choice and its measurement."""

    choice: StepChoice
    objective: float | None  # predicted, of the step as taken, mean over tokens; None: not tried
    raw: float | None = None  # the predictor's uncalibrated shift of the whole step
    divergence: Divergence | None = None  # of the very step as taken, where it was tried
    batch: StepBatch | None = None
    budget: float | None = None
    maximiser: float | None = None  # of the objective shift, with step_length="quadratic"
    last_policy_shift: float | None = None  # of the step before, where this one's pass showed it

    def shorten(self, maximiser: float) -> None:
        """Take no more of the step than ``maximiser``."""
        self.maximiser = maximiser
        if (choice := self.choice).scale <= maximiser:
            return
        # Not to nothing: a batch whose halves disagree says little about the momentum's direction.
        scale = max(maximiser, LEAST_SHARE * choice.scale)
        share = scale / choice.scale
        self.choice = replace(choice, scale=scale, predicted=choice.predicted * share**2)
        self.objective = None if self.objective is None else self.objective * share
        self.divergence = None  # of another length


def ledger(
    pending: Pending, batch: StepBatch, measured: dict[str, float] | None = None
) -> dict[str, float]:
    """The step's metrics, named as they are logged."""
    choice = pending.choice
    entries = {
        "scale": choice.scale,
        "proposed_policy_shift": choice.proposed,
        "predicted_policy_shift": choice.predicted,
        "trials": float(choice.trials if pending.objective is not None else 0),
        **(measured or {}),
    }
    if pending.budget is not None:
        entries["budget"] = pending.budget
    if pending.maximiser is not None and math.isfinite(pending.maximiser):
        entries["maximiser"] = pending.maximiser
    if pending.last_policy_shift is not None:
        entries["last_measured_policy_shift"] = pending.last_policy_shift
    if pending.objective is not None and measured is not None:
        shift = measured["measured_policy_shift"]
        # Theorem 5.1 for episodes of at most T tokens, γ = 1 (docs/theorem.md).
        longest, largest = batch.extremes
        constant = math.sqrt(2.0) * largest * longest * (longest - 1)
        entries["predicted_objective_shift"] = pending.objective
        entries["omega"] = pending.objective * batch.mean_length
        entries["penalty"] = constant * math.sqrt(max(shift, 0.0))
        if pending.budget is not None:
            entries["met"] = float(shift <= pending.budget)
    return {f"capo/trust/{name}": value for name, value in entries.items()}
