"""What ``capo bench warning`` found: tables, README and figure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from capo.core.early_warning import FROZEN, WarningConstants
from capo.lab.report.page import EXPORT_SCALE, VEGA_LITE
from capo.lab.report.style import vega_config
from capo.lab.warning.freeze import SAFETY, candidates, largest_sum, lead
from capo.lab.warning.watched import Watched

AIM = 5  # optimizer steps ahead
PLANTED = "GRPO, lr 1e-3"  # the preset small-aggressive as it is
CALM = ("GRPO, lr 1e-4", "CAPO, lr 1e-2")
SHOWN = 10  # candidates


def judged(runs: Sequence[Watched]) -> dict[str, Any]:
    """Goals, groups and leads of the judged runs."""
    fallen = [run for run in runs if run.halved is not None]
    stable = [run for run in runs if run.halved is None]
    leads = [lead(run, FROZEN) for run in fallen]
    calm = [run for run in stable if run.group in CALM]
    edge = [run for run in stable if run.group not in CALM]
    planted = [lead(run, FROZEN) for run in fallen if run.group == PLANTED]
    everything = f"{sum(one > 0 for one in leads)} of {len(leads)}"
    goals = [
        _goal(
            "the planted collapse is warned of before its accuracy has halved",
            f"{sum(one > 0 for one in planted)} of {len(planted)}",
            bool(planted) and min(planted) > 0,
        ),
        _goal(
            f"and at least {AIM} steps ahead",
            f"{sum(one >= AIM for one in planted)} of {len(planted)}",
            bool(planted) and min(planted) >= AIM,
        ),
        _goal(
            "every collapse of any group is warned of before that",
            everything,
            bool(leads) and min(leads) > 0,
        ),
        _goal(
            "no false alarm over ten stable runs",
            f"{_alarms(calm)} of {len(calm)}",
            len(calm) >= 10 and not _alarms(calm),
        ),
        _goal(
            "nor in the other runs that did not halve, near the edge",
            f"{_alarms(edge)} of {len(edge)}",
            bool(edge) and not _alarms(edge),
        ),
    ]
    return {
        "constants": dataclasses.asdict(FROZEN),
        "goals": goals,
        "groups": [_group(name, runs) for name in dict.fromkeys(run.group for run in runs)],
        "leads": [
            {
                "group": run.group,
                "seed": run.seed,
                "warned": run.warned(FROZEN),
                "halved": run.halved,
                "lead": _finite(lead(run, FROZEN)),
                "peak accuracy": run.peak,
            }
            for run in fallen
        ],
    }


def _group(
    name: str, runs: Sequence[Watched], constants: WarningConstants = FROZEN
) -> dict[str, Any]:
    own = [run for run in runs if run.group == name]
    fallen = [run for run in own if run.halved is not None]
    stable = [run for run in own if run.halved is None]
    leads = [lead(run, constants) for run in fallen]
    worst = max((largest_sum(run, constants) for run in stable), default=None)
    return {
        "group": name,
        "runs": len(own),
        "halved": len(fallen),
        "warned in time": sum(one > 0 for one in leads),
        "lead, median": _finite(statistics.median(leads)) if leads else None,
        "lead, smallest": _finite(min(leads)) if leads else None,
        "lead, largest": _finite(max(leads)) if leads else None,
        "stable": len(stable),
        "false alarms": sum(run.warned(constants) is not None for run in stable),
        "largest score of a stable run": None if worst is None else worst / constants.threshold,
        "final accuracy, median": statistics.median(run.accuracy[-1][1] for run in own),
    }


def freezing(runs: Sequence[Watched]) -> dict[str, Any]:
    """The best candidates, and what the freezing runs were."""
    ranked = candidates(runs)
    return {
        "frozen": dataclasses.asdict(ranked[0].constants),
        "safety": SAFETY,
        "candidates": [
            {
                **dataclasses.asdict(one.constants),
                "safety": _finite(one.safety),
                "median lead": _finite(one.median_lead),
                "smallest lead": _finite(one.smallest_lead),
            }
            for one in ranked[:SHOWN]
        ],
        "groups": [
            _group(name, runs, ranked[0].constants)
            for name in dict.fromkeys(run.group for run in runs)
        ],
    }


def _alarms(runs: Sequence[Watched]) -> int:
    return sum(run.warned(FROZEN) is not None for run in runs)


def _goal(name: str, value: str, reached: bool) -> dict[str, Any]:
    return {"goal": name, "value": value, "reached": reached}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "never"


def lines(document: dict[str, Any]) -> list[str]:
    """The record's findings for a terminal."""
    found = [f"{goal['goal']}: {goal['value']}" for goal in document.get("goals", [])]
    if "frozen" in document:
        found.append(f"constants: {document['frozen']}")
    for row in document["groups"]:
        halved = f"{row['halved']} of {row['runs']} halved"
        span = f"lead {row['lead, median']} [{row['lead, smallest']}, {row['lead, largest']}]"
        quiet = f"{row['false alarms']} of {row['stable']} stable runs warned of"
        found.append(f"  {row['group']:<36} {halved}, {span}; {quiet}")
    return found


