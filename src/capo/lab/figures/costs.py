"""Tables of measurements: what a step costs, and how well it is foreseen."""

from __future__ import annotations

import math
import statistics
from typing import Any

from capo.lab.figures.figure import Drawn
from capo.lab.sweep.intervals import interval
from capo.lab.sweep.measures import FORESEEN, OWN, PARTS, PROXIES
from capo.lab.sweep.reading import GridResult, Run, labels

WARM_UP = 2  # steps that are not timed: what is compiled and allocated once
FLOOR = 1e-9
"""Nats a token; a step of less (the first of a warm-up) is no step."""


def table1(result: GridResult) -> Drawn:
    """CPU time of every part of a step, in all and as a share."""
    drawn = Drawn()
    numbers: dict[str, Any] = {}
    for each in result.cells:
        steps = [row for run in each.runs for row in run.measured[WARM_UP:]]
        if not steps:
            continue
        parts = {part: statistics.median(row[part] for row in steps) for part in PARTS}
        whole = sum(parts.values())
        numbers[each.cell.variant] = {"seconds": whole, "parts": parts, "steps": len(steps)}
        numbers[each.cell.variant]["shares"] = {k: v / whole for k, v in parts.items()}
    drawn.numbers["cost"] = numbers
    drawn.tables["CPU milliseconds of a step, medians"] = [
        {
            "": result.of(variant).cell.label,
            "step": f"{1e3 * n['seconds']:.0f}",
            **{part: f"{1e3 * n['parts'][part]:.1f} ({n['shares'][part]:.1%})" for part in PARTS},
        }
        for variant, n in numbers.items()
    ]
    drawn.notes.append(
        "96 completions a step, one thread. The paper's step: 2.9 %, moments 2.5 of them."
    )
    return drawn


def table5(result: GridResult) -> Drawn:
    """Spearman correlations of predictors and proxies with the true KL."""
    drawn = Drawn()
    numbers: dict[str, Any] = {}
    names = [OWN, *FORESEEN, *PROXIES]
    for each, label in zip(result.cells, labels([c.cell for c in result.cells]), strict=True):
        runs = [run for run in each.runs if len(_steps(run)) > 2]
        if not runs:
            continue
        found: dict[str, Any] = {}
        for name in names:
            token = [v for run in runs if (v := _token(run, name)) is not None]
            batch = [v for run in runs if (v := _batch(run, name)) is not None]
            if token:
                found[name] = {"token": interval(token).as_dict()}
                if batch:
                    found[name]["batch"] = interval(batch).as_dict()
        numbers[each.cell.name] = {
            "label": label,
            "variant": each.cell.variant,
            "predictors": found,
        }
    drawn.numbers["spearman"] = numbers
    for n in numbers.values():
        drawn.tables[n["label"]] = [
            {
                "predictor": FORESEEN.get(name, name),
                "token level": _text(row["token"]),
                "batch level": _text(row["batch"]) if "batch" in row else "-",
            }
            for name, row in n["predictors"].items()
        ]
    drawn.notes.append(
        "Rank correlation with the exact KL of the step, on the tokens of its batch: token level within a "
        "step (median over the steps of a run), batch level of the means over a run's steps. Interquartile "
        "means over the seeds, 95 % bootstrap intervals. `surprise` is −log π, `gap` |A|(1 − π). The paper: "
        "0.622 under GRPO's updates, 0.459 under CAPO's, higher at batch level."
    )
    return drawn


def _steps(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.measured if row["truth"] > FLOOR]


def _token(run: Run, name: str) -> float | None:
    values = [row["token"].get(name) for row in _steps(run)]
    there = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.median(there) if there else None


def _batch(run: Run, name: str) -> float | None:
    from scipy import stats

    pairs = [(row["batch"][name], row["truth"]) for row in _steps(run) if name in row["batch"]]
    if len({round(p, 15) for p, _ in pairs}) < 3:
        return None
    said, truth = zip(*pairs, strict=True)
    return float(stats.spearmanr(said, truth).statistic)


def _text(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
