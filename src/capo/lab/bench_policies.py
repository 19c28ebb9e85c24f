"""Pre-train the policies of the recipes that ship with the package, and measure what they can do.

    capo bench policies --runs runs/lab --output results/policies          # all of them
    capo bench policies spell_backward sums_gemma2 --output results/policies

A policy lies below ``--runs`` under its recipe's hash, where grids look for it too; one that is there
is not made again. pass@1 well below pass@8 is what the recipes are after: a policy that *can* be
right and does not *prefer* to be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError
from capo.lab.options import at_least_one
from capo.lab.provenance import collect_provenance
from capo.lab.rundir import write_text
from capo.lab.suite_run import Figure, Outcome

if TYPE_CHECKING:
    from capo.policies import Policy
    from capo.tasks import Task

RECORD, FIDELITY = "policies.json", "fidelity.json"
DEFAULT = "embedded:sums"
_LENGTHS = 128  # problems, one completion each, that the lengths are taken from


HEAD = (
    *("recipe", "architecture", "parameters", "vocabulary", "tokens"),
    *("pass@1", "pass@8", "greedy", "minutes"),
)


def main(arguments: list[str] | None = None) -> None:
    """Make the policies, measure them, write the record and the report."""
    from capo.policies.recipes import recipe_names

    parser = argparse.ArgumentParser(
        prog="capo bench policies", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all where none is given")
    parser.add_argument("--problems", type=int, default=256, help="held out, of every task")
    parser.add_argument("--k", type=int, default=8, help="completions a problem, at least 8")
    parser.add_argument("--seed", type=int, default=20251000, help="of problems and completions")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="where policies lie")
    parser.add_argument("--output", type=Path, default=Path("results/policies"), help="directory")
    options = parser.parse_args(arguments)
    if options.k < 8:
        raise InputError("--k", f"must be at least 8, got {options.k}.")
    at_least_one(options, "problems")
    names = options.names or recipe_names()
    for name in names:
        row = measured(name, options.runs, options.problems, options.k, options.seed)
        write(options.output, row)
        print(_said(row))


def measured(name: str, runs: Path, problems: int, k: int, seed: int) -> dict[str, Any]:
    """Pre-train the policy of a recipe unless it is there, and measure it.

    Raises:
        InputError: there is no such recipe.
    """
    from capo.lab.suite_run import run_suite
    from capo.lab.suites import Entry, SuiteTask
    from capo.lab.sweep.execute import pretrained
    from capo.policies import EMBEDDED, load_policy
    from capo.policies.lessons import task_of
    from capo.policies.pretrain import RECIPE, PretrainConfig
    from capo.policies.recipes import recipe_settings, recipe_title

    settings = recipe_settings(name)
    config = PretrainConfig.from_dict(settings)
    if config == PretrainConfig():  # the one whose weights ship with the package
        place, directory = DEFAULT, EMBEDDED[DEFAULT]
    else:
        directory = pretrained(settings, runs)
        place = directory.relative_to(runs).as_posix()
    recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    policy, task = load_policy(directory), task_of(config)
    entry = Entry(
        SuiteTask(name=name, task=config.task.name, problems=problems, k=k, seed=seed),
        task,
        task.eval_problems(problems, seed),
    )
    [outcome] = run_suite(policy, [entry])
    return {
        "name": name,
        "title": recipe_title(name),
        "architecture": config.architecture,
        "dataset": config.task.params.get("dataset", config.task.name),
        "parameters": recipe["weights"]["parameters"],
        "vocabulary": config.vocabulary or len(policy.tokenizer),
        **_lengths(policy, task, seed),
        **_figures(outcome),
        "greedy": recipe["measured"]["greedy_accuracy"],
        "problems": problems,
        "k": k,
        "seed": seed,
        "pretraining_seed": config.seed,
        "pretraining_seconds": recipe["seconds"],
        "final_loss": recipe["final_loss"],
        "sha256": recipe["weights"]["sha256"],
        "policy": place,
        "recipe": settings,
        "versions": recipe["versions"],
        "measured_on": collect_provenance()["hardware"],
    }


def write(output: Path, row: dict[str, Any]) -> None:
    """Put a policy's row into the record, instead of an older one of that name, and renew the report."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / RECORD
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = [each for each in document.get("policies", []) if each["name"] != row["name"]]
    rows = sorted([*rows, row], key=lambda each: str(each["name"]))
    document = {"policies": rows, "provenance": collect_provenance()}
    write_text(path, json.dumps(document, indent=2) + "\n")
    foreseen = output / FIDELITY
    measured = json.loads(foreseen.read_text(encoding="utf-8")) if foreseen.is_file() else None
    write_text(output / "README.md", report(rows, measured))


