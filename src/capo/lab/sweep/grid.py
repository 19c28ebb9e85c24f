"""A grid: a preset, axes whose values are combined, variants, conditions, seeds; checked before it runs."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from capo.core.errors import InputError
from capo.lab.sections import PositiveInt, Section, Seed, validate
from capo.lab.study.jobs import SCHEDULE, SCHEDULES, overrides_of, slug
from capo.lab.sweep.point import POLICIES, Cell, Point

HORIZON = "horizon"
Settings = dict[str, Any]
Axes = dict[str, list[Any]]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]


def _target(value: object) -> object:
    # a union would report an error once per branch
    if value == "halfway" or (isinstance(value, float) and 0 < value < 1):
        return value
    raise InputError("target", f"must lie between 0 and 1, or be 'halfway', got {value!r}.")


class Candidates(Section):
    """``[[variants.search.among]]``: settings, and axes of which every combination is a candidate."""

    set: Settings = Field(default_factory=dict)
    axes: Axes = Field(default_factory=dict)

    def settings(self) -> Iterator[Settings]:
        """Of every candidate."""
        for values in itertools.product(*self.axes.values()):
            yield {**self.set, **dict(zip(self.axes, values, strict=True))}


class Search(Section):
    """``[variants.search]``: the variant's settings are found first, at every condition anew.

    All candidates are run with ``seeds``, which are none of the grid's own, and that of the highest mean
    accuracy over training is taken.
    """

    seeds: Annotated[list[Seed], Field(min_length=1)]
    among: Annotated[list[Candidates], Field(min_length=1)]

    def candidates(self) -> list[Settings]:
        """The settings of all."""
        return [settings for each in self.among for settings in each.settings()]


class Variant(Section):
    """``[[variants]]``: one thing to compare, at every combination of the axes.

    ``set`` and ``axes`` are laid over those of the grid; an axis of the grid that ``set`` names is
    held at that value. ``seeds``: instead of the grid's and of those of the condition.
    """

    name: Name
    label: str | None = None
    preset: str | None = None
    seeds: Annotated[list[Seed] | None, Field(min_length=1)] = None
    set: Settings = Field(default_factory=dict)
    axes: Axes = Field(default_factory=dict)
    search: Search | None = None

    @property
    def shown(self) -> str:
        """For people."""
        return self.label or self.name


class Condition(Section):
    """``[[conditions]]``: what every variant is tried under, such as a task and its policy.

    Attributes:
        recipe: one that ships with the package; the condition is its policy and its task.
        seeds, search_seeds: instead of the grid's and of those of its searches.
        set: laid over the grid's settings, under those of the variants.
    """

    name: Name
    label: str | None = None
    recipe: str | None = None
    seeds: Annotated[list[Seed] | None, Field(min_length=1)] = None
    search_seeds: Annotated[list[Seed] | None, Field(min_length=1)] = None
    set: Settings = Field(default_factory=dict)

    @property
    def shown(self) -> str:
        """For people."""
        return self.label or self.name

    def settings(self) -> Settings:
        """Its own, with those of its recipe.

        Raises:
            InputError: there is no such recipe.
        """
        from capo.policies.pretrain_config import PretrainConfig
        from capo.policies.recipes import recipe_settings

        if self.recipe is None:
            return self.set
        try:
            config = PretrainConfig.from_dict(recipe_settings(self.recipe))
        except InputError as error:
            raise InputError(f"conditions.{self.name}.recipe", error.message) from None
        if config == PretrainConfig():  # the one whose weights ship with the package
            return self.set
        task = {"task.name": config.task.name, "task.params": config.task.params}
        return {"policy.path": f"{POLICIES}{self.recipe}", **task, **self.set}


HasSeeds = TypeVar("HasSeeds", Variant, Condition)


class Grid(Section):
    """The whole file.

    Attributes:
        preset: what every point starts from.
        seeds: of every cell.
        target: accuracy, completions to which are reported; ``halfway``: the mean of 1 and the base
            policy's accuracy under the cell's condition.
        measure: ``runs`` trains; ``fidelity`` and ``cost`` train with a watch on the predictors, or on
            the clock, and cost more.
        set: dotted keys and values of every point. ``schedule`` stands for the shape and its warm-up,
            ``horizon`` for as many optimizer steps as consume so many completions.
        axes: dotted keys, each with its values, of which every combination is a cell.
        variants: what is compared; none: one, as it is.
        conditions: under each of which all variants are tried; none: one, the grid's own settings.
        policies: base policies to pre-train first, by name: settings of ``capo pretrain``, over those of
            the ``recipe`` that ships with the package by that name, if one is given. The policy path
            ``policies:NAME`` stands for one of them.
        overrides: ``section.key=value``, laid over every point after all else.
        choices: what searches have found, by the cell's name; see `capo.lab.sweep.reading.settle`.
    """

    preset: str
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        default_factory=lambda: list(range(5))
    )
    target: Annotated[float | Literal["halfway"], BeforeValidator(_target)] = 0.75
    measure: Literal["runs", "fidelity", "cost"] = "runs"
    set: Settings = Field(default_factory=dict)
    axes: Axes = Field(default_factory=dict)
    variants: list[Variant] = Field(default_factory=list)
    conditions: list[Condition] = Field(default_factory=list)
    policies: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    overrides: list[str] = Field(default_factory=list)
    choices: dict[str, Settings] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        self._check_seeds()
        for field, each in (("variants", self.variants), ("conditions", self.conditions)):
            names = [one.name for one in each]
            for name in names:
                if names.count(name) > 1:
                    raise InputError(field, f"{name!r} names more than one.")
        _check_axes("axes", self.axes)
        for variant in self.variants:
            _check_axes(f"variants.{variant.name}.axes", variant.axes)
            if variant.search is not None:
                for among in variant.search.among:
                    _check_axes(f"variants.{variant.name}.search.among.axes", among.axes)
        return self

    def _check_seeds(self) -> None:
        """None repeats, and what a search has found is judged with others than its own."""
        judging = {
            "seeds": self.seeds,
            **{f"conditions.{each.name}.seeds": each.seeds for each in self.conditions},
            **{f"variants.{each.name}.seeds": each.seeds for each in self.variants},
        }
        searches = {
            f"variants.{each.name}.search.seeds": each.search.seeds
            for each in self.variants
            if each.search is not None
        }
        of_conditions = {
            f"conditions.{each.name}.search_seeds": each.search_seeds for each in self.conditions
        }
        for field, seeds in (judging | searches | of_conditions).items():
            if len(set(seeds or [])) < len(seeds or []):
                raise InputError(field, "must not repeat.")
        own = {seed for seeds in judging.values() for seed in seeds or []}
        searched = {seed for seeds in of_conditions.values() for seed in seeds or []}
        for field, seeds in searches.items():
            if own & {*seeds, *searched}:
                raise InputError(field, "must be none of those that judge what is found.")

    def with_seeds(self, number: int | None) -> Grid:
        """The same with so many seeds, 0 and up; None: its own.

        A condition or variant that has seeds of its own keeps so many of them; those of searches stay.

        Raises:
            InputError: a search has one of these seeds.
        """
        if number is None:
            return self
        conditions = [_with_fewer_seeds(each, number) for each in self.conditions]
        variants = [_with_fewer_seeds(each, number) for each in self.variants]
        seeds = list(range(number))
        grid = self.model_copy(
            update={"seeds": seeds, "conditions": conditions, "variants": variants}
        )
        try:
            grid._check_seeds()  # a copy is not validated
        except InputError as error:
            message = f"with {number}, {error.field} {error.message}"
            raise InputError("--seeds", message) from None
        return grid

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
        """Every variant at every condition and combination of its axes.

        Where a search has found nothing yet, the cell has the first candidate's settings and is ``open``.
        """
        for place in self._places():
            search = place.variant.search
            if search is None:
                yield self._cell(place)
                continue
            found = self.choices.get(place.name)
            settings = search.candidates()[0] if found is None else found
            yield replace(self._cell(place, settings), chosen=found or {}, open=found is None)

    def candidates(self) -> dict[str, list[Cell]]:
        """The cells of every search, by the name of the cell that it is for."""
        return {
            place.name: [
                replace(
                    self._cell(place, settings),
                    at=settings,
                    name=f"{place.name}/search/{slug(settings)}",
                    seeds=place.search_seeds,
                )
                for settings in place.variant.search.candidates()
            ]
            for place in self._places()
            if place.variant.search is not None
        }

    def _places(self) -> Iterator[_Place]:
        conditions: list[Condition | None] = [*self.conditions]
        for condition in conditions or [None]:
            for variant in self.variants or [Variant(name="as-is", label="as it is")]:
                axes = {**self.axes, **variant.axes}
                axes = {key: values for key, values in axes.items() if key not in variant.set}
                for values in itertools.product(*axes.values()):
                    yield _Place(condition, variant, dict(zip(axes, values, strict=True)))

    def _cell(self, place: _Place, searched: Settings | None = None) -> Cell:
        condition, variant = place.condition, place.variant
        own = condition.settings() if condition is not None else {}
        settings = {**self.set, **own, **variant.set, **place.at, **(searched or {})}
        recipe = self._recipe(settings)
        horizon = settings.pop(HORIZON, None)
        if horizon is not None and not (type(horizon) is int and horizon > 0):
            raise InputError(HORIZON, f"must be an integer ≥ 1, got {horizon!r}.")
        return Cell(
            variant=variant.name,
            label=variant.shown,
            at=place.at,
            name=place.name,
            preset=variant.preset or self.preset,
            overrides=(*overrides_of(settings), *self.overrides),
            seeds=tuple(variant.seeds or (condition and condition.seeds) or self.seeds),
            recipe=recipe,
            measure=self.measure,
            horizon=horizon,
            condition="" if condition is None else condition.name,
            where="" if condition is None else condition.shown,
        )

    def points(self, *, supposed: bool = False) -> list[Point]:
        """Searches first, then every cell with every seed, the first seed of all cells first.

        Args:
            supposed: also those that a search decides about, as if its first candidate were found.

        Raises:
            InputError: a point's configuration cannot be used; all are checked.
        """
        searched = [cell for cells in self.candidates().values() for cell in cells]
        cells = list(self.cells())
        for cell in (*searched, *cells):
            try:
                Point(cell, cell.seeds[0]).config(Path())
            except InputError as error:
                raise InputError(error.field, f"{error.message} (in {cell.name})") from None
        ready = [cell for cell in cells if supposed or not cell.open]
        return [*_by_seed(searched), *_by_seed(ready)]

    def _recipe(self, settings: Settings) -> dict[str, Any] | None:
        path = settings.get("policy.path")
        if not isinstance(path, str) or not path.startswith(POLICIES):
            return None
        name = path.removeprefix(POLICIES)
        shipped = {each.recipe: {"recipe": each.recipe} for each in self.conditions if each.recipe}
        known = {**shipped, **self.policies}
        if name not in known:
            names = ", ".join(known) or "none"
            raise InputError("policy.path", f"{path!r} is not among [policies] ({names}).")
        recipe = known[name]
        if "recipe" not in recipe:
            return recipe
        from capo.policies.recipes import recipe_settings

        own = {key: value for key, value in recipe.items() if key != "recipe"}
        try:
            return recipe_settings(str(recipe["recipe"])) | own
        except InputError as error:
            raise InputError(f"policies.{name}.recipe", error.message) from None


@dataclass(frozen=True)
class _Place:
    """A variant under a condition, at a combination of its axes."""

    condition: Condition | None
    variant: Variant
    at: Settings

    @property
    def search_seeds(self) -> tuple[int, ...]:
        """Of its search; none where there is none."""
        if self.variant.search is None:
            return ()
        own = None if self.condition is None else self.condition.search_seeds
        return tuple(own or self.variant.search.seeds)

    @property
    def name(self) -> str:
        """``CONDITION/VARIANT/AXES``, what there is of it."""
        condition = [] if self.condition is None else [self.condition.name]
        return "/".join([*condition, self.variant.name, *([slug(self.at)] if self.at else [])])


def _with_fewer_seeds(each: HasSeeds, number: int) -> HasSeeds:
    return each.model_copy(update={"seeds": each.seeds and each.seeds[:number]})


def _by_seed(cells: Sequence[Cell]) -> list[Point]:
    """The first seed of all cells first."""
    most = max((len(cell.seeds) for cell in cells), default=0)
    return [
        Point(cell, cell.seeds[index])
        for index in range(most)
        for cell in cells
        if index < len(cell.seeds)
    ]


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
