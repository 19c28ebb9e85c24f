"""``capo lab``: grids of runs, and the paper's figures from them."""

from __future__ import annotations

import json
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capo.cli import completing
from capo.cli.training import INTERRUPTED, AsJson, Quiet
from capo.core.errors import InputError
from capo.lab.provenance import cores

if TYPE_CHECKING:
    from capo.lab.sweep.drive import Swept
    from capo.lab.sweep.grid import Grid
    from capo.lab.sweep.point import Point

GridFile = Annotated[Path, typer.Argument(metavar="GRID", help="A grid in TOML.")]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Processes, one thread each \\[default: one a core]."),
]
Runs = Annotated[Path, typer.Option(help="Where the run directories are.")]
Seeds = Annotated[int | None, typer.Option(help="So many seeds, 0 and up \\[default: the grid's].")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Laid over every point, as in training.steps=4.",
        autocompletion=completing.overrides,
    ),
]
Only = Annotated[
    str,
    typer.Option(metavar="PATTERN", help="Only cells whose names match, as in 'sums/*'."),
]
DryRun = Annotated[bool, typer.Option(help="Say what would be run, and about how long it takes.")]
RUNS = Path("runs/lab")

lab = typer.Typer(
    name="lab",
    help="Grids of runs: sweep, status, report; the paper's figures and a verdict on each claim.",
    no_args_is_help=True,
)