def write_readme(output: Path) -> None:
    """The directory's first page; its tables are made of the JSON files."""
    from capo.lab.warning.command import JUDGED, read

    document = read(output / JUDGED)
    goals = "\n".join(
        f"- {goal['goal']}: {'reached' if goal['reached'] else 'not reached'} ({goal['value']})."
        for goal in document.get("goals", [])
    )
    drawn = (output / "warning.png").is_file()
    figure = "\n![Leads and scores](warning.png)\n" if drawn else ""
    (output / "README.md").write_text(
        "# Early warning of collapse\n\n"
        "Commands: `capo bench warning --freeze` chose the constants (`freezing.json`: other seeds, another "
        "range of terms, other learning rates, batches and passes), `capo bench warning` judged them "
        "(`judged.json`). *Halved*: the first evaluation (256 held-out problems) below half of the best so "
        "far; *lead*: optimizer steps from the first warning to that; *false alarm*: a warning in a run that "
        "never halves. What is warned of and how: docs/monitor.md.\n\n"
        f"{goals}\n{figure}",
        encoding="utf-8",
    )


def save_figure(runs: Sequence[Watched], output: Path) -> None:
    """``warning.svg``, ``.png`` and ``.csv``: from warning to halving, and how near stable runs came."""
    rows = [
        {
            "group": run.group,
            "seed": run.seed,
            "run": f"{run.group}, seed {run.seed}",
            "warned": run.warned(FROZEN),
            "halved": run.halved,
            "score": largest_sum(run, FROZEN) / FROZEN.threshold,
        }
        for run in runs
    ]
    data = pd.DataFrame(rows).sort_values(["group", "seed"], kind="stable")
    data.to_csv(output / "warning.csv", index=False)
    spec = alt.hconcat(_leads(data), _scores(data), spacing=40).to_dict()
    spec.pop("config", None)
    spec["padding"] = 16
    config = {**vega_config(dark=False), "background": "white"}
    svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, config=config)
    (output / "warning.svg").write_text(svg, encoding="utf-8")
    (output / "warning.png").write_bytes(vl_convert.svg_to_png(svg, scale=EXPORT_SCALE))


def _leads(data: pd.DataFrame) -> alt.LayerChart:
    fallen = data[data["halved"].notna()]
    y = alt.Y("run:N", title=None, sort=list(fallen["run"])).axis(labelLimit=260)
    x_title = "optimizer step"
    base = alt.Chart(fallen)
    line = base.mark_rule(strokeWidth=2).encode(
        y=y, x=alt.X("warned:Q", title=x_title), x2="halved:Q"
    )
    marks = fallen.melt(["run"], ["warned", "halved"], "event", "step").dropna()
    names = {"warned": "first warning", "halved": "accuracy halved"}
    marks = marks.assign(event=marks["event"].map(names))
    domain = list(names.values())
    points = (
        alt.Chart(marks)
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            y=y,
            x=alt.X("step:Q", title=x_title),
            color=alt.Color("event:N", title=None).scale(domain=domain),
            shape=alt.Shape("event:N", title=None).scale(domain=domain),
        )
    )
    return (line + points).properties(
        title="Collapses: from the warning to half the accuracy", width=360, height={"step": 18}
    )


def _scores(data: pd.DataFrame) -> alt.LayerChart:
    stable = data[data["halved"].isna()]
    y = alt.Y("run:N", title=None, sort=list(stable["run"])).axis(labelLimit=260)
    points = (
        alt.Chart(stable)
        .mark_point(filled=True, size=70, opacity=1)
        .encode(y=y, x=alt.X("score:Q", title="largest score (1: a warning)"))
    )
    limit = alt.Chart(pd.DataFrame({"x": [1.0]})).mark_rule(strokeDash=[4, 3]).encode(x="x:Q")
    return (points + limit).properties(
        title="Stable runs: how near a warning came", width=260, height={"step": 18}
    )
