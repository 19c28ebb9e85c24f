"""Colours, dashes and shapes of the series, and the Vega configuration of both themes.

The hues are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), lightened for the dark
theme. No series is told by colour alone: each has its own dash and point shape as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LIGHT_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07C00", "#3FA7DB", "#4D4D4D")
DARK_SERIES = ("#56A9E8", "#FF8A4C", "#2FC79A", "#E79CC8", "#F0C04A", "#A5DBF7", "#C4C4C4")
# Six dashes and seven hues: the pairs repeat only after 42 series.
DASHES = ([1, 0], [7, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 2, 1, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
# Reasons are told by lightness (one hue), so that they never look like a series.
REASON_COLORS = ("#4B3B8F", "#8E7CC9", "#CFC5EE", "#6E6A7C", "#B9B6C2")
FONT = 'Inter, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif'


@dataclass(frozen=True)
class Swatch:
    """How one series is drawn, for the HTML legend."""

    name: str
    index: int
    dash: str
    shape: str


def swatches(names: list[str]) -> list[Swatch]:
    """The legend entries, in the order of the series."""
    return [
        Swatch(
            name,
            index % len(LIGHT_SERIES),
            " ".join(map(str, DASHES[index % len(DASHES)])) if index % len(DASHES) else "none",
            SHAPES[index % len(SHAPES)],
        )
        for index, name in enumerate(names)
    ]


def vega_config(dark: bool) -> dict[str, Any]:
    """The Vega-Lite configuration of a theme; figures themselves hold no colour of a series."""
    ink, soft, line = (
        ("#E8EAED", "#A3ABB5", "#2C333B") if dark else ("#1B1F24", "#59636E", "#E4E7EB")
    )
    return {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": soft,
            "titleColor": soft,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "gridColor": line,
            "domain": False,
            "tickColor": line,
            "labelOverlap": True,
        },
        "axisX": {"grid": False, "domain": True, "domainColor": soft, "tickColor": soft},
        "legend": {
            "labelColor": ink,
            "titleColor": soft,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "orient": "top",
            "symbolStrokeWidth": 2,
            "symbolSize": 90,
            "labelLimit": 320,
        },
        "title": {"color": ink, "fontSize": 15, "fontWeight": 600, "anchor": "start", "offset": 12},
        "range": {
            "category": list(DARK_SERIES if dark else LIGHT_SERIES),
            "symbol": list(SHAPES),
        },
        "text": {"color": soft, "fontSize": 12},
        "rule": {"color": soft},
        # Behind a label that crosses lines.
        "style": {"halo": {"stroke": "#191E24" if dark else "#FFFFFF", "strokeWidth": 4}},
    }
