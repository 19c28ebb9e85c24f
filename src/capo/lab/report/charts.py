"""The drawing blocks shared by all figures: series encodings, bands, fans, rules, scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from capo.lab.report.style import DASHES

WIDTH, HEIGHT = 760, 300  # of an exported figure, in CSS pixels; the page fits the width itself
MAIN = "data"  # the dataset of a figure that its CSV holds
ZERO = "datum.value == 0 ? '0' : datum.label"  # instead of 0e+0
OUTER_BANDS, INNER_BANDS = 3, 5  # with more series than this, bands would hide each other
CROSS = "M-1,-1L1,1M1,-1L-1,1"
# Eight decades below the largest value, a shift is zero to the eye and to any threshold.
LOG_DECADES = 8


@dataclass(frozen=True)
class Figure:
    """One figure: a Vega-Lite chart over named datasets, its words, and the data of its CSV.

    Attributes:
        slug: file name and anchor.
        title, caption: plain text (escaped by the page).
        chart: refers to its datasets by name, holds no data.
        data: the dataset named `MAIN`, and the CSV.
        extras: further datasets (rules, marks).
        series_legend: False for a figure whose legend does not list the series.
        wide: spans the whole page.
        height, export_height: of the plot on the page and in an exported file, CSS pixels.
    """

    slug: str
    title: str
    caption: str
    chart: Any
    data: pd.DataFrame
    extras: dict[str, pd.DataFrame] = field(default_factory=dict)
    series_legend: bool = True
    wide: bool = False
    height: int = 240
    export_height: int = HEIGHT

    def spec(self, *, page: bool) -> dict[str, Any]:
        """The Vega-Lite specification with its data, for the page or for an exported file."""
        spec: dict[str, Any] = self.chart.to_dict()
        # The schema's address is the only URL in a specification, and nothing reads it here.
        spec.pop("$schema", None)
        spec.pop("config", None)
        tables = {MAIN: self.data, **self.extras}
        if page:
            spec.update(width="container", height=self.height + 80 * self.wide)
            spec["autosize"] = {"type": "fit-x", "contains": "padding"}
            if self.series_legend:  # the page's own legend serves all figures at once
                _drop_legends(spec)
        else:
            spec.update(width=WIDTH, height=self.export_height, title=self.title, padding=16)
        spec["datasets"] = {name: records(table) for name, table in tables.items()}
        spec["description"] = f"{self.title}. {self.caption}"
        return spec


def _drop_legends(node: Any) -> None:
    if isinstance(node, dict):
        if "legend" in node:
            node["legend"] = None
        for child in node.values():
            _drop_legends(child)
    elif isinstance(node, list):
        for child in node:
            _drop_legends(child)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON-ready dicts; six digits, and null for what is not finite."""
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict(orient="records")]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")
    return value


def x_axis() -> Any:
    """Completions consumed: the only honest abscissa between batch sizes."""
    return alt.X(
        "completions:Q",
        title="completions consumed",
        axis=alt.Axis(format=",d", tickCount=6),
        scale=alt.Scale(nice=False),
    )


def series_encodings(names: Sequence[str], data: pd.DataFrame) -> dict[str, Any]:
    """Colour and dash of a series, one merged legend of the series that ``data`` holds."""
    legend = _legend(names, data, symbolType="stroke", symbolSize=500, symbolStrokeWidth=2.5)
    dashes = [DASHES[index % len(DASHES)] for index in range(len(names))]
    domain = list(names)
    return {
        "color": alt.Color("series:N", scale=alt.Scale(domain=domain), legend=legend),
        "strokeDash": alt.StrokeDash(
            "series:N", scale=alt.Scale(domain=domain, range=dashes), legend=legend
        ),
    }


def point_encodings(names: Sequence[str], data: pd.DataFrame) -> dict[str, Any]:
    """Colour and point shape of a series, one merged legend: for figures whose lines have points."""
    legend, domain = _legend(names, data, symbolSize=110, symbolStrokeWidth=0), list(names)
    return {
        "color": alt.Color("series:N", scale=alt.Scale(domain=domain), legend=legend),
        "shape": alt.Shape("series:N", scale=alt.Scale(domain=domain), legend=legend),
    }


def _legend(names: Sequence[str], data: pd.DataFrame, **look: Any) -> Any:
    drawn = set(data["series"])
    values = [name for name in names if name in drawn]
    return alt.Legend(title=None, columns=3, values=values, symbolOpacity=1, **look)


def source(name: str = MAIN) -> Any:
    """A chart over a named dataset that shows only the series switched on in the page."""
    return alt.Chart(alt.NamedData(name=name)).transform_filter("indexof(shown, datum.series) >= 0")


def layered(names: Sequence[str], *layers: Any) -> Any:
    """Layers with the page's switch ``shown``, a list of series names."""
    return alt.layer(*layers).add_params(alt.param(name="shown", value=list(names)))


