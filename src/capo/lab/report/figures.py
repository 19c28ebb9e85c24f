"""Every figure of the report, in the order of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from capo.lab.report import charts
from capo.lab.report import series as tables
from capo.lab.report.charts import POSITION_TIPS, Figure
from capo.lab.report.signals import REJECTION, SIGNALS, signal_figure
from capo.lab.report.style import REASON_COLORS
from capo.lab.report.summary import Series, selects
from capo.lab.report.thresholds import thresholds_of
from capo.lab.report.trust import trust_figures

POLICY_SHIFT = {f"capo/policy_shift/{name}": name for name in ("p50", "p90", "p99", "max")}
OBJECTIVE_SHIFT = {f"capo/objective_shift/{name}": name for name in ("p01", "p50", "p99")}
MAX_REASON_FIGURES = 6


def accuracy_figure(series: Sequence[Series], target: float) -> Figure:
    """Accuracy against completions consumed, with error band, collapse and target."""
    names = [one.name for one in series]
    data = tables.accuracy_table(series)
    fallen = [
        {
            "series": one.name,
            "completions": s.collapsed_at.completions,
            "accuracy": s.collapsed_at.accuracy,
            "run": s.run.name,
        }
        for one in series
        for s in one.summaries
        if s.collapsed_at
    ]
    collapse = pd.DataFrame(fallen, columns=["series", "completions", "accuracy", "run"])
    rules = pd.DataFrame([{"value": target, "label": f"target {target:g}"}])
    y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
    base, look = charts.source(), charts.point_encodings(names, data)
    dash = charts.series_encodings(names, data)["strokeDash"].copy(deep=True)
    dash.legend = None
    band = base.mark_area(opacity=0.18, line=False).encode(
        x=charts.x_axis(), y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=look["color"]
    )
    line = base.mark_line(strokeWidth=2.5).encode(
        x=charts.x_axis(), y=y, color=look["color"], strokeDash=dash
    )
    tips = charts.tooltips(
        ("accuracy", "accuracy", ".3f"),
        ("low", "low", ".3f"),
        ("high", "high", ".3f"),
        *POSITION_TIPS,
        ("runs", "runs", "d"),
    )
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=charts.x_axis(),
        y=y,
        tooltip=tips,
        **look,
    )
    marks = charts.source("collapse")
    cross = marks.mark_point(shape=charts.CROSS, size=260, strokeWidth=3, opacity=1).encode(
        x=charts.x_axis(),
        y=y,
        color=look["color"],
        tooltip=charts.tooltips(
            ("completions", "collapsed at", ","), ("accuracy", "accuracy", ".3f")
        ),
    )
    word = marks.mark_text(align="left", dx=12, dy=-12, fontSize=12, fontWeight=600).encode(
        x=charts.x_axis(), y=y, text=alt.value("collapsed"), color=look["color"]
    )
    chart = charts.layered(names, band, *charts.rule_layers("rules"), line, points, cross, word)
    return Figure(
        "accuracy",
        "Accuracy against completions consumed",
        "Accuracy of sampled answers on fixed held-out problems. Band: ± one binomial standard "
        "error (one run) or the range over seeds around their median; a seed that is over holds its last "
        "value, one that diverged 0, and one that stopped otherwise is left out from there on. ✕: the "
        "first evaluation of a collapse (below half the base policy's accuracy three times in a row, or at "
        "the end; or diverged).",
        chart,
        data,
        {"collapse": collapse, "rules": rules},
        wide=True,
    )


def policy_shift_figure(series: Sequence[Series]) -> Figure:
    """Quantiles of the token-level policy shift over training, as a fan on a log axis."""
    names = [one.name for one in series]
    columns = list(POLICY_SHIFT.values())
    data = tables.quantile_table(series, POLICY_SHIFT)
    floor = charts.log_floor(data, columns)
    base, look = (
        charts.clamped(charts.source(), columns, floor),
        charts.series_encodings(names, data),
    )

    def y(column: str) -> Any:
        return charts.log_y(data, columns, f"{column}_", "policy shift m_F (nats)")

    layers = [
        base.mark_area(opacity=opacity).encode(
            x=charts.x_axis(), y=y(low), y2=f"{high}_:Q", color=look["color"]
        )
        for low, high, opacity, most in (
            ("p50", "max", 0.10, charts.OUTER_BANDS),
            ("p90", "p99", 0.20, charts.INNER_BANDS),
        )
        if data["series"].nunique() <= most
    ]
    layers.append(base.mark_line(strokeWidth=2).encode(x=charts.x_axis(), y=y("p99"), **look))
    tips = charts.tooltips(*((c, c, ".2e") for c in reversed(columns)), *POSITION_TIPS)
    layers += charts.hover_layers(look["color"], base, y("p99"), tips)
    rules = pd.DataFrame(
        [
            {"value": limit.policy_shift, "label": f"δ_F = {limit.policy_shift:g} ({name})"}
            for name, limit in thresholds_of(series).items()
            if limit.policy_shift
        ],
        columns=["value", "label"],
    )
    if len(rules):
        layers += charts.rule_layers("rules")
    return Figure(
        "policy-shift",
        "Policy shift of a token's own step",
        "m_F, about the KL divergence that the step of one token alone would cause. Line: 99th "
        "percentile; dark band (of five series at most): 90th to 99th; light band (of three at "
        f"most): median to largest; the tooltip tells all four. Values below {floor:.0e} are drawn "
        "there; a step without any is left out. Dashed: the threshold above which a token is rejected.",
        charts.layered(names, *layers),
        data,
        {"rules": rules},
    )


def objective_shift_figure(series: Sequence[Series]) -> Figure:
    """Quantiles of the token-level objective shift over training, signed log axis."""
    names = [one.name for one in series]
    columns = list(OBJECTIVE_SHIFT.values())
    data = tables.quantile_table(series, OBJECTIVE_SHIFT)
    base, look = charts.source(), charts.series_encodings(names, data)
    limits = [
        {"value": bound, "label": f"δ_H = {bound:g} ({name})"}
        for name, limit in thresholds_of(series).items()
        for bound in limit.objective_shift
        if bound is not None
    ]

    def y(column: str) -> Any:
        return charts.symlog_y(data, columns, column, "objective shift m_H")

    layers = [
        base.mark_area(opacity=0.10).encode(
            x=charts.x_axis(), y=y("p01"), y2="p99:Q", color=look["color"]
        ),
        *(
            base.mark_line(strokeWidth=width).encode(x=charts.x_axis(), y=y(column), **look)
            for column, width in (("p01", 1), ("p50", 2), ("p99", 1))
        ),
    ]
    tips = charts.tooltips(*((c, c, ".2e") for c in reversed(columns)), *POSITION_TIPS)
    layers += charts.hover_layers(look["color"], base, y("p50"), tips)
    rules = pd.DataFrame(limits, columns=["value", "label"])
    if limits:
        layers += charts.rule_layers("rules")
    return Figure(
        "objective-shift",
        "Objective shift of a token's own step",
        "m_H, the change of the objective that the step of one token alone promises, to second "
        "order. Line: median; band: 1st to 99th percentile; signed logarithmic axis. Dashed: the "
        "thresholds between which a token is kept.",
        charts.layered(names, *layers),
        data,
        {"rules": rules},
    )


def batch_figure(series: Sequence[Series], kind: str) -> Figure:
    """Batch-level policy or objective shift: of the one step that the optimizer takes."""
    names = [one.name for one in series]
    data = tables.signal_table(series, f"capo/batch/{kind}_shift")
    symbol = "m_F" if kind == "policy" else "m_H"
    title, columns = f"Batch-level {kind} shift", ["median"]
    base, look = charts.source(), charts.series_encodings(names, data)
    if kind == "policy":
        floor = charts.log_floor(data, columns)
        base = charts.clamped(base, columns, floor)
        y = charts.log_y(data, columns, "median_", f"{symbol} (nats)")
    else:
        y = charts.symlog_y(data, columns, "median", symbol)
    line = base.mark_line(strokeWidth=1.8).encode(x=charts.x_axis(), y=y, **look)
    tips = charts.tooltips(("median", symbol, ".2e"), *POSITION_TIPS)
    layers = [line, *charts.hover_layers(look["color"], base, y, tips)]
    caption = f"{symbol} of the whole batch's step of the LM head, as the last-layer model sees it."
    return Figure(f"batch-{kind}-shift", title, caption, charts.layered(names, *layers), data)


def reason_figure(one: Series, index: int) -> Figure:
    """Rejection rate of one series, stacked by reason."""
    data = tables.rejection_table(one)
    reasons = list(dict.fromkeys(data["reason"]))
    color = alt.Color(
        "reason:N",
        scale=alt.Scale(domain=reasons, range=list(REASON_COLORS)),
        legend=alt.Legend(title=None, columns=1, symbolType="square"),
    )
    tips = [
        alt.Tooltip("reason:N"),
        alt.Tooltip("rate:Q", title="rate", format=".2%"),
        alt.Tooltip("completions:Q", format=","),
        alt.Tooltip("step:Q"),
    ]
    share = alt.Y("rate:Q", stack="zero", title="share of tokens", axis=alt.Axis(format="~%"))
    base = alt.Chart(alt.NamedData(name=charts.MAIN))
    area = (
        base.mark_area()
        .encode(
            x=charts.x_axis(), y=share, color=color, order=alt.Order("position:Q"), tooltip=tips
        )
        .transform_calculate(position=f"indexof({reasons!r}, datum.reason)")
    )
    return Figure(
        f"rejection-by-reason-{index}",
        f"Rejected tokens by reason: {one.name}",
        "Share of a step's completion tokens; a token counts once, under its first reason.",
        charts.layered([one.name], area),
        data,
        series_legend=False,
    )


def sections(series: Sequence[Series], target: float) -> list[tuple[str, str, list[Figure]]]:
    """The figures by section (anchor, heading, figures); what no run logged is left out."""

    def logged(key: str) -> bool:
        return tables.has_metric(series, key)

    curves = [accuracy_figure(series, target)] if any(_evaluated(one) for one in series) else []
    shifts = [policy_shift_figure(series)] if any(map(logged, POLICY_SHIFT)) else []
    if any(map(logged, OBJECTIVE_SHIFT)):
        shifts.append(objective_shift_figure(series))
    for kind in ("policy", "objective"):
        if logged(f"capo/batch/{kind}_shift"):
            shifts.append(batch_figure(series, kind))
    # A run whose tokens are only watched rejects none, by its nature: no line at zero for it.
    selecting = [(i, one) for i, one in enumerate(series, 1) if any(map(selects, one.runs))]
    rejection = []
    if tables.has_metric([one for _, one in selecting], REJECTION.key):
        rejection.append(signal_figure(series, REJECTION, [one.name for _, one in selecting]))
    judged = [(i, one) for i, one in selecting if len(tables.rejection_table(one))]
    rejection += [reason_figure(one, i) for i, one in judged[:MAX_REASON_FIGURES]]
    found = [
        ("curves", "Learning curves", curves),
        (
            "signals",
            "Training signals",
            [signal_figure(series, s) for s in SIGNALS if logged(s.key)],
        ),
        ("trust", "Trust region", trust_figures(series)),
        ("shifts", "Policy and objective shift", shifts),
        ("rejection", "Rejected tokens", rejection),
    ]
    return [entry for entry in found if entry[2]]


def _evaluated(one: Series) -> bool:
    return any(len(run.evals) for run in one.runs)
