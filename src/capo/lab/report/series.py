"""Tables behind the figures: metrics of runs, thinned over steps, aggregated over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from capo.lab.report.reading import Run
from capo.lab.report.summary import Series

REJECTION_BY = "capo/rejection_rate/"
REASON_WORDS = {
    "policy_shift": "policy shift too large",
    "objective_low": "objective shift too low",
    "objective_high": "objective shift too high",
    "budget": "batch over its budget",
}
MAX_POINTS = 300  # a line of more points is drawn as the median and range of so many bins


def has_metric(series: Sequence[Series], key: str) -> bool:
    """Whether any run logged a finite value of ``key``."""
    return any(_has(run, key) for one in series for run in one.runs)


def _has(run: Run, key: str) -> bool:
    return key in run.metrics and bool(run.metrics[key].notna().any())


def signal_table(series: Sequence[Series], key: str) -> Any:
    """One logged number over training.

    Returns:
        columns series, completions, step, median, low, high, values: over the seeds at a step, or
        over the steps of a bin for runs longer than `MAX_POINTS` steps.
    """
    tables = []
    for one in series:
        pooled = _pool(one, [key])
        if pooled is None:
            continue
        groups = pooled.groupby("bin", sort=True)
        table = pd.DataFrame(
            {
                "completions": groups["completions"].max(),
                "step": groups["step"].max(),
                "median": groups[key].median(),
                "low": groups[key].min(),
                "high": groups[key].max(),
                "values": groups[key].count(),
            }
        )
        tables.append(_label(table, one.name))
    return _stack(tables, ["series", "completions", "step", "median", "low", "high", "values"])


def quantile_table(series: Sequence[Series], keys: dict[str, str]) -> Any:
    """Several logged numbers over training; the median over seeds and bins of each.

    Args:
        series: what to draw.
        keys: metric key -> column name.
    """
    tables = []
    for one in series:
        pooled = _pool(one, list(keys))
        if pooled is None:
            continue
        groups = pooled.groupby("bin", sort=True)
        columns = {"completions": groups["completions"].max(), "step": groups["step"].max()}
        # The largest shift of a bin is the largest, not the median of the largest ones.
        for key, name in keys.items():
            columns[name] = groups[key].max() if name == "max" else groups[key].median()
        tables.append(_label(pd.DataFrame(columns), one.name))
    return _stack(tables, ["series", "completions", "step", *keys.values()])


def rejection_table(one: Series) -> Any:
    """Rejection rate by reason of one series (means, so that they add up).

    Returns:
        columns series, completions, step, reason, rate; one row a step (or bin) and reason.
    """
    columns = ["series", "completions", "step", "reason", "rate"]
    # The reasons that runs logged, so that a new rule's reason needs no word here to be drawn.
    logged = {
        key for run in one.runs for key in map(str, run.metrics) if key.startswith(REJECTION_BY)
    }
    reasons = {key: reason_words(key.removeprefix(REJECTION_BY)) for key in _ordered(logged)}
    pooled = _pool(one, list(reasons)) if reasons else None
    if pooled is None:
        return pd.DataFrame(columns=columns)
    means = pooled.groupby("bin", sort=True).mean().rename(columns=reasons)
    table = means.melt(
        id_vars=["completions", "step"],
        value_vars=list(reasons.values()),
        var_name="reason",
        value_name="rate",
    )
    return _label(table, one.name)[columns]


def reason_words(label: str) -> str:
    """A reason's label in metrics, in words."""
    return REASON_WORDS.get(label, label.replace("_", " "))


def _ordered(keys: set[str]) -> list[str]:
    known = [REJECTION_BY + label for label in REASON_WORDS]
    return [key for key in known if key in keys] + sorted(keys - set(known))


def accuracy_table(series: Sequence[Series]) -> Any:
    """Accuracy of every evaluation; seeds aggregated as median with range.

    Returns:
        columns series, completions, step, accuracy, low, high, runs. The band is ± one binomial
        standard error for a single run and the range over seeds for several. A run that is over
        holds its last value, one that diverged 0.
    """
    tables = []
    for one in series:
        runs = [run for run in one.runs if len(run.curve)]
        if not runs:
            continue
        if len(one.runs) == 1:
            curve = runs[0].curve
            table = curve[["completions", "step", "accuracy"]].copy()
            stderr = curve["stderr"].fillna(0)
            table["low"] = (curve["accuracy"] - stderr).clip(lower=0)
            table["high"] = (curve["accuracy"] + stderr).clip(upper=1)
            table["runs"] = 1
        else:
            table = _over_seeds(runs)
        tables.append(_label(table, one.name))
    return _stack(tables, ["series", "completions", "step", "accuracy", "low", "high", "runs"])


def _over_seeds(runs: Sequence[Run]) -> Any:
    """Median and range at every position of any run; each holds its last value until the next."""
    positions = pd.concat([run.curve for run in runs]).groupby("completions", sort=True)["step"]
    rows = []
    for completions, step in positions.first().items():
        held = [value for run in runs if (value := _held(run, completions)) is not None]
        rows.append(
            {"completions": completions, "step": step, "accuracy": float(np.median(held))}
            | {"low": min(held), "high": max(held), "runs": len(held)}
        )
    return pd.DataFrame(rows)


def _held(run: Run, completions: Any) -> float | None:
    """Accuracy of the last evaluation by then; None before the first, and once a run not over ends."""
    curve = run.curve
    if not run.over and completions > curve["completions"].iloc[-1]:
        return None
    before = curve["accuracy"][curve["completions"] <= completions]
    return float(before.iloc[-1]) if len(before) else None


def _pool(one: Series, keys: list[str]) -> Any:
    """All runs' rows of ``keys`` with a ``bin`` column, or None if no run logged any of them."""
    runs = [run for run in one.runs if any(_has(run, key) for key in keys)]
    if not runs:
        return None
    tables = [run.metrics.reindex(columns=["step", "completions", *keys]) for run in runs]
    pooled = pd.concat(tables, ignore_index=True).dropna(subset=keys, how="all")
    steps = np.sort(pooled["step"].unique())
    width = -(-len(steps) // MAX_POINTS)
    pooled["bin"] = np.searchsorted(steps, pooled["step"]) // width
    return pooled


def _label(table: Any, name: str) -> Any:
    table = table.reset_index(drop=True)
    table.insert(0, "series", name)
    return table


def _stack(tables: list[Any], columns: list[str]) -> Any:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
