"""The study's report: ``README.md``, ``summary.json``, ``runs.csv`` and the figures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.rundir import write_text
from capo.lab.study.figures import save_figures
from capo.lab.study.goals import (
    Goal,
    all_goals,
    completions_estimate,
    final_median,
    survived_text,
)
from capo.lab.study.jobs import rate
from capo.lab.study.outcome import Outcome
from capo.lab.study.stages import Narrowing, StudyResult
from capo.lab.study.statistics import Estimate, Value
from capo.lab.study.tables import (
    cell,
    narrowing_data,
    narrowings,
    origins,
    provenances,
    races_table,
    seconds_of,
    section,
)

EXTRAS = ("fidelity.json", "cost.json")  # written by others into the report's folder


def write_report(study: StudyResult, outcomes: Sequence[Outcome], output: Path) -> list[Goal]:
    """Write everything into ``output``, which may hold ``fidelity.json`` and ``cost.json``.

    Args:
        study: its results.
        outcomes: every run that there is, for ``runs.csv``.
        output: the folder, to be made.

    Returns:
        the goals.
    """
    output.mkdir(parents=True, exist_ok=True)
    extras = {name: extra for name in EXTRAS if (extra := _extra(output / name)) is not None}
    goals = all_goals(study, [row for extra in extras.values() for row in extra.get("goals", [])])
    figures = save_figures(study, output)
    _write_runs(outcomes, output / "runs.csv")
    summary = {"goals": [vars(goal) for goal in goals], **summarise(study, outcomes)}
    write_text(output / "summary.json", json.dumps(_plain(summary), indent=1) + "\n")
    sections = [
        _head(study, outcomes),
        _goals(goals),
        races_table("Completions to the target", study.races, study.plan.measure.target)
        if study.races
        else "",
        _ranges(study),
        _conservative(study),
        narrowings(_all_narrowings(study)),
        *(_extra_section(name, extra) for name, extra in extras.items()),
        "\n".join(
            f"![{figure.title}]({figure.slug}.png)\n\n{figure.caption}\n" for figure in figures
        ),
    ]
    write_text(output / "README.md", "\n".join(part for part in sections if part))
    return goals


def summarise(study: StudyResult, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All figures of the report, for machines; infinities become null."""
    return {
        "plan": study.plan.model_dump(mode="json"),
        "provenance": provenances(outcomes),
        "races": [
            {
                "name": result.name,
                "label": result.label,
                "preset": result.arm.preset,
                "overrides": list(result.arm.overrides),
                "seeds": [outcome.seed for outcome in result.outcomes],
                "completions": _estimate(completions_estimate(result)),
                "per_seed": [outcome.to_target for outcome in result.outcomes],
                "collapsed": result.collapses,
            }
            for result in study.races
        ],
        "ranges": [
            {
                "name": result.name,
                "label": result.label,
                "survived": result.survived,
                "points": [
                    {
                        "learning_rate": learning_rate,
                        "final_accuracy": [o.final_accuracy for o in point.outcomes],
                        "median": final_median(point) if point.outcomes else None,
                        "collapsed": point.collapses,
                    }
                    for learning_rate, point in result.points
                ],
            }
            for result in study.ranges
        ],
        "collapse_search": vars(study.conservative.search) if study.conservative else None,
        "narrowings": [narrowing_data(each) for each in _all_narrowings(study)],
    }


# Sections


def _head(study: StudyResult, outcomes: Sequence[Outcome]) -> str:
    measure = study.plan.measure
    seconds = seconds_of(outcomes)
    preset = f" --preset {study.plan.preset}"
    return "\n".join(
        [
            "# The trust region against everything else, on the embedded policy",
            "",
            f"Command: `capo bench trust-region{preset}`; this report alone from the recorded runs: "
            f"`capo bench trust-region{preset} --report-only`.",
            "",
            f"{len(outcomes)} runs, {seconds / 3600:.1f} core hours, seeds {_list(measure.seeds)} "
            "for every figure below, other seeds for every choice but that of the conservative learning "
            "rate, which follows from where aggressive GRPO collapses with these.",
            *origins(outcomes),
            "",
            f"*Completions to {measure.target:g}*: the completions at the third of three "
            f"evaluations in a row whose mean is at least {measure.target:g}; "
            f"{measure.problems} fixed held-out problems, temperature 1, every {measure.spacing} "
            "completions (a larger batch is held at its policy while it is sampled, and counts as "
            "evaluated in between). A run that does not get there is censored, not dropped: `>` "
            "marks figures that are therefore lower bounds. Intervals of medians are of order "
            "statistics (93.75 % for five seeds), of ratios 95 % bootstrap over seeds. *Collapse*: "
            "below half the base policy's accuracy at three evaluations in a row.",
            "",
        ]
    )


