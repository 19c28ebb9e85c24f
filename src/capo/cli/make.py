"""``capo demo``, ``capo pretrain`` and ``capo bench``: the shows and the workshop."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from capo.cli import completing
from capo.cli.training import INTERRUPTED, AsJson, Quiet
from capo.core.errors import InputError

BENCHES = {
    "step": "capo.lab.bench_step",
    "core": "capo.lab.bench_core",
    "fidelity": "capo.lab.bench_fidelity",
    "trust-region": "capo.lab.study.command",
    "levers": "capo.lab.study.levers_command",
    "warning": "capo.lab.warning.command",
    "plan": "capo.lab.bench_plan",
    "policies": "capo.lab.bench_policies",
    "larger": "capo.lab.bench_larger",
    "gpu": "capo.lab.gpu.command",
}

HELP = "--help"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to put it.")] = Path(
        "runs/demo"
    ),
    overwrite: Annotated[bool, typer.Option(help="Train anew even what is finished.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a real policy four ways and write the report: ten to 25 minutes, by the machine."""
    from capo.lab.demo import run_demo
    from capo.lab.run import Interrupted

    try:
        run_demo(output, overwrite=overwrite, quiet=quiet)
    except Interrupted as interrupted:
        typer.echo(
            f"capo: interrupted after step {interrupted.step} of {interrupted.steps} of "
            f"{interrupted.output.name}; continue with: capo demo --output {output}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def pretrain(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The model directory to make.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|NAME",
            autocompletion=completing.recipes,
            help="A TOML file, or a recipe by name \\[default: the shipped policy's recipe].",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in steps=500.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Write into a directory that has files.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Pre-train a policy: as the shipped one was, or by another recipe (docs/how-to/policies.md)."""
    from capo.core.tables import laid_over
    from capo.lab.run import quiet_libraries
    from capo.lab.sources import parse_override

    overrides: dict[str, Any] = {}
    for setting in settings or []:
        overrides = laid_over(overrides, parse_override(f"set.{setting}")["set"])
    quiet_libraries()
    from capo.policies.pretrain import PretrainConfig
    from capo.policies.pretrain import pretrain as run

    if config is None:
        recipe = PretrainConfig.from_dict(overrides)
    else:
        recipe = PretrainConfig.from_toml(config, overrides)

    def say(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 20) == 0:
            typer.echo(f"step {step}/{steps}, loss {loss:.3f} nats a token", err=True)

    result = run(recipe, output, progress=None if quiet else say, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(result.recipe))
        return
    typer.echo(f"policy: {result.directory}")


def bench(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="step|core|fidelity|trust-region|levers|warning|plan|policies|larger|gpu",
            help="What to measure.",
            autocompletion=completing.benches,
        ),
    ],
) -> None:
    """Time a step (step, core), judge its predictors (fidelity), compare rules (trust-region),
    combine all levers (levers), judge the early warning (warning), hold the plan against real
    runs (plan), pre-train and measure policies (policies), train a larger one (larger), check and
    time a GPU (gpu). Each has options of its own: capo bench step --help.
    """
    if what == HELP:
        typer.echo(context.get_help())
        return
    if what not in BENCHES:
        raise InputError("bench", f"must be one of {', '.join(BENCHES)}, got {what!r}.")
    importlib.import_module(BENCHES[what]).main(context.args)


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(demo)
    app.command()(pretrain)
    # Without a help option of its own, `--help` is what is measured, or goes to the bench that is.
    app.command(
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(bench)
