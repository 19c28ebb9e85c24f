"""Figures of one logged number each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from capo.lab.report import charts
from capo.lab.report import series as tables
from capo.lab.report.charts import POSITION_TIPS, Figure
from capo.lab.report.summary import Series


@dataclass(frozen=True)
class Signal:
    """A logged number worth a figure of its own."""

    key: str
    title: str
    unit: str
    caption: str
    axis_format: str = "~g"
    zero: bool = False


SIGNALS = (
    Signal("reward", "Training reward", "mean reward", "Mean reward of a step's completions."),
    Signal("entropy", "Entropy", "nats a token", "Of the policy, mean over completion tokens."),
    Signal(
        "grad_norm",
        "Gradient norm",
        "norm",
        "Norm of the whole gradient of a step, before it is clipped.",
        zero=True,
    ),
    Signal("kl", "KL to the reference policy", "nats a token", "As the trainer estimates it."),
    Signal(
        "completions/mean_length", "Completion length", "tokens", "Mean over a step's completions."
    ),
    Signal("learning_rate", "Learning rate", "learning rate", "As scheduled.", "~e", zero=True),
)
REJECTION = Signal(
    "capo/rejection_rate",
    "Rejected tokens",
    "share of tokens",
    "Share of a step's completion tokens that selection left out of the loss.",
    "~%",
    zero=True,
)


def signal_figure(
    series: Sequence[Series], signal: Signal, only: Sequence[str] | None = None
) -> Figure:
    """One logged number: median line, range over seeds (or over the steps of a bin) as a band.

    ``only`` names the series to draw; the others keep their colours for the next figure.
    """
    names = [one.name for one in series]
    drawn = [one for one in series if only is None or one.name in only]
    data = tables.signal_table(drawn, signal.key)
    base, look = charts.source(), charts.series_encodings(names, data)
    scale = alt.Scale(zero=signal.zero)
    axis = alt.Axis(tickCount=5, format=signal.axis_format, labelExpr=charts.ZERO)
    y = alt.Y("median:Q", title=signal.unit, scale=scale, axis=axis)
    layers = []
    if (data["values"] > 1).any():
        layers.append(
            base.mark_area(opacity=0.18).encode(
                x=charts.x_axis(),
                y=alt.Y("low:Q", title=signal.unit, scale=scale),
                y2="high:Q",
                color=look["color"],
            )
        )
    layers.append(base.mark_line(strokeWidth=1.8).encode(x=charts.x_axis(), y=y, **look))
    tips = charts.tooltips(("median", signal.title.lower(), ".4~g"), *POSITION_TIPS)
    layers += charts.hover_layers(look["color"], base, y, tips)
    slug = signal.key.removeprefix("capo/").replace("/", "-").replace("_", "-")
    return Figure(slug, signal.title, signal.caption, charts.layered(names, *layers), data)