def hover_layers(color: Any, base: Any, y: Any, tooltip: list[Any]) -> list[Any]:
    """A point that appears, with its tooltip, on the value nearest to the pointer."""
    nearest = alt.selection_point(
        name="nearest",
        nearest=True,
        on="pointerover",
        clear="pointerout",
        fields=["series", "completions"],
        empty=False,
    )
    points = base.mark_point(filled=True, size=70).encode(
        x=x_axis(),
        y=y,
        color=color,
        opacity=alt.condition(nearest, alt.value(1.0), alt.value(0.0)),
        tooltip=tooltip,
    )
    return [points.add_params(nearest)]


def rule_layers(name: str, value: str = "value") -> list[Any]:
    """Dashed horizontal lines with their labels at the right end, from the dataset ``name``."""
    base = alt.Chart(alt.NamedData(name=name))
    rule = base.mark_rule(strokeDash=[4, 4], strokeWidth=1).encode(y=f"{value}:Q")
    place = {"align": "right", "baseline": "bottom", "dx": -2, "dy": -4, "fontSize": 11}
    words = {"x": alt.value("width"), "y": f"{value}:Q", "text": "label:N"}
    halo = base.mark_text(**place, style="halo").encode(**words)
    return [rule, halo, base.mark_text(**place).encode(**words)]


def tooltips(*fields: tuple[str, str, str]) -> list[Any]:
    """Tooltip rows (field, title, format); the series comes first."""
    rows = [alt.Tooltip("series:N", title="series")]
    rows += [alt.Tooltip(f"{name}:Q", title=title, format=form) for name, title, form in fields]
    return rows


POSITION_TIPS = (("completions", "completions", ",d"), ("step", "step", ",d"))


def log_floor(table: pd.DataFrame, columns: Sequence[str]) -> float:
    """The smallest value worth drawing on a log axis; below it values are drawn at it."""
    values = table[list(columns)].to_numpy(dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 1e-12
    lowest = max(float(positive.min()), float(positive.max()) * 10.0**-LOG_DECADES)
    return float(10.0 ** math.floor(math.log10(lowest)))


def clamped(base: Any, columns: Sequence[str], floor: float) -> Any:
    """``base`` with a drawn twin ``NAME_`` of each column, never below the floor.

    Where the last column, the largest, is zero there was no step at all: nothing is drawn.
    """
    largest = f"datum['{columns[-1]}']"
    for column in columns:
        drawn = f"{largest} > 0 ? max(datum['{column}'], {floor!r}) : null"
        base = base.transform_calculate(as_=f"{column}_", calculate=drawn)
    return base


def log_y(table: pd.DataFrame, columns: Sequence[str], column: str, title: str) -> Any:
    """A logarithmic axis; powers of ten alone are marked once there are three of them."""
    top = float(np.nanmax(table[list(columns)].to_numpy(dtype=float)))
    low = round(math.log10(log_floor(table, columns)))
    high = math.ceil(math.log10(top)) if top > 0 else low + 1
    decades = range(low, high + 1, 1 if high - low <= 6 else 2)
    ticks = {"values": [10.0**k for k in decades], "tickCount": 20} if len(decades) > 2 else {}
    axis = alt.Axis(format="~e", **ticks)
    return alt.Y(f"{column}:Q", title=title, scale=alt.Scale(type="log", nice=True), axis=axis)


def symlog_y(table: pd.DataFrame, columns: Sequence[str], column: str, title: str) -> Any:
    """A signed logarithmic axis: linear within ± its constant, powers of ten outside."""
    look = symlog_look(table[list(columns)].to_numpy(dtype=float))
    return alt.Y(f"{column}:Q", title=title, **look)


def symlog_look(values: Any) -> dict[str, Any]:
    """Scale and axis of `symlog_y`, for any channel."""
    values = np.abs(values)
    values = values[np.isfinite(values) & (values > 0)]
    top = math.ceil(math.log10(values.max())) if values.size else 0
    low = math.floor(math.log10(np.quantile(values, 0.1))) if values.size else -3
    low = min(max(low, top - 5), top - 1)
    # Not the first decade: it is half linear, and its label would touch that of zero.
    decades = (
        range(top - (top - low - 1) // 2 * 2, top + 1, 2)
        if top - low > 3
        else range(low + 1, top + 1)
    )
    ticks = [-(10.0**k) for k in reversed(decades)] + [0.0] + [10.0**k for k in decades]
    # Vega halves `values` that outnumber its tick count.
    count = len(ticks) + 1
    axis = alt.Axis(values=ticks, tickCount=count, format="~e", labelExpr=ZERO, labelOverlap=False)
    return {"axis": axis, "scale": alt.Scale(type="symlog", constant=10.0**low, nice=False)}
