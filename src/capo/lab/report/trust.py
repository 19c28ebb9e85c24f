"""The figures of the monotonicity ledger: how far steps went, and whether that was foreseen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from capo.lab.report import charts
from capo.lab.report import ledger as ledgers
from capo.lab.report import series as tables
from capo.lab.report.alarms import read_alarms
from capo.lab.report.charts import POSITION_TIPS, Figure
from capo.lab.report.ledger import LEDGER
from capo.lab.report.signals import Signal, signal_figure
from capo.lab.report.summary import Series

SHIFTS = ("proposed", "predicted", "measured", "budget")
DASH = {"predicted": [1, 0], "proposed": [1, 3], "budget": [7, 4]}
NEUTRAL = "#888888"  # seen on either theme
SCALE = Signal(
    "capo/trust/scale",
    "Scale of the step",
    "share of the step",
    "Factor on the step that the optimizer proposed, so that it fits the budget; 1 is all of it.",
    zero=True,
)
MAX_SHIFT_FIGURES = 6
MAX_DRAWN = 1000  # points of a series in a scatter; more are thinned evenly


def trust_figures(series: Sequence[Series]) -> list[Figure]:
    """The figures of the series that keep a ledger; none if none does."""

    def logged(*columns: str) -> bool:
        return all(tables.has_metric(series, LEDGER[column]) for column in columns)

    if not logged("measured"):
        return []
    keeping = [one for one in series if tables.has_metric([one], LEDGER["measured"])]
    names = [one.name for one in series]
    figures = [measured_figure(keeping, names)] if len(keeping) > 1 else []
    figures += [
        shift_figure(one, names, index)
        for index, one in enumerate(keeping[:MAX_SHIFT_FIGURES], start=1)
    ]
    if logged("predicted"):
        figures.append(agreement_figure(keeping, names))
    if logged("budget"):
        figures.append(signal_figure(series, SCALE, [one.name for one in keeping]))
    if logged("promised", "observed"):
        figures.append(objective_figure(keeping, names))
    if logged("promised", "reward"):
        figures.append(reward_figure(keeping, names))
    if logged("omega", "penalty"):
        figures.append(bound_figure(keeping, names))
    return [figure for figure in figures if len(figure.data)]


def measured_figure(keeping: Sequence[Series], names: Sequence[str]) -> Figure:
    """The measured policy shift of every series, on a log axis."""
    data = tables.signal_table(keeping, LEDGER["measured"])
    floor = charts.log_floor(data, ["median"])
    base = charts.clamped(charts.source(), ["median"], floor)
    look = charts.series_encodings(names, data)
    y = charts.log_y(data, ["median"], "median_", "policy shift (nats a token)")
    line = base.mark_line(strokeWidth=1.8).encode(x=charts.x_axis(), y=y, **look)
    tips = charts.tooltips(("median", "measured", ".2e"), *POSITION_TIPS)
    layers = [line, *charts.hover_layers(look["color"], base, y, tips)]
    return Figure(
        "trust-measured",
        "Measured policy shift",
        "KL divergence between the policies before and after a step, mean over the tokens on which it "
        "was measured.",
        charts.layered(names, *layers),
        data,
    )


def shift_figure(one: Series, names: Sequence[str], index: int) -> Figure:
    """Policy shift per step of one series: proposed, predicted, measured, and the budget."""
    keys = {LEDGER[name]: name for name in SHIFTS if tables.has_metric([one], LEDGER[name])}
    wide = tables.quantile_table([one], keys)
    floor = charts.log_floor(wide, list(keys.values()))
    data = wide.melt(
        id_vars=["series", "completions", "step"],
        value_vars=list(keys.values()),
        var_name="quantity",
        value_name="nats",
    )
    data = data[data["nats"].notna()].reset_index(drop=True)
    lines = [name for name in DASH if name in set(data["quantity"])]
    color = alt.Color("series:N", scale=alt.Scale(domain=list(names)), legend=None)
    dash = alt.StrokeDash(
        "quantity:N",
        scale=alt.Scale(domain=lines, range=[DASH[name] for name in lines]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolSize=500, symbolStrokeWidth=2),
    )
    shape = alt.Shape(
        "quantity:N",
        scale=alt.Scale(domain=["measured"], range=["circle"]),
        legend=alt.Legend(title=None, symbolSize=70, symbolFillColor=NEUTRAL, symbolStrokeWidth=0),
    )
    # A step of length 0 has no place on a log axis.
    drawn = f"datum.nats > 0 ? max(datum.nats, {floor!r}) : null"
    base = charts.source().transform_calculate(as_="nats_", calculate=drawn)
    y = charts.log_y(data, ["nats"], "nats_", "policy shift (nats a token)")
    tips = [
        alt.Tooltip("quantity:N"),
        alt.Tooltip("nats:Q", title="nats a token", format=".2e"),
        *(
            alt.Tooltip(f"{name}:Q", title=title, format=form)
            for name, title, form in POSITION_TIPS
        ),
    ]
    where = {"x": _step_axis(), "y": y, "color": color}
    width = alt.condition("datum.quantity == 'predicted'", alt.value(2.2), alt.value(1.4))
    line = (
        base.transform_filter("datum.quantity != 'measured'")
        .mark_line()
        .encode(**where, strokeDash=dash, strokeWidth=width)
    )
    point = (
        base.transform_filter("datum.quantity == 'measured'")
        .mark_point(filled=True, size=38, opacity=0.9)
        .encode(**where, shape=shape, tooltip=tips)
    )
    marks, extras = _alarm_layers(one, wide, color, y)
    return Figure(
        f"trust-shift-{index}",
        f"Policy shift of a step: {one.name}",
        "Proposed: foreseen for the whole step of the optimizer. Predicted: for the part of it that was "
        "taken. Measured: KL divergence between the policies before and after. Budget: the most that "
        "a step may be. Medians over seeds. ✕: a step that an alarm blames.",
        charts.layered([one.name], line, point, *marks),
        data,
        extras,
        series_legend=False,
    )


def _step_axis() -> Any:
    """Optimizer steps: several of them may consume the same completions."""
    return alt.X(
        "step:Q",
        title="optimizer step",
        axis=alt.Axis(format=",d", tickCount=6),
        scale=alt.Scale(nice=False),
    )


def _alarm_layers(
    one: Series, wide: Any, color: Any, y: Any
) -> tuple[list[Any], dict[str, pd.DataFrame]]:
    """A cross at every step that an alarm blames, at the series' own measured shift."""
    blamed = {alarm.began for run in one.runs for alarm in read_alarms(run)}
    rows = wide[wide["step"].isin(blamed) & (wide["measured"] > 0)]
    table = rows[["series", "completions", "step", "measured"]].rename(
        columns={"measured": "nats_"}
    )
    if not len(table):
        return [], {}
    cross = charts.source("blamed").mark_point(
        shape=charts.CROSS, size=220, strokeWidth=3, opacity=1
    )
    tips = charts.tooltips(("step", "blamed by an alarm: step", ",d"))
    return [cross.encode(x=_step_axis(), y=y, color=color, tooltip=tips)], {"blamed": table}


