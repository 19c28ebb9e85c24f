"""CAPO's part of a Hugging Face model card: what was set, and what the run logged."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

TAGS = ["trl", "grpo", "capo"]
PAPER = {
    "title": "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning",
    "id": "2510.00819",
    "citation": """\
@inproceedings{melo2026stabilizing,
  title     = {{Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning}},
  author    = {Melo, Luckeciano and Abate, Alessandro and Gal, Yarin},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  eprint    = {2510.00819},
  archivePrefix = {arXiv}
}""",
}
BEFORE = "### Framework versions"

_READINGS = {
    "capo/trust/scale": "share of the optimizer's step that was taken",
    "capo/trust/measured_policy_shift": "policy shift of a step, nats a token (measured)",
    "capo/trust/budget": "its budget, nats a token",
    "capo/rejection_rate": "share of tokens rejected",
    "capo/monitor/measured_policy_shift": "policy shift of a step, nats a token (measured, monitor)",
    "capo/monitor/rejection_rate": "share of tokens that would be rejected (monitor)",
    "capo/monitor/excess": "policy shift as a multiple of what the batch justifies (monitor)",
}


def card_section(trainer: Any) -> str:
    """The Markdown section on curvature of a model card.

    Args:
        trainer: a `CAPOTrainer`, or a `GRPOTrainer` with a `capo.CurvatureMonitor`, after training.
    """
    parts = ["### Curvature of the policy"]
    settings = _settings(trainer)
    if settings:
        parts.append("\n".join(f"- {name}: {value}" for name, value in settings.items()))
    table = _table(trainer.state.log_history)
    if table:
        parts.append(table)
    monitor = getattr(trainer, "capo_monitor", None)
    if monitor is not None:
        found = [one.sentence for one in (*monitor.warnings, *monitor.diagnoses)]
        parts.append("\n".join(f"- {one}" for one in found) or "No early warning was raised.")
    return "\n\n".join(parts) + "\n"


def add_section(path: Path, section: str) -> None:
    """Put a section into a card that TRL wrote, before its framework versions."""
    text = path.read_text(encoding="utf-8")
    head, found, tail = text.partition(BEFORE)
    text = f"{head}{section}\n{found}{tail}" if found else f"{text.rstrip()}\n\n{section}"
    path.write_text(text, encoding="utf-8")


def _settings(trainer: Any) -> dict[str, str]:
    args = trainer.args
    if not hasattr(args, "trust_region"):
        return {}
    return {
        "trust region": _code(args.trust_region),
        "token selection": _code(args.selection),
        "passes over a batch": str(args.num_iterations),
    }


def _code(value: Any) -> str:
    return "none" if value is None else f"`{value}`"


def _table(history: list[dict[str, Any]]) -> str:
    lines = []
    for key, words in _READINGS.items():
        values = [row[key] for row in history if isinstance(row.get(key), int | float)]
        values = [value for value in values if math.isfinite(value)]
        if values:
            middle, least, most = statistics.median(values), min(values), max(values)
            lines.append(f"| {words} | {middle:.3g} | {least:.3g} | {most:.3g} |")
    if not lines:
        return ""
    return "\n".join(
        ["| over the run | median | smallest | largest |", "|---|---|---|---|", *lines]
    )
