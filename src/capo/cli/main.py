"""The command ``capo``. What is heavy is imported inside the commands: ``--help`` is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import capo
from capo.cli import doctor, evaluation, inspection, lab, make, planning, results, shells, training
from capo.core.errors import InputError

app = typer.Typer(
    name="capo",
    help="Curvature-aware policy optimization: look at a policy-gradient step before it is taken.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"capo {capo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


for module in (training, results, inspection, evaluation, lab, planning, make, doctor):
    module.register(app)


def main() -> None:
    """Run the command line. Bad input ends with one sentence on standard error and exit code 2."""
    shells.prepare()
    try:
        app()
    except InputError as error:
        typer.echo(f"capo: {error}", err=True)
        sys.exit(2)
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("", "capo"):  # a fault of ours
            raise
        typer.echo(f"capo: {_remedy(error, module)}", err=True)
        sys.exit(2)


def _remedy(error: ImportError, module: str) -> str:
    """What to do about a package that is missing, or cannot be imported."""
    from capo.doctor.requirements import install_line, needed

    if not isinstance(error, ModuleNotFoundError):
        return f"{error}; `capo doctor` says what is broken and what to do"
    asked = next((each for each in needed() if each.module == module), None)
    if asked is None:
        return f"{module} is missing; pip install {module}"
    extra = next((extra for extra in ("trl", *asked.extras) if extra in asked.extras and extra), "")
    return f"{module} is missing; {install_line(extra) if extra else asked.fix}"


if __name__ == "__main__":
    main()
