"""Figures about accuracy over completions: who collapses, who learns, at what rejection rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from capo.lab.figures.bands import MOST_ROWS
from capo.lab.figures.figure import Drawn
from capo.lab.report.charts import MAIN, Figure
from capo.lab.study.statistics import ratio_of_medians
from capo.lab.sweep.curves import curve_figure, metric_points, split_figures
from capo.lab.sweep.intervals import interval
from capo.lab.sweep.reading import CellResult, GridResult, Run, labels
from capo.lab.sweep.table import (
    REJECTION,
    completions_to_target,
    final_accuracy,
    rejections,
    shown,
    table_of,
)

CONSERVATIVE, AGGRESSIVE = "grpo-conservative", ("grpo", "dr-grpo", "reinforce")
MOST_CURVES = 24  # cells: of more, nobody reads the curves; `capo lab report` draws them all
MASKED = ("capo", "dr-capo", "reincapo")


def base(result: GridResult, title: str = "Accuracy over completions") -> Drawn:
    """The table, the learning curves and the numbers that every figure has."""
    drawn = Drawn()
    rows = table_of(result)
    drawn.tables["Runs"] = [shown(row, result.grid.target) for row in rows]
    drawn.numbers["cells"] = rows
    trained = [each for each in result.cells if any(run.evaluations for run in each.runs)]
    if len(trained) <= MOST_CURVES:
        drawn.figures += split_figures("accuracy", title, trained)
    return drawn


def compared(result: GridResult) -> Drawn:
    """Cells side by side."""
    drawn = base(result)
    drawn.figures[:0] = final_figures(result.cells)
    return drawn


def fig1(result: GridResult) -> Drawn:
    """The sample-efficiency ratios against conservative GRPO."""
    drawn = base(result)
    slow = result.of(CONSERVATIVE)
    target = result.target(slow.cell.condition)
    assert target is not None, "the grid of figure 1 names a number"
    rows: list[dict[str, str]] = []
    ratios: dict[str, Any] = {}
    for name in (*AGGRESSIVE, *MASKED, "trust-region"):
        ratio = efficiency(slow, result.of(name), target)
        if ratio is not None:
            ratios[name] = ratio
            rows.append({"": result.of(name).cell.label, "× fewer completions": str(ratio["text"])})
    drawn.tables[f"Completions to {target:g}, conservative GRPO's over each one's"] = rows
    drawn.numbers["efficiency"] = ratios
    drawn.notes.append(
        f"The ratio is that of the median completions at which three evaluations in a row average "
        f"{target:g}; a run that did not get there counts as a bound (> or <), 95 % bootstrap interval."
    )
    return drawn


def efficiency(slow: CellResult, fast: CellResult, target: float) -> dict[str, Any] | None:
    """How many times fewer completions ``fast`` takes; None where one of them has no run."""
    if not slow.runs or not fast.runs:
        return None
    ratio = ratio_of_medians(
        *([completions_to_target(r, target) for r in each.runs] for each in (slow, fast))
    )
    return {
        "low": _finite(ratio.value.low),
        "high": _finite(ratio.value.high),
        "interval_low": _finite(ratio.low.low),
        "text": ratio.text(".2f"),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def fig5(result: GridResult) -> Drawn:
    """Peak and end of the rejection rate."""
    drawn = base(result)
    rate = curve_figure(
        "rejection", "Rejected tokens", result.cells, metric_points(REJECTION), y="share of tokens"
    )
    drawn.figures[:0] = [rate] if rate is not None else []
    numbers: dict[str, dict[str, Any]] = {}
    for each, name in zip(result.cells, labels([c.cell for c in result.cells]), strict=True):
        series = [rates for run in each.runs if (rates := rejections(run))]
        if series:
            numbers[each.cell.name] = {
                "label": name,
                "peak": interval([max(rates) for rates in series]).as_dict(),
                "late": interval([_late(rates) for rates in series]).as_dict(),
            }
    drawn.numbers["rejection"] = numbers
    drawn.tables["Rejection rate"] = [
        {
            "": n["label"],
            "peak": f"{n['peak']['value']:.1%}",
            "last quarter": f"{n['late']['value']:.1%}",
        }
        for n in numbers.values()
    ]
    return drawn


def _late(rates: Sequence[float]) -> float:
    last = rates[-max(1, len(rates) // 4) :]
    return sum(last) / len(last)


def fig6(result: GridResult) -> Drawn:
    """Both step models side by side."""
    return compared(result)


def fig7(result: GridResult) -> Drawn:
    """Clips at every number of passes."""
    return compared(result)


def fig8(result: GridResult) -> Drawn:
    """The penalty, and the norms of the gradients."""
    drawn = compared(result)
    norms = curve_figure(
        "gradient-norms", "Gradient norm before clipping", result.cells, metric_points("grad_norm"),
        y="norm (logarithmic)", log=True,
    )  # fmt: skip
    drawn.figures += [norms] if norms is not None else []
    drawn.numbers["gradient_norm"] = {
        each.cell.name: interval([_peak(run) for run in each.runs]).as_dict()
        for each in result.cells
        if each.runs
    }
    return drawn


def _peak(run: Run) -> float:
    norms = [norm for _, norm in run.series("grad_norm") if math.isfinite(norm)]
    return max(norms, default=0.0)


def thresholds(result: GridResult) -> Drawn:
    """Accuracy and rejection over the threshold."""
    drawn = compared(result)
    rows = []
    for each in result.cells:
        optimizer, _, tail = each.cell.variant.partition("-")
        if each.runs and tail != "none":
            final = final_accuracy(each.runs)
            rates = [sum(r) / len(r) for run in each.runs if (r := rejections(run))]
            rate = each.cell.at["training.learning_rate"]
            rows.append(
                {
                    "series": f"{optimizer}, learning rate {rate:g}",
                    "threshold": float(tail),
                    "value": final.value,
                    "low": final.low,
                    "high": final.high,
                    "rejected": sum(rates) / len(rates) if rates else 0.0,
                    "collapsed": sum(run.collapsed for run in each.runs),
                    "runs": len(each.runs),
                }
            )
    data = pd.DataFrame(rows)
    drawn.numbers["sweep"] = rows
    if len(data):
        for column, title in (("value", "final accuracy"), ("rejected", "rejected tokens")):
            drawn.figures.insert(0, _over_threshold(data, column, title))
    return drawn


def _over_threshold(data: pd.DataFrame, column: str, title: str) -> Figure:
    x = alt.X("threshold:Q", title="δ_F (nats, logarithmic)", scale=alt.Scale(type="log"))
    x = x.axis(format="~e")
    start = alt.Chart(alt.NamedData(name=MAIN))
    line = start.mark_line(point=True).encode(
        x=x, y=alt.Y(f"{column}:Q", title=title), color="series:N"
    )
    layers = [line]
    if column == "value":
        layers.append(start.mark_rule().encode(x=x, y="low:Q", y2="high:Q", color="series:N"))
    caption = "Interquartile mean over the seeds; lines: 95 % bootstrap interval."
    slug = "threshold-" + ("accuracy" if column == "value" else "rejection")
    return Figure(
        slug, f"{title.capitalize()} over the threshold", caption, alt.layer(*layers), data
    )


def mapped(result: GridResult) -> Drawn:
    """What masks add to the final accuracy, by optimizer and condition, and where they rescue."""
    drawn = compared(result)
    rows: list[dict[str, Any]] = []
    for each in result.cells:
        optimizer, condition, masks = each.cell.variant.split("-")
        if masks != "masks" or not each.runs:
            continue
        rate = each.cell.at["training.learning_rate"]
        plain = result.of(f"{optimizer}-{condition}-none", learning_rate=rate)
        pairs = by_seed(each, plain)
        if not pairs:
            continue
        masked_fell = sum(m.collapsed for m, _ in pairs)
        plain_fell = sum(p.collapsed for _, p in pairs)
        rows.append(
            {
                "optimizer": optimizer,
                "condition": condition,
                "learning_rate": rate,
                "plain_collapsed": plain_fell,
                "masked_collapsed": masked_fell,
                "runs": len(pairs),
                "gain": interval([m.final_accuracy - p.final_accuracy for m, p in pairs]).as_dict(),
                "rescued": 2 * plain_fell > len(pairs) and not masked_fell,
            }
        )
    drawn.numbers["map"] = rows
    drawn.tables["What masks add to the final accuracy, seed by seed"] = [
        {
            "optimizer": row["optimizer"],
            "condition": row["condition"],
            "learning rate": f"{row['learning_rate']:g}",
            "collapsed without": f"{row['plain_collapsed']} of {row['runs']}",
            "collapsed with": f"{row['masked_collapsed']} of {row['runs']}",
            "gain": f"{row['gain']['value']:+.3f} [{row['gain']['low']:+.3f}, {row['gain']['high']:+.3f}]",
            "rescued": "yes" if row["rescued"] else "no",
        }
        for row in rows
    ]
    drawn.notes.append(
        "Rescued: most seeds collapse without masks and none with them. Cold moments: no warm-up, so that "
        "the first steps are taken at the full learning rate before Adam's moments are filled."
    )
    return drawn


def by_seed(a: CellResult, b: CellResult) -> list[tuple[Run, Run]]:
    """The runs of both cells that have a seed in common, in pairs."""
    other = {run.point.seed: run for run in b.runs}
    return [(run, other[run.point.seed]) for run in a.runs if run.point.seed in other]


def final_figures(cells: Sequence[CellResult]) -> list[Figure]:
    """Final accuracy of every cell, in figures of at most `MOST_ROWS`."""
    there = [each for each in cells if any(run.evaluations for run in each.runs)]
    names = labels([each.cell for each in there])
    pairs = list(zip(there, names, strict=True))
    parts = [pairs[start : start + MOST_ROWS] for start in range(0, len(pairs), MOST_ROWS)]
    many = len(parts) > 1
    return [
        _final_figure(part, f"final-{index}" if many else "final")
        for index, part in enumerate(parts, start=1)
    ]


def _final_figure(part: Sequence[tuple[CellResult, str]], slug: str) -> Figure:
    """The interval, and the seeds as points."""
    rows = [
        {"series": name, "value": f.value, "low": f.low, "high": f.high}
        for each, name in part
        for f in [final_accuracy(each.runs)]
    ]
    seeds = [
        {"series": name, "accuracy": run.final_accuracy, "seed": run.point.seed}
        for each, name in part
        for run in each.runs
    ]
    names = [name for _, name in part]
    y = alt.Y("series:N", title=None, sort=names, axis=alt.Axis(labelLimit=320, labelOverlap=False))
    x: dict[str, Any] = {"title": "final accuracy", "scale": alt.Scale(domain=[0, 1])}
    start = alt.Chart(alt.NamedData(name=MAIN)).encode(y=y)
    rule = start.mark_rule(strokeWidth=2, color="#0072B2").encode(
        x=alt.X("low:Q", **x), x2="high:Q"
    )
    tick = start.mark_tick(thickness=3, size=12, color="#0072B2").encode(x=alt.X("value:Q", **x))
    points = (
        alt.Chart(alt.NamedData(name="seeds"))
        .mark_point(size=24, color="#59636E", opacity=0.7)
        .encode(y=y, x=alt.X("accuracy:Q", **x))
    )
    return Figure(
        slug,
        "Final accuracy",
        "Ticks: interquartile mean; lines: 95 % bootstrap interval; points: seeds.",
        alt.layer(points, rule, tick),
        pd.DataFrame(rows),
        {"seeds": pd.DataFrame(seeds)},
    )
