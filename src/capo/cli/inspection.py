"""``capo inspect``: the tokens of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file [default: RUN/inspect.html]."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="The recorded step to open at.")] = None,
    limit_mb: Annotated[
        float, typer.Option(help="Size of the file at most; steps are left out beyond it.")
    ] = 10.0,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it from this machine instead, whatever its size.")
    ] = False,
    port: Annotated[int, typer.Option(help="Where to serve; 0 for any.", min=0, max=65535)] = 0,
) -> None:
    """Show a run's completions token by token: shifts, verdicts, worst offenders, step by step."""
    from capo.lab import inspect as inspection

    if serve:
        inspection.serve(run, port, step=step, say=typer.echo)
        return
    written = inspection.build_inspection(
        run, output or run / "inspect.html", step=step, limit_mb=limit_mb
    )
    typer.echo(f"{written.path} ({written.steps} steps, {written.size / 1e6:.1f} MB)")
    if written.steps < written.recorded:
        typer.echo(
            f"{written.recorded - written.steps} of {written.recorded} recorded steps do not fit into "
            f"{limit_mb:g} MB; --serve shows all, --limit-mb raises the limit."
        )


def register(app: typer.Typer) -> None:
    """Add this command to ``app``."""
    app.command()(inspect)
