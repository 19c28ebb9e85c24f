"""The page of `capo bench larger`: what the archive holds, as figures, tables and plain sentences."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.bench_larger import SITTING
from capo.lab.rundir import write_text
from capo.lab.sections import validate
from capo.lab.sweep.curves import metric_points, save_figures, split_figures
from capo.lab.sweep.grid import Grid
from capo.lab.sweep.reading import CellResult, GridResult, Run, read_grid
from capo.lab.sweep.report import run_rows
from capo.lab.sweep.table import csv_text, markdown, shown, table_of

KEPT_UP = 0.9  # of the best evaluation: a run that ends below has lost what it had


def report(archive: Path, output: Path) -> Path:
    """Write README, figures, tables and the raw record to ``output``; returns the page.

    Raises:
        InputError: the archive is not one of `capo bench larger`.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(runs, filter="data")
            sitting = json.loads((runs / SITTING).read_text(encoding="utf-8"))
        except (OSError, tarfile.TarError, json.JSONDecodeError) as error:
            raise InputError("--report", f"{str(archive)!r} is no archive: {error}.") from None
        result = read_grid(validate(Grid, sitting["grid"]), runs)
        return write(sitting, result, output)


def write(sitting: dict[str, Any], result: GridResult, output: Path) -> Path:
    """The page and everything beside it."""
    output.mkdir(parents=True, exist_ok=True)
    trained = [cell for cell in result.cells if cell.runs]
    rows = table_of(result)
    write_text(output / "runs.csv", csv_text(run_rows(result)))
    write_text(output / "curves.csv", csv_text(curve_rows(result)))
    write_text(output / "summary.json", json.dumps({"rows": rows, **sitting}, indent=1) + "\n")
    figures = save_figures(
        [
            *split_figures("accuracy", "Accuracy on held-out problems", trained),
            *split_figures(
                "reward",
                "Reward of the completions trained on",
                trained,
                metric_points("reward"),
                y="mean reward of a step",
            ),
        ],
        output,
    )
    target = result.grid.target
    parts = [
        "# A larger policy on a GPU",
        setting(sitting, result),
        "## Verdict",
        "\n".join(f"- {sentence}" for sentence in verdict(result)),
        "## Runs",
        markdown([shown(row, target) for row in rows]),
        "Accuracy: sampled at temperature 1 on "
        f"{result.runs[0].point.resolved.eval.problems if result.runs else 0} fixed held-out problems. "
        "Collapsed: accuracy below half the base policy's at three evaluations in a row or at the end, or "
        "diverged. An interval is over seeds; of one seed there is none.",
        *(f"![{one.title}]({one.slug}.svg)\n\n{one.title}. {one.caption}" for one in figures),
        "Beside this page: `grid.toml` (the settings and why), `runs.csv`, `curves.csv` (every evaluation), "
        "`summary.json` (versions, stages, pre-training losses), and the figures as SVG, PNG and CSV.",
    ]
    page = output / "README.md"
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def setting(sitting: dict[str, Any], result: GridResult) -> str:
    """Command, hardware, the policy and how much time there was."""
    provenance, policy = sitting["provenance"], sitting["policy"]
    machine, measured = provenance["hardware"], policy["measured"]
    config, seconds = policy["config"], sitting["seconds"]
    commit = str(provenance["git_commit"] or "unknown")[:12]
    words = "characters" if config["vocabulary"] is None else f"a BPE of {config['vocabulary']:,}"
    lessons = policy["steps"] * config["batch_size"]
    seeds = [len(cell.runs) for cell in result.cells]
    return "\n\n".join(
        [
            "```sh\nbenchmarks/gpu_policy.sh OUT\n"
            "capo bench larger --report OUT/runs.tar.gz --output results/gpu/larger_policy\n```",
            f"{machine['gpu'] or 'no GPU'}, {machine['cores']} cores of {machine['cpu']}; torch "
            f"{provenance['packages']['torch']}, transformers {provenance['packages']['transformers']}, "
            f"TRL {provenance['packages']['trl']}; commit {commit}. One sitting of "
            f"{seconds['all']:.0f} s: pre-training {policy['seconds']:.0f} s, then "
            f"{seconds['training']:.0f} s in which all runs shared the device.",
            f"The policy: {policy['weights']['parameters'] / 1e6:.1f} M parameters, {config['layers']} "
            f"layers of width {config['hidden_size']}, {words}; "
            f"{policy['steps']:,} steps on {lessons:,} lessons of `gsm_symbolic`, loss "
            f"{policy['final_loss']:.3f} nats a token. On {measured['problems']} held-out problems "
            f"pass@1 {measured['sampled_accuracy']:.3f}, pass@{measured['k']} "
            f"{measured['pass_at_k']:.3f}, greedy {measured['greedy_accuracy']:.3f}.",
            f"Seeds a setting: {min(seeds)} to {max(seeds)}, those for which there was time; runs end with "
            "their time, not at equal numbers of completions. Pre-training had "
            f"{config['max_seconds'] or 0:.0f} s, not the ten to twenty minutes that were meant for it: "
            "there were fifteen of the device for all measurements together.",
            _missing(sitting),
        ]
    ).strip()


def _missing(sitting: dict[str, Any]) -> str:
    wrong = {k: v for k, v in sitting["checks"].items() if v != "ok"} | sitting["failed"]
    if not wrong:
        return "No run failed."
    return "Failed: " + "; ".join(f"{name}: {word}" for name, word in wrong.items()) + "."


def verdict(result: GridResult) -> list[str]:
    """A sentence a setting, as it came out."""
    return [_sentence(cell) for cell in result.cells]


def _sentence(cell: CellResult) -> str:
    label = cell.cell.label
    if not cell.runs:
        return f"{label}: no run was long enough to be evaluated."
    ends = [_ending(run) for run in cell.runs]
    return f"{label}: " + "; ".join(ends) + "."


def _ending(run: Run) -> str:
    consumed = run.evaluations[-1].completions
    curve = f"{run.base_accuracy:.2f} → {run.final_accuracy:.2f} in {consumed:,} completions"
    if run.ended == "diverged":
        return f"**diverged** after {consumed:,} completions (best {run.best_accuracy:.2f})"
    if run.collapsed:
        began = run.collapse_began
        at = f" from {began.completions:,} completions on" if began else ""
        return f"**collapsed**{at}, {curve}, best {run.best_accuracy:.2f}"
    if not run.best_accuracy:
        return f"nothing was ever right, {curve}"
    if run.final_accuracy < KEPT_UP * run.best_accuracy:
        return f"lost ground, {curve}, best {run.best_accuracy:.2f}"
    return f"held, {curve}"


def curve_rows(result: GridResult) -> list[dict[str, Any]]:
    """Every evaluation of every run."""
    return [
        {
            "variant": cell.cell.variant,
            "seed": run.point.seed,
            "step": each.step,
            "completions": each.completions,
            "accuracy": each.accuracy,
            "stderr": each.stderr,
        }
        for cell in result.cells
        for run in cell.runs
        for each in run.evaluations
    ]
