"""The same settings on every task and architecture: what each arm comes to, and what searches found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from capo.lab.figures.bands import final_accuracy_bands
from capo.lab.figures.figure import Drawn
from capo.lab.report.charts import Figure
from capo.lab.study.statistics import Estimate, median_estimate, ratio_of_medians
from capo.lab.sweep.intervals import Interval
from capo.lab.sweep.reading import CellResult, GridResult, searched_mean
from capo.lab.sweep.table import completions_to_target, final_accuracy, table_of

ROW = 48  # CSS pixels of the figure for a condition
OWN, BEST = "trust-region", "grpo-best"


def tasks(result: GridResult) -> Drawn:
    """A row a condition, a column an arm; completions to the halfway target; the searches."""
    drawn = Drawn()
    drawn.numbers["cells"] = table_of(result)
    rows = [row for group in _by_condition(result) if (row := _row(result, group)) is not None]
    drawn.numbers["tasks"] = rows
    drawn.numbers["searches"] = _searches(result)
    arms = list(dict.fromkeys(cell.cell.variant for cell in result.cells))
    names = {cell.cell.variant: cell.cell.label for cell in result.cells}
    drawn.tables["Final accuracy"] = [
        {"": row["label"], "seeds": _seeds(row), "base": f"{row['base']:.3f}"}
        | {names[arm]: _accuracy(row["arms"].get(arm)) for arm in arms}
        for row in rows
    ]
    drawn.tables["Completions to the target"] = [
        {"": row["label"], "target": f"{row['target']:.3f}"}
        | {names[arm]: _said(row["arms"].get(arm), "completions") for arm in arms}
        | {"GRPO at its best over the trust region": (row["ratio"] or {}).get("text", "-")}
        for row in rows
    ]
    drawn.tables["Seeds that collapsed"] = [
        {"": row["label"]} | {names[arm]: _fallen(row["arms"].get(arm)) for arm in arms}
        for row in rows
    ]
    drawn.tables["What the searches found for GRPO"] = [
        _found(row) for row in drawn.numbers["searches"]
    ]
    drawn.figures += _figures(rows, arms, names)
    drawn.notes.append(
        "Final accuracy: interquartile mean over the seeds, 95 % bootstrap interval. The target lies "
        "halfway between the base policy's accuracy and 1; completions to it: the median over the seeds at "
        "the third of three evaluations in a row whose mean is at least that, with an interval of order "
        "statistics (of five seeds from the smallest to the largest, 94 %; of three 75 %); a run that does "
        "not get there is a lower bound (>). The ratio is that of the medians, 95 % bootstrap interval. "
        "Collapsed: accuracy below half of the base policy's at three evaluations in a row or at the end, or "
        "diverged. GRPO's settings were searched for every row on seeds of their own, by the mean accuracy "
        "over training; nothing of ours differs between rows."
    )
    return drawn


def _by_condition(result: GridResult) -> list[list[CellResult]]:
    groups: dict[str, list[CellResult]] = {}
    for each in result.cells:
        groups.setdefault(each.cell.condition, []).append(each)
    return list(groups.values())


def _row(result: GridResult, group: Sequence[CellResult]) -> dict[str, Any] | None:
    """The figures of a condition; None where there is no run."""
    first = group[0].cell
    target = result.target(first.condition)
    if target is None:
        return None
    there = {each.cell.variant: each for each in group if any(r.evaluations for r in each.runs)}
    ratio = None
    if OWN in there and BEST in there:
        slow, fast = (
            [completions_to_target(r, target) for r in there[arm].runs] for arm in (BEST, OWN)
        )
        found = ratio_of_medians(slow, fast)
        if found.value.low > 0 or math.isfinite(found.value.high):  # else neither gets there
            ratio = _estimated(found, ".2f")
    return {
        "condition": first.condition,
        "label": first.where,
        "base": 2 * target - 1,
        "target": target,
        "wanted": group[0].wanted,
        "arms": {name: _arm(each, target) for name, each in there.items()},
        "ratio": ratio,
    }


def _arm(result: CellResult, target: float) -> dict[str, Any]:
    runs = result.runs
    return {
        "final": final_accuracy(runs).as_dict(),
        "finals": [run.final_accuracy for run in runs],
        "completions": _estimated(
            median_estimate([completions_to_target(run, target) for run in runs])
        ),
        "collapsed": sum(run.collapsed for run in runs),
        "seeds": len(runs),
    }


def _estimated(estimate: Estimate, form: str = ",.0f") -> dict[str, Any]:
    ends = {"low": estimate.value.low, "high": estimate.value.high}
    return {"text": estimate.text(form)} | {
        key: value if math.isfinite(value) else None for key, value in ends.items()
    }


def _searches(result: GridResult) -> list[dict[str, Any]]:
    """Every search with its candidates, the best first."""
    found = []
    for name, candidates in result.searches.items():
        there = [each for each in candidates if each.runs]
        ranked = sorted(there, key=searched_mean, reverse=True)
        if ranked:
            found.append(
                {
                    "cell": name,
                    "label": ranked[0].cell.where,
                    "over": len(there) == len(candidates) and all(c.complete for c in candidates),
                    "chosen": result.grid.choices.get(name),
                    "edge": _edge(candidates, result.grid.choices.get(name)),
                    "candidates": [
                        {
                            "settings": each.cell.at,
                            "mean_accuracy": searched_mean(each),
                            "final_accuracy": fmean(run.final_accuracy for run in each.runs),
                            "seeds": [run.point.seed for run in each.runs],
                        }
                        for each in ranked
                    ],
                }
            )
    return found


def _edge(candidates: Sequence[CellResult], chosen: dict[str, Any] | None) -> str | None:
    """``lowest`` or ``highest``: the chosen learning rate has no neighbour on one side."""
    key = "training.learning_rate"
    if chosen is None or key not in chosen:
        return None
    others = {k: v for k, v in chosen.items() if k != key}
    rates = [
        each.cell.at[key]
        for each in candidates
        if {k: v for k, v in each.cell.at.items() if k != key} == others
    ]
    return {min(rates): "lowest", max(rates): "highest"}.get(chosen[key])


def _found(row: dict[str, Any]) -> dict[str, str]:
    best, *others = row["candidates"]
    second = others[0] if others else None
    return {
        "": row["label"],
        "chosen": _settings(row["chosen"]) if row["chosen"] is not None else "(not over)",
        "mean over training": f"{best['mean_accuracy']:.3f}",
        "the next": "-"
        if second is None
        else f"{second['mean_accuracy']:.3f} ({_settings(second['settings'])})",
        "of its learning rates": row["edge"] or "between",
        "candidates": str(len(row["candidates"])),
    }


def _settings(settings: dict[str, Any]) -> str:
    short = {
        "training.learning_rate": "lr {:g}",
        "training.completions_per_step": "{} completions a step",
        "training.num_generations": "groups of {}",
        "algorithm.num_iterations": "{} passes",
    }
    parts = [short.get(key, "{}").format(value) for key, value in settings.items()]
    return ", ".join(parts)


def _seeds(row: dict[str, Any]) -> str:
    there = sorted({arm["seeds"] for arm in row["arms"].values()})
    return str(row["wanted"]) if there == [row["wanted"]] else f"{there[0]} to {row['wanted']}"


def _accuracy(arm: dict[str, Any] | None) -> str:
    return "-" if arm is None else Interval(**arm["final"]).text()


def _said(arm: dict[str, Any] | None, key: str) -> str:
    return "-" if arm is None else str(arm[key]["text"])


def _fallen(arm: dict[str, Any] | None) -> str:
    return "-" if arm is None else f"{arm['collapsed']} of {arm['seeds']}"


def _figures(
    rows: Sequence[dict[str, Any]], arms: Sequence[str], names: dict[str, str]
) -> list[Figure]:
    """Final accuracy of every arm, a band of the figure for every condition."""
    if not rows:
        return []
    data = pd.DataFrame(
        {"task": row["label"], "series": names[arm], **found["final"]}
        for row in rows
        for arm in arms
        if (found := row["arms"].get(arm)) is not None
    )
    base = pd.DataFrame({"task": row["label"], "value": row["base"]} for row in rows)
    title = "Final accuracy on every task and architecture"
    return [
        final_accuracy_bands(
            "final", title, data, base, [names[arm] for arm in arms], row="task", height=ROW
        )
    ]
