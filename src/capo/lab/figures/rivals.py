"""Rivals under identical conditions: what each ends at, ranked, and that ratio rules are GRPO on one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from capo.lab.figures.accuracy import base, by_seed
from capo.lab.figures.bands import MOST_ROWS, final_accuracy_bands
from capo.lab.figures.criteria import FIRST_PASS
from capo.lab.figures.figure import Drawn
from capo.lab.report.charts import Figure
from capo.lab.sweep.intervals import Interval
from capo.lab.sweep.reading import GridResult

ROW = 32  # CSS pixels of the figure for a rule
RATE, PASSES = "training.learning_rate", "algorithm.num_iterations"

Rates = dict[float, dict[str, Any]]
"""A rule's rows of the table by learning rate."""


def rivals(result: GridResult) -> Drawn:
    """Ranking, and that ratio rules are GRPO on the first pass."""
    drawn = base(result)
    rules = _by_rule(result, drawn.numbers["cells"])
    rates = sorted({rate for rows in rules.values() for rate in rows})
    drawn.figures[:0] = _figures(rules, rates)
    if rules:
        drawn.tables = {
            "Final accuracy, the best at the highest learning rate first": _ranked(rules, rates)
        } | drawn.tables
    drawn.numbers["on_policy"] = equal = _on_policy(result)
    if equal:
        apart = ", ".join(f"{name} {difference:g}" for name, difference in equal.items())
        drawn.notes.append(
            "Ratio rules on the first pass, the largest difference of a batch's mean reward from GRPO's: "
            f"{apart}. Those of one seed are not ranked."
        )
    return drawn


def _by_rule(result: GridResult, table: Sequence[dict[str, Any]]) -> dict[str, Rates]:
    """Every rule at every number of passes, as far as it was run; in the grid's order."""
    found: dict[str, Rates] = {}
    for each, row in zip(result.cells, table, strict=True):
        if each.cell.variant.endswith(FIRST_PASS) or "final_accuracy" not in row:
            continue
        passes = each.cell.at.get(PASSES)
        said = {None: "", 1: ", 1 pass"}.get(passes, f", {passes} passes")
        found.setdefault(each.cell.label + said, {})[each.cell.at[RATE]] = row
    return found


def _ranked(rules: dict[str, Rates], rates: Sequence[float]) -> list[dict[str, str]]:
    """A row a rule; those that were not run at a rate come after those that were."""

    def place(rows: Rates) -> list[float]:
        return [
            rows[rate]["final_accuracy"]["value"] if rate in rows else -math.inf
            for rate in reversed(rates)
        ]

    return [
        {"": name} | {f"learning rate {rate:g}": _said(rows.get(rate)) for rate in rates}
        for name, rows in sorted(rules.items(), key=lambda rule: place(rule[1]), reverse=True)
    ]


def _said(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    fallen = row["collapsed"]
    said = f", {fallen} of {row['seeds']} collapsed" if fallen else ""
    return Interval(**row["final_accuracy"]).text() + said


def _figures(rules: dict[str, Rates], rates: Sequence[float]) -> list[Figure]:
    """A band a rule, a colour a learning rate; as few figures as can be read, as even as can be."""
    names = list(rules)
    number = math.ceil(len(names) / MOST_ROWS)
    size = math.ceil(len(names) / max(number, 1))
    drawn: list[Figure] = []
    for part in range(number):
        within = names[part * size : (part + 1) * size]
        data = pd.DataFrame(
            {"rule": name, "series": f"learning rate {rate:g}"}
            | rules[name][rate]["final_accuracy"]
            for name in within
            for rate in rates
            if rate in rules[name]
        )
        starts = pd.DataFrame(
            {"rule": name, "value": next(iter(rules[name].values()))["base_accuracy"]}
            for name in within
        )
        drawn.append(
            final_accuracy_bands(
                f"final-{part + 1}" if number > 1 else "final",
                "Final accuracy" + (f", part {part + 1} of {number}" if number > 1 else ""),
                data,
                starts,
                [f"learning rate {rate:g}" for rate in rates],
                row="rule",
                height=ROW,
            )
        )
    return drawn


SAME_NORMALISATION = {
    **{name: name for name in ("clip-0.02", "clip-0.002")},
    **{name: name + FIRST_PASS for name in ("two-sided", "clip-higher", "gspo", "sapo")},
}
"""Ratio rules that weigh tokens as GRPO does, and the variants of their first pass."""


def _on_policy(result: GridResult) -> dict[str, float]:
    """Largest difference of any reward in a batch between GRPO and a ratio rule, both on one pass."""
    found: dict[str, float] = {}
    for plain in result.all("clip-0.2", num_iterations=1):
        rate = plain.cell.at["training.learning_rate"]
        for name, variant in SAME_NORMALISATION.items():
            for other in result.all(variant, learning_rate=rate):
                if other.cell.at.get("algorithm.num_iterations", 1) != 1:
                    continue
                apart = [
                    abs(x - y)
                    for a, b in by_seed(plain, other)
                    for (_, x), (_, y) in zip(a.series("reward"), b.series("reward"), strict=False)
                ]
                if apart:
                    found[name] = max([found.get(name, 0.0), *apart])
    return found
