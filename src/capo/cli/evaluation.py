"""``capo eval``: how good a policy is, on one task or on a suite of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capo.cli import completing
from capo.cli.training import AsJson, Quiet
from capo.core.errors import InputError

if TYPE_CHECKING:
    from capo.lab.config import TaskSection
    from capo.lab.devices import Place


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="embedded:sums, a model directory, or a run.",
            autocompletion=completing.policies,
        ),
    ],
    *,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Instead of a task: embedded, math, reasoning-gym, paper, or a TOML or JSONL file.",
            autocompletion=completing.suites,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Of a suite: a directory for its report.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The task \\[default: the run's, or sums].", autocompletion=completing.tasks
        ),
    ] = None,
    problems: Annotated[
        int | None, typer.Option(help="Held-out problems \\[default: 512].", min=1)
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="Completions per problem, for pass@k \\[default: 1].", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of problems and sampling.", min=0)] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="A parameter of the task, KEY=VALUE.")
    ] = None,
    max_completion_tokens: Annotated[
        int | None,
        typer.Option(help="Of a completion \\[default: the run's, or the task's].", min=1),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto (an accelerator where there is one), cpu, cuda, cuda:1.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights: auto (as they were saved, but float32 on the CPU), float32, bfloat16, "
            "float16."
        ),
    ] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a policy's sampled accuracy and pass@k on held-out problems, or on a suite of tasks."""
    from capo.lab.devices import find_place

    if suite is None:
        if output is not None:
            raise InputError("--output", "is for the report of a --suite; give that as well.")
        asked = _Asked(task, problems or 512, k or 1, seed, param or [], max_completion_tokens)
        _evaluate_task(model, asked, find_place(device, dtype), as_json=as_json)
        return
    single = {"--task": task, "--problems": problems, "--k": k, "--seed": seed, "--param": param}
    single["--max-completion-tokens"] = max_completion_tokens
    for option, value in single.items():
        if value is not None:
            raise InputError(option, "is what the suite says; leave it out beside --suite.")
    place = find_place(device, dtype)
    _evaluate_suite(model, suite, output, place, quiet=quiet, as_json=as_json)


@dataclass(frozen=True)
class _Asked:
    """What is asked about one task; None: as the run has it, or the task."""

    task: str | None
    problems: int
    k: int
    seed: int | None
    param: list[str]
    max_completion_tokens: int | None


@dataclass(frozen=True)
class _Trained:
    """A policy to load, what it was trained on, and the tokens that a completion could take then."""

    directory: str
    task: TaskSection
    max_completion_tokens: int | None = None


def _evaluate_task(model: str, asked: _Asked, place: Place, *, as_json: bool) -> None:
    from capo.core.tables import laid_over
    from capo.lab.config import EvalSection
    from capo.lab.devices import sampled_on
    from capo.lab.evaluate import evaluate as measure
    from capo.lab.ingredients import load_configured_task
    from capo.lab.run import quiet_libraries
    from capo.lab.sources import parse_override

    quiet_libraries()
    from capo.policies import load_policy

    trained = _policy_of(model)
    name = asked.task or trained.task.name
    own = name == trained.task.name
    given: dict[str, Any] = {}
    for each in asked.param:
        given = laid_over(given, parse_override(f"params.{each}")["params"])
    graded = load_configured_task(name, laid_over(trained.task.params, given) if own else given)
    limit = asked.max_completion_tokens
    if limit is None and own and "max_completion_tokens" not in given:
        limit = trained.max_completion_tokens
    seed = EvalSection().seed if asked.seed is None else asked.seed
    try:
        held_out = graded.eval_problems(asked.problems, seed)
    except InputError as error:
        raise InputError("--problems", error.message) from None
    policy = load_policy(trained.directory, device=place.device, dtype=place.dtype)
    result = measure(policy, graded, held_out, seed=seed, k=asked.k, max_completion_tokens=limit)
    sampled = sampled_on(policy)
    if as_json:
        about = {"model": trained.directory, "task": name, "seed": seed, **sampled}
        typer.echo(json.dumps({**about, **result.to_dict()}))
        return
    low, high = result.interval
    typer.echo(
        f"sampled accuracy {result.accuracy:.3f} ± {result.stderr:.3f} "
        f"(95% interval {low:.3f} to {high:.3f}), pass@{asked.k} {result.pass_at_k:.3f}, "
        f"on {asked.problems} held-out problems of {name!r}, at most "
        f"{result.completion_tokens_limit} tokens a completion ({sampled['device']}, {sampled['dtype']})"
    )


def _evaluate_suite(
    model: str, suite: str, output: Path | None, place: Place, *, quiet: bool, as_json: bool
) -> None:
    from capo.lab.devices import sampled_on
    from capo.lab.run import quiet_libraries
    from capo.lab.suite_report import HEAD, document_of, rows_of, write_report
    from capo.lab.suite_run import run_suite
    from capo.lab.suites import load_suite

    if output is not None and output.is_file():
        raise InputError("--output", f"{str(output)!r} is a file; give a directory.")
    quiet_libraries()
    from capo.policies import load_policy

    directory = _policy_of(model).directory
    entries = load_suite(suite)  # before the model: data that is missing is news at once
    silent = quiet or as_json
    policy = load_policy(directory, device=place.device, dtype=place.dtype)
    outcomes = run_suite(
        policy, entries, lambda text: None if silent else typer.echo(text, err=True)
    )
    sampled = sampled_on(policy)
    if output is not None:
        write_report(output, model, suite, outcomes, sampled)
    if as_json:
        typer.echo(json.dumps(document_of(model, suite, outcomes, sampled)))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, box=SIMPLE, padding=(0, 1))
    for row in rows_of(outcomes):
        table.add_row(*row)
    Console().print(table)
    typer.echo(f"sampled on {sampled['device']} in {sampled['dtype']}")
    if output is not None:
        typer.echo(f"report: {output / 'report.md'}")


def _policy_of(model: str) -> _Trained:
    """Of a run, its final policy."""
    from capo.lab.config import TaskSection
    from capo.lab.run import recorded_config
    from capo.lab.rundir import RunDirectory
    from capo.policies.pretrain import RECIPE

    directory = RunDirectory(Path(model))
    if not directory.exists:
        recipe = directory.read(RECIPE)  # of a policy that `capo pretrain` has made
        return _Trained(model, TaskSection(**recipe.get("config", {}).get("task", {})))
    if not directory.final.is_dir():
        raise InputError("MODEL", f"the run in {model!r} has no final policy yet.")
    config = recorded_config(model)
    return _Trained(str(directory.final), config.task, config.training.max_completion_tokens)


def register(app: typer.Typer) -> None:
    """Add this command to ``app``."""
    app.command(name="eval")(evaluate)
