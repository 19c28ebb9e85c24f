"""The study's figures: the races, the learning rates, and all completions to the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from capo.lab.report.charts import MAIN, Figure, series_encodings
from capo.lab.study.goals import completions_estimate, final_median
from capo.lab.study.outcome import ArmResult, held
from capo.lab.study.stages import StudyResult
from capo.lab.sweep.curves import save_figures as write_figures

BAND = 0.14  # opacity
COUNTS = alt.Axis(format="~s", tickCount=8)


def save_figures(study: StudyResult, output: Path) -> list[Figure]:
    """Write SVG, PNG and CSV of every figure that there is data for."""
    return write_figures(all_figures(study), output)


def all_figures(study: StudyResult) -> list[Figure]:
    """Every figure, those without data included."""
    default = [study.default] if study.default and study.default.outcomes else []
    rules = [rule.narrowing.result for rule in study.rules]
    others = [result for result in study.races if result not in rules + list(study.variants)]
    figures = [
        races("races", "CAPO and GRPO raced to the target", others, study),
        races("races_rules", "Other step rules at their best", default + rules, study),
        races("races_variants", "CAPO's variants", default + list(study.variants), study),
        completions_figure(study),
        learning_rates(study),
    ]
    return [figure for figure in figures if figure is not None]


def races(slug: str, title: str, results: Sequence[ArmResult], study: StudyResult) -> Figure | None:
    """Accuracy over completions: median and range over the seeds, of a few arms."""
    results = [result for result in results if result.outcomes]
    if len(results) < 2 and slug != "races":
        return None
    data = pd.concat([race_table(result) for result in results]) if results else pd.DataFrame()
    names = [result.label for result in results]
    x = alt.X("completions:Q", title="completions (logarithmic)", axis=COUNTS).scale(
        type="log", nice=False
    )
    base = alt.Chart(alt.NamedData(name=MAIN)).encode(x=x)
    looks = series_encodings(names, data) if results else {}
    title_y, free = "accuracy on held-out problems", alt.Scale(zero=False)
    band = base.mark_area(opacity=BAND).encode(
        y=alt.Y("low:Q", title=title_y, scale=free),
        y2="high:Q",
        color=looks.get("color", alt.value("grey")),
    )
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("median:Q", title=title_y, scale=free), **looks
    )
    target = pd.DataFrame({"value": [study.plan.measure.target]})
    rule = alt.Chart(alt.NamedData(name="target")).mark_rule(strokeDash=[4, 4]).encode(y="value:Q")
    caption = (
        "Lines: median over the seeds; bands: smallest and largest. A run that has reached the "
        "target ends there and is held at its last accuracy."
    )
    return Figure(slug, title, caption, alt.layer(band, line, rule), data, {"target": target})


def race_table(result: ArmResult) -> pd.DataFrame:
    """Columns series, completions, median, low, high, running (seeds that have not ended).

    The base policy's evaluation, at no completions, is left out: the axis is logarithmic.
    """
    curves = []
    for outcome in result.outcomes:
        points = held(outcome.evaluations, outcome.completions_per_step, outcome.spacing)
        curves.append([point for point in points if point[0] > 0])
    grid = sorted({completions for curve in curves for completions, _ in curve})
    values = np.array([_stepwise(curve, grid) for curve in curves])
    last = np.array([curve[-1][0] if curve else 0 for curve in curves])
    return pd.DataFrame(
        {
            "series": result.label,
            "completions": grid,
            "median": np.median(values, axis=0),
            "low": values.min(axis=0),
            "high": values.max(axis=0),
            "running": [(last >= at).sum() for at in grid],
        }
    )


def _stepwise(curve: list[tuple[int, float]], grid: list[int]) -> list[float]:
    """The curve's last accuracy at or before every point of the grid."""
    values, position = [], 0
    for at in grid:
        while position + 1 < len(curve) and curve[position + 1][0] <= at:
            position += 1
        values.append(curve[position][1])
    return values


