"""What a run left behind: one JSON file, and what it says about target and collapse."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from capo.lab.rundir import write_text
from capo.lab.study.jobs import Arm, Job

Ended = Literal["steps", "budget", "target", "collapse", "diverged"]

IN_A_ROW = 3  # evaluations that must agree, on the target as on a collapse
FORMAT = 1  # of the file; older ones are made anew


@dataclass(frozen=True)
class Evaluated:
    """Sampled accuracy on the fixed held-out problems after some optimizer step."""

    step: int
    completions: int
    accuracy: float
    stderr: float


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        stage, arm, seed: which.
        fingerprint: of everything that decided it; see `Job.fingerprint`.
        preset, overrides: the configuration.
        completions_per_step: the batch; the policy stays as it is while it is sampled.
        learning_rate: the schedule's largest.
        target: accuracy that the run was raced to.
        spacing: completions between evaluations.
        evaluations: in order, that of the base policy first.
        completions: consumed in all.
        horizon: completions of the whole schedule.
        ended: why it ended; ``diverged``: the weights are no longer finite numbers.
        metrics: the trainer's, a row per optimizer step.
        seconds: wall clock, evaluations included.
        provenance: commit, hardware, package versions.
    """

    stage: str
    arm: str
    seed: int
    fingerprint: str
    preset: str
    overrides: tuple[str, ...]
    completions_per_step: int
    learning_rate: float
    target: float
    spacing: int
    evaluations: tuple[Evaluated, ...]
    completions: int
    horizon: int
    ended: Ended
    metrics: tuple[dict[str, Any], ...] = ()
    seconds: float = math.nan
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def to_target(self) -> int | None:
        """Completions at which the target was reached, None where it was not."""
        return reached(self.evaluations, self.completions_per_step, self.spacing, self.target)

    @property
    def collapsed(self) -> bool:
        """Whether accuracy was below half the base policy's at three evaluations in a row."""
        return self.ended == "diverged" or has_collapsed(self.evaluations)

    @property
    def final_accuracy(self) -> float:
        """At the last evaluation; 0 for a policy that cannot be sampled from any more."""
        return 0.0 if self.ended == "diverged" else self.evaluations[-1].accuracy

    @property
    def recent_accuracy(self) -> float:
        """Mean of the last three evaluations."""
        last = [each.accuracy for each in self.evaluations[-IN_A_ROW:]]
        return 0.0 if self.ended == "diverged" else sum(last) / len(last)


def held(evaluations: Sequence[Evaluated], batch: int, spacing: int) -> list[tuple[int, float]]:
    """Completions and accuracy at every evaluation that the spacing asks for.

    A policy is held while its next batch is sampled, and the evaluation's problems and random
    numbers are fixed: where the batch exceeds the spacing, the evaluations in between would repeat
    the last one, so they are written down and not made.
    """
    copies = -(-batch // spacing)
    return [
        (each.completions + index * spacing, each.accuracy)
        for each in evaluations
        for index in range(copies)
    ]


def reached(
    evaluations: Sequence[Evaluated], batch: int, spacing: int, target: float
) -> int | None:
    """Completions at the third of the first three evaluations in a row with mean ≥ ``target``."""
    points = held(evaluations, batch, spacing)
    for end in range(IN_A_ROW, len(points) + 1):
        window = points[end - IN_A_ROW : end]
        if sum(accuracy for _, accuracy in window) / IN_A_ROW >= target - 1e-12:
            return window[-1][0]
    return None


def has_collapsed(evaluations: Sequence[Evaluated]) -> bool:
    """Whether three evaluations in a row are below half the first, the base policy's."""
    return _three_low(_below_half([each.accuracy for each in evaluations])) is not None


def collapse_at(accuracies: Sequence[float]) -> int | None:
    """Index of a collapse's first evaluation; None: a whole run did not collapse.

    Three in a row below half the first, the base policy's, or the last one below.
    """
    low = _below_half(accuracies)
    first = _three_low(low)
    if first is not None or not low[-1]:
        return first
    return len(low) - 2 if low[-2] else len(low) - 1  # no more: three would be in a row


def _below_half(accuracies: Sequence[float]) -> list[bool]:
    return [each < accuracies[0] / 2 for each in accuracies]


def _three_low(low: Sequence[bool]) -> int | None:
    starts = range(len(low) - IN_A_ROW + 1)
    return next((start for start in starts if all(low[start : start + IN_A_ROW])), None)


class Store:
    """The finished runs on disk: ``ROOT/STAGE/ARM/SEED.json``, each written whole or not at all."""

    def __init__(self, root: Path) -> None:
        """Nothing is made before something is saved."""
        self.root = root

    def load(self, job: Job) -> Outcome | None:
        """The run's outcome, None where it is missing or of another configuration."""
        document = self._read(job)
        if document is None or document.get("fingerprint") != job.fingerprint():
            return None
        return _outcome(document)

    def save(self, outcome: Outcome) -> Path:
        """Write the outcome's file."""
        path = self.root / outcome.stage / outcome.arm / f"{outcome.seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": FORMAT, **asdict(outcome)}) + "\n")
        return path

    def _read(self, job: Job) -> dict[str, Any] | None:
        path = self.root / f"{job.path}.json"
        if not path.is_file():
            return None
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document if document.get("format") == FORMAT else None


def _outcome(document: dict[str, Any]) -> Outcome:
    values = {key: value for key, value in document.items() if key != "format"}
    values["evaluations"] = tuple(Evaluated(**each) for each in document["evaluations"])
    values["overrides"] = tuple(document["overrides"])
    values["metrics"] = tuple(document["metrics"])
    return Outcome(**values)


@dataclass(frozen=True)
class ArmResult:
    """An arm with its finished runs, in the order of the seeds.

    Attributes:
        name: stable, for files and data.
        label: for people.
        arm: what was run.
        outcomes: of the seeds that are finished.
        wanted: seeds that the plan asks for.
    """

    name: str
    label: str
    arm: Arm
    outcomes: tuple[Outcome, ...]
    wanted: int

    @property
    def complete(self) -> bool:
        """Whether every seed is there."""
        return len(self.outcomes) == self.wanted

    @property
    def collapses(self) -> int:
        """Seeds that collapsed."""
        return sum(outcome.collapsed for outcome in self.outcomes)