def _goals(goals: Sequence[Goal]) -> str:
    return "\n".join(["## Goals", "", *(f"- {goal.sentence}" for goal in goals), ""])


def _ranges(study: StudyResult) -> str:
    if not study.ranges:
        return ""
    rates = study.plan.range.learning_rates
    rows = []
    for result in study.ranges:
        cells = dict.fromkeys(rates, "")
        for learning_rate, point in result.points:
            if point.outcomes:
                finals = [o.final_accuracy for o in point.outcomes]
                cells[learning_rate] = f"{final_median(point):.3f} [{min(finals):.3f}, "
                cells[learning_rate] += f"{max(finals):.3f}], {point.collapses} of {len(finals)}"
        rows.append([result.label, *cells.values(), survived_text(result)])
    text = section(
        "Final accuracy over the learning rate",
        ["arm", *(rate(each) for each in rates), "survived"],
        rows,
    )
    return text + (
        f"\nMedian [smallest, largest] over seeds, and seeds that collapsed. CAPO and GRPO run "
        f"{study.plan.range.horizon:,} completions; the other step rules, at their own best settings, "
        f"{study.plan.range.rule_horizon:,}, from the lowest learning rate up to the first at which "
        "a seed collapses.\n"
    )


def _conservative(study: StudyResult) -> str:
    if study.conservative is None:
        return ""
    search = study.conservative.search
    rows = [[rate(each), f"{fallen} of {made}"] for each, fallen, made in search.points]
    needed, seeds = study.plan.collapse.needed, len(study.plan.measure.seeds)
    found = "none was found" if search.lowest is None else f"it is {rate(search.lowest)}"
    text = section("Where aggressive GRPO collapses", ["learning rate", "collapsed"], rows)
    return text + (
        f"\nThe lowest learning rate of the √2 grid at which at least {needed} of {seeds} seeds "
        f"collapse: {found}. A point is given up once so many seeds have survived that the others "
        "could not change the verdict.\n"
    )


def _extra_section(name: str, extra: dict[str, Any]) -> str:
    rows = extra.get("rows", [])
    head = list(dict.fromkeys(key for row in rows for key in row))
    title = extra.get("title", name.removesuffix(".json").capitalize())
    text = section(title, head, [[cell(row.get(key)) for key in head] for row in rows])
    if "command" in extra:
        text += f"\nCommand: `{extra['command']}`.\n"
    return text + "".join(f"\n{note}\n" for note in extra.get("notes", []))


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _all_narrowings(study: StudyResult) -> list[Narrowing]:
    found = [study.capo, study.grpo, study.same_batch, *(r.narrowing for r in study.rules)]
    return [each for each in found if each is not None]


# Data


def _extra(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(path.name, f"is not valid JSON: {error}.") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows", []), list):
        raise InputError(path.name, "must be an object with rows, and perhaps goals and notes.")
    return document


def _write_runs(outcomes: Sequence[Outcome], path: Path) -> None:
    rows = [_row(o) for o in sorted(outcomes, key=lambda o: (o.stage, o.arm, o.seed))]
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "stage": outcome.stage,
        "arm": outcome.arm,
        "seed": outcome.seed,
        "learning_rate": outcome.learning_rate,
        "completions_per_step": outcome.completions_per_step,
        "completions_to_target": outcome.to_target,
        "completions": outcome.completions,
        "ended": outcome.ended,
        "collapsed": int(outcome.collapsed),
        "final_accuracy": outcome.final_accuracy,
        "seconds": outcome.seconds,
        "commit": str(outcome.provenance.get("git_commit") or "")[:10],
        "overrides": " ".join(outcome.overrides),
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {key: vars(v) if isinstance(v, Value) else v for key, v in vars(estimate).items()}


def _plain(node: Any) -> Any:
    """JSON without infinities."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
