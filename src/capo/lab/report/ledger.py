"""The monotonicity ledger of runs, read: what each step was to do, and what it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from capo.lab.report.reading import MEASURED, Run
from capo.lab.report.summary import BUDGET, Series

# Column -> metric.
LEDGER = {
    "proposed": "capo/trust/proposed_policy_shift",
    "predicted": "capo/trust/predicted_policy_shift",
    "measured": MEASURED,
    "budget": BUDGET,
    "promised": "capo/trust/predicted_objective_shift",
    "observed": "capo/trust/observed_objective_shift",
    "omega": "capo/trust/omega",
    "penalty": "capo/trust/penalty",
    "reward": "reward",
}
SAME = 1e-6  # relative difference below which a prediction is the measurement itself


def ledger(run: Run) -> Any:
    """The ledger of a run.

    Returns:
        columns step, completions, those of `LEDGER` (NaN where not logged) and ``change``: of the mean
        reward, from the batch of the step to the next batch (NaN where the step sampled none).
    """
    table = run.metrics.reindex(columns=["step", "completions", *LEDGER.values()])
    table = table.rename(columns={metric: name for name, metric in LEDGER.items()})
    rewards = table["reward"].dropna()  # logged where completions are sampled
    table["change"] = rewards.shift(-1) - rewards
    return table


def points(series: Sequence[Series], x: str, y: str) -> Any:
    """All steps of all runs with both numbers: columns series, run, step, completions, x, y."""
    tables = []
    for one in series:
        for run in one.runs:
            table = ledger(run)[["step", "completions", x, y]].dropna()
            table = table.set_axis(["step", "completions", "x", "y"], axis=1)
            table.insert(0, "run", run.name)
            table.insert(0, "series", one.name)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Agreement:
    """How well policy shifts were foreseen.

    Attributes:
        steps: that were predicted and measured, both above zero.
        tried: of those, the steps whose prediction is the measurement: they were tried at that length.
        correlation: of the logs of the others; None below three of them.
        factor: exp of the median \\|log(measured / predicted)\\| of the others; None without any.
        worst: largest measured / predicted of the others, and its step; None without any.
    """

    steps: int
    tried: int
    correlation: float | None = None
    factor: float | None = None
    worst: tuple[float, int] | None = None


def agreement(table: Any) -> Agreement:
    """Of `points` with x predicted and y measured."""
    table = table[(table["x"] > 0) & (table["y"] > 0)]
    x, y = np.log(table["x"].to_numpy()), np.log(table["y"].to_numpy())
    other = np.abs(y - x) > SAME
    steps, tried = len(table), int((~other).sum())
    if not other.any():
        return Agreement(steps, tried)
    x, y, at = x[other], y[other], table["step"].to_numpy()[other]
    ratios = y - x
    where = int(ratios.argmax())
    correlation = None
    if len(x) >= 3 and x.std() > 0 and y.std() > 0:
        correlation = float(np.corrcoef(x, y)[0, 1])
    worst = (float(np.exp(ratios[where])), int(at[where]))
    return Agreement(steps, tried, correlation, float(np.exp(np.median(np.abs(ratios)))), worst)


def same_sign(table: Any) -> float | None:
    """Share of the points, none of them on an axis, whose x and y point the same way."""
    product = (table["x"] * table["y"]).to_numpy()
    product = product[product != 0]
    return float((product > 0).mean()) if product.size else None


def correlation(table: Any) -> float | None:
    """Pearson's, None where it is not defined."""
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    if len(x) < 3 or not (x.std() > 0 and y.std() > 0):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def certified(table: Any) -> tuple[int, int]:
    """Of `points` with x the penalty and y ω: the steps with ω above the penalty, and all."""
    return int((table["y"] > table["x"]).sum()), len(table)


def change_noise(series: Sequence[Series]) -> float | None:
    """Typical binomial standard error of a change of the mean reward between two batches."""
    errors = []
    for one in series:
        for run in one.runs:
            count = run.setting("training.completions_per_step")
            if isinstance(count, int) and "reward" in run.metrics:
                level = run.metrics["reward"].dropna().clip(0, 1)
                errors += [math.sqrt(2 * p * (1 - p) / count) for p in level]
    return float(np.median(errors)) if errors else None
