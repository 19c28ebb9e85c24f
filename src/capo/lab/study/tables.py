"""What the study's reports are made of: tables in Markdown, settings in words, origins of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capo.lab.study.goals import completions_estimate
from capo.lab.study.jobs import BATCH, GROUP, ITERATIONS, LEARNING_RATE, SCHEDULE
from capo.lab.study.outcome import ArmResult, Outcome
from capo.lab.study.stages import Narrowing

SHOWN = 5  # arms of a round of narrowing in the report; all are in summary.json


def section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table."""
    lines = [f"## {title}", "", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def cell(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def words(settings: Mapping[str, Any]) -> str:
    """Settings for people."""
    short = {
        LEARNING_RATE: "lr",
        BATCH: "batch",
        GROUP: "group",
        ITERATIONS: "iterations",
        SCHEDULE: "schedule",
    }
    return ", ".join(f"{short.get(key, key)} {cell(value)}" for key, value in settings.items())


def seconds_of(outcomes: Iterable[Outcome]) -> float:
    """Core seconds of the runs, one thread each."""
    return sum(o.seconds for o in outcomes if math.isfinite(o.seconds))


def provenances(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """The distinct commits and machines behind the runs, with how many runs each has."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        origin = {
            key: outcome.provenance.get(key)
            for key in ("git_commit", "git_dirty", "hardware", "packages", "python")
        }
        entry = found.setdefault(json.dumps(origin, sort_keys=True), {**origin, "runs": 0})
        entry["runs"] += 1
    return sorted(found.values(), key=lambda entry: -int(entry["runs"]))


def origins(outcomes: Sequence[Outcome]) -> list[str]:
    """`provenances` as items of a list."""
    lines = []
    for origin in provenances(outcomes):
        hardware = origin["hardware"] or {}
        commit = str(origin["git_commit"] or "unknown")[:10]
        commit += " with uncommitted changes" if origin["git_dirty"] else ""
        lines.append(
            f"- {origin['runs']} runs at commit {commit} on {hardware.get('cpu', 'unknown')} "
            f"({hardware.get('cores', '?')} cores), one thread each"
        )
    return lines


def races_table(title: str, results: Sequence[ArmResult], target: float) -> str:
    """Arms that were raced to the target, one a row."""
    rows = []
    for result in results:
        estimate = completions_estimate(result)
        reached = sum(o.to_target is not None for o in result.outcomes)
        rows.append(
            [
                result.label,
                _settings(result),
                estimate.text(),
                f"{reached} of {len(result.outcomes)}",
                str(result.collapses),
                ", ".join(str(o.to_target or f"> {o.completions}") for o in result.outcomes),
            ]
        )
    head = ["arm", "settings", f"completions to {target:g}", "reached", "collapsed", "per seed"]
    return section(title, head, rows)


def _settings(result: ArmResult) -> str:
    return f"`{result.arm.preset}` " + ", ".join(f"`{each}`" for each in result.arm.overrides)


def narrowings(results: Sequence[Narrowing]) -> str:
    """The best arms of every round of every narrowing."""
    parts = []
    for each in results:
        rows = []
        for index, arms in enumerate(each.rounds):
            for settings, score, runs in arms[:SHOWN]:
                name = f"{index + 1} ({len(arms)} arms)"
                rows.append([name, words(settings), f"{score:,.0f}", str(runs)])
        head = ["round", f"settings (best {SHOWN})", "mean score", "runs"]
        parts.append(section(f"Narrowing: {each.label}", head, rows) + _edges(each))
    if not parts:
        return ""
    note = (
        "\nScore: completions to the target; a run that did not reach it counts its round's budget "
        "and the missing share of accuracy on top. Every round has fresh seeds, and the winner's "
        "figures above are of seeds that chose nothing.\n"
    )
    return "\n".join(parts) + note


def _edges(narrowing: Narrowing) -> str:
    """Where the best settings are the outermost that were tried, the best may lie beyond."""
    edges = []
    for key, value in narrowing.winner.items():
        if not isinstance(value, int | float):
            continue
        tried = {settings[key] for settings, _, _ in (narrowing.rounds or ((),))[0]}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            edges.append(words({key: value}))
    return f"\nAt the edge of what was tried: {', '.join(edges)}.\n" if edges else ""


def narrowing_data(narrowing: Narrowing) -> dict[str, Any]:
    """A narrowing for machines."""
    return {
        "name": narrowing.name,
        "winner": narrowing.winner,
        "rounds": [
            [{"settings": s, "score": score, "runs": n} for s, score, n in arms]
            for arms in narrowing.rounds
        ],
    }
