"""A tiny grid of real runs, for the tests of the lab."""

from __future__ import annotations

from pathlib import Path

GRID = """
preset = "small-aggressive"
seeds = [0, 1]
[set]
"training.steps" = 4
"training.completions_per_step" = 16
"training.save_every" = 1
"eval.problems" = 8
"eval.every_completions" = 16
[axes]
"training.learning_rate" = [1e-4, 1e-3]
[[variants]]
name = "grpo"
label = "GRPO"
[[variants]]
name = "capo"
label = "CAPO"
set = { "capo.selection" = "capo" }
"""


def write_grid(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path
