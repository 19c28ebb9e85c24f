"""All levers together: combinations are drawn, halved, and the winners judged on many seeds.

CAPO and GRPO are offered the same axes but for those that only one of them has (a learning rate; a
predictor, a step length, a pace), and get the same number of draws and of runs.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Self

from pydantic import Field, model_validator

from capo.core.errors import InputError
from capo.lab.sections import PositiveInt, Section, Seed, validate
from capo.lab.study.jobs import LEARNING_RATE, Arm, overrides_of, slug
from capo.lab.study.outcome import ArmResult
from capo.lab.study.plan import Family, Measure, Round, Seeds
from capo.lab.study.stages import (
    Narrowing,
    Ranking,
    Settings,
    Stage,
    halve,
    race,
)


class Levers(Section):
    """What is drawn, how it is halved, and on which seeds it is judged.

    The first value of every axis is where the family starts; that combination is always drawn.
    """

    preset: str
    plain: str
    draw: PositiveInt
    draw_seed: Seed
    more_seeds: Seeds
    budget: PositiveInt
    measure: Measure
    rounds: Annotated[list[Round], Field(min_length=1)]
    families: Annotated[list[Family], Field(min_length=1)]

    @model_validator(mode="after")
    def _honest(self) -> Self:
        seen = self.all_seeds
        for seeds in (each.seeds for each in self.rounds):
            if set(seeds) & set(seen):
                raise InputError("rounds", "seeds must be fresh, neither judging nor used before.")
            seen = seen + seeds
        return self

    @property
    def all_seeds(self) -> list[int]:
        """The judging seeds of the study and the additional ones."""
        return self.measure.seeds + self.more_seeds

    def preset_of(self, family: Family) -> str:
        """What the family's overrides are laid over."""
        return self.preset if family.kind == "capo" else self.plain

    def arm(self, family: Family, stage: str, settings: Settings, each: Round | None = None) -> Arm:
        """An arm of a round, or of the final."""
        changed = {
            key: settings[key] for key, values in family.axes.items() if settings[key] != values[0]
        }
        return Arm(
            stage=stage,
            name=slug(changed),
            preset=self.preset_of(family),
            overrides=overrides_of(settings),
            target=self.measure.target,
            spacing=each.spacing if each else self.measure.spacing,
            problems=each.problems if each else self.measure.problems,
            horizon=each.horizon if each else self.measure.horizon,
            stop_at="target or collapse",
            budget=each.budget if each else self.budget,
        )


def load_levers(path: Path | None = None) -> Levers:
    """Read and check a plan; None: the one that ships with the package.

    Raises:
        InputError: anything that cannot be used.
    """
    if path is None:
        text = resources.files("capo.lab.study").joinpath("levers.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise InputError("--plan", f"{str(path)!r} is no file.")
    try:
        return validate(Levers, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError("--plan", f"is not valid TOML: {error}.") from None


def drawn(family: Family, number: int, seed: int) -> list[Settings]:
    """Different combinations of the axes, the start first; all of them where there are no more."""
    every = [{**family.set, **each} for each in family.combinations()]
    start, rest = every[0], every[1:]
    return [start, *random.Random(seed).sample(rest, min(number - 1, len(rest)))]


@dataclass(frozen=True)
class Effect:
    """What a level of an axis is worth in company: mean score of the drawn arms that have it.

    Attributes:
        axis, level: which.
        score: mean of their scores in the first round; low is good.
        stderr: of that mean.
        arms: how many they are.
    """

    axis: str
    level: object
    score: float
    stderr: float
    arms: int


def effects(family: Family, ranking: Ranking) -> list[Effect]:
    """The levels of all axes that vary."""
    found = []
    for axis, levels in family.axes.items():
        for level in levels if len(levels) > 1 else []:
            scores = [score for settings, score, _ in ranking if settings[axis] == level]
            if len(scores) > 1:
                error = stdev(scores) / len(scores) ** 0.5
                found.append(Effect(axis, level, mean(scores), error, len(scores)))
    return found


def composed(family: Family, ranking: Ranking) -> Settings:
    """Of every axis the level with the best mean score: all that helped, together."""
    best: dict[str, Effect] = {}
    for effect in effects(family, ranking):
        if effect.axis not in best or effect.score < best[effect.axis].score:
            best[effect.axis] = effect
    settings = {**family.set, **{axis: levels[0] for axis, levels in family.axes.items()}}
    return settings | {axis: effect.level for axis, effect in best.items()}


@dataclass(frozen=True)
class LeversResult:
    """A family's draws, halved.

    Attributes:
        family: whose.
        narrowing: its rounds, and the winner on all judging seeds.
        effects: of every lever in the first round.
        start: where it started from, on all judging seeds.
    """

    family: Family
    narrowing: Narrowing
    effects: tuple[Effect, ...]
    start: ArmResult


def levers_of(plan: Levers, family: Family) -> Stage[LeversResult]:
    """Draw, halve, and judge the winner and the start."""
    arms = drawn(family, plan.draw, plan.draw_seed)
    winner, rounds = yield from halve(
        arms,
        plan.rounds,
        lambda each, settings: plan.arm(family, family.name, settings, each),
        lambda ranking: composed(family, ranking),
    )
    # The study's own seeds first, so that a stop leaves a whole table of them.
    for seeds in (plan.measure.seeds, plan.all_seeds):
        start = yield from judged(plan, family, arms[0], f"{family.label}: where it starts", seeds)
        result = yield from judged(plan, family, winner, family.label, seeds)
    own = {key: value for key, value in winner.items() if key != LEARNING_RATE}
    narrowing = Narrowing(family.name, family.label, rounds, winner, own, result)
    return LeversResult(family, narrowing, tuple(effects(family, rounds[0])), start)


def judged(
    plan: Levers, family: Family, settings: Settings, label: str, seeds: Sequence[int]
) -> Stage[ArmResult]:
    """The runs of one arm on these seeds."""
    arm = plan.arm(family, f"{family.name}-final", settings)
    return (yield from race(arm, label, seeds, family.name))


def on(result: ArmResult, seeds: Sequence[int]) -> ArmResult:
    """The same arm on some of its seeds."""
    there = tuple(each for each in result.outcomes if each.seed in seeds)
    return ArmResult(result.name, result.label, result.arm, there, len(seeds))
