"""One run of the study as data: an arm, a seed, and the fingerprint of everything that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from capo.lab.config import Config
from capo.lab.sources import load_config

StopAt = Literal["never", "target", "collapse", "target or collapse"]

LEARNING_RATE = "training.learning_rate"
BATCH = "training.completions_per_step"
GROUP = "training.num_generations"
ITERATIONS = "algorithm.num_iterations"
SCHEDULE = "schedule"  # two keys at once: the shape and its warm-up
SCHEDULES: dict[str, tuple[str, float]] = {"constant": ("constant", 0.0), "cosine": ("cosine", 0.1)}
LARGEST_MICRO_BATCH = 288  # completions of one pass: beyond it memory grows and no time is saved


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but the seed.

    Attributes:
        stage: part of the study, and folder.
        name: of the arm, and folder below that of the stage.
        preset: what the configuration starts from.
        overrides: ``section.key=value``, laid over the preset in this order.
        target: accuracy that the runs are raced to.
        spacing: completions between evaluations.
        problems: held-out problems of an evaluation.
        horizon: completions of the whole run, which is also the schedule's length; None: as many
            as the preset says.
        stop_at: what ends a run before its horizon.
        budget: completions after which a run ends wherever its schedule is; None: the horizon.
    """

    stage: str
    name: str
    preset: str
    overrides: tuple[str, ...]
    target: float
    spacing: int
    problems: int
    horizon: int | None = None
    stop_at: StopAt = "never"
    budget: int | None = None

    def job(self, seed: int) -> Job:
        """The arm's run with this seed."""
        return Job(self, seed)

    @property
    def path(self) -> str:
        """``STAGE/ARM``, what ``--only`` is matched against."""
        return f"{self.stage}/{self.name}"


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    arm: Arm
    seed: int

    @property
    def path(self) -> str:
        """``STAGE/ARM/SEED``."""
        return f"{self.arm.path}/{self.seed}"

    def config(self) -> Config:
        """The resolved configuration.

        Raises:
            InputError: the preset or an override cannot be used.
        """
        arm = self.arm
        common = [
            *arm.overrides,
            f"run.seed={self.seed}",
            "run.threads=1",
            "records.tokens=false",
            f"eval.every_completions={arm.spacing}",
            f"eval.problems={arm.problems}",
        ]
        config = load_config(arm.preset, common)
        if arm.horizon is None:
            return config
        batches = -(-arm.horizon // config.training.completions_per_step)
        steps = batches * config.algorithm.num_iterations
        return load_config(arm.preset, [*common, f"training.steps={steps}"])

    def fingerprint(self) -> str:
        """Changes with everything that decides what the run's file says."""
        arm = self.arm
        document = {
            "config": self.config().identity(),
            "stop_at": arm.stop_at,
            "target": arm.target,
            "budget": arm.budget,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def overrides_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Dotted keys and values as overrides; a batch size brings a micro-batch that divides it."""
    overrides: list[str] = []
    for key, value in settings.items():
        if key == SCHEDULE:
            shape, warmup = SCHEDULES[value]
            overrides += [f'training.schedule="{shape}"', f"training.warmup_ratio={warmup}"]
            continue
        overrides.append(f"{key}={_toml(value)}")
        if key == BATCH:
            overrides.append(f"training.micro_batch={micro_batch(value)}")
    return tuple(overrides)


def _toml(value: Any) -> str:
    """A value in TOML; a table on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


def micro_batch(batch: int) -> int:
    """The largest divisor of the batch that is at most `LARGEST_MICRO_BATCH`."""
    return max(size for size in range(1, min(batch, LARGEST_MICRO_BATCH) + 1) if batch % size == 0)


def slug(settings: Mapping[str, Any]) -> str:
    """A folder's name for settings, readable: ``lr1e-04-b96-i1-cosine``."""
    short = {LEARNING_RATE: "lr", BATCH: "b", GROUP: "g", ITERATIONS: "i", SCHEDULE: ""}
    parts = []
    for key, value in settings.items():
        name = short.get(key, key.rpartition(".")[2].replace("_", "-") + "=")
        parts.append(name + (rate(value) if key == LEARNING_RATE else _plain(value)))
    return "-".join(parts) or "as-is"


def rate(value: float) -> str:
    """A learning rate for names and tables: ``3.16e-04``."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{exponent}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "-")
