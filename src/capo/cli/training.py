"""``capo train`` and ``capo presets``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capo.cli import completing
from capo.core.errors import InputError

if TYPE_CHECKING:
    from capo.lab.config import Config

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while at work.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

INTERRUPTED = 130  # what a shell reports of a process that SIGINT ended


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A TOML file, or the name of a preset.",
            autocompletion=completing.configs,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="As in training.learning_rate=3e-4.",
            autocompletion=completing.overrides,
        ),
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run directory \\[default: runs/CONFIG]."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is there.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue the run that is there.")] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="EVERY",
            help="Record the tokens of every so many steps, for capo inspect; changes no weight "
            "\\[default: 1 where tokens are judged, else none].",
        ),
    ] = None,
    monitor: Annotated[
        int | None,
        typer.Option(
            metavar="EVERY",
            min=1,
            help="Look at every so many steps: log both shifts and gradient noise, warn early; changes "
            "no weight.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a policy and write a run directory.

    Ctrl-C finishes the step and leaves a run that --resume continues to the same weights.
    """
    from capo.lab.progress import make_progress

    if overwrite and resume:
        raise InputError("--resume", "cannot be combined with --overwrite.")
    if config is None and not (resume and output):
        raise InputError("CONFIG", "must be given, or --resume with --output.")
    resolved, output = _resolve(config, overrides or [], output)
    progress = make_progress(quiet=quiet or as_json)
    from capo.lab.run import Interrupted
    from capo.lab.run import train as run

    try:
        directory = run(
            resolved,
            output,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            tokens=tokens,
            monitor=monitor,
        )
    except Interrupted as interrupted:
        typer.echo(f"capo: {interrupted}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    facts = _facts(directory)
    typer.echo(json.dumps(facts) if as_json else _sentence(facts))


def presets(
    action: Annotated[
        str,
        typer.Argument(
            help="list, or show.", metavar="[list|show]", autocompletion=completing.actions
        ),
    ] = "list",
    name: Annotated[
        str | None,
        typer.Argument(help="A preset to show.", autocompletion=completing.presets),
    ] = None,
) -> None:
    """List the presets, or show one."""
    from capo.lab.sources import preset_names, preset_text

    if action == "show" and name is not None:
        typer.echo(preset_text(name), nl=False)
    elif action == "show":
        raise InputError("NAME", f"must be one of {', '.join(preset_names())}.")
    elif action == "list":
        for each in preset_names():
            comment = preset_text(each).splitlines()[0].removeprefix("# ")
            typer.echo(f"{each:<24}{comment}")
    else:
        raise InputError("presets", f"must be followed by list or show NAME, got {action!r}.")


def _resolve(config: str | None, overrides: list[str], output: Path | None) -> tuple[Config, Path]:
    from capo.lab.run import recorded_config
    from capo.lab.sources import load_config

    if config is None or (output is not None and "=" in config):
        # `--resume --output DIR`: the run knows its own configuration.
        assert output is not None
        if config is not None:
            raise InputError("CONFIG", f"must come before the overrides, got {config!r}.")
        return recorded_config(output), output
    return load_config(config, overrides), output or Path("runs") / Path(config).stem


def _facts(directory: Path) -> dict[str, Any]:
    from capo.lab.rundir import RunDirectory

    run = RunDirectory(directory)
    evals = run.rows("evals.jsonl")
    return {
        "run": str(directory),
        "policy": str(run.final),
        "base_accuracy": evals[0]["accuracy"],
        "accuracy": evals[-1]["accuracy"],
        "stderr": evals[-1]["stderr"],
        "completions": evals[-1]["completions"],
        "seconds": evals[-1]["seconds"],
    }


def _sentence(facts: dict[str, Any]) -> str:
    return (
        f"accuracy {facts['base_accuracy']:.3f} -> {facts['accuracy']:.3f} "
        f"± {facts['stderr']:.3f} after {facts['completions']:,} completions "
        f"in {facts['seconds']:.0f} s; policy: {facts['policy']}"
    )


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(train)
    app.command()(presets)
