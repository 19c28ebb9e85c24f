"""What the runs measured: accuracy, completions to a target, collapse, rejection; as numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

from capo.lab.report.reading import MEASURED, Run
from capo.lab.study.outcome import collapse_at

ALGORITHMS = {"grpo": "GRPO", "dr_grpo": "Dr.GRPO", "reinforce": "REINFORCE"}
SELECTED = {
    ("grpo", "capo"): "CAPO",
    ("dr_grpo", "dr_capo"): "Dr.CAPO",
    ("reinforce", "reincapo"): "ReinCAPO",
}
BUDGET = "capo/trust/budget"
# Keys that do not make two runs different experiments.
IDENTITY_FREE = ("seed", "name")


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its binomial standard error, and the completions consumed before it."""

    accuracy: float
    stderr: float
    completions: float


@dataclass(frozen=True)
class Within:
    """Steps whose measured policy shift was within the budget, of those measured.

    ``budget`` is the median one (nats a token).
    """

    met: int
    steps: int
    budget: float


@dataclass(frozen=True)
class Summary:
    """The measured outcome of one run; ``None`` where the run does not say."""

    run: Run
    algorithm: str
    learning_rate: float | None
    completions_per_step: int | None
    base: Estimate | None
    best: Estimate | None
    final: Estimate | None
    completions_to_target: float | None
    collapsed: bool | None
    collapsed_at: Estimate | None
    rejection_mean: float | None
    rejection_peak: float | None
    completions: float
    seconds: float | None
    within: Within | None = None


