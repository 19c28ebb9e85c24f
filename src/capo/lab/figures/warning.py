"""Figure 3: does m_F or m_H rise before a run collapses, and how long before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from capo.lab.figures.accuracy import base
from capo.lab.figures.figure import Drawn
from capo.lab.sweep.curves import curve_figure, metric_points
from capo.lab.sweep.reading import GridResult, Run

SIGNALS = {
    "capo/batch/policy_shift": "m_F of the step, last layer",
    "capo/batch/objective_shift": "m_H of the step, last layer",
    "capo/policy_shift/p99": "m_F of the tokens, 0.99 quantile",
    "capo/trust/measured_policy_shift": "measured policy shift of the step",
    "grad_norm": "gradient norm",
}
MARGIN = 2.0  # an alarm: so many times the QUANTILE of all steps of the other stable runs
QUANTILE = 0.99


def fig3(result: GridResult) -> Drawn:
    """Signals over training, and for each the warning before the collapse and the false alarms."""
    drawn = base(result)
    for key in ("capo/batch/policy_shift", "capo/batch/objective_shift"):
        slug = key.removeprefix("capo/").replace("/", "-").replace("_", "-")
        figure = curve_figure(
            slug, SIGNALS[key], result.cells, metric_points(key), y="logarithmic", log=True
        )
        drawn.figures[:0] = [figure] if figure is not None else []
    fallen = [run for run in result.runs if run.collapsed]
    stable = [run for run in result.runs if not run.collapsed]
    drawn.numbers["runs"] = {"collapsed": len(fallen), "stable": len(stable)}
    rows = {key: warning_of(key, fallen, stable) for key in SIGNALS}
    drawn.numbers["warnings"] = {key: row for key, row in rows.items() if row is not None}
    drawn.tables["Warnings"] = [
        {
            "signal": SIGNALS[key],
            "collapses warned of": f"{row['warned']} of {row['collapsed']}",
            "steps before, median": "-" if row["lead"] is None else f"{row['lead']:g}",
            "false alarms": f"{row['false_alarms']} of {row['stable']} stable runs",
        }
        for key, row in rows.items()
        if row is not None
    ]
    drawn.notes.append(
        f"An alarm is the first step whose signal exceeds {MARGIN:g} × the {QUANTILE:g} quantile over all "
        "steps of the stable runs (for a stable run: of the others). A collapse is warned of where the "
        "alarm comes at or before the last step before the first evaluation below half the base "
        "policy's accuracy; evaluations are two steps apart, so leads are exact to that."
    )
    return drawn


def warning_of(key: str, fallen: Sequence[Run], stable: Sequence[Run]) -> dict[str, Any] | None:
    """How early a signal warned, and how often in vain; None without runs of both fates."""
    quiet = {index: _values(run, key) for index, run in enumerate(stable)}
    quiet = {index: values for index, values in quiet.items() if values}
    if len(quiet) < 2 or not fallen:
        return None
    level = _level(quiet.values())
    leads: list[float] = []
    for run in fallen:
        began = run.collapse_began
        alarm = _alarm(run, key, level)
        end = run.metrics[-1]["step"] if began is None else began.step
        if alarm is not None and alarm < end:
            leads.append(end - alarm)
    false = 0
    for index in quiet:
        others = [values for other, values in quiet.items() if other != index]
        false += _alarm(stable[index], key, _level(others)) is not None
    return {
        "collapsed": len(fallen),
        "warned": len(leads),
        "lead": median(leads) if leads else None,
        "stable": len(quiet),
        "false_alarms": false,
        "level": level,
    }


def _level(series: Any) -> float:
    return MARGIN * float(
        np.quantile(np.concatenate([np.asarray(each) for each in series]), QUANTILE)
    )


def _values(run: Run, key: str) -> list[float]:
    return [abs(value) for _, value in run.series(key) if math.isfinite(value)]


def _alarm(run: Run, key: str, level: float) -> int | None:
    for step, value in run.series(key):
        if not abs(value) <= level:  # a signal that is no number is an alarm
            return step
    return None
