"""A larger policy on a GPU, in one sitting: pre-train it, measure it, train it in every regime, pack up.

    capo bench larger GRID [--tiny SETTINGS] --runs runs/larger --output out     # on the GPU
    capo bench larger --report out/runs.tar.gz --output results/gpu/larger_policy

The first command checks every way of training (plain, with a selection, with a trust region) on the
embedded policy beside the pre-training, leaves out those that fail, and ends after ``--seconds`` whatever
is at work then. It writes ``runs.tar.gz`` (the run directories without weights) and ``summary.json``; the
second makes figures and a page of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tarfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.options import at_least_one
from capo.lab.pool import Failure, working
from capo.lab.provenance import collect_provenance
from capo.lab.rundir import write_text
from capo.lab.sections import validate
from capo.lab.study.jobs import overrides_of
from capo.lab.sweep.drive import sweep
from capo.lab.sweep.execute import Mark, end_point, make_point, pretrained
from capo.lab.sweep.grid import Grid, load_grid
from capo.lab.sweep.point import Point, policy_folder
from capo.lab.sweep.watching import Watcher

ARCHIVE, SUMMARY, SITTING = "runs.tar.gz", "summary.json", "sitting.json"
JOBS = (
    8  # a policy this small leaves a GPU idle between kernels; more processes wait for one another
)
PACKING = 10.0  # seconds kept for packing up
_PACKED = ("*.json", "*.jsonl")
_TRIED: dict[str, Any] = {  # what every way of training is checked on
    **{"policy.path": "embedded:sums", "task.name": "sums"},
    **{"training.completions_per_step": 16, "training.micro_batch": 8, "training.steps": 4},
    **{
        "training.num_generations": 4,
        "training.save_every": 4,
        "training.max_completion_tokens": 8,
    },
    **{"eval.problems": 16, "eval.every_completions": 32},
}


_NOT_TRIED = ("policy.path", "task.name", "task.params")


@dataclass
class Sitting:
    """What was done, when, and with what outcome.

    Attributes:
        grid: as it was run.
        seconds: by stage.
        checks: by way of training, ``"ok"`` or what went wrong.
        failed: by point, what went wrong.
        policy: the base policy's ``recipe.json``.
        losses: of pre-training, step and nats a token.
        provenance: commit, hardware, package versions.
    """

    grid: Grid
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "grid": self.grid.model_dump(mode="json")}


def main(arguments: list[str] | None = None) -> None:
    """Run the sitting, or report one."""
    parser = argparse.ArgumentParser(
        prog="capo bench larger", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("grid", nargs="?", type=Path, metavar="GRID", help="what is compared")
    parser.add_argument("--tiny", type=Path, metavar="FILE", help="laid over the grid: a rehearsal")
    parser.add_argument("--report", type=Path, metavar="ARCHIVE", help="write up, run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/larger"), help="run directories")
    parser.add_argument("--output", type=Path, required=True, help="directory of what comes out")
    parser.add_argument("--jobs", type=int, default=JOBS, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=400.0, help="of everything")
    options = parser.parse_args(arguments)
    if options.report is not None:
        from capo.lab.bench_larger_report import report

        print(report(options.report, options.output))
        return
    if options.grid is None:
        raise InputError("GRID", "must be given, or --report ARCHIVE.")
    at_least_one(options, "jobs")
    grid = load_grid(options.grid)
    if options.tiny is not None:
        grid = smaller(grid, options.tiny)
    sit(grid, options.runs, options.output, options.jobs, options.seconds)


def smaller(grid: Grid, path: Path) -> Grid:
    """The grid with the settings and the recipes of a file laid over it.

    Raises:
        InputError: the file cannot be used.
    """
    try:
        laid = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError("--tiny", f"{str(path)!r} cannot be read: {error}.") from None
    document = grid.model_dump(mode="json")
    document["overrides"] += overrides_of(laid.get("set", {}))
    for name, recipe in laid.get("policies", {}).items():
        document["policies"][name] = document["policies"].get(name, {}) | recipe
    return validate(Grid, document)


def sit(grid: Grid, runs: Path, output: Path, jobs: int, seconds: float) -> Sitting:
    """Everything, within so many seconds; ``output`` has an archive and a summary afterwards.

    Raises:
        InputError: the grid cannot be used.
        RuntimeError: no way of training works here.
    """
    from capo.lab.run import quiet_libraries

    began = time.monotonic()
    points = grid.points()
    output.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sitting = Sitting(grid, provenance=collect_provenance())

    def said(words: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {words}", flush=True)

    said(f"{sitting.provenance['hardware']}")
    _pretrain_and_check(sitting, runs, said)
    points = [point for point in points if sitting.checks[way(point)] == "ok"]
    if not points:
        raise RuntimeError(f"no way of training works here: {sitting.checks}")
    sitting.seconds["pretraining"] = time.monotonic() - began
    said(f"training, {jobs} at a time")
    left = max(0.0, seconds - PACKING - (time.monotonic() - began))
    swept = sweep(points, runs, jobs, _Saying(said), max_seconds=left, make=make_uncompiled)
    sitting.failed = swept.failed
    for point in points:
        if point.name not in swept.failed:
            end_point(point, runs, sitting.provenance)
    sitting.seconds["training"] = swept.seconds
    sitting.seconds["all"] = time.monotonic() - began
    pack(sitting, runs, output)
    said(f"packed {output / ARCHIVE}, {(output / ARCHIVE).stat().st_size / 1e6:.1f} MB")
    return sitting


def make_uncompiled(point: Point, runs: Path, provenance: dict[str, Any]) -> Mark:
    """Make a point without ``torch.compile``, which takes longer than it saves in minutes."""
    from capo.core.statistics import options

    with options(compile=False):
        return make_point(point, runs, provenance)


def _pretrain_and_check(sitting: Sitting, runs: Path, said: Any) -> None:
    """Pre-train the policies of the grid; beside it, train a few steps in every way there is."""
    tried = runs / "checks"
    shutil.rmtree(tried, ignore_errors=True)
    checks = {way(point): point for point in checked(sitting.grid).points()}
    with working(min(4, len(checks)), make_uncompiled, tried, {}) as workers:
        for point in checks.values():
            workers.submit(point)
        for recipe in recipes(sitting.grid):
            _pretrain(sitting, recipe, runs, said)
        while workers.running:
            for point, made in workers.finished():
                failure = made.message if isinstance(made, Failure) else "ok"
                sitting.checks[way(point)] = failure
    shutil.rmtree(tried, ignore_errors=True)
    said(f"checks: {sitting.checks}")


def recipes(grid: Grid) -> list[dict[str, Any]]:
    """Of the base policies that the grid asks for, each once."""
    found = {cell.policy_folder: cell.recipe for cell in grid.cells() if cell.recipe is not None}
    return list(found.values())


def way(point: Point) -> str:
    """How the point trains, whatever its batch and its rate."""
    capo = point.resolved.capo
    parts = {"selection": capo.selection is not None, "region": capo.trust_region is not None}
    return " and ".join(name for name, there in parts.items() if there) or "plain"


def checked(grid: Grid) -> Grid:
    """A few steps of every variant, on the embedded policy and its task."""
    overrides = [*grid.overrides, *overrides_of(_TRIED)]
    settings = {key: value for key, value in grid.set.items() if key not in _NOT_TRIED}
    return grid.model_copy(update={"seeds": [0], "set": settings, "overrides": overrides})


def _pretrain(sitting: Sitting, recipe: dict[str, Any], runs: Path, said: Any) -> None:
    import torch

    last = time.monotonic()

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal last
        if step == 1 or step % 10 == 0:
            sitting.losses.append((step, loss))
        if step == 1 or time.monotonic() - last > 15:
            last = time.monotonic()
            said(f"pre-training: step {step}, {loss:.3f} nats a token")

    directory = pretrained(recipe, runs, progress=progress)
    gc.collect()
    torch.cuda.empty_cache()  # the device is for the runs to come; nothing to do without one
    sitting.policy = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
    said(
        f"policy: {sitting.policy['weights']['parameters'] / 1e6:.1f} M parameters, "
        f"{sitting.policy['steps']} steps, {sitting.policy['measured']}"
    )


class _Saying(Watcher):
    """A watcher that says one line a point, with the sitting's clock."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def finished(self, point: Point, mark: Mark) -> None:
        """A point is over."""
        self.said(f"{point.name}: {mark.ended}, {mark.seconds:.0f} s")

    def failed(self, point: Point, message: str) -> None:
        """A point failed."""
        self.said(f"{point.name}: FAILED, {message}")


def pack(sitting: Sitting, runs: Path, output: Path) -> None:
    """Write the archive, the run directories without weights, and the summary."""
    from capo.lab.sweep.reading import read_grid
    from capo.lab.sweep.table import shown, table_of

    write_text(runs / SITTING, json.dumps(sitting.as_dict(), indent=1) + "\n")
    folders = {point.folder() for point in sitting.grid.points()}
    folders |= {policy_folder(recipe) for recipe in recipes(sitting.grid)}
    with tarfile.open(output / ARCHIVE, "w:gz") as archive:
        archive.add(runs / SITTING, SITTING)
        for folder in sorted(folders):
            for path in _files(runs / folder, _PACKED):
                archive.add(path, str(path.relative_to(runs)))
    rows = table_of(read_grid(sitting.grid, runs))
    write_text(output / SUMMARY, json.dumps({"rows": rows, **sitting.as_dict()}, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in shown(row, sitting.grid.target).items()))


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Records of a run or a policy; of the latter neither weights nor tokenizer."""
    skip = {"tokenizer.json", "tokenizer_config.json"}
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.name not in skip]
