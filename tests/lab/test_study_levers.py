"""All levers together, on invented outcomes: what is drawn, composed, judged and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_kit import Fake, racing

from capo import InputError
from capo.lab.sections import validate
from capo.lab.study import levers_command
from capo.lab.study.jobs import Job
from capo.lab.study.levers import Levers, composed, drawn, levers_of, load_levers
from capo.lab.study.outcome import Outcome, Store
from capo.lab.study.pool import Driver

BATCH, SCALE = "training.completions_per_step", "algorithm.scale_rewards"


def plan(**changes: Any) -> Levers:
    axes = {BATCH: [24, 8], SCALE: ["group", "none"], "algorithm.num_iterations": [4, 2, 1]}
    document: dict[str, Any] = {
        "preset": "small-capo",
        "plain": "small-aggressive",
        "draw": 6,
        "draw_seed": 1,
        "more_seeds": [50, 51],
        "budget": 960,
        "measure": {"seeds": [0, 1], "spacing": 24},
        "rounds": [
            {"seeds": [100], "share": 0.4, "budget": 480, "spacing": 24},
            {"seeds": [101, 102], "budget": 480, "spacing": 24},
        ],
        "families": [
            {"name": "levers-capo", "label": "CAPO, all levers", "kind": "capo", "axes": axes},
            {
                "name": "levers-grpo",
                "label": "GRPO, all levers",
                "kind": "grpo",
                "set": {"training.num_generations": 4},
                "axes": {"training.learning_rate": [5e-5, 1e-4], **axes},
            },
        ],
    }
    made: Levers = validate(Levers, document | changes)
    return made


def helped(job: Job) -> Outcome:
    """Two levers help, each alone and both together; one does harm; the rest is nothing."""
    config = job.config()
    at = 360
    at -= 120 * (config.algorithm.scale_rewards == "none")
    at -= 96 * (config.training.completions_per_step == 8)
    at += 48 * (config.algorithm.num_iterations == 1)
    return racing(job, at=at)


def study(tmp_path: Path, behave: Callable[[Job], Outcome] = helped) -> tuple[Any, Fake]:
    fake, one = Fake(behave), plan()
    driver = Driver(Store(tmp_path), fake)
    return driver({each.name: levers_of(one, each) for each in one.families}), fake


def test_the_shipped_plan_can_be_run_and_is_fair() -> None:
    shipped = load_levers()
    axes = {each.kind: each.axes for each in shipped.families}
    for family in shipped.families:
        for settings in drawn(family, shipped.draw, shipped.draw_seed):
            shipped.arm(family, family.name, settings, shipped.rounds[0]).job(0).config()
    own = {"capo.trust_region.predictor", "capo.trust_region.step_length"}
    assert set(axes["capo"]) - set(axes["grpo"]) == own | {"capo.trust_region.cruise"}
    assert set(axes["grpo"]) - set(axes["capo"]) == {"training.learning_rate"}
    for key in set(axes["capo"]) & set(axes["grpo"]):
        assert sorted(map(str, axes["capo"][key])) == sorted(map(str, axes["grpo"][key])), key
    assert shipped.measure.seeds == [0, 1, 2, 3, 4]
    assert shipped.more_seeds == [400, 401, 402]


def test_draws_are_different_repeatable_and_include_the_start() -> None:
    family = plan().families[0]
    first = drawn(family, 6, 1)
    assert first == drawn(family, 6, 1) != drawn(family, 6, 2)
    assert first[0] == {BATCH: 24, SCALE: "group", "algorithm.num_iterations": 4}
    assert all(first.count(each) == 1 for each in first)
    assert len(drawn(family, 99, 1)) == 12


def test_what_helps_on_average_is_put_together() -> None:
    family = plan().families[0]
    arms = drawn(family, 12, 1)

    def score(settings: dict[str, Any]) -> float:
        return 300 - 50 * (settings[SCALE] == "none") - 20 * (settings[BATCH] == 8)

    best = composed(family, tuple((each, score(each), 1) for each in arms))
    assert (best[SCALE], best[BATCH]) == ("none", 8)


def test_the_combination_wins_and_is_judged_on_fresh_seeds(tmp_path: Path) -> None:
    results, fake = study(tmp_path)
    capo = results["levers-capo"]
    assert capo.narrowing.winner[SCALE] == "none"
    assert capo.narrowing.winner[BATCH] == 8
    assert [o.seed for o in capo.narrowing.result.outcomes] == [0, 1, 50, 51]
    assert [o.seed for o in capo.start.outcomes] == [0, 1, 50, 51]
    judging = {job.seed for job in fake.made if job.arm.stage.endswith("-final")}
    choosing = {job.seed for job in fake.made if not job.arm.stage.endswith("-final")}
    assert not judging & choosing
    per_family = [
        sum(j.arm.stage == f"levers-{name}" for j in fake.made) for name in ("capo", "grpo")
    ]
    assert abs(per_family[0] - per_family[1]) <= 3  # but for a combination that was drawn already


def test_the_report_says_what_was_reached(tmp_path: Path) -> None:
    results, _ = study(tmp_path / "runs")
    goals = levers_command.write_report(plan(), list(results.values()), [], tmp_path)
    by_name = {goal.name: goal for goal in goals}
    few = by_name["2 seeds, all levers together against GRPO at its best"]
    assert few.status == "reached"  # 360 against 144
    same = by_name["4 seeds, all levers together against GRPO with the same levers"]
    assert same.sentence.startswith(
        "4 seeds, all levers together against GRPO with the same levers: 1.0 ×"
    )
    text = (tmp_path / "README.md").read_text()
    assert "every level in company" in text
    assert "## Narrowing: CAPO, all levers" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["races"][1]["per_seed"] == {"0": 144, "1": 144, "50": 144, "51": 144}
    effects = {(e["axis"], e["level"]): e["score"] for e in summary["effects"]["levers-capo"]}
    assert effects[SCALE, "none"] < effects[SCALE, "group"]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    one, store = plan(), Store(tmp_path)
    parts = {each.name: levers_of(one, each) for each in one.families}
    with pytest.raises(KeyboardInterrupt):
        Driver(store, Fake(helped, dies_after=9))(parts)
    again = Fake(helped)
    Driver(store, again)({each.name: levers_of(one, each) for each in one.families})
    whole, fake = study(tmp_path / "whole")
    assert len(again.made) == len(fake.made) - 9
    assert whole["levers-capo"] is not None


def test_an_unfinished_narrowing_is_left_out(tmp_path: Path) -> None:
    one = plan()
    results = Driver(Store(tmp_path), None)({e.name: levers_of(one, e) for e in one.families})
    assert results == {"levers-capo": None, "levers-grpo": None}
    goals = levers_command.write_report(one, [], [], tmp_path)
    assert {goal.status for goal in goals} == {"not measured"}


def test_seeds_that_judge_may_not_choose() -> None:
    with pytest.raises(InputError, match="rounds"):
        plan(more_seeds=[101])
    with pytest.raises(InputError, match="--plan"):
        load_levers(Path("nowhere.toml"))
