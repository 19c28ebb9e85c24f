"""The rows of the report's tables: measured numbers as text, settings, provenance."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from capo.lab.report.reading import Run, lookup
from capo.lab.report.summary import Estimate, Series, Summary, flatten, middle

DASH = "—"


@dataclass(frozen=True)
class Cell:
    """A number as text, and what belongs to it in smaller print."""

    text: str = DASH
    aside: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the summary table; ``kind`` is single, series (of several seeds) or seed."""

    kind: str
    index: int
    name: str
    algorithm: str
    learning_rate: str
    batch: str
    base: Cell
    best: Cell
    final: Cell
    to_target: Cell
    collapsed: str
    fell: bool
    rejection: Cell
    within: Cell
    completions: Cell
    wall: Cell
    state: str


def summary_rows(series: Sequence[Series]) -> list[Row]:
    """A row a run; runs that differ only in the seed are gathered under a row of their own."""
    rows = []
    for index, one in enumerate(series):
        if len(one.summaries) > 1:
            rows.append(_series_row(one, index))
        kind = "seed" if len(one.summaries) > 1 else "single"
        for summary in one.summaries:
            seed = f"seed {summary.run.setting('run.seed', '?')} · {summary.run.name}"
            rows.append(_run_row(summary, kind, index, seed if kind == "seed" else one.name))
    return rows


def _run_row(summary: Summary, kind: str, index: int, name: str) -> Row:
    at = summary.collapsed_at
    verdict = f"at {at.completions:,.0f}" if at else "no"
    return Row(
        kind=kind,
        index=index,
        name=name,
        algorithm=summary.algorithm,
        learning_rate=_number(summary.learning_rate),
        batch=_number(summary.completions_per_step),
        base=_estimate(summary.base),
        best=_estimate(summary.best),
        final=_estimate(summary.final),
        to_target=Cell(_completions(summary.completions_to_target)),
        collapsed=DASH if summary.collapsed is None else verdict,
        fell=bool(summary.collapsed),
        rejection=_rejection([summary]),
        within=_within([summary]),
        completions=Cell(f"{summary.completions:,.0f}"),
        wall=Cell(duration(summary.seconds)),
        state=summary.run.state or "unknown",
    )


def _series_row(one: Series, index: int) -> Row:
    members = one.summaries
    judged = [s for s in members if s.collapsed is not None]
    fallen = sum(bool(s.collapsed) for s in judged)
    targets = [
        math.inf if s.completions_to_target is None else s.completions_to_target for s in members
    ]
    reached = sum(map(math.isfinite, targets))
    return Row(
        kind="series",
        index=index,
        name=one.name,
        algorithm=members[0].algorithm,
        learning_rate=_number(members[0].learning_rate),
        batch=_number(members[0].completions_per_step),
        base=_spread([s.base for s in members]),
        best=_spread([s.best for s in members]),
        final=_spread([s.final for s in members]),
        to_target=Cell(_completions(middle(targets)[0]), f"{reached} of {len(targets)}"),
        collapsed=f"{fallen} of {len(judged)}" if judged else DASH,
        fell=fallen > 0,
        rejection=_rejection(members),
        within=_within(members),
        completions=Cell(f"{sum(s.completions for s in members):,.0f}", "in all"),
        wall=Cell(duration(sum(s.seconds or 0.0 for s in members) or None), "in all"),
        state="",
    )


def _estimate(value: Estimate | None) -> Cell:
    if value is None:
        return Cell()
    error = f"± {value.stderr:.3f}" if math.isfinite(value.stderr) else ""
    return Cell(f"{value.accuracy:.3f}", error)


def _spread(values: Sequence[Estimate | None]) -> Cell:
    known = [value.accuracy for value in values if value]
    if not known:
        return Cell()
    mid, low, high = middle(known)
    return Cell(f"{mid:.3f}", f"{low:.3f} – {high:.3f}")


def _completions(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None and math.isfinite(value) else "not reached"


def _number(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value and abs(value) < 1e-3:
            mantissa, exponent = f"{value:e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:g}"
    return DASH if value is None else str(value)


def _rejection(members: Sequence[Summary]) -> Cell:
    means = [s.rejection_mean for s in members if s.rejection_mean is not None]
    peaks = [s.rejection_peak for s in members if s.rejection_peak is not None]
    if not means:
        return Cell()
    return Cell(f"{sum(means) / len(means):.1%}", f"peak {max(peaks):.1%}")


def _within(members: Sequence[Summary]) -> Cell:
    found = [summary.within for summary in members if summary.within is not None]
    if not found:
        return Cell()
    met, steps = sum(one.met for one in found), sum(one.steps for one in found)
    budget = median(one.budget for one in found)
    return Cell(f"{met / steps:.1%}", f"δ {budget:.1e}")


def duration(seconds: float | None) -> str:
    """Wall time in the two largest units that say something."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def config_difference(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Dotted config keys in which the runs differ, with each run's value."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = []
    for key in keys:
        values = [_json(one[key]) if key in one else DASH for one in flat]
        # A subtree that one run sets to null shows up as its leaves in the others: both are kept.
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pretty(value: Any) -> str:
    """Indented JSON of a config."""
    return json.dumps(value, indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Provenance:
    """Where a run came from, as text."""

    name: str
    directory: str
    commit: str
    dirty: bool
    started: str
    hardware: str
    python: str
    packages: list[tuple[str, str]]
    command: str


def provenance_row(run: Run) -> Provenance:
    """The provenance of a run; a dash where it was not written."""
    source = run.provenance
    command = source.get("command") or []
    words = [str(word) for word in command] if isinstance(command, list) else [str(command)]
    packages = source.get("packages")
    listed = packages.items() if isinstance(packages, dict) else ()
    version = source.get("capo_version")
    return Provenance(
        name=run.name,
        directory=run.path.resolve().name,
        commit=str(source.get("git_commit") or DASH),
        dirty=bool(source.get("git_dirty")),
        started=str(source.get("started") or DASH).replace("T", " ", 1),
        hardware=_hardware(source),
        python=str(source.get("python") or DASH),
        packages=[("capo-rl", str(version))] * (version is not None)
        + [(str(name), str(value)) for name, value in listed],
        command=shlex.join(words) or DASH,
    )


def _hardware(source: dict[str, Any]) -> str:
    parts: list[tuple[str, Callable[[Any], str]]] = [
        ("cpu", str),
        ("cores", lambda v: f"{v} core{'s' * (v != 1)}"),
        ("memory_gb", lambda v: f"{v:.0f} GB" if isinstance(v, int | float) else str(v)),
        ("gpu", lambda v: ", ".join(map(str, v)) if isinstance(v, list) else str(v)),
    ]
    values = [(lookup(source, f"hardware.{key}"), show) for key, show in parts]
    return ", ".join(show(value) for value, show in values if value) or DASH
