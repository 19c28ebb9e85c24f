"""Grids and points as data: what they combine, what they are named after, what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_kit import GRID

from capo import InputError
from capo.lab.sweep.drive import distinct
from capo.lab.sweep.estimate import Rate, forecast, modelled_seconds, point_seconds
from capo.lab.sweep.execute import Mark
from capo.lab.sweep.grid import parse_grid
from capo.lab.sweep.point import Point


def test_every_variant_at_every_combination_with_every_seed():
    points = parse_grid(GRID).points()
    assert [point.name for point in points] == [
        f"{variant}/lr{rate} seed {seed}"
        for seed in (0, 1)
        for variant in ("grpo", "capo")
        for rate in ("1e-04", "1e-03")
    ]
    config = points[3].config(Path())
    assert config.training.learning_rate == 1e-3
    assert config.training.steps == 4
    assert config.capo.selection == "capo"
    assert config.run.threads == 1
    assert points[4].config(Path()).run.seed == 1


def test_a_variants_own_axes_and_settings_win():
    text = (
        GRID
        + """
[[variants]]
name = "fixed"
set = { "training.learning_rate" = 5e-4 }
[[variants]]
name = "clip"
[variants.axes]
"algorithm.epsilon" = [0.2, 0.02]
"""
    )
    cells = [cell.name for cell in parse_grid(text).cells()]
    assert cells[4] == "fixed"
    assert cells[5:] == [
        f"clip/lr{rate}-epsilon={epsilon}" for rate in ("1e-04", "1e-03") for epsilon in (0.2, 0.02)
    ]


def test_the_same_configuration_is_the_same_run_whatever_it_is_called():
    one = parse_grid(GRID).points()
    other = parse_grid(GRID.replace('"grpo"', '"baseline"').replace("GRPO", "another")).points()
    assert [p.folder() for p in one] == [p.folder() for p in other]
    assert len(distinct([*one, *other])) == len(one)
    changed = parse_grid(GRID.replace('eval.problems" = 8', 'eval.problems" = 9')).points()
    assert not {p.folder() for p in changed} & {p.folder() for p in one}


def test_a_measurement_is_another_run_than_the_training():
    one, other = (parse_grid(text).points()[0] for text in (GRID, 'measure = "cost"\n' + GRID))
    assert one.fingerprint() != other.fingerprint()
    assert other.folder().startswith("cost-")


POLICY = """
preset = "small-aggressive"
[set]
"policy.path" = "policies:flat"
[policies.flat]
steps = 7
"""


def test_a_pretrained_policy_is_known_by_its_recipe_wherever_the_runs_are(tmp_path):
    point = parse_grid(POLICY).points()[0]
    here, there = point.config(tmp_path), point.config(tmp_path / "elsewhere")
    assert here.policy.path == str(tmp_path / point.cell.policy_folder)
    assert here.identity() != there.identity()
    assert point.identity()["recipe"] == {"steps": 7}
    other = parse_grid(POLICY.replace("7", "8")).points()[0]
    assert other.fingerprint() != point.fingerprint()
    assert other.cell.policy_folder != point.cell.policy_folder


def test_overrides_come_last():
    grid = parse_grid(GRID).with_settings(["training.steps=2"]).with_seeds(1)
    assert {point.config(Path()).steps for point in grid.points()} == {2}
    assert {point.seed for point in grid.points()} == {0}


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("[set]", "[sett]", "sett"),
        ("[1e-4, 1e-3]", "[]", "axes.training.learning_rate"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds"),
        ('name = "capo"', 'name = "grpo"', "variants"),
        ('"small-aggressive"', '"small-agressive"', "config"),
        ("training.steps", "training.stepz", "training.stepz"),
        ("seeds = [0, 1]", 'seeds = [0]\nmeasure = "luck"', "measure"),
        ("[axes]", '"policy.path" = "policies:none"\n[axes]', "policy.path"),
        ("preset =", "preset", "GRID"),
    ],
)
def test_what_cannot_be_is_named(old, new, field):
    with pytest.raises(InputError) as error:
        parse_grid(GRID.replace(old, new, 1)).points()
    assert error.value.field == field


def test_the_forecast_counts_what_is_missing_once(tmp_path):
    points = parse_grid(GRID).points()
    found = forecast([*points, *points], tmp_path)
    assert (found.runs, found.missing, found.measured) == (8, 8, False)
    assert found.core_seconds == pytest.approx(sum(modelled_seconds(p) for p in points))
    assert "8 runs, 0 of them made already" in found.sentence(2)


def test_the_forecast_follows_what_runs_have_taken_here():
    points = {point.folder(): point for point in parse_grid(GRID).points()}
    marks = {
        folder: Mark(point.fingerprint(), "steps", 3 * modelled_seconds(point), {})
        for folder, point in points.items()
    }
    rate = Rate.measured(points, marks)
    point = next(iter(points.values()))
    assert point_seconds(point, rate) == pytest.approx(3 * modelled_seconds(point))
    few = {
        folder: mark if index < 2 else None for index, (folder, mark) in enumerate(marks.items())
    }
    assert Rate.measured(points, few).by_kind == {}


def test_judging_and_passes_cost_more():
    plain, judged = parse_grid(GRID).points()[0], parse_grid(GRID).points()[2]
    assert modelled_seconds(judged) > modelled_seconds(plain)
    twice = parse_grid(GRID).with_settings(["algorithm.num_iterations=2", "training.steps=8"])
    assert modelled_seconds(twice.with_settings(["training.save_every=2"]).points()[0]) > (
        modelled_seconds(plain)
    )


def test_a_recipe_that_ships_is_known_by_its_settings():
    text = POLICY.replace("steps = 7", 'recipe = "aiw"\nsteps = 7')
    recipe = parse_grid(text).points()[0].cell.recipe
    assert recipe is not None
    assert recipe["steps"] == 7
    assert recipe["task"]["params"]["dataset"] == "aiw"
    assert "recipe" not in recipe
    with pytest.raises(InputError, match="did you mean 'aiw'") as error:
        parse_grid(text.replace('"aiw"', '"aiww"')).points()
    assert error.value.field == "policies.flat.recipe"


CONDITIONS = """
preset = "small-aggressive"
seeds = [0, 1]
target = "halfway"
[set]
horizon = 192
[[variants]]
name = "grpo"
[[variants]]
name = "best"
label = "GRPO at its best"
[variants.search]
seeds = [100, 101]
[[variants.search.among]]
set = { "training.completions_per_step" = 24 }
axes = { "training.learning_rate" = [1e-4, 5e-4] }
[[variants.search.among]]
axes = { "training.learning_rate" = [2e-4] }
[[conditions]]
name = "sums"
label = "sums, as they are"
recipe = "sums"
[[conditions]]
name = "short"
recipe = "aiw"
seeds = [0]
search_seeds = [100]
set = { horizon = 96 }
"""


def test_every_variant_is_tried_under_every_condition():
    grid = parse_grid(CONDITIONS)
    cells = list(grid.cells())
    assert [cell.name for cell in cells] == ["sums/grpo", "sums/best", "short/grpo", "short/best"]
    assert [cell.seeds for cell in cells] == [(0, 1), (0, 1), (0,), (0,)]
    assert [cell.open for cell in cells] == [False, True, False, True]
    sums, short = (Point(cells[index], 0).config(Path()) for index in (0, 2))
    assert (sums.policy.path, sums.task.name, sums.steps) == ("embedded:sums", "sums", 2)
    assert short.task.params["dataset"] == "aiw"
    assert short.policy.path == cells[2].policy_folder
    assert short.steps == 1
    assert [cell.seeds for cell in grid.with_seeds(1).cells()] == [(0,)] * 4


def test_a_variant_may_have_seeds_of_its_own():
    grid = parse_grid(CONDITIONS.replace('name = "grpo"', 'name = "grpo"\nseeds = [7, 8, 9]'))
    seeds = [cell.seeds for cell in grid.cells()]
    assert seeds == [(7, 8, 9), (0, 1), (7, 8, 9), (0,)]
    assert [cell.seeds for cell in grid.with_seeds(1).cells()] == [(7,), (0,), (7,), (0,)]
    with pytest.raises(InputError, match="none of those that judge"):
        parse_grid(CONDITIONS.replace('name = "grpo"', 'name = "grpo"\nseeds = [100]'))


def test_fewer_or_more_seeds_are_none_of_a_searchs():
    grid = parse_grid(CONDITIONS.replace("[100, 101]", "[2, 101]"))
    assert grid.with_seeds(2).seeds == [0, 1]
    with pytest.raises(InputError, match=r"with 3, variants\.best\.search\.seeds must be") as error:
        grid.with_seeds(3)
    assert error.value.field == "--seeds"


def test_searches_come_first_and_what_they_decide_about_waits():
    grid = parse_grid(CONDITIONS)
    candidates = grid.candidates()
    assert list(candidates) == ["sums/best", "short/best"]
    assert [cell.name for cell in candidates["sums/best"]] == [
        "sums/best/search/b24-lr1e-04",
        "sums/best/search/b24-lr5e-04",
        "sums/best/search/lr2e-04",
    ]
    points = grid.points()
    assert [point.seed for point in points[:9]] == [100] * 6 + [101] * 3
    assert [point.name for point in points[9:]] == [
        "sums/grpo seed 0",
        "short/grpo seed 0",
        "sums/grpo seed 1",
    ]
    assert len(grid.points(supposed=True)) == 15
    chosen = candidates["sums/best"][1].at
    settled = grid.model_copy(update={"choices": {"sums/best": chosen}})
    (cell,) = (each for each in settled.cells() if each.name == "sums/best")
    assert (cell.open, cell.chosen) == (False, chosen)
    config = Point(cell, 1).config(Path())
    assert config.training.completions_per_step == 24
    assert config.training.learning_rate == 5e-4
    assert config.steps == 8
    assert "sums/best seed 1" in [point.name for point in settled.points()]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("[100, 101]", "[1, 100]", "variants.best.search.seeds"),
        ("search_seeds = [100]", "search_seeds = [0]", "variants.best.search.seeds"),
        ("[100, 101]", "[100, 100]", "variants.best.search.seeds"),
        ("search_seeds = [100]", "search_seeds = [7, 7]", "conditions.short.search_seeds"),
        ("seeds = [0]", "seeds = [3, 3]", "conditions.short.seeds"),
        ('name = "grpo"', 'name = "grpo"\nseeds = [7, 7]', "variants.grpo.seeds"),
        ("[1e-4, 5e-4]", "[]", "variants.best.search.among.axes.training.learning_rate"),
        ('name = "short"', 'name = "sums"', "conditions"),
        ('recipe = "aiw"', 'recipe = "aiww"', "conditions.short.recipe"),
        ('"halfway"', '"half"', "target"),
    ],
)
def test_what_a_condition_or_a_search_cannot_be_is_named(old, new, field):
    with pytest.raises(InputError) as error:
        parse_grid(CONDITIONS.replace(old, new, 1)).points()
    assert error.value.field == field
