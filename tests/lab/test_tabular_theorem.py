"""Theorem 5.1: never violated where it should hold, and the checker can see a violation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from capo import InputError
from capo.lab import tabular
from capo.lab.tabular_adversary import Search, worst_ratio
from capo.lab.tabular_bounds import episodic_constants, safe_logit_range
from capo.lab.tabular_mdp import evaluate, random_mdp
from capo.lab.tabular_study import (
    DIRECTIONS,
    SETTINGS,
    Setting,
    Sweep,
    normalised_direction,
    rows_by_kl,
    rows_by_step,
    summarise,
    sweep,
    vacuous_horizons,
)

if TYPE_CHECKING:
    from pathlib import Path

FAST = (Setting(discount=0.3), Setting(discount=0.9), Setting(horizon=1), Setting(horizon=4))
NEVER = (
    "violations_exact",
    "violations_exact_proven_constant",
    "violations_damage",
    "violations_corrected",
)


@pytest.fixture(scope="module")
def sweeps() -> dict[str, Sweep]:
    """400 MDPs a setting × 4 directions × 25 steps."""
    return {setting.name: sweep(setting, 400, seed=11) for setting in FAST}


@pytest.mark.parametrize("name", [setting.name for setting in FAST])
def test_exact_bounds_and_the_corrected_quadratic_one_always_hold(
    sweeps: dict[str, Sweep], name: str
) -> None:
    summary = summarise(sweeps[name])
    assert summary["instances"] == 400 * 4 * 25
    assert {key: summary[key] for key in NEVER} == dict.fromkeys(NEVER, 0)
    assert summary["tightness_proven_constant"] <= 1
    assert summary["remainder_over_bound"] <= 1
    assert summary["mean_kl_over_bound"] <= 1 + 1e-9
    assert summary["remainder_order"] == pytest.approx(3, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_exact_bounds_hold_over_more_mdps(setting: Setting) -> None:
    summary = summarise(sweep(setting, 2000, seed=23))
    assert {key: summary[key] for key in NEVER} == dict.fromkeys(NEVER, 0)


@pytest.mark.parametrize("name", ["γ=0.3", "γ=0.9", "T=4"])
def test_a_planted_wrong_constant_is_detected(sweeps: dict[str, Sweep], name: str) -> None:
    s = sweeps[name]
    too_small = s.violated(s.comparison.surrogate, s.constants.paper / 100, s.comparison.mean_kl)
    assert int(too_small.sum()) > 0


def test_a_planted_wrong_improvement_is_detected(sweeps: dict[str, Sweep]) -> None:
    """A sign error in J would have to be noticed, too."""
    s = sweeps["γ=0.3"]
    flipped = replace(s, comparison=replace(s.comparison, improvement=-s.comparison.improvement))
    assert summarise(flipped)["violations_exact"] > 0


def test_quadratic_forms_violate_the_claim_at_large_steps_only(sweeps: dict[str, Sweep]) -> None:
    s = sweeps["γ=0.3"]
    rows = rows_by_step(s)
    safe = safe_logit_range(discount=0.3)
    assert sum(row["violations_quadratic"] for row in rows if row["logit_range"] >= 20) > 0
    assert sum(row["violations_quadratic"] for row in rows if row["logit_range"] <= safe) == 0
    assert safe < float(s.onset.min()) < 20
    assert sum(row["violations_quadratic"] for row in rows_by_kl(s)) == sum(
        row["violations_quadratic"] for row in rows
    )


def test_onset_separates_violating_from_holding_steps(sweeps: dict[str, Sweep]) -> None:
    s = sweeps["γ=0.3"]
    violated = s.violated(
        s.comparison.quadratic_surrogate, s.constants.paper, s.comparison.quadratic_kl
    )
    before = s.steps[None, :, None] < s.onset[:, None]
    assert not bool((violated & before).any())
    assert bool((violated.any(1) == s.onset.isfinite()).all())


def test_one_decision_leaves_no_penalty_and_so_no_room_for_the_quadratic_form(
    sweeps: dict[str, Sweep],
) -> None:
    """At T = 1 ω is the improvement itself (C = 0); its Taylor polynomial overshoots at any size."""
    s = sweeps["T=1"]
    torch.testing.assert_close(
        s.comparison.surrogate, s.comparison.improvement, rtol=1e-9, atol=1e-12
    )
    assert safe_logit_range(horizon=1) == 0
    assert rows_by_step(s)[0]["violations_quadratic"] > 0


def test_nothing_is_certified_where_the_penalty_outgrows_any_surrogate(
    sweeps: dict[str, Sweep],
) -> None:
    """ω ≤ M ε √(2δ), which is below C √δ as soon as γ ≥ 1/3 or T ≥ 2."""
    for name in ("γ=0.9", "T=4"):
        assert summarise(sweeps[name])["certified_exact"] == 0
        assert summarise(sweeps[name])["improved"] > 0
        assert summarise(sweeps[name])["certified_max_kl"] > 0
    assert summarise(sweeps["γ=0.3"])["certified_exact"] > 0


@pytest.mark.parametrize("discount", [0.1, 0.5, 0.9])
def test_the_worst_case_search_stays_within_what_is_proven(discount: float) -> None:
    search = Search(restarts=12, iterations=150)
    found = float(worst_ratio(torch.tensor([discount]), search=search))
    proven = min(0.5, 0.5 * math.sqrt((1 - discount) / discount))
    assert proven / 4 < found <= proven  # a factor 4: the constant cannot be far too large


def test_the_worst_case_search_breaks_the_quadratic_form_above_the_safe_range() -> None:
    ratios = worst_ratio(
        torch.tensor([0.3, 0.3]),
        quadratic=True,
        logit_ranges=torch.tensor([safe_logit_range(discount=0.3), 10.0]),
        search=Search(restarts=12, iterations=150),
    )
    assert float(ratios[0]) < 1 < float(ratios[1])


def test_vacuous_horizons_are_the_first_lengths_with_a_penalty_of_one() -> None:
    for row in vacuous_horizons():
        for key, column in (("theorem", 0), ("trajectory", 1)):
            T = row[key]
            at, before = (
                episodic_constants(t)[column] * math.sqrt(row["mean_kl"]) for t in (T, T - 1)
            )
            assert before < 1 <= at
        assert math.sqrt(row["pinsker"] * row["mean_kl"] / 2) == pytest.approx(1)


def test_directions_are_normalised_and_named() -> None:
    generator = torch.Generator().manual_seed(0)
    mdp, logits = random_mdp(5, 3, 2, generator=generator, horizon=3)
    base = evaluate(mdp, logits)
    for name in DIRECTIONS:
        direction = normalised_direction(name, mdp, base, generator)
        width = (direction.amax(-1) - direction.amin(-1)).amax(-1)
        torch.testing.assert_close(width, torch.ones_like(width))
    with pytest.raises(InputError, match="direction"):
        normalised_direction("sideways", mdp, base, generator)


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(tabular.main)
    return app


def test_the_same_seed_gives_the_same_study() -> None:
    settings, search = FAST[:1], Search(restarts=2, iterations=2)
    studies = [tabular.run_study(8, seed, search, settings) for seed in (5, 5, 6)]
    assert json.dumps(studies[0]) == json.dumps(studies[1])
    assert studies[0]["by_step"] != studies[2]["by_step"]


@pytest.mark.slow
def test_command_writes_the_results_and_refuses_to_overwrite_them(tmp_path: Path) -> None:
    output = tmp_path / "results"
    options = ["--output", str(output), "--mdps", "8", "--search-iterations", "3"]
    result = CliRunner().invoke(command(), options)
    assert result.exit_code == 0, result.output
    assert "Worst case" in result.output
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert [row["setting"] for row in summary["settings"]] == [s.name for s in SETTINGS]
    assert len(pd.read_csv(output / "by_step.csv")) == len(SETTINGS) * len(DIRECTIONS) * 25
    assert "<svg" in (output / "theorem.svg").read_text(encoding="utf-8")
    assert (output / "theorem.png").stat().st_size > 10_000

    before = (output / "summary.json").read_bytes()
    again = CliRunner().invoke(command(), options)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    assert (output / "summary.json").read_bytes() == before


def test_command_refuses_too_few_mdps_and_writes_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(command(), ["--output", str(tmp_path / "x"), "--mdps", "3"])
    assert result.exit_code == 2
    assert "mdps: must be at least 4" in result.output
    assert not (tmp_path / "x").exists()