def agreement_figure(keeping: Sequence[Series], names: Sequence[str]) -> Figure:
    """Predicted against measured policy shift, both logarithmic."""
    data = ledgers.points(keeping, "predicted", "measured")
    data = data[(data["x"] > 0) & (data["y"] > 0)].reset_index(drop=True)
    words = "; ".join(
        f"{one.name}: {_agreement_words(data[data['series'] == one.name])}" for one in keeping
    )
    return _scatter(
        "trust-agreement",
        "Predicted and measured policy shift",
        f"Each point is a step, in nats a token; above the diagonal it went further than predicted. "
        f"{words}.",
        data,
        names,
        ("predicted", "measured"),
        (_log_look(data), _log_look(data)),
    )


def _agreement_words(table: Any) -> str:
    found = ledgers.agreement(table)
    if not found.steps:
        return "no step moved the policy"
    parts = []
    if found.tried:
        parts.append(
            f"{found.tried} of {found.steps} steps had been tried at the very length that was taken, "
            "so that prediction and measurement are one"
        )
    if found.factor is not None and found.worst is not None:
        rest = "of the others " if found.tried else ""
        log = "" if found.correlation is None else f"log-log correlation {found.correlation:.2f}, "
        parts.append(
            f"{rest}{log}median |log ratio| {math.log(found.factor):.2f} (a factor of "
            f"{found.factor:.2f}), worst measured {found.worst[0]:.2f} × the prediction, at step "
            f"{found.worst[1]}"
        )
    return "; ".join(parts)


def objective_figure(keeping: Sequence[Series], names: Sequence[str]) -> Figure:
    """Predicted against observed objective shift, on the step's own batch."""
    data = ledgers.points(keeping, "promised", "observed")
    words = "; ".join(
        f"{one.name}: correlation {_number(ledgers.correlation(own))}, the same sign at "
        f"{_share(ledgers.same_sign(own))} of the steps"
        for one in keeping
        for own in [data[data["series"] == one.name]]
    )
    look = _symlog_look(data, ["x", "y"])
    tried = int(np.isclose(data["x"], data["y"], rtol=ledgers.SAME, atol=0).sum())
    same = f" At {tried} of {len(data)} steps the two are one number." if tried else ""
    return _scatter(
        "trust-objective",
        "Predicted and observed objective shift",
        "Mean over tokens of advantage · (ratio − 1) on the step's own batch, before and after the step; "
        f"signed logarithmic axes. {words}.{same}",
        data,
        names,
        ("predicted", "observed"),
        (look, look),
    )