def completions_figure(study: StudyResult) -> Figure:
    """Completions to the target of every arm: seeds as points, the median with its interval."""
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    for result in study.races:
        for outcome in result.outcomes:
            at = outcome.to_target
            rows.append(
                {
                    "series": result.label,
                    "completions": outcome.completions if at is None else at,
                    "seed": outcome.seed,
                    "reached": "reached" if at is not None else "not reached by then",
                }
            )
        estimate = completions_estimate(result)
        bars.append(
            {
                "series": result.label,
                "median": estimate.value.low,
                "low": estimate.low.low,
                "high": estimate.high.high if np.isfinite(estimate.high.high) else None,
            }
        )
    names = [result.label for result in study.races]
    y = alt.Y("series:N", title=None, sort=names, axis=alt.Axis(labelLimit=260))
    x = alt.X("completions:Q", title="completions (logarithmic)", axis=COUNTS)
    x = x.scale(type="log", nice=False, padding=20)
    shape = alt.Shape("reached:N", title=None).scale(
        domain=["reached", "not reached by then"], range=["circle", "triangle-right"]
    )
    points = (
        alt.Chart(alt.NamedData(name=MAIN))
        .mark_point(size=60, filled=False, color="#59636E")
        .encode(x=x, y=y, shape=shape)
    )
    middle = alt.Chart(alt.NamedData(name="medians")).encode(y=y)
    interval = (
        middle.transform_filter("isValid(datum.high)")
        .mark_rule(strokeWidth=2, color="#0072B2", opacity=0.5)
        .encode(x="low:Q", x2="high:Q")
    )
    median = middle.mark_tick(thickness=3, size=18, color="#0072B2").encode(x="median:Q")
    caption = (
        "Points: seeds, a triangle where the target was not reached by then; bars: medians, lines: "
        "their intervals, drawn where neither end is open."
    )
    title = f"Completions to accuracy {study.plan.measure.target:g}"
    return Figure(
        "completions",
        title,
        caption,
        alt.layer(interval, points, median),
        pd.DataFrame(rows),
        {"medians": pd.DataFrame(bars)},
    )


def learning_rates(study: StudyResult) -> Figure:
    """Final accuracy over the learning rate of every rule, collapsed seeds told apart."""
    rows = [
        {
            "series": result.label,
            "learning_rate": learning_rate,
            "seed": outcome.seed,
            "accuracy": outcome.final_accuracy,
            "fate": "collapsed" if outcome.collapsed else "survived",
        }
        for result in study.ranges
        for learning_rate, point in result.points
        for outcome in point.outcomes
    ]
    data = pd.DataFrame(rows)
    names = [result.label for result in study.ranges]
    medians = pd.DataFrame(
        [
            {"series": result.label, "learning_rate": at, "median": final_median(point)}
            for result in study.ranges
            for at, point in result.points
            if point.outcomes
        ]
    )
    x = alt.X(
        "learning_rate:Q",
        title="learning rate (logarithmic)",
        axis=alt.Axis(format="~e", values=sorted(set(data.get("learning_rate", [])))),
    ).scale(type="log")
    looks = series_encodings(names, data) if len(data) else {}
    fate = alt.Shape("fate:N", title=None, legend=alt.Legend(orient="bottom")).scale(
        domain=["survived", "collapsed"], range=["circle", "cross"]
    )
    y = {"title": "final accuracy"}
    lines = (
        alt.Chart(alt.NamedData(name="medians"))
        .mark_line(strokeWidth=2)
        .encode(x=x, y=alt.Y("median:Q", **y), **looks)
    )
    points = (
        alt.Chart(alt.NamedData(name=MAIN))
        .mark_point(filled=True, size=45, opacity=0.65)
        .encode(
            x=x,
            y=alt.Y("accuracy:Q", **y),
            shape=fate,
            color=looks.get("color", alt.value("grey")),
        )
    )
    caption = (
        "Points: seeds; lines: medians. A step rule's runs end when they collapse, and its climb "
        "at the first learning rate that it does not survive."
    )
    return Figure(
        "learning_rates",
        "Final accuracy over the learning rate",
        caption,
        alt.layer(lines, points),
        data,
        {"medians": medians},
    )
