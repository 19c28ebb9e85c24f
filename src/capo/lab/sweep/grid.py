"""A grid: a preset, axes whose values are combined, variants, seeds; checked before anything runs."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from capo.core.errors import InputError
from capo.lab.sections import PositiveInt, Section, Seed, validate
from capo.lab.study.jobs import SCHEDULE, SCHEDULES, overrides_of, slug
from capo.lab.sweep.point import POLICIES, Cell, Point

HORIZON = "horizon"
Settings = dict[str, Any]
Axes = dict[str, list[Any]]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]


class Variant(Section):
    """``[[variants]]``: one thing to compare, at every combination of the axes.

    ``set`` and ``axes`` are laid over those of the grid; an axis of the grid that ``set`` names is
    held at that value.
    """

    name: Name
    label: str | None = None
    preset: str | None = None
    set: Settings = Field(default_factory=dict)
    axes: Axes = Field(default_factory=dict)

    @property
    def shown(self) -> str:
        """For people."""
        return self.label or self.name


class Grid(Section):
    """The whole file.

    Attributes:
        preset: what every point starts from.
        seeds: of every cell.
        target: accuracy, completions to which are reported.
        measure: ``runs`` trains; ``fidelity`` and ``cost`` train with a watch on the predictors, or on
            the clock, and cost more.
        set: dotted keys and values of every point. ``schedule`` stands for the shape and its warm-up,
            ``horizon`` for as many optimizer steps as consume so many completions.
        axes: dotted keys, each with its values, of which every combination is a cell.
        variants: what is compared; none: one, as it is.
        policies: base policies to pre-train first, by name: settings of ``capo pretrain``, over those of
            the ``recipe`` that ships with the package by that name, if one is given. The policy path
            ``policies:NAME`` stands for one of them.
        overrides: ``section.key=value``, laid over every point after all else.
    """

    preset: str
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        default_factory=lambda: list(range(5))
    )
    target: Annotated[float, Field(gt=0, lt=1)] = 0.75
    measure: Literal["runs", "fidelity", "cost"] = "runs"
    set: Settings = Field(default_factory=dict)
    axes: Axes = Field(default_factory=dict)
    variants: list[Variant] = Field(default_factory=list)
    policies: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    overrides: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError("seeds", "must not repeat.")
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise InputError("variants", f"{name!r} names more than one.")
        _check_axes("axes", self.axes)
        for variant in self.variants:
            _check_axes(f"variants.{variant.name}.axes", variant.axes)
        return self

    def with_seeds(self, number: int | None) -> Grid:
        """The same with so many seeds, 0 and up; None: its own."""
        return self if number is None else self.model_copy(update={"seeds": list(range(number))})

    def with_settings(self, settings: Sequence[str]) -> Grid:
        """The same with ``section.key=value`` laid over every point, after all else.

        Raises:
            InputError: one is not of that form.
        """
        for setting in settings:
            if "=" not in setting or "." not in setting.partition("=")[0]:
                raise InputError("--set", f"must read section.key=value, got {setting!r}.")
        return self.model_copy(update={"overrides": [*self.overrides, *settings]})

    def cells(self) -> Iterator[Cell]:
        """Every variant at every combination of its axes."""
        for variant in self.variants or [Variant(name="as-is", label="as it is")]:
            axes = {**self.axes, **variant.axes}
            axes = {key: values for key, values in axes.items() if key not in variant.set}
            for values in itertools.product(*axes.values()):
                at = dict(zip(axes, values, strict=True))
                settings = {**self.set, **variant.set, **at}
                recipe = self._recipe(settings)
                horizon = settings.pop(HORIZON, None)
                if horizon is not None and not (type(horizon) is int and horizon > 0):
                    raise InputError(HORIZON, f"must be an integer ≥ 1, got {horizon!r}.")
                yield Cell(
                    variant=variant.name,
                    label=variant.shown,
                    at=at,
                    name=f"{variant.name}/{slug(at)}" if at else variant.name,
                    preset=variant.preset or self.preset,
                    overrides=(*overrides_of(settings), *self.overrides),
                    recipe=recipe,
                    measure=self.measure,
                    horizon=horizon,
                )

    def points(self) -> list[Point]:
        """Every cell with every seed, the first seed of all cells first.

        Raises:
            InputError: a point's configuration cannot be used; all are checked.
        """
        cells = list(self.cells())
        points = [Point(cell, seed) for seed in self.seeds for cell in cells]
        for cell in cells:
            try:
                Point(cell, self.seeds[0]).config(Path())
            except InputError as error:
                raise InputError(error.field, f"{error.message} (in {cell.name})") from None
        return points

    def _recipe(self, settings: Settings) -> dict[str, Any] | None:
        path = settings.get("policy.path")
        if not isinstance(path, str) or not path.startswith(POLICIES):
            return None
        name = path.removeprefix(POLICIES)
        if name not in self.policies:
            known = ", ".join(self.policies) or "none"
            raise InputError("policy.path", f"{path!r} is not among [policies] ({known}).")
        recipe = self.policies[name]
        if "recipe" not in recipe:
            return recipe
        from capo.policies.recipes import recipe_settings

        own = {key: value for key, value in recipe.items() if key != "recipe"}
        try:
            return recipe_settings(str(recipe["recipe"])) | own
        except InputError as error:
            raise InputError(f"policies.{name}.recipe", error.message) from None


def _check_axes(field: str, axes: Axes) -> None:
    for key, values in axes.items():
        if not values:
            raise InputError(f"{field}.{key}", "must not be empty.")
        if key == SCHEDULE and not set(values) <= set(SCHEDULES):
            raise InputError(f"{field}.{key}", f"must be of {', '.join(SCHEDULES)}.")


def load_grid(path: Path) -> Grid:
    """Read and check a grid.

    Raises:
        InputError: anything that cannot be used, named by its dotted key.
    """
    if not path.is_file():
        raise InputError("GRID", f"{str(path)!r} is no file.")
    return parse_grid(path.read_text(encoding="utf-8"))


def parse_grid(text: str) -> Grid:
    """A grid from TOML.

    Raises:
        InputError: see `load_grid`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError("GRID", f"is not valid TOML: {error}.") from None
    return validate(Grid, document)


def seeds_option(number: int | None) -> PositiveInt | None:
    """A number of seeds from a command line.

    Raises:
        InputError: there is not at least one.
    """
    if number is not None and number < 1:
        raise InputError("--seeds", f"must be at least 1, got {number}.")
    return number
