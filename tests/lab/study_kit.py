"""Invented outcomes and a runner that makes them: TEST DATA, for the tests of the study only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from capo.lab.sections import validate
from capo.lab.study.jobs import Job
from capo.lab.study.outcome import Ended, Evaluated, Outcome, Store
from capo.lab.study.plan import Plan
from capo.lab.study.pool import Driver

BASE = 0.4
ORIGIN = {
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
    "hardware": {"cpu": "a test's CPU", "cores": 2, "memory_gb": 8.0, "gpu": None},
}


def small_plan(**changes: Any) -> Plan:
    """Two learning rates, two families of a few arms, one rule."""
    document: dict[str, Any] = {
        "preset": "small-aggressive-capo",
        "plain": "small-aggressive",
        "measure": {"seeds": [0, 1, 2, 3, 4]},
        "range": {"learning_rates": [1e-4, 1e-3, 1e-2], "rule_seeds": [0, 1]},
        "rounds": [
            {"seeds": [100], "share": 0.5, "at_least": 2, "budget": 1920},
            {"seeds": [101, 102], "budget": 2880},
        ],
        "families": [
            {
                "name": "grpo",
                "label": "GRPO at its best",
                "kind": "grpo",
                "axes": {
                    "training.learning_rate": [1e-4, 2e-4],
                    "training.completions_per_step": [24, 96],
                    "schedule": ["constant", "cosine"],
                },
            },
            {
                "name": "gradient-clip",
                "label": "gradient-norm clip",
                "kind": "rule",
                "axes": {
                    "training.learning_rate": [1e-4, 4e-4],
                    "training.max_grad_norm": [0.1, 0.3],
                },
            },
        ],
    }
    plan: Plan = validate(Plan, document | changes)
    return plan


def evaluations(*accuracies: float, every: int = 96) -> tuple[Evaluated, ...]:
    """The base policy's accuracy and those after it."""
    return tuple(
        Evaluated(index, index * every, accuracy, 0.02)
        for index, accuracy in enumerate((BASE, *accuracies))
    )


def outcome(
    *accuracies: float, batch: int = 96, spacing: int = 96, ended: Ended = "steps", **values: Any
) -> Outcome:
    """A run that was evaluated after every batch."""
    made = Outcome(
        stage="stage",
        arm="arm",
        seed=0,
        fingerprint="",
        preset="small-aggressive",
        overrides=(),
        completions_per_step=batch,
        learning_rate=1e-4,
        target=0.75,
        spacing=spacing,
        evaluations=evaluations(*accuracies, every=batch),
        completions=batch * len(accuracies),
        horizon=4800,
        ended=ended,
        seconds=10.0,
        provenance=ORIGIN,
    )
    return replace(made, **values)


def racing(job: Job, at: int | None = None, final: float = 0.9, collapses: bool = False) -> Outcome:
    """The outcome of a job: at 0.75 at the given evaluation's completions, or ending at ``final``."""
    config, arm = job.config(), job.arm
    batch = config.training.completions_per_step
    horizon = config.completions_after(config.steps)
    end = arm.budget or horizon
    accuracy = 0.0 if collapses else final
    if at is not None and at <= end and not collapses:
        # A level well above the target, first seen two evaluations before the run has reached it.
        points = [Evaluated(0, 0, BASE, 0.02)]
        copies = -(-batch // arm.spacing)
        points += [Evaluated(1, at - copies * arm.spacing * 3, 0.5, 0.02)]
        points += [
            Evaluated(2 + index, at - (2 - index) * arm.spacing, 0.8, 0.01) for index in range(3)
        ]
        batch, end = min(batch, arm.spacing), at if "target" in arm.stop_at else end
        points[-1] = replace(points[-1], completions=at)
    else:
        points = [Evaluated(0, 0, BASE, 0.02)]
        points += [
            Evaluated(1 + index, end - (2 - index) * batch, accuracy, 0.01) for index in range(3)
        ]
    return Outcome(
        stage=arm.stage,
        arm=arm.name,
        seed=job.seed,
        fingerprint=job.fingerprint(),
        preset=arm.preset,
        overrides=arm.overrides,
        completions_per_step=batch,
        learning_rate=config.training.learning_rate,
        target=arm.target,
        spacing=arm.spacing,
        evaluations=tuple(points),
        completions=end,
        horizon=horizon,
        ended="target" if at is not None and "target" in arm.stop_at else "steps",
        seconds=10.0,
        provenance=ORIGIN,
    )


class Fake:
    """A runner that makes outcomes up, and dies on request."""

    def __init__(self, behave: Callable[[Job], Outcome], dies_after: int | None = None) -> None:
        self.behave = behave
        self.dies_after = dies_after
        self.made: list[Job] = []
        self.queue: list[Job] = []

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def finished(self) -> list[tuple[Job, Outcome]]:
        if len(self.made) == self.dies_after:
            raise KeyboardInterrupt
        job = self.queue.pop(0)
        self.made.append(job)
        return [(job, self.behave(job))]

    @property
    def paths(self) -> list[str]:
        return [job.path for job in self.made]


def driven(part: Any, behave: Callable[[Job], Outcome], root: Path) -> tuple[Any, Fake]:
    """The result of one part on invented outcomes, and the runner that made them."""
    fake = Fake(behave)
    return Driver(Store(root), fake)({"part": part})["part"], fake
