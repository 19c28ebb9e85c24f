"""``capo inspect``: the tokens of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from capo.core.errors import InputError


def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file \\[default: RUN/inspect.html]."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="The recorded step to open at.")] = None,
    limit_mb: Annotated[
        float | None,
        typer.Option(
            help="Size of the file at most; steps are left out beyond it \\[default: 10]."
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it from this machine instead, whatever its size.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(help="Where to serve \\[default: 0, any].", min=0, max=65535),
    ] = None,
) -> None:
    """Show a run's completions token by token: shifts, verdicts, worst offenders, step by step."""
    from capo.lab import inspect as inspection

    if serve:
        for option, value in {"--output": output, "--limit-mb": limit_mb}.items():
            if value is not None:
                raise InputError(option, "is for the file that --serve does not write.")
        inspection.serve(run, port or 0, step=step, say=typer.echo)
        return
    if port is not None:
        raise InputError("--port", "is where to --serve; give that as well.")
    limit = inspection.LIMIT_MB if limit_mb is None else limit_mb
    written = inspection.build_inspection(
        run, output or run / "inspect.html", step=step, limit_mb=limit
    )
    typer.echo(f"{written.path} ({written.steps} steps, {written.size / 1e6:.1f} MB)")
    if written.steps < written.recorded:
        typer.echo(
            f"{written.recorded - written.steps} of {written.recorded} recorded steps do not fit into "
            f"{limit:g} MB; --serve shows all, --limit-mb raises the limit."
        )


def register(app: typer.Typer) -> None:
    """Add this command to ``app``."""
    app.command()(inspect)
