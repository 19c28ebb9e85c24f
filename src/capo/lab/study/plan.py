"""What the study compares: checked data, from ``plan.toml`` or a file in its form."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from capo.core.errors import InputError
from capo.lab.config import Config
from capo.lab.sections import PositiveFloat, PositiveInt, Probability, Section, Seed, validate
from capo.lab.sources import load_config
from capo.lab.study.jobs import (
    BATCH,
    LEARNING_RATE,
    SCHEDULE,
    SCHEDULES,
    Arm,
    StopAt,
    overrides_of,
    slug,
)

Seeds = Annotated[list[Seed], Field(min_length=1)]
Rates = Annotated[list[PositiveFloat], Field(min_length=1)]
Settings = dict[str, Any]


class Measure(Section):
    """``[measure]``: how completions to the target are measured, the same for every raced arm."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.75
    spacing: Annotated[int, Field(ge=1, le=96)] = 48
    problems: PositiveInt = 512
    horizon: PositiveInt = 4800
    seeds: Seeds = Field(default_factory=lambda: [0, 1, 2, 3, 4])


class Range(Section):
    """``[range]``: final accuracy over the learning rate."""

    learning_rates: Rates
    horizon: PositiveInt = 9600
    spacing: PositiveInt = 192
    rule_horizon: PositiveInt = 4800
    rule_seeds: Seeds = Field(default_factory=lambda: [0, 1, 2, 3, 4])

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if sorted(set(self.learning_rates)) != self.learning_rates:
            raise InputError("range.learning_rates", "must ascend, without repetition.")
        return self


class Collapse(Section):
    """``[collapse]``: the search on the √2 grid through ``start``."""

    start: PositiveFloat = 1e-4
    needed: PositiveInt = 4
    spacing: PositiveInt = 192
    limit: PositiveInt = 14


class Conservative(Section):
    """``[conservative]``: the paper's regime, in ratios to the aggressive one."""

    preset: str = "small-conservative"
    batch_factor: PositiveInt = 12
    learning_rate_share: Annotated[float, Field(gt=0, le=1)] = 0.2


class Round(Section):
    """``[[rounds]]``: a round of narrowing.

    ``share`` of the arms go on to the next round, but at least ``at_least``.
    """

    seeds: Seeds
    share: Probability = 0.0
    at_least: PositiveInt = 1
    horizon: PositiveInt = 4800
    budget: PositiveInt
    spacing: PositiveInt = 96
    problems: PositiveInt = 128

    def kept(self, arms: int) -> int:
        """How many of so many arms go on."""
        return min(arms, max(self.at_least, math.ceil(self.share * arms)))


class Family(Section):
    """``[[families]]``: arms that are narrowed down to the best of them.

    ``grpo`` and ``capo`` start from the plan's presets, a ``rule`` from the settings of GRPO's
    winner, and its range of learning rates is measured as well.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    label: str
    kind: Literal["grpo", "capo", "rule"]
    set: Settings = Field(default_factory=dict)
    axes: dict[str, list[Any]]

    @model_validator(mode="after")
    def _usable(self) -> Self:
        field = f"families.{self.name}.axes"
        for key, values in self.axes.items():
            if not values:
                raise InputError(f"{field}.{key}", "must not be empty.")
        for value in self.axes.get(SCHEDULE, []):
            if value not in SCHEDULES:
                raise InputError(
                    f"{field}.schedule", f"must be one of {', '.join(SCHEDULES)}, got {value!r}."
                )
        return self

    def combinations(self, **fixed: Any) -> Iterator[Settings]:
        """Every combination of the axes; those that ``fixed`` names (dots as ``__``) are fixed."""
        axes = self.axes | {key.replace("__", "."): [value] for key, value in fixed.items()}
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))


class Variant(Section):
    """``[[variants]]``: a change of CAPO's default, raced as it is."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    label: str
    set: Settings


