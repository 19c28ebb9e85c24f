"""Learning curves with interval bands, in the style of the reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from capo.lab.report.charts import MAIN, Figure, series_encodings
from capo.lab.report.page import EXPORT_SCALE, VEGA_LITE
from capo.lab.report.style import vega_config
from capo.lab.sweep.intervals import interval
from capo.lab.sweep.reading import CellResult, Run, labels

BAND = 0.14  # opacity
MOST = 8  # series of one figure
BINS = 60

Points = list[tuple[float, float]]


def accuracy_points(run: Run) -> Points:
    """Completions and accuracy; a policy that diverged stays at 0."""
    return [(float(completions), accuracy) for completions, accuracy in run.curve]


def metric_points(key: str) -> Callable[[Run], Points]:
    """Completions and a logged metric."""

    def points(run: Run) -> Points:
        rows = [row for row in run.metrics if row.get(key) is not None]
        return [(float(row["completions"]), float(row[key])) for row in rows]

    return points


def curve_table(
    cells: Sequence[CellResult], of: Callable[[Run], Points] = accuracy_points
) -> pd.DataFrame:
    """Columns series, completions, value, low, high, n: the interval over seeds at every position.

    Runs that are over hold their last value. More than `BINS` positions are thinned evenly.
    """
    rows: list[dict[str, Any]] = []
    there = [each for each in cells if each.runs]
    for result, name in zip(there, labels([each.cell for each in there]), strict=True):
        curves = [points for points in map(of, result.runs) if points]
        places = sorted({x for curve in curves for x, _ in curve})
        if len(places) > BINS:
            last = len(places) - 1
            places = [places[round(i * last / (BINS - 1))] for i in range(BINS)]
        for x in places:
            values = [value for curve in curves if (value := _held(curve, x)) is not None]
            if values:
                band = interval(values)
                rows.append(
                    {"series": name, "completions": x, "value": band.value, "low": band.low}
                    | {"high": band.high, "n": band.n}
                )
    return pd.DataFrame(rows)


def _held(curve: Points, x: float) -> float | None:
    before = [value for place, value in curve if place <= x]
    return before[-1] if before else None


def curve_figure(
    slug: str,
    title: str,
    cells: Sequence[CellResult],
    of: Callable[[Run], Points] = accuracy_points,
    *,
    y: str = "accuracy on held-out problems",
    log: bool = False,
) -> Figure | None:
    """A line and its band for every cell; None where there is nothing to draw."""
    data = curve_table(cells, of)
    if data.empty:
        return None
    if log:  # what is 0 or not finite has no place on the axis
        data = data[(data["value"] > 0)].copy()
        data["low"] = data["low"].clip(lower=data["value"].min() / 10)
        if data.empty:
            return None
    names = list(dict.fromkeys(data["series"]))
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    axis = alt.Axis(format="~e") if log else alt.Axis()
    base = alt.Chart(alt.NamedData(name=MAIN)).encode(
        x=alt.X(
            "completions:Q", title="completions consumed", axis=alt.Axis(format=",d", tickCount=6)
        )
    )
    looks = series_encodings(names, data)
    band = base.mark_area(opacity=BAND).encode(
        y=alt.Y("low:Q", title=y, scale=scale, axis=axis), y2="high:Q", color=looks["color"]
    )
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("value:Q", title=y, scale=scale, axis=axis), **looks
    )
    caption = (
        "Lines: interquartile mean over the seeds; bands: 95 % bootstrap interval. A run that is over "
        "holds its last value."
    )
    return Figure(slug, title, caption, alt.layer(band, line), data)


def split_figures(
    slug: str,
    title: str,
    cells: Sequence[CellResult],
    of: Callable[[Run], Points] = accuracy_points,
    **look: Any,
) -> list[Figure]:
    """Figures of at most `MOST` series each."""
    parts = [cells[start : start + MOST] for start in range(0, len(cells), MOST)]
    found = []
    for index, part in enumerate(parts):
        suffix = f"-{index + 1}" if len(parts) > 1 else ""
        figure = curve_figure(f"{slug}{suffix}", title, part, of, **look)
        if figure is not None:
            found.append(figure)
    return found


def save_figures(figures: Sequence[Figure], output: Path) -> list[Figure]:
    """Write SVG, PNG and CSV of every figure that has data."""
    drawn = [figure for figure in figures if len(figure.data)]
    config = {**vega_config(dark=False), "background": "white"}
    for figure in drawn:
        figure.data.to_csv(output / f"{figure.slug}.csv", index=False)
        svg = vl_convert.vegalite_to_svg(
            figure.spec(page=False), vl_version=VEGA_LITE, config=config
        )
        (output / f"{figure.slug}.svg").write_text(svg, encoding="utf-8")
        png = vl_convert.svg_to_png(svg, scale=EXPORT_SCALE)
        (output / f"{figure.slug}.png").write_bytes(png)
    return drawn