@dataclass(frozen=True)
class Series:
    """Runs that share their whole configuration but the seed: one line in every figure."""

    name: str
    summaries: tuple[Summary, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs, in the order given."""
        return tuple(summary.run for summary in self.summaries)


def algorithm_name(run: Run) -> str:
    """The field's name of what was run: CAPO is GRPO with the paper's selection."""
    base = str(run.setting("algorithm.name", "unknown"))
    selection = run.setting("capo.selection")
    shown = ALGORITHMS.get(base, base)
    scaled = " + trust region" if scales(run) else ""
    if not selects(run):
        return f"{shown}{scaled}"
    if not isinstance(selection, str):
        rule = selection.get("rule", "own thresholds") if isinstance(selection, dict) else "rule"
        return f"{shown} + {rule}{scaled}"
    return SELECTED.get((base, selection), f"{shown} + {selection} thresholds") + scaled


def scales(run: Run) -> bool:
    """Whether the run scales steps to a budget; to measure them is not to scale."""
    return run.setting("capo.trust_region.policy_shift") is not None


def selects(run: Run) -> bool:
    """Whether the run leaves tokens out at all; to watch them is not to select."""
    selection = run.setting("capo.selection")
    if isinstance(selection, dict):
        return "rule" in selection or any(_bounds(selection))
    return selection is not None


def _bounds(selection: dict[str, Any]) -> list[bool]:
    bounds = [selection.get("policy_shift"), *(selection.get("objective_shift") or ())]
    return [bound is not None for bound in bounds]


def collapse_of(run: Run) -> tuple[bool | None, Estimate | None]:
    """Whether the run collapsed, by the rule of grids, and the first evaluation of the collapse.

    ``None``: no base evaluation, or none after it, and it did not diverge.
    """
    points = _estimates(run)
    at = None
    if _has_base(run):
        if len(points) < 2:
            return None, None
        at = collapse_at([point.accuracy for point in points])
    elif not run.diverged:
        return None, None
    if at is None and run.diverged:
        at = len(points) - 1
    return (False, None) if at is None else (True, points[at])


def _has_base(run: Run) -> bool:
    return len(run.evals) > 0 and run.evals["step"].iloc[0] == 0


def summarise(run: Run, target_accuracy: float) -> Summary:
    """Everything the summary table says about one run."""
    points = _estimates(run)
    collapsed, collapsed_at = collapse_of(run)
    reached = [point.completions for point in points if point.accuracy >= target_accuracy]
    rejection_mean, rejection_peak = _rejection(run)
    clocks = [*run.metrics["completions"], *run.evals["completions"]]
    seconds = [s for s in (*run.metrics["seconds"], *run.evals["seconds"]) if math.isfinite(s)]
    return Summary(
        run=run,
        algorithm=algorithm_name(run),
        learning_rate=run.setting("training.learning_rate"),
        completions_per_step=run.setting("training.completions_per_step"),
        base=points[0] if _has_base(run) else None,
        best=max(points, key=lambda point: point.accuracy, default=None),
        final=points[-1] if points else None,
        completions_to_target=reached[0] if reached else None,
        collapsed=collapsed,
        collapsed_at=collapsed_at,
        rejection_mean=rejection_mean,
        rejection_peak=rejection_peak,
        completions=max(clocks, default=0.0),
        seconds=max(seconds, default=None),
        within=_within(run),
    )


def _estimates(run: Run) -> list[Estimate]:
    """Of every evaluation; 0 where the policy diverged."""
    columns = run.curve[["accuracy", "stderr", "completions"]]
    return [Estimate(*map(float, row)) for row in columns.itertuples(index=False)]


def _within(run: Run) -> Within | None:
    """None where no step was both measured and under a budget."""
    table = run.metrics.reindex(columns=[MEASURED, BUDGET]).dropna()
    if not len(table):
        return None
    met = int((table[MEASURED] <= table[BUDGET]).sum())
    return Within(met, len(table), float(table[BUDGET].median()))


def _rejection(run: Run) -> tuple[float | None, float | None]:
    """Mean over tokens (over steps where tokens were not counted) and largest of a step."""
    if not selects(run) or "capo/rejection_rate" not in run.metrics:
        return None, None
    table = run.metrics[run.metrics["capo/rejection_rate"].notna()]
    if not len(table):
        return None, None
    rate = table["capo/rejection_rate"]
    if "capo/tokens" in table and table["capo/tokens"].notna().all() and table["capo/tokens"].sum():
        mean = float((rate * table["capo/tokens"]).sum() / table["capo/tokens"].sum())
    else:
        mean = float(rate.mean())
    return mean, float(rate.max())


def group_series(summaries: Sequence[Summary]) -> list[Series]:
    """Group runs that differ in nothing but the seed (and the name) into one series each."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        config = dict(summary.run.config)
        section = config.get("run")
        if isinstance(section, dict):
            config["run"] = {k: v for k, v in section.items() if k not in IDENTITY_FREE}
        groups.setdefault(json.dumps(config, sort_keys=True, default=str), []).append(summary)
    names = [_series_name([summary.run for summary in group]) for group in groups.values()]
    series: list[Series] = []
    for name, group in zip(names, groups.values(), strict=True):
        unique = name
        if names.count(name) > 1:
            unique = f"{name} ({group[0].run.path.resolve().name})"
        taken = {other.name for other in series}
        if unique in taken:
            unique = f"{unique} #{len(series) + 1}"
        series.append(Series(unique, tuple(group)))
    return series


def _series_name(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    columns = zip(*(run.name for run in runs), strict=False)
    common = "".join(column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns))
    if common not in {run.name for run in runs}:
        # "small-seed" of "small-seed0" and "small-seed1" is the name and a seed's marker.
        common = re.sub(r"[-_. ]+(seed|s)?[-_. ]*\d*$", "", common)
    return f"{common or 'runs'} ({len(runs)} seeds)"


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest; infinities are allowed."""
    return median(values), min(values), max(values)


def headline(series: Sequence[Series], target_accuracy: float) -> str:
    """One sentence, as measured: collapses, best final accuracy, completions to the target."""
    runs = [summary for one in series for summary in one.summaries]
    ended = [one for one in series if any(summary.final for summary in one.summaries)]
    if not ended:
        return f"{_count(len(runs), 'run')}, none of them evaluated yet."
    parts = []
    judged = [summary for summary in runs if summary.collapsed is not None]
    fallen = [summary for summary in judged if summary.collapsed]
    if len(runs) == 1:
        parts += _single(runs[0])
    else:
        names = list(dict.fromkeys(s.name for s in series if any(x in fallen for x in s.summaries)))
        if judged:
            of = f"of {_count(len(judged), 'run')}, "
            parts.append(
                of + (f"{len(fallen)} collapsed ({_join(names)})" if fallen else "none collapsed")
            )
        top = max(ended, key=_final_accuracy)
        parts.append(f"the highest final accuracy is {_final_text(top)} of {top.name}")
    parts.append(_target_text(series, target_accuracy))
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:] if len(runs) > 1 else text


def _single(summary: Summary) -> list[str]:
    assert summary.final is not None
    base = f"from {summary.base.accuracy:.3f} " if summary.base else ""
    at = summary.collapsed_at
    verdict = f", collapsed at {at.completions:,.0f} completions" if at else ""
    return [
        f"{summary.run.name} ({summary.algorithm}) went {base}to {summary.final.accuracy:.3f} "
        f"± {summary.final.stderr:.3f} accuracy after {summary.final.completions:,.0f} "
        f"completions{verdict}"
    ]


def _final_accuracy(one: Series) -> float:
    return median([s.final.accuracy for s in one.summaries if s.final] or [-1.0])


def _final_text(one: Series) -> str:
    finals = [summary.final for summary in one.summaries if summary.final]
    if len(finals) == 1:
        return f"{finals[0].accuracy:.3f} ± {finals[0].stderr:.3f}"
    mid, low, high = middle([final.accuracy for final in finals])
    return f"{mid:.3f} (median of {len(finals)}, {low:.3f} to {high:.3f})"


def _target_text(series: Sequence[Series], target: float) -> str:
    reached: list[tuple[float, str]] = []
    for one in series:
        at = median(
            math.inf if s.completions_to_target is None else s.completions_to_target
            for s in one.summaries
        )
        if math.isfinite(at):
            reached.append((at, one.name))
    if not reached:
        return f"{target:g} accuracy was not reached"
    reached.sort()
    (first, name), rest = reached[0], reached[1:]
    if len(series) == 1:
        return f"{target:g} accuracy was reached after {first:,.0f} completions"
    text = f"{target:g} accuracy came first to {name}, after {first:,.0f} completions"
    if rest and first > 0:
        text += f" ({rest[0][1]}: {rest[0][0]:,.0f}, {rest[0][0] / first:.1f} × as many)"
    elif not rest:
        text += "; no other reached it" if len(series) > 1 else ""
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys (an empty dict stays a value)."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
