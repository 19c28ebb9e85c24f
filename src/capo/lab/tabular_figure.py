"""The figure of ``docs/theorem.md``, drawn from the study's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

WIDTH, HEIGHT = 300, 240
DECADES = [10.0**power for power in range(-5, 5)]


def save_figure(
    rows: list[dict[str, Any]],
    vacuous: list[dict[str, Any]],
    penalties: list[dict[str, Any]],
    output: Path,
) -> list[Path]:
    """Write ``theorem.svg`` and ``theorem.png``.

    Args:
        rows: ``rows_by_step`` of every setting.
        vacuous: ``vacuous_horizons()``; its δ are the third panel's lines.
        penalties: rows with ``horizon``, ``mean_kl`` and ``penalty`` for the third panel.
        output: an existing directory.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["setting"] != "T=1"]  # one decision: C = 0, nothing to draw
    figure = alt.hconcat(
        alt.hconcat(_tightness(frame), _violations(frame)),
        _horizons(pd.DataFrame(penalties), vacuous),
    ).resolve_scale(color="independent")
    figure = figure.configure_axis(labelFontSize=11, titleFontSize=12).configure_title(
        fontSize=13, anchor="start"
    )
    paths = [output / "theorem.svg", output / "theorem.png"]
    figure.save(str(paths[0]))
    figure.save(str(paths[1]), ppi=110)
    return paths


def _setting_color(frame: pd.DataFrame) -> alt.Color:
    """The same colour for a setting in every panel, in the order of the study."""
    order = list(frame["setting"].unique())
    return alt.Color("setting:N", title=None, sort=order).scale(domain=order, scheme="tableau10")


def _tightness(frame: pd.DataFrame) -> alt.LayerChart:
    """Exact quantities: the largest share of the theorem's penalty that any instance needs."""
    data = frame.groupby(["setting", "logit_range"], as_index=False)["tightness"].max()
    lines = (
        alt.Chart(data, title="Exact ω and KL: share of C√δ that is needed")
        .mark_line(point={"size": 12})
        .encode(
            x=alt.X("logit_range:Q", title="logit range R of the step")
            .scale(type="log", domain=[0.01, 100])
            .axis(values=[0.01, 0.1, 1, 10, 100]),
            y=alt.Y("tightness:Q", title="largest (ω − ΔJ) / (C√δ)")
            .scale(type="log", domain=[1e-5, 2])
            .axis(values=DECADES, format="~g"),
            color=_setting_color(frame),
        )
    )
    limit = alt.Chart(pd.DataFrame({"y": [1.0]})).mark_rule(strokeDash=[4, 3]).encode(y="y:Q")
    return (lines + limit).properties(width=WIDTH, height=HEIGHT)


def _violations(frame: pd.DataFrame) -> alt.Chart:
    """Quadratic quantities: how often the claim is false."""
    data = frame.groupby(["setting", "logit_range"], as_index=False)[
        ["violations_quadratic", "instances"]
    ].sum()
    data["share"] = data["violations_quadratic"] / data["instances"]
    return (
        alt.Chart(data, title="Quadratic ω and KL: violations")
        .mark_line(point={"size": 12})
        .encode(
            x=alt.X("logit_range:Q", title="logit range R of the step")
            .scale(type="log", domain=[0.01, 100])
            .axis(values=[0.01, 0.1, 1, 10, 100]),
            y=alt.Y("share:Q", title="share of instances").axis(format="%"),
            color=_setting_color(frame),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )


def _horizons(data: pd.DataFrame, vacuous: list[dict[str, Any]]) -> alt.LayerChart:
    """The penalty against the length of a completion; above 1 nothing is said."""
    order = [f"{row['mean_kl']:g}" for row in vacuous]
    data = data[data["penalty"] <= 1e4]
    data = data.assign(kl=[f"{value:g}" for value in data["mean_kl"]])
    lines = (
        alt.Chart(data, title="Penalty at γ = 1, reward in [0, 1]")
        .mark_line()
        .encode(
            x=alt.X("horizon:Q", title="completion length T (tokens)")
            .scale(type="log", domain=[2, 4096], nice=False)
            .axis(values=[2, 8, 32, 128, 512, 2048], format="~g"),
            y=alt.Y("penalty:Q", title="penalty (reward)")
            .scale(type="log", domain=[1e-3, 1e4])
            .axis(values=DECADES, format="~g"),
            color=alt.Color("kl:N", title="δ (nats/token)", sort=order),
            strokeDash=alt.StrokeDash(
                "bound:N", title=None, sort=["Theorem 5.1", "trajectory (3)", "damage (8)"]
            ),
        )
    )
    limit = alt.Chart(pd.DataFrame({"y": [1.0]})).mark_rule(color="black").encode(y="y:Q")
    return (lines + limit).properties(width=WIDTH, height=HEIGHT)