class Plan(Section):
    """The whole study."""

    preset: str = "small-aggressive-capo"
    plain: str = "small-aggressive"
    measure: Measure = Measure()
    range: Range
    collapse: Collapse = Collapse()
    conservative: Conservative = Conservative()
    rounds: Annotated[list[Round], Field(min_length=1)]
    families: list[Family] = Field(default_factory=list)
    variants: list[Variant] = Field(default_factory=list)

    @model_validator(mode="after")
    def _honest(self) -> Self:
        seen = list(self.measure.seeds)
        for index, each in enumerate(self.rounds):
            if set(each.seeds) & set(seen) or len(set(each.seeds)) < len(each.seeds):
                raise InputError(
                    f"rounds.{index}.seeds",
                    "must be fresh: neither those of another round nor of the final runs.",
                )
            seen += each.seeds
        names = [f.name for f in self.families] + [v.name for v in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise InputError("families", f"{name!r} names more than one arm.")
        if self.collapse.needed > len(self.measure.seeds):
            raise InputError(
                "collapse.needed", f"must be at most the {len(self.measure.seeds)} seeds."
            )
        for kind in ("grpo", "capo"):
            if sum(family.kind == kind for family in self.families) > 1:
                raise InputError("families", f"at most one may be of kind {kind!r}.")
        return self

    def family(self, kind: Literal["grpo", "capo"]) -> Family | None:
        """The family of this kind, if the plan has one."""
        return next((family for family in self.families if family.kind == kind), None)

    @property
    def rules(self) -> list[Family]:
        """The other step rules."""
        return [family for family in self.families if family.kind == "rule"]

    def default_config(self) -> Config:
        """CAPO's default as it is raced."""
        return load_config(self.preset)

    def plain_config(self) -> Config:
        """Aggressive GRPO."""
        return load_config(self.plain)

    # Arms

    def screened(self, family: Family, each: Round, settings: Settings) -> Arm:
        """An arm of a family in a round of narrowing; ``settings`` are all it overrides."""
        return Arm(
            stage=family.name,
            name=slug({key: settings[key] for key in settings if key not in family.set}),
            preset=self.preset if family.kind == "capo" else self.plain,
            overrides=overrides_of(settings),
            target=self.measure.target,
            spacing=each.spacing,
            problems=each.problems,
            horizon=each.horizon,
            stop_at="target or collapse",
            budget=each.budget,
        )

    def raced(self, name: str, preset: str, settings: Mapping[str, Any]) -> Arm:
        """An arm of the final, whose figures are reported."""
        return self._measured("final", name, preset, settings, stop_at="target")

    def ranged(
        self, name: str, preset: str, settings: Mapping[str, Any], learning_rate: float, rule: bool
    ) -> Arm:
        """An arm of the range of learning rates; a rule's runs end when they collapse."""
        settings = {**settings, LEARNING_RATE: learning_rate}
        return self._measured(
            "range",
            f"{name}-{slug({LEARNING_RATE: learning_rate})}",
            preset,
            settings,
            stop_at="collapse" if rule else "never",
            spacing=self.range.spacing,
            horizon=self.range.rule_horizon if rule else self.range.horizon,
        )

    def collapsing(self, learning_rate: float) -> Arm:
        """Aggressive GRPO at a point of the √2 grid."""
        return self._measured(
            "collapse",
            f"grpo-{slug({LEARNING_RATE: learning_rate})}",
            self.plain,
            {LEARNING_RATE: learning_rate},
            stop_at="collapse",
            spacing=self.collapse.spacing,
            horizon=None,
        )

    def conservative_arm(self, collapsing_rate: float) -> Arm:
        """The paper's conservative regime, given where the aggressive one collapses."""
        batch = self.plain_config().training.completions_per_step * self.conservative.batch_factor
        settings = {
            LEARNING_RATE: collapsing_rate * self.conservative.learning_rate_share,
            BATCH: batch,
        }
        return self._measured(
            "final",
            f"conservative-{slug(settings)}",
            self.conservative.preset,
            settings,
            stop_at="target",
            horizon=None,
        )

    def _measured(
        self,
        stage: str,
        name: str,
        preset: str,
        settings: Mapping[str, Any],
        *,
        stop_at: StopAt,
        spacing: int | None = None,
        horizon: int | None = -1,
    ) -> Arm:
        return Arm(
            stage=stage,
            name=name,
            preset=preset,
            overrides=overrides_of(settings),
            target=self.measure.target,
            spacing=spacing or self.measure.spacing,
            problems=self.measure.problems,
            horizon=self.measure.horizon if horizon == -1 else horizon,
            stop_at=stop_at,
        )


def load_plan(path: Path | None = None, preset: str | None = None) -> Plan:
    """Read and check a plan.

    Args:
        path: a TOML file; None: the plan that ships with the package.
        preset: CAPO's default, in place of the plan's.

    Raises:
        InputError: anything that cannot be used, named by its dotted key.
    """
    if path is None:
        text = resources.files("capo.lab.study").joinpath("plan.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise InputError("--plan", f"{str(path)!r} is no file.")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError("--plan", f"is not valid TOML: {error}.") from None
    if preset is not None:
        document["preset"] = preset
    return validate(Plan, document)