def report(rows: list[dict[str, Any]], fidelity: dict[str, Any] | None = None) -> str:
    """The record as a page.

    Args:
        rows: of the policies.
        fidelity: what ``capo bench fidelity`` has written beside the record.
    """
    lines = [
        "# Pre-trained policies",
        "",
        "Policies that can be right and do not prefer to be: made and measured by",
        "",
        "```sh",
        "capo bench policies --runs runs/lab --output results/policies",
        "```",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|---" + "|---:" * (len(HEAD) - 2) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        *(f"- `{row['name']}`: {row['title']}" for row in rows),
        "",
        "pass@1 and pass@8 (unbiased, arXiv 2107.03374): completions sampled at temperature 1 from the "
        "full vocabulary, of held-out problems, with Wilson's 95 % interval over problems. tokens: of a "
        "completion, median and the middle 90 %. minutes: wall clock of pre-training and its own "
        "measurement on one core, which others may have used as well. Seeds, recipes and hashes of the "
        "weights are in `policies.json`.",
        "",
        *_foreseen(fidelity),
    ]
    return "\n".join(lines)


def _foreseen(fidelity: dict[str, Any] | None) -> list[str]:
    """How well steps on these policies are foreseen."""
    if fidelity is None:
        return []
    goals = [f"| {g['name']} | {g['goal']} | {g['value']} |" for g in fidelity["goals"]]
    commands = fidelity["command"].split("; ")
    return [
        "## Steps foreseen",
        "",
        "Over the natural steps of plain GRPO, median over the runs; all predictors, the smallest and the "
        f"largest are in `{FIDELITY}`.",
        "",
        "```sh",
        *(f"{command} --output results/policies/{FIDELITY}" for command in commands),
        "```",
        "",
        "| figure | goal | |",
        "|---|---:|---:|",
        *goals,
        "",
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["completion_tokens_90"]
    return (
        f"`{row['name']}`",
        row["architecture"],
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['vocabulary']:,}",
        f"{row['completion_tokens']:g} ({low:g} to {high:g})",
        *(_interval(row, key) for key in ("pass_at_1", "pass_at_8")),
        f"{row['greedy']:.3f}",
        f"{row['pretraining_seconds'] / 60:.1f}",
    )


def _interval(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]"


def _said(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}: pass@1 {_interval(row, 'pass_at_1')}, "
        f"pass@8 {_interval(row, 'pass_at_8')}, greedy {row['greedy']:.3f}"
    )


def _figures(outcome: Outcome) -> dict[str, Any]:
    """pass@1 and pass@8 with their intervals."""
    figures: dict[str, Figure] = {f"pass_at_{j}": outcome.pass_at[j] for j in (1, 8)}
    means = {key: figure.mean for key, figure in figures.items()}
    intervals = {f"{key}_interval": list(figure.interval) for key, figure in figures.items()}
    return means | intervals


def _lengths(policy: Policy, task: Task, seed: int) -> dict[str, Any]:
    """Tokens of sampled completions: the median, and the middle 90 %."""
    from statistics import median

    from capo.policies import sample_completions

    prompts = [problem.prompt for problem in task.eval_problems(_LENGTHS, seed)]
    texts = sample_completions(policy, prompts, 1, 1.0, task.max_completion_tokens, seed)
    lengths = sorted(len(policy.tokenizer(text)["input_ids"]) + 1 for [text] in texts)
    return {
        "completion_tokens": median(lengths),
        "completion_tokens_90": [lengths[len(lengths) // 20], lengths[-len(lengths) // 20]],
    }
