"""What ``capo bench fidelity`` writes and says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capo.lab.bench_fidelity import EMBEDDED, GENERATIONS
from capo.lab.provenance import collect_provenance


def report(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``capo bench trust-region`` shows: title, rows, goals and notes.

    Args:
        conditions: dicts of completions, learning_rate and predictors (see `summarise`), and of the
            policy where it is not the embedded one.
    """
    from capo.core.trust_region import auto_sequences

    rows, goals = [], []
    for each in conditions:
        policy = each.get("policy", EMBEDDED)
        where = "" if policy == EMBEDDED else f"{policy}, "
        where += f"{each['completions']} completions a step, lr {each['learning_rate']:g}"
        for name, found in each["predictors"].items():
            rows.append(_row(each, name, found))
        deep = each["predictors"]["deep (all)"]["token_spearman"]["median"]
        goals.append(_goal(f"token Spearman of deep, {where}", deep))
        size = auto_sequences(each["completions"] // GENERATIONS)
        default = each["predictors"][f"measured ({size} completions)"]["log_correlation"]["median"]
        goals.append(_goal(f"log-log correlation of the default predictor, {where}", default))
    notes = [
        "Over the natural steps of plain GRPO at a constant learning rate, nothing scaled: the truth is "
        "the exact mean KL over all completion tokens of the step's batch. Medians over runs "
        "[smallest, largest]; |log ratio|: median over all steps; worst: over all steps. The default "
        "predictor is `measured` on two completions of every prompt (24 of 96), on 8 at least (of 24); "
        "`measured (all)` is the truth itself.",
        "The paper's Table 5 gives 0.622 (token level) and 0.459 (batch level) for the last layer.",
    ]
    return {"title": "Fidelity of the predictors", "rows": rows, "goals": goals, "notes": notes}


def _row(condition: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    def span(key: str) -> str:
        values = found[key]
        if values is None:
            return ""
        return f"{values['median']:.3f} [{values['min']:.3f}, {values['max']:.3f}]"

    seconds = found["cpu_seconds"]
    policy = condition.get("policy", EMBEDDED)
    return {
        **({} if policy == EMBEDDED else {"policy": policy}),
        "completions a step": condition["completions"],
        "learning rate": f"{condition['learning_rate']:g}",
        "predictor": name,
        "token Spearman": span("token_spearman"),
        "batch log-log": span("log_correlation"),
        "median |log ratio|": f"{found['median_abs_log_ratio']:.2f}",
        "worst under": f"{found['worst_under_prediction']:,.1f} ×",
        "worst over": f"{found['worst_over_prediction']:,.1f} ×",
        "CPU ms": "" if seconds is None else f"{1000 * seconds:.0f}",
    }


def _goal(name: str, value: float, goal: float = 0.95) -> dict[str, Any]:
    return {"name": name, "goal": f"≥ {goal}", "value": f"{value:.3f}", "reached": value >= goal}


def write(path: Path, tables: Sequence[dict[str, Any]]) -> None:
    """Put conditions into the file, instead of older ones of the same policy, batch and learning rate."""

    def key(table: dict[str, Any]) -> tuple[Any, ...]:
        return table.get("policy", EMBEDDED), table["completions"], table["learning_rate"]

    there = json.loads(path.read_text(encoding="utf-8"))["conditions"] if path.is_file() else []
    new = {key(table) for table in tables}
    conditions = [*(table for table in there if key(table) not in new), *tables]
    document = {
        "command": "; ".join(
            dict.fromkeys(_command(each) for each in conditions if "seeds" in each)
        ),
        "provenance": collect_provenance(),
        **report(conditions),
        "conditions": conditions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _command(table: dict[str, Any]) -> str:
    policy = table.get("policy", EMBEDDED)
    named = "" if policy == EMBEDDED else f" --policies {policy}"
    return (
        f"capo bench fidelity{named} --seeds {table['seeds']} --steps {table['steps']} "
        f"--completions {table['completions']} --learning-rates {table['learning_rate']:g}"
    )


def in_words(table: dict[str, Any]) -> str:
    """A condition for a terminal."""
    where = f"{table['completions']} completions a step, learning rate {table['learning_rate']:g}"
    lines = [f"{table.get('policy', 'embedded')}, {where}"]
    for name, entry in table["predictors"].items():
        token = entry["token_spearman"]
        lines.append(
            f"  {name:<26} log-log {entry['log_correlation']['median']:6.3f}"
            f"  |log ratio| {entry['median_abs_log_ratio']:5.2f}"
            f"  under {entry['worst_under_prediction']:9.2f}x"
            f"  Spearman {token['median'] if token else math.nan:6.3f}"
        )
    return "\n".join(lines)
