"""One point in this process: trained from where it is, and marked when it is over."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from capo.lab.divergence import DIVERGED, has_diverged, is_divergence
from capo.lab.rundir import RunDirectory
from capo.lab.sweep.point import Point, policy_folder

MARK = "lab.json"  # a point that has it is over
MEASURED = "measured.json"
FORMAT = 1

Ended = Literal["steps", "time", "diverged"]


@dataclass(frozen=True)
class Mark:
    """What `MARK` says.

    Attributes:
        fingerprint: of the point.
        ended: ``time``: its time was over, with steps left; ``diverged``: the weights are no numbers any
            more, and nothing can be sampled.
        seconds: wall clock of the process that ended it, without its base policy's pre-training.
        provenance: commit, hardware, package versions.
    """

    fingerprint: str
    ended: Ended
    seconds: float
    provenance: dict[str, Any]
    format: int = FORMAT


def mark_of(directory: RunDirectory, point: Point) -> Mark | None:
    """The point's mark, None while it is not over (or was made by another version of the lab)."""
    document = directory.read(MARK)
    if document.get("format") != FORMAT or document.get("fingerprint") != point.fingerprint():
        return None
    return Mark(**document)


def make_point(point: Point, runs: Path, provenance: dict[str, Any]) -> Mark:
    """Make the point, or what is missing of it.

    Args:
        point: which.
        runs: the folder of all run directories.
        provenance: kept in the mark.

    Raises:
        InputError: its configuration cannot be used.
        Exception: whatever the run raised; its directory stays as it is and can be continued.
    """
    directory = RunDirectory(runs / point.folder())
    mark = mark_of(directory, point)
    if mark is not None:
        return mark
    make_policy(point, runs)
    began = time.monotonic()
    ended = _make(point, directory, runs)
    mark = Mark(point.fingerprint(), ended, round(time.monotonic() - began, 2), provenance)
    directory.write(MARK, asdict(mark))
    for leftover in (directory.checkpoints, directory.final):  # grids are read, not sampled from
        shutil.rmtree(leftover, ignore_errors=True)
    return mark


def end_point(point: Point, runs: Path, provenance: dict[str, Any]) -> Mark | None:
    """Let a half-finished point be over as it is; None where it was never evaluated in training."""
    directory = RunDirectory(runs / point.folder())
    there = mark_of(directory, point)
    if there is not None:
        return there
    evaluated = directory.rows("evals.jsonl")
    if len(evaluated) < 2:
        return None
    ended: Ended = "diverged" if has_diverged(directory) else "time"
    mark = Mark(point.fingerprint(), ended, float(evaluated[-1]["seconds"]), provenance)
    directory.write(MARK, asdict(mark))
    shutil.rmtree(directory.checkpoints, ignore_errors=True)
    return mark


def make_policy(point: Point, runs: Path) -> None:
    """Pre-train the point's base policy unless it is there, whole or not at all."""
    if point.cell.recipe is not None:
        pretrained(point.cell.recipe, runs)


def pretrained(
    recipe: dict[str, Any],
    runs: Path,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """The directory of a recipe's policy below ``runs``, pre-trained unless it is there.

    ``progress`` hears of the steps as `capo.policies.pretrain.pretrain` has it.

    Raises:
        InputError: the recipe cannot be used.
    """
    from capo.lab.run import quiet_libraries
    from capo.policies.pretrain import PretrainConfig, pretrain

    output = runs / policy_folder(recipe)
    with RunDirectory(output.with_name(output.name + ".lock")).waited():
        if not output.is_dir():
            quiet_libraries()
            aside = output.with_name(output.name + ".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            pretrain(PretrainConfig.from_dict(recipe), aside, progress=progress)
            aside.replace(output)
    return output


def _make(point: Point, directory: RunDirectory, runs: Path) -> Ended:
    from capo.lab.run import train
    from capo.lab.sweep.measures import MEASURES

    if has_diverged(directory):  # and was killed before it could be marked
        return "diverged"
    config = point.config(runs)
    measure = MEASURES.get(point.cell.measure)
    # A rule with state outside of checkpoints, and a measurement beside the run, begin anew.
    resume = directory.exists and config.rival.rule == "none" and measure is None
    try:
        if measure is None:
            train(config, directory.path, resume=resume, overwrite=not resume)
        else:
            rows = measure(config, directory.path)
            directory.write(MEASURED, {"rows": rows})
    except (RuntimeError, ValueError) as error:
        if not is_divergence(str(error), directory):
            raise
        step = int(directory.read("status.json").get("step", 0))
        directory.set_status("finished", step, config.steps, DIVERGED)
        return "diverged"
    return "time" if directory.out_of_time else "steps"
