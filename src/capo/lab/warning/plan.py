"""The runs on which the early warning is judged, and the others on which it was frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

Settings = dict[str, str | int | float]

AGGRESSIVE, TRUSTED = "small-aggressive", "small-capo"
OTHER_TASK: Settings = {"task.params.largest": 44}
"""Sums of terms from 10 to 44: about as hard."""
FREEZE_SEED = 300


@dataclass(frozen=True)
class RunPlan:
    """One run.

    Attributes:
        group: runs that are reported together.
        preset: what it starts from.
        seed: of the run.
        settings: overrides of the preset, by dotted key.
        evaluate_every: optimizer steps between evaluations.
    """

    group: str
    preset: str
    seed: int
    settings: Settings = field(default_factory=dict)
    evaluate_every: int = 1

    @property
    def overrides(self) -> list[str]:
        """As on a command line."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def judged_runs(seeds: int) -> list[RunPlan]:
    """Collapses; with five seeds ten stable runs, five of them at lr 1e-2 in a trust region; and the edge.

    At 2.5e-4 GRPO learns, a factor of two below the learning rates at which it falls.
    """
    plans = []
    for seed in range(seeds):
        plans += [
            RunPlan("GRPO, lr 1e-3", AGGRESSIVE, seed),
            RunPlan("GRPO, lr 2e-3", AGGRESSIVE, seed, {"training.learning_rate": 2e-3}),
            RunPlan(
                "GRPO, lr 1e-3, no warm-up",
                AGGRESSIVE,
                seed,
                {"training.warmup_ratio": 0.0, "training.schedule": "constant"},
            ),
            RunPlan(
                "GRPO, lr 1e-4",
                AGGRESSIVE,
                seed,
                {"training.learning_rate": 1e-4},
                evaluate_every=4,
            ),
            RunPlan(
                "GRPO, lr 2.5e-4",
                AGGRESSIVE,
                seed,
                {"training.learning_rate": 2.5e-4},
                evaluate_every=4,
            ),
            RunPlan(
                "CAPO, lr 1e-2",
                TRUSTED,
                seed,
                {"training.learning_rate": 1e-2, "training.steps": 600},
                evaluate_every=24,
            ),
        ]
    return plans


def freezing_runs() -> list[RunPlan]:
    """Other seeds, another task, other learning rates, batches and numbers of passes."""
    small: Settings = {"training.completions_per_step": 24, "training.micro_batch": 24}
    passes: Settings = {
        **small,
        "algorithm.num_iterations": 4,
        "training.schedule": "constant",
        "training.warmup_ratio": 0.0,
        "training.steps": 160,
    }
    variants: list[tuple[str, str, Settings, int]] = [
        ("96 completions, lr 1.4e-3", AGGRESSIVE, {"training.learning_rate": 1.4e-3}, 1),
        ("96 completions, lr 7e-4", AGGRESSIVE, {"training.learning_rate": 7e-4}, 1),
        ("96 completions, lr 2e-4", AGGRESSIVE, {"training.learning_rate": 2e-4}, 2),
        ("24 completions, lr 6e-4", AGGRESSIVE, {**small, "training.learning_rate": 6e-4}, 1),
        ("24 completions, lr 7e-5", AGGRESSIVE, {**small, "training.learning_rate": 7e-5}, 2),
        (
            "24 completions, 4 passes, lr 4e-4",
            AGGRESSIVE,
            {**passes, "training.learning_rate": 4e-4},
            1,
        ),
        (
            "24 completions, 4 passes, lr 3e-5",
            AGGRESSIVE,
            {**passes, "training.learning_rate": 3e-5},
            4,
        ),
        (
            "CAPO, lr 3e-3",
            TRUSTED,
            {"training.learning_rate": 3e-3, "training.steps": 400},
            12,
        ),
    ]
    return [
        RunPlan(group, preset, seed, {**settings, **OTHER_TASK}, every)
        for seed in range(FREEZE_SEED, FREEZE_SEED + 3)
        for group, preset, settings, every in variants
    ]
