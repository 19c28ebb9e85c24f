"""How long points take: a model of the embedded policy's cost, scaled by what was measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from capo.lab.rundir import RunDirectory
from capo.lab.study.estimate import core_seconds
from capo.lab.sweep.execute import Mark, mark_of
from capo.lab.sweep.point import Measure, Point
from capo.policies.pretrain_config import PretrainConfig

# Judging tokens and measuring steps, each as a share of a step; measured with `capo bench step`.
JUDGED, FORESEEN = 0.06, 0.03
# A measurement beside the run, in runs: the predictors at four depths on every token of every step.
FACTORS: dict[Measure, float] = {"runs": 1.0, "fidelity": 3.0, "cost": 1.1}
PRETRAINING = 0.3  # seconds of one core for an optimizer step of the embedded policy's recipe
TOKENS = 30  # of a prompt and its completion, in the embedded policy's task
CHARACTERS = 3.0  # of English in a token of a recipe's BPE
PROMPTS = 32  # whose length is looked at
Kind = tuple[Measure, str | None]
ENOUGH = 3  # finished runs from which a rate is taken


def kind_of(point: Point) -> Kind:
    """What points cost alike: the measure and the folder of the base policy."""
    return point.cell.measure, point.cell.policy_folder


@dataclass(frozen=True)
class Rate:
    """Measured seconds over modelled ones, by what a point is and by its base policy.

    Attributes:
        by_kind: the median over finished points; 1 where there are too few.
    """

    by_kind: Mapping[Kind, float] = field(default_factory=dict)

    @classmethod
    def measured(cls, points: Mapping[str, Point], marks: Mapping[str, Mark | None]) -> Rate:
        """From the points that are over."""
        ratios: dict[Kind, list[float]] = {}
        for folder, point in points.items():
            mark = marks[folder]
            if mark is not None and mark.ended == "steps":
                modelled = modelled_seconds(point)
                ratios.setdefault(kind_of(point), []).append(mark.seconds / modelled)
        return cls({key: median(each) for key, each in ratios.items() if len(each) >= ENOUGH})


def modelled_seconds(point: Point) -> float:
    """Seconds of one core, without its base policy's pre-training."""
    config = point.resolved
    every = config.eval.every_completions
    assert every is not None, "a resolved configuration says how often it evaluates"
    completions = config.completions_after(config.steps)
    seconds = core_seconds(config, completions, spacing=every, problems=config.eval.problems)
    extra = JUDGED * config.capo.judges + FORESEEN * (config.capo.ledger is not None)
    return seconds * (1 + extra) * FACTORS[point.cell.measure] * _weight(point.cell.recipe)


def _weight(recipe: dict[str, Any] | None) -> float:
    """What a run of a recipe's policy costs, in runs of the embedded one: by its shape and its tokens."""
    if recipe is None:
        return 1.0
    config = PretrainConfig.from_dict(recipe)
    return _shape(config) * max(1.0, _tokens(json.dumps(recipe, sort_keys=True)) / TOKENS)


@lru_cache
def _tokens(recipe: str) -> float:
    """About as many as a prompt and its completion have: half the room that there is for one."""
    from capo.policies.lessons import task_of

    config = PretrainConfig.from_dict(json.loads(recipe))
    task = task_of(config)
    prompts = [len(problem.prompt) for problem in task.train_problems(PROMPTS, 0)]
    per_token = 1.0 if config.vocabulary is None else CHARACTERS
    return fmean(prompts) / per_token + 0.5 * task.max_completion_tokens


def _shape(config: PretrainConfig) -> float:
    embedded = PretrainConfig()
    return max(
        1.0, config.layers * config.hidden_size**2 / embedded.layers / embedded.hidden_size**2
    )


def _pretraining_seconds(recipe: dict[str, Any]) -> float:
    config, embedded = PretrainConfig.from_dict(recipe), PretrainConfig()
    tokens = config.batch_size * config.positions / embedded.batch_size / embedded.positions
    return PRETRAINING * config.steps * _shape(config) * tokens


def point_seconds(point: Point, rate: Rate) -> float:
    """Seconds of one core, expected."""
    return modelled_seconds(point) * rate.by_kind.get(kind_of(point), 1.0)


@dataclass(frozen=True)
class Forecast:
    """What a sweep will cost.

    Attributes:
        runs: all of them, distinct.
        missing: those that are to be made.
        core_seconds: of those, base policies included.
        measured: whether the rate was measured on runs that are there, or is the model's own.
    """

    runs: int
    missing: int
    core_seconds: float
    measured: bool

    def sentence(self, jobs: int) -> str:
        """For people."""
        minutes = self.core_seconds / 60 / max(1, min(jobs, self.missing))
        basis = "at the rate measured on the runs that are there" if self.measured else "a model"
        return (
            f"{self.runs} runs, {self.runs - self.missing} of them made already; about "
            f"{minutes:.1f} minutes for the other {self.missing} with {jobs} processes on idle cores "
            f"({self.core_seconds / 60:.1f} core minutes; {basis})"
        )


def forecast(points: Sequence[Point], runs: Path) -> Forecast:
    """Of the points that are missing."""
    from capo.lab.sweep.drive import distinct

    wanted = distinct(points)
    marks = {folder: mark_of(RunDirectory(runs / folder), each) for folder, each in wanted.items()}
    rate = Rate.measured(wanted, marks)
    missing = [each for folder, each in wanted.items() if marks[folder] is None]
    seconds = sum(point_seconds(each, rate) for each in missing)
    recipes = {each.cell.policy_folder: each.cell.recipe for each in missing}
    for folder, recipe in recipes.items():
        if folder is not None and recipe is not None and not (runs / folder).is_dir():
            seconds += _pretraining_seconds(recipe)
    return Forecast(len(wanted), len(missing), seconds, bool(rate.by_kind))