@lab.command()
def sweep(
    grid: GridFile,
    jobs: Jobs = None,
    runs: Runs = RUNS,
    seeds: Seeds = None,
    settings: Settings = None,
    only: Only = "*",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the runs of a grid that are missing.

    Ctrl-C or a kill loses nothing: the same command continues.
    """
    from capo.lab.sweep.reading import settle

    checked = _grid(grid, seeds, settings)
    supposed = matching(settle(checked, runs).points(supposed=True), only)
    if not supposed:
        raise InputError("--only", f"{only!r} matches none of the grid's cells.")
    _forecast(
        supposed, runs, jobs or cores(), as_json=as_json, quiet=(quiet or as_json) and not dry_run
    )
    if dry_run:
        return
    swept = make_grid(checked, runs, jobs or cores(), quiet or as_json, only)
    if as_json:
        from capo.lab.sweep.reading import read_grid
        from capo.lab.sweep.table import table_of

        typer.echo(json.dumps({**asdict(swept), "table": table_of(read_grid(checked, runs))}))
        return _fail(swept.failed)
    _print_table(checked, runs, swept.failed)
    _end(swept)


@lab.command()
def status(
    grid: GridFile,
    runs: Runs = RUNS,
    seeds: Seeds = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say where every point of a grid stands. Ends with 1 if one has failed."""
    from capo.lab.sweep.drive import state_of
    from capo.lab.sweep.reading import settle

    settled = settle(_grid(grid, seeds, settings), runs)
    rows = [(point, *state_of(point, runs)) for point in settled.points()]
    waiting = len(settled.points(supposed=True)) - len(rows)
    if as_json:
        document = [
            {"point": p.name, "folder": p.folder(), "state": state, "word": word}
            for p, state, word in rows
        ]
        typer.echo(json.dumps(document, indent=1))
    else:
        counts: dict[str, int] = {}
        for _, state, _ in rows:
            counts[state] = counts.get(state, 0) + 1
        if waiting:
            counts["waiting for a search"] = waiting
        typer.echo(", ".join(f"{number} {state}" for state, number in counts.items()))
        for point, state, word in rows:
            if word or state == "diverged":
                typer.echo(f"{point.name}: {state}{f', {word}' if word else ''} ({point.folder()})")
    if any(state == "failed" for _, state, _ in rows):
        raise typer.Exit(1)


@lab.command()
def report(
    grid: GridFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    runs: Runs = RUNS,
    seeds: Seeds = None,
    settings: Settings = None,
) -> None:
    """Write a grid's table and learning curves, with JSON and CSV."""
    from capo.lab.sweep.reading import read_grid
    from capo.lab.sweep.report import write_report

    checked = _grid(grid, seeds, settings)
    checked.points()
    write_report(read_grid(checked, runs), output, grid.stem)
    typer.echo(str(output / "README.md"))


@lab.command()
def reproduce(
    figure: Annotated[
        str,
        typer.Argument(
            metavar="FIGURE|all",
            help="See `capo lab figures`.",
            autocompletion=completing.figures,
        ),
    ],
    jobs: Jobs = None,
    runs: Runs = RUNS,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Results go to OUTPUT/FIGURE.")
    ] = Path("results"),
    seeds: Seeds = None,
    settings: Settings = None,
    dry_run: DryRun = False,
    report_only: Annotated[bool, typer.Option(help="Write up the runs that are there.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Regenerate a figure or table of the paper from nothing: runs, figure, record.

    Figures share runs; what is there is not run again. With `all` a figure that has no run at all is left
    as it is recorded.
    """
    from capo.lab.figures import all_figures, figure_named
    from capo.lab.figures.reproduce import check_replaceable, write_up
    from capo.lab.sweep.drive import state_of
    from capo.lab.sweep.grid import seeds_option
    from capo.lab.sweep.reading import settle
    from capo.lab.sweep.watching import clock

    chosen = list(all_figures()) if figure == "all" else [figure_named(figure)]
    number = seeds_option(seeds)
    grids = {each.name: each.grid(number, settings or []) for each in chosen}
    wanted = {name: settle(grid, runs).points(supposed=True) for name, grid in grids.items()}
    quiet = quiet or as_json
    points = [point for each in wanted.values() for point in each]
    _forecast(points, runs, jobs or cores(), as_json=as_json, quiet=quiet and not dry_run)
    if dry_run:
        return
    for name, its_points in wanted.items():  # before anything is made for a record that has to stay
        if not report_only:
            check_replaceable(output / name, grids[name], len(its_points))
    failed: dict[str, str] = {}
    written: dict[str, str] = {}
    for each in chosen:
        seconds, its_failed = 0.0, {}
        if not report_only:
            if len(chosen) > 1 and not quiet:
                typer.echo(f"{each.name}: {each.title}", err=True)
            swept = make_grid(grids[each.name], runs, jobs or cores(), quiet)
            its_failed = swept.failed
            failed |= its_failed
            seconds = swept.seconds if swept.made else 0.0
        elif len(chosen) > 1 and not any(
            state_of(point, runs)[0] in ("finished", "diverged") for point in wanted[each.name]
        ):
            typer.echo(f"{each.name}: no run is there; left as it is", err=True)
            continue
        folder = write_up(each, grids[each.name], runs, output / each.name, its_failed, seconds)
        written[each.name] = str(folder / "README.md")
        if not as_json:
            typer.echo(f"{each.name}: {written[each.name]} ({clock(seconds)})")
    if as_json:
        typer.echo(json.dumps({"figures": written, "failed": failed}))
    _fail(failed)


@lab.command()
def figures(
    runs: Runs = RUNS, jobs: Jobs = None, seeds: Seeds = None, as_json: AsJson = False
) -> None:
    """List what can be reproduced, and how long each takes."""
    from capo.lab.figures import all_figures
    from capo.lab.sweep.estimate import forecast
    from capo.lab.sweep.grid import seeds_option
    from capo.lab.sweep.reading import settle

    number = seeds_option(seeds)
    everything: list[Point] = []
    rows: list[dict[str, Any]] = []
    for each in all_figures():
        points = settle(each.grid(number, []), runs).points(supposed=True)
        everything += points
        cost = forecast(points, runs)
        rows.append(
            {"figure": each.name, "title": each.title, "runs": cost.runs, "missing": cost.missing}
            | {"core_minutes": round(cost.core_seconds / 60, 1)}
        )
    together = forecast(everything, runs)
    if as_json:
        total = {"runs": together.runs, "core_minutes": round(together.core_seconds / 60, 1)}
        typer.echo(json.dumps({"figures": rows, "all": total}, indent=1))
        return
    typer.echo(f"{'figure':<12}{'runs':>6}{'missing':>9}{'core min':>10}  what")
    for row in rows:
        typer.echo(
            f"{row['figure']:<12}{row['runs']:>6}{row['missing']:>9}{row['core_minutes']:>10.1f}  "
            f"{row['title']}"
        )
    typer.echo(f"all: {together.sentence(jobs or cores())}")


@lab.command()
def verdicts(
    results: Annotated[Path, typer.Option(help="Where the results are.")] = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Write the one-page verdict on each claim of the paper, from the recorded results."""
    from capo.lab.figures.verdicts import judge_all, write_verdicts

    found = judge_all(results)
    path = write_verdicts(found, results)
    typer.echo(json.dumps([each.as_dict() for each in found], indent=1) if as_json else str(path))


@lab.command()
def pack(
    grid: Annotated[
        str,
        typer.Argument(metavar="GRID|FIGURE", help="A grid in TOML, or see `capo lab figures`."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .tar.xz file to write.")],
    runs: Runs = RUNS,
    seeds: Seeds = None,
    settings: Settings = None,
) -> None:
    """Put the finished points of a grid or figure into one small file, for another machine or the record.

    Everything that reports read: evaluations, metrics, provenance; no policies and no tokens.
    """
    from capo.lab.figures import figure_named
    from capo.lab.sweep.archive import pack as write
    from capo.lab.sweep.grid import seeds_option
    from capo.lab.sweep.reading import settle

    if Path(grid).suffix == ".toml":
        checked = _grid(Path(grid), seeds, settings)
    else:
        checked = figure_named(grid).grid(seeds_option(seeds), settings or [])
    points = settle(checked, runs).points()
    number = write(points, runs, output)
    size = output.stat().st_size / 2**20
    typer.echo(f"{number} of {len(points)} points in {output}, {size:.1f} MiB")


@lab.command()
def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Made by `capo lab pack`.")],
    runs: Runs = RUNS,
) -> None:
    """Take packed points out, so that they are not run again. What is finished already stays."""
    from capo.lab.sweep.archive import unpack as take

    taken = take(archive, runs)
    typer.echo(f"{taken.new} points now in {runs}, {taken.there} were there already")


def make_grid(grid: Grid, runs: Path, jobs: int, quiet: bool, only: str = "*") -> Swept:
    """Make what is missing of a grid: its searches and all that waits for none, then what they decide."""
    from capo.lab.sweep.reading import settle

    before = settle(grid, runs)
    swept = make_points(matching(before.points(), only), runs, jobs, quiet)
    after = settle(before, runs)
    if after.choices != before.choices:
        later = make_points(matching(after.points(), only), runs, jobs, quiet)
        swept = swept.then(later)
    return swept


def matching(points: list[Point], only: str) -> list[Point]:
    """Those of cells whose names match the pattern."""
    return [point for point in points if fnmatchcase(point.cell.name, only)]


def make_points(points: list[Point], runs: Path, jobs: int, quiet: bool) -> Swept:
    """Make what is missing; an interrupt ends the command."""
    from capo.lab.sweep.drive import sweep as drive
    from capo.lab.sweep.watching import make_watcher

    try:
        return drive(points, runs, jobs, make_watcher(quiet))
    except KeyboardInterrupt:
        typer.echo("capo: interrupted; continue with the same command", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _grid(path: Path, seeds: int | None, settings: list[str] | None) -> Grid:
    from capo.lab.sweep.grid import load_grid, seeds_option

    return load_grid(path).with_seeds(seeds_option(seeds)).with_settings(settings or [])


def _forecast(points: list[Point], runs: Path, jobs: int, *, as_json: bool, quiet: bool) -> None:
    from capo.lab.sweep.estimate import forecast

    cost = forecast(points, runs)
    if quiet:
        return
    document = {"runs": cost.runs, "missing": cost.missing, "core_seconds": cost.core_seconds}
    typer.echo(json.dumps(document) if as_json else cost.sentence(jobs), err=not as_json)


def _print_table(grid: Grid, runs: Path, failed: dict[str, str]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from capo.lab.sweep.reading import read_grid
    from capo.lab.sweep.table import shown, table_of

    rows = [shown(row, grid.target) for row in table_of(read_grid(grid, runs))]
    table = Table(*rows[0], box=SIMPLE, padding=(0, 1))
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    for name, message in failed.items():
        typer.echo(f"failed: {name}: {message}")


def _end(swept: Swept) -> None:
    from capo.lab.sweep.watching import clock

    typer.echo(
        f"{swept.made} made, {swept.found} found, {len(swept.failed)} failed, {clock(swept.seconds)}"
    )
    _fail(swept.failed)


def _fail(failed: dict[str, str]) -> None:
    if failed:
        typer.echo(
            f"capo: {len(failed)} points failed; the same command tries them again", err=True
        )
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.add_typer(lab)
