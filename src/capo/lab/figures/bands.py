"""Dot plots with a band for every row and a colour for every series within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from capo.lab.report.charts import MAIN, Figure, point_encodings

MOST_ROWS = 18  # of one figure: more are too small to be read


def final_accuracy_bands(
    slug: str,
    title: str,
    data: pd.DataFrame,
    base: pd.DataFrame,
    series: Sequence[str],
    *,
    row: str,
    height: int,
) -> Figure:
    """Final accuracies side by side.

    Args:
        slug, title: of the figure.
        data: the column ``row``, ``series``, and the interval as ``value``, ``low``, ``high``.
        base: the column ``row`` and ``value``, the base policy's accuracy; its order is that of the rows.
        series: in the order of the legend.
        row: name of the column that says which row.
        height: of a band, CSS pixels.
    """
    order = list(base[row])
    assert len(order) <= MOST_ROWS, "one figure holds no more"
    between = alt.Axis(labelLimit=320, labelOverlap=False, grid=True, tickBand="extent")
    y = alt.Y(f"{row}:N", title=None, sort=order, axis=between)
    axis = alt.Axis(tickCount=10)
    x: dict[str, Any] = {"title": "final accuracy", "scale": alt.Scale(domain=[0, 1]), "axis": axis}
    looks = point_encodings(series, data)
    start = alt.Chart(alt.NamedData(name=MAIN)).encode(
        y=y, yOffset=alt.YOffset("series:N", sort=list(series)), color=looks["color"]
    )
    rule = start.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", **x), x2="high:Q")
    point = start.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("value:Q", **x), shape=looks["shape"]
    )
    bases = (
        alt.Chart(alt.NamedData(name="base"))
        .mark_tick(thickness=1.5, size=0.75 * height, color="#59636E", opacity=0.8)
        .encode(y=y, x=alt.X("value:Q", **x))
    )
    return Figure(
        slug,
        title,
        "Points: interquartile mean over the seeds; lines: 95 % bootstrap interval; grey: base policy.",
        alt.layer(bases, rule, point),
        data,
        {"base": base},
        export_height=len(order) * height,
    )
