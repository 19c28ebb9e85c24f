"""The core benchmark's numbers as JSON, CSV and a figure of time and memory over N and V."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from capo.lab.provenance import collect_provenance

BASE_TOKENS = 1024  # N of the panel over V
CURVES = ("SGD, with the logits", "Adam top-k, given the logits")


def write(result: dict[str, Any], output: Path) -> None:
    """Write ``core.json``, ``core.csv`` and ``scaling.svg``/``.png`` into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    record = {**result, "provenance": collect_provenance()}
    (output / "core.json").write_text(json.dumps(record, indent=2) + "\n")
    tables = ("adam_given_logits", "end_to_end", "sgd", "scaling")
    rows = [{"table": t, **row} for t in tables for row in result[t]]
    pd.DataFrame(rows).to_csv(output / "core.csv", index=False)
    if result["scaling"]:
        chart = figure(pd.DataFrame(result["scaling"]))
        chart.save(str(output / "scaling.svg"))
        chart.save(str(output / "scaling.png"), scale_factor=2)


def figure(rows: pd.DataFrame) -> alt.VConcatChart:
    """Seconds and extra memory over N at fixed V, and over V at fixed N; slope 1 is linear."""
    base_vocabulary = int(rows.loc[rows.tokens != BASE_TOKENS, "vocabulary"].iloc[0])
    over_n = rows[rows.vocabulary == base_vocabulary]
    over_v = rows[rows.tokens == BASE_TOKENS]
    panels = [
        alt.hconcat(
            _panel(over_n, "tokens", f"tokens N (V = {base_vocabulary:,})", y, unit),
            _panel(over_v, "vocabulary", f"vocabulary V (N = {BASE_TOKENS:,})", y, unit),
        )
        for y, unit in (("seconds", "seconds"), ("peak_mb", "extra memory, MB"))
    ]
    return alt.vconcat(*panels).properties(
        title="Time (median) and peak extra memory of the statistics; all axes logarithmic"
    )


def _panel(rows: pd.DataFrame, x: str, title: str, y: str, unit: str) -> alt.LayerChart:
    base = alt.Chart(rows.assign(**{y: rows[y].clip(lower=0.1 if y == "peak_mb" else 0.0)})).encode(
        x=alt.X(f"{x}:Q", title=title, scale=alt.Scale(type="log", base=2)),
        y=alt.Y(f"{y}:Q", title=unit, scale=alt.Scale(type="log")),
        color=alt.Color(
            "name:N",
            title=None,
            scale=alt.Scale(domain=list(CURVES), range=["#0072B2", "#D55E00"]),
            legend=alt.Legend(orient="bottom"),
        ),
        shape=alt.Shape("name:N", title=None, scale=alt.Scale(domain=list(CURVES))),
    )
    return (base.mark_line(strokeWidth=2) + base.mark_point(filled=True, size=70)).properties(
        width=300, height=200
    )
