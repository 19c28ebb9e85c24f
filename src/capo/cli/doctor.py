"""``capo doctor``: what is installed, what of it works, and what to do about the rest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from capo.cli.training import AsJson

if TYPE_CHECKING:
    from capo.doctor import Finding


def doctor(as_json: AsJson = False) -> None:
    """Try every package, backend, engine and plug-in, and say what to do about what does not work.

    Ends with 1 if something that is installed is broken; what is absent is no fault.
    """
    import platform

    import capo
    from capo.doctor import examine

    if as_json:
        findings = list(examine())
        document = {
            "capo": capo.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "broken": [each.name for each in findings if each.state == "broken"],
            "findings": [each.as_dict() for each in findings],
        }
        typer.echo(json.dumps(document, indent=1))
    else:
        findings = _shown()
    if any(each.state == "broken" for each in findings):
        raise typer.Exit(1)


def _shown() -> list[Finding]:
    from rich.console import Console

    from capo.doctor import examine
    from capo.doctor.show import Printer

    console = Console()
    printer, findings = Printer(console), []
    with console.status("") as status:
        for found in examine(lambda what: status.update(f"trying {what} …")):
            findings.append(found)
            printer.finding(found)
    printer.end(findings)
    return findings


def register(app: typer.Typer) -> None:
    """Add this command to ``app``."""
    app.command()(doctor)
