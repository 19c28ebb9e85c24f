"""The outcome of a suite for readers: Markdown beside JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capo.lab.provenance import collect_provenance
from capo.lab.rundir import write_text
from capo.lab.suite_run import Figure, Outcome, mean_pass_at_1

HEAD = ("task", "problems", "k", "T", "pass@1", "pass@k", "majority@k")


def document_of(
    model: str, suite: str, outcomes: Sequence[Outcome], sampled: dict[str, str]
) -> dict[str, Any]:
    """The outcome as one JSON object; ``sampled`` is from `capo.lab.devices.sampled_on`."""
    mean, stderr = mean_pass_at_1(outcomes)
    return {
        "model": model,
        "suite": suite,
        **sampled,
        "tasks": [outcome.to_dict() for outcome in outcomes],
        "mean_pass_at_1": {"mean": mean, "stderr": stderr},
        "provenance": collect_provenance(),
    }


def rows_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A row a task, as text, under `HEAD`."""
    return [
        (
            outcome.name,
            f"{outcome.problems:,}",
            str(outcome.k),
            f"{outcome.temperature:g}",
            _cell(outcome.pass_at[1]),
            _cell(outcome.pass_at[outcome.k]) if outcome.k > 1 else "-",
            "-" if outcome.majority is None else _cell(outcome.majority),
        )
        for outcome in outcomes
    ]


def markdown(model: str, suite: str, outcomes: Sequence[Outcome], sampled: dict[str, str]) -> str:
    """The outcome as a page."""
    mean, stderr = mean_pass_at_1(outcomes)
    lines = [
        f"# Evaluation of `{model}` on suite `{suite}`",
        "",
        f"Mean pass@1 over {len(outcomes)} task(s): **{mean:.3f}** ± {stderr:.3f} (standard error). "
        f"Sampled on `{sampled['device']}` in {sampled['dtype']}.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" + "|---:" * (len(HEAD) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows_of(outcomes)),
        "",
        "In brackets: 95% interval of Wilson, on as many effective trials as the standard error over "
        "problems amounts to. pass@k is the unbiased estimator of Chen et al. (arXiv 2107.03374); "
        "majority@k grades the most frequent final answer of the k. An answer is right where its "
        "reward is 1.",
    ]
    ladders = [(o, [j for j in o.pass_at if j not in (1, o.k)]) for o in outcomes]
    if any(steps for _, steps in ladders):
        lines += ["", "## pass@j", ""]
        for outcome, steps in ladders:
            cells = (f"{j}: {_cell(outcome.pass_at[j])}" for j in (1, *steps, outcome.k))
            lines.append(f"- {outcome.name}: {'; '.join(cells)}")
    return "\n".join(lines) + "\n"


def write_report(
    directory: Path, model: str, suite: str, outcomes: Sequence[Outcome], sampled: dict[str, str]
) -> None:
    """``evaluation.json`` and ``report.md``; existing files of those names are replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    document = document_of(model, suite, outcomes, sampled)
    write_text(directory / "evaluation.json", json.dumps(document, indent=2) + "\n")
    write_text(directory / "report.md", markdown(model, suite, outcomes, sampled))


def _cell(figure: Figure) -> str:
    low, high = figure.interval
    return f"{figure.mean:.3f} [{low:.3f}, {high:.3f}]"
