"""A point of a grid: a cell with a seed, and the directory that its configuration names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from capo.lab.config import Config
from capo.lab.sources import load_config
from capo.lab.study.jobs import rate

Measure = Literal["runs", "fidelity", "cost"]

POLICIES = "policies:"
RUN_PREFIX = ("run.threads=1", "records.tokens=false")


@dataclass(frozen=True)
class Cell:
    """Points that differ in nothing but the seed.

    Attributes:
        variant, label: what is compared, for data and for people.
        at: the values of its axes.
        name: of the cell in this grid.
        preset, overrides: the configuration.
        seeds: with each of which it is run.
        recipe: settings of the base policy to pre-train, None where it is there already.
        measure: what a point of it is.
        horizon: completions of the whole run; None: as the preset says.
        condition, where: what it is tried under, for data and for people; empty where the grid has none.
        chosen: the settings that a search has found, None where nothing is searched.
        open: the search is not over, and nothing of this cell can be run.
    """

    variant: str
    label: str
    at: dict[str, Any]
    name: str
    preset: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: dict[str, Any] | None = None
    measure: Measure = "runs"
    horizon: int | None = None
    condition: str = ""
    where: str = ""
    chosen: dict[str, Any] | None = None
    open: bool = False

    @property
    def policy_folder(self) -> str | None:
        """Where the pre-trained base policy lies, below the folder of the runs."""
        if self.recipe is None:
            return None
        return policy_folder(self.recipe)


@dataclass(frozen=True)
class Point:
    """One run to be made."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """For people: ``VARIANT/AXES seed N``."""
        return f"{self.cell.name} seed {self.seed}"

    def config(self, runs: Path) -> Config:
        """The resolved configuration.

        Args:
            runs: where a base policy that is pre-trained for it lies.

        Raises:
            InputError: the preset or an override cannot be used.
        """
        cell = self.cell
        overrides = [*RUN_PREFIX, *cell.overrides, f"run.seed={self.seed}"]
        if cell.policy_folder is not None:
            overrides.append(f"policy.path={json.dumps(str(runs / cell.policy_folder))}")
        config = load_config(cell.preset, overrides)
        if cell.horizon is None or any(o.startswith("training.steps=") for o in overrides):
            return config
        batches = -(-cell.horizon // config.training.completions_per_step)
        steps = batches * config.algorithm.num_iterations
        return load_config(cell.preset, [*overrides, f"training.steps={steps}"])

    def identity(self) -> dict[str, Any]:
        """Everything that decides what comes out, wherever it is run."""
        document: dict[str, Any] = {"config": self.resolved.identity()}
        if self.cell.recipe is not None:
            document["config"]["policy"]["path"] = "pretrained"
            document["recipe"] = self.cell.recipe
        if self.cell.measure != "runs":
            document["measure"] = self.cell.measure
        return document

    @cached_property
    def resolved(self) -> Config:
        """The configuration wherever the runs are: the path of a pre-trained policy is relative."""
        return self.config(Path())

    def fingerprint(self) -> str:
        """Of the identity."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return _hash(self.identity())

    def folder(self) -> str:
        """The run directory's name: what it is, readably, and the fingerprint."""
        config = self.resolved
        training = config.training
        kind = "" if self.cell.measure == "runs" else f"{self.cell.measure}-"
        return (
            f"{kind}{config.algorithm.name}-lr{rate(training.learning_rate)}"
            f"-b{training.completions_per_step}-i{config.algorithm.num_iterations}"
            f"-s{self.seed}-{self.fingerprint()}"
        )


def policy_folder(recipe: dict[str, Any]) -> str:
    """Where the policy of a recipe lies, below the folder of the runs."""
    return f"policies/{_hash(recipe)}"


def _hash(document: Any) -> str:
    text = json.dumps(document, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
