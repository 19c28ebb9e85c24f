"""Writing a figure up: pictures, tables, and a record of where they came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.figures.figure import Drawn, FigureOf
from capo.lab.provenance import collect_provenance
from capo.lab.rundir import write_text
from capo.lab.sweep.curves import save_figures
from capo.lab.sweep.grid import Grid
from capo.lab.sweep.reading import GridResult, read_grid
from capo.lab.sweep.report import run_rows
from capo.lab.sweep.table import csv_text, markdown
from capo.lab.sweep.watching import clock

RECORD = "record.json"


def write_up(
    figure: FigureOf,
    grid: Grid,
    runs: Path,
    output: Path,
    failed: Mapping[str, str],
    wall_seconds: float,
) -> Path:
    """Draw what is there of a figure's runs and write it to ``output``.

    Args:
        figure: which.
        grid: its grid as it was run.
        runs: the folder of all run directories.
        output: its folder; what an older write-up of no more runs has left there is replaced.
        failed: points that failed, with their messages.
        wall_seconds: that making what was missing took, this time; added to what an earlier call of the
            same command has recorded.

    Returns:
        the folder.

    Raises:
        InputError: there is no run, or see `check_replaceable`; nothing has been written then.
    """
    result = read_grid(grid, runs)
    if not result.runs and not failed:
        raise InputError("--runs", f"no run of {figure.name} is over in {str(runs)!r}.")
    before = check_replaceable(output, grid, len(result.runs))
    drawn = figure.draw(result)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "runs.csv", csv_text(run_rows(result)))
    drawn.figures = save_figures(drawn.figures, output)
    _remove_others(output, drawn)
    same = before.get("command") == command_of(figure, grid)
    wall = float(before["wall_seconds"]) if same else 0.0
    record = record_of(figure, grid, result, drawn, failed, wall + wall_seconds)
    write_text(output / RECORD, json.dumps(record, indent=1) + "\n")
    write_text(output / "README.md", readme(figure, record, drawn))
    return output


def check_replaceable(output: Path, grid: Grid, runs: int) -> dict[str, Any]:
    """Refuse to write over a record that says more, or something else.

    Args:
        output: the folder of a figure.
        grid: as it is to be written up.
        runs: that there are, or will be at most.

    Returns:
        the record that is there; ``{}`` where there is none.

    Raises:
        InputError: the record in the folder was made with other settings, or of more runs.
    """
    before = _record_before(output)
    if not before:
        return {}
    there, another = f"the record in {str(output)!r} was made", "give another folder."
    if before["overrides"] != grid.overrides:
        settings = " ".join(f"--set {each}" for each in before["overrides"]) or "no --set"
        raise InputError("--output", f"{there} with {settings}; {another}")
    if runs < before["runs"]:
        raise InputError(
            "--output", f"{there} of {before['runs']} runs, here are {runs}; {another}"
        )
    return before


def record_of(
    figure: FigureOf,
    grid: Grid,
    result: GridResult,
    drawn: Drawn,
    failed: Mapping[str, str],
    wall_seconds: float,
) -> dict[str, Any]:
    """Everything that a reader or a verdict needs."""
    provenance = collect_provenance()
    made = [run.mark.provenance for run in result.runs]
    return {
        "figure": figure.name,
        "title": figure.title,
        "command": command_of(figure, grid),
        "seeds": grid.seeds,
        "overrides": grid.overrides,
        "runs": len(result.runs),
        "wanted": sum(cell.wanted for cell in result.cells),
        "failed": dict(failed),
        "commits": sorted({str(each.get("git_commit")) for each in made}),
        "uncommitted_changes": any(each.get("git_dirty") for each in made),
        "hardware": provenance["hardware"],
        "machines": _machines(made),
        "packages": provenance["packages"],
        "wall_seconds": round(wall_seconds, 1),
        "core_seconds": round(sum(run.mark.seconds for run in result.runs), 1),
        "numbers": drawn.numbers,
    }


def _machines(made: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many runs each kind of machine has made."""
    found = [each["hardware"] for each in made if "hardware" in each]
    named = (f"{h['cpu']}, {h['cores']} core{'s' * (h['cores'] != 1)}" for h in found)
    return dict(Counter(named).most_common())


def _record_before(output: Path) -> dict[str, Any]:
    """What an earlier call has recorded; ``{}`` where none has."""
    path = output / RECORD
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError("--output", f"{str(path)!r} is not valid JSON: {error}.") from None
    return record


def _remove_others(output: Path, drawn: Drawn) -> None:
    """What earlier figures have left behind, once these are written."""
    kinds = (".svg", ".png", ".csv")
    written = {"runs.csv", *(each.slug + kind for each in drawn.figures for kind in kinds)}
    for path in output.iterdir():
        if path.suffix in kinds and path.name not in written:
            path.unlink()


def command_of(figure: FigureOf, grid: Grid) -> str:
    """The command that repeats it."""
    parts = ["capo lab reproduce", figure.name]
    if grid.seeds != figure.grid(None, []).seeds:
        parts.append(f"--seeds {len(grid.seeds)}")
    parts += [f"--set {setting}" for setting in grid.overrides]
    return " ".join(parts)


def readme(figure: FigureOf, record: dict[str, Any], drawn: Drawn) -> str:
    """For people."""
    machines = [
        name if len(record["machines"]) == 1 else f"{name} ({count} runs)"
        for name, count in record["machines"].items()
    ]
    seeds = ", ".join(map(str, record["seeds"]))
    commits = ", ".join(commit[:12] for commit in record["commits"]) or "none"
    changed = " with uncommitted changes" if record["uncommitted_changes"] else ""
    core, wall = clock(record["core_seconds"]), clock(record["wall_seconds"])
    facts = [
        f"Command: `{record['command']}`. Seeds: {seeds}. Commit: {commits}{changed}.",
        f"{record['runs']} of {record['wanted']} runs, {core} of processes in all"
        + (f"; making them took {wall} of wall time here. " if record["wall_seconds"] else ". ")
        + f"{'; '.join(machines)}.",
    ]
    parts = [f"# {figure.title}", "\n".join(facts)]
    if record["failed"]:
        rows = [{"failed": name, "why": why} for name, why in record["failed"].items()]
        parts.append(markdown(rows))
    parts += [f"![{each.title}]({each.slug}.svg)\n\n{each.caption}" for each in drawn.figures]
    for title, rows in drawn.tables.items():
        parts.append(f"## {title}\n\n{markdown(rows)}")
    parts += drawn.notes
    return "\n\n".join(parts) + "\n"