def reward_figure(keeping: Sequence[Series], names: Sequence[str]) -> Figure:
    """What a step promised, against the change of the mean reward to the next batch."""
    data = ledgers.points(keeping, "promised", "change")
    noise = ledgers.change_noise(keeping)
    words = "; ".join(
        f"{one.name}: correlation {_number(ledgers.correlation(own))}, the same sign at "
        f"{_share(ledgers.same_sign(own))} of the steps"
        for one in keeping
        for own in [data[data["series"] == one.name]]
    )
    still = "" if noise is None else f" (its standard error without any step: {noise:.3f})"
    return _scatter(
        "trust-reward",
        "Promise of a step, and what came of the reward",
        "Change of the mean reward from the batch of a step to the next batch, of other problems and "
        f"after every step on the first{still}, against the predicted objective shift (mean over "
        f"tokens). {words}.",
        data,
        names,
        ("predicted objective shift", "change of the mean reward"),
        (
            _symlog_look(data, ["x"]),
            {"axis": alt.Axis(tickCount=5, format="~g"), "scale": alt.Scale(nice=True)},
        ),
        diagonal=False,
    )


def bound_figure(keeping: Sequence[Series], names: Sequence[str]) -> Figure:
    """ω against the penalty of Theorem 5.1, both logarithmic."""
    data = ledgers.points(keeping, "penalty", "omega")
    words = []
    for one in keeping:
        sure, steps = ledgers.certified(data[data["series"] == one.name])
        words.append(f"{one.name}: {sure} of {steps} steps ({_share(sure / max(1, steps))})")
    drawn = data[(data["x"] > 0) & (data["y"] > 0)].reset_index(drop=True)
    hidden = len(data) - len(drawn)
    left = f" {hidden} steps with ω or penalty at or below 0 are not drawn." if hidden else ""
    return _scatter(
        "trust-bound",
        "ω and the penalty C√δ",
        "Theorem 5.1: a step improves the objective by at least ω − C√δ (ω: predicted objective shift of "
        "a completion; δ: measured policy shift). Above the diagonal it certifies an improvement: "
        f"{'; '.join(words)}.{left}",
        drawn,
        names,
        ("penalty C√δ", "predicted improvement ω"),
        (_log_look(drawn), _log_look(drawn)),
    )


def _scatter(
    slug: str,
    title: str,
    caption: str,
    data: Any,
    names: Sequence[str],
    axes: tuple[str, str],
    looks: tuple[dict[str, Any], dict[str, Any]],
    *,
    diagonal: bool = True,
) -> Figure:
    look = charts.point_encodings(names, data)
    base = charts.source()
    x, y = (
        alt.X("x:Q", title=axes[0], **looks[0]),
        alt.Y("y:Q", title=axes[1], **looks[1]),
    )
    tips = charts.tooltips(("x", axes[0], ".3~g"), ("y", axes[1], ".3~g"), *POSITION_TIPS)
    points = base.mark_point(filled=True, size=42, opacity=0.75).encode(
        x=x, y=y, tooltip=tips, **look
    )
    layers, extras = [], {}
    if diagonal and len(data):
        values = data[["x", "y"]].to_numpy(dtype=float)
        ends = [float(values.min()), float(values.max())]
        extras["diagonal"] = pd.DataFrame({"x": ends, "y": ends})
        layers.append(
            alt.Chart(alt.NamedData(name="diagonal"))
            .mark_line(strokeDash=[4, 4], strokeWidth=1, color=NEUTRAL)
            .encode(x=x, y=y)
        )
    chart = charts.layered(names, *layers, points)
    return Figure(slug, title, caption, chart, _thinned(data), extras)


def _thinned(data: Any) -> Any:
    """At most `MAX_DRAWN` points of a series, evenly over its steps."""
    kept = []
    for _, own in data.groupby("series", sort=False):
        width = -(-len(own) // MAX_DRAWN)
        kept.append(own.iloc[::width])
    return pd.concat(kept, ignore_index=True) if kept else data


def _log_look(data: Any) -> dict[str, Any]:
    """Scale and axis of a logarithmic channel over all values of x and y."""
    values = data[["x", "y"]].to_numpy(dtype=float)
    if not values.size:
        return {}
    low = math.floor(math.log10(charts.log_floor(data, ["x", "y"])))
    high = max(math.ceil(math.log10(float(np.max(values)))), low + 1)
    decades = range(low, high + 1, 1 if high - low <= 6 else 2)
    return {
        "scale": alt.Scale(type="log", domain=[10.0**low, 10.0**high], clamp=True, nice=False),
        "axis": alt.Axis(format="~e", values=[10.0**k for k in decades], tickCount=20),
    }


def _symlog_look(data: Any, columns: list[str]) -> dict[str, Any]:
    """Scale and axis of a signed logarithmic channel, with room around the outermost points."""
    values = data[columns].to_numpy(dtype=float)
    look = charts.symlog_look(values)
    if values.size:
        constant = look["scale"].constant
        low, high = float(values.min()), float(values.max())
        room = [low - 0.3 * abs(low) - constant / 4, high + 0.3 * abs(high) + constant / 4]
        look["scale"] = alt.Scale(type="symlog", constant=constant, domain=room, nice=False)
    return look


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"
