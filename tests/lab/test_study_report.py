"""The study's report on invented outcomes: goals both ways, tables, data, figures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from study_kit import Fake, outcome, racing, small_plan

from capo import InputError
from capo.lab.study.goals import all_goals, any_learning_rate, range_goal, ratio_goal
from capo.lab.study.outcome import ArmResult, Store
from capo.lab.study.pool import Driver
from capo.lab.study.report import write_report
from capo.lab.study.stages import RangeResult, run_study
from capo.lab.study.tables import provenances

ARM = small_plan().raced("some", "small-aggressive", {})


def at(*completions, wanted=5, label="an arm"):
    """An arm whose seeds reach the target there (a spacing of 1), or never (None: at 4800)."""
    runs = []
    for seed, each in enumerate(completions):
        if each is None:
            run = outcome(0.5, 0.5, 0.5, completions=4800)
        else:
            run = outcome(0.9, 0.9, 0.9, completions=each)
            points = [
                replace(e, completions=each - 96 * (3 - i)) for i, e in enumerate(run.evaluations)
            ]
            run = replace(run, evaluations=tuple(points))
        runs.append(replace(run, seed=seed))
    return ArmResult("some", label, ARM, tuple(runs), wanted)


def over(*points, label="CAPO"):
    """Final accuracies by learning rate; a value below 0.2 is a collapse."""
    results = []
    for rate, *finals in points:
        runs = tuple(outcome(final, final, final, seed=i) for i, final in enumerate(finals))
        results.append((rate, ArmResult("x", label, ARM, runs, len(finals))))
    return RangeResult("x", label, tuple(results), False)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# Goals


def test_a_ratio_goal_that_is_reached_says_so_with_its_figures():
    goal = ratio_goal("against it", at(*[13200] * 5), at(*[1000] * 5), 10, 30)
    assert goal.status == "reached"
    assert goal.sentence == (
        "Against it: goal ≥ 10 ×: reached, 13.2 × [13.2, 13.2]; aim 30 ×: not reached "
        "(median 1,000 against 13,200 completions)."
    )


def test_a_ratio_goal_that_is_not_reached_says_so():
    goal = ratio_goal("against it", at(*[4000] * 5), at(*[1000] * 5), 10, 30)
    assert goal.status == "not reached"
    assert "goal ≥ 10 ×: not reached, 4.0 × [4.0, 4.0]" in goal.sentence


def test_a_goal_is_reached_at_its_figure_exactly():
    assert ratio_goal("x", at(*[1500] * 5), at(*[1000] * 5), 1.5, 3).status == "reached"


def test_being_ahead_means_more_than_as_good():
    assert ratio_goal("x", at(*[1000] * 5), at(*[1000] * 5), 1.0).status == "not reached"
    assert ratio_goal("x", at(*[1001] * 5), at(*[1000] * 5), 1.0).status == "reached"


def test_a_censored_rival_is_beaten_by_at_least_so_much_or_nobody_knows():
    slow = at(None, None, None, 900, 900)
    surely = ratio_goal("x", slow, at(*[400] * 5), 10)
    assert surely.status == "reached"
    assert "reached, > 12.0 ×" in surely.sentence
    unclear = ratio_goal("x", slow, at(*[1000] * 5), 10)
    assert unclear.status == "undecided"
    assert "(median 1,000 against > 4,800 completions)" in unclear.sentence


def test_a_default_that_never_gets_there_fails():
    goal = ratio_goal("x", at(*[1000] * 5), at(*[None] * 5), 1.5, 3)
    assert goal.status == "not reached"


def test_missing_seeds_are_said():
    goal = ratio_goal("x", at(2000, 2000), at(*[1000] * 5), 1.5)
    assert goal.sentence.endswith("Preliminary: 7 of 10 runs.")
    assert ratio_goal("x", None, at(1000), 1.5).status == "not measured"
    assert ratio_goal("x", at(), at(1000), 1.5).status == "not measured"


def test_any_learning_rate_is_reached_within_five_hundredths_and_without_a_collapse():
    goal = any_learning_rate(over((1e-4, 0.9, 0.9, 0.5), (1e-2, 0.85, 0.85, 0.99)))
    assert goal.status == "reached"
    assert (
        "the lowest median of the final accuracy is 0.850 (at 1e-02), 0.050 below" in goal.sentence
    )
    assert "0 of 6 runs collapsed" in goal.sentence


@pytest.mark.parametrize(
    "points",
    [
        ((1e-4, 0.9, 0.9, 0.9), (1e-2, 0.84, 0.84, 0.84)),  # too far below the best
        ((1e-4, 0.9, 0.9, 0.9), (1e-2, 0.9, 0.9, 0.1)),  # one seed collapsed
    ],
)
def test_any_learning_rate_is_not_reached_otherwise(points):
    assert any_learning_rate(over(*points)).status == "not reached"


def test_a_wider_range_must_be_wider():
    wide = over((1e-4, 0.9), (1e-3, 0.9), (1e-2, 0.9))
    narrow = over((1e-4, 0.9), (1e-3, 0.1), label="rule")
    ahead = range_goal("x", narrow, wide)
    assert ahead.status == "reached"
    assert "1e-04 to 1e-02 (100 ×) against 1e-04 to 1e-04 (1 ×)" in ahead.sentence
    assert range_goal("x", wide, wide).status == "not reached"
    nothing = over((1e-4, 0.1))
    assert "against no learning rate survived" in range_goal("x", nothing, wide).sentence


# The whole report


def behave(job):
    """CAPO learns at any learning rate, GRPO below 4e-4 and later; large ones collapse."""
    config = job.config()
    rate, batch = config.training.learning_rate, config.training.completions_per_step
    if job.arm.preset == "small-aggressive-capo":
        return racing(job, at=960 + 48 * job.seed if job.seed < 5 else 960)
    if batch > 1000:
        return racing(job, at=12 * 1152)
    slow = 2400 if job.arm.stage == "final" else 1440
    return racing(job, at=slow, collapses=rate > 3e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    driver = Driver(Store(root / "runs"), Fake(behave))
    plan = small_plan(
        variants=[{"name": "v1", "label": "CAPO | no warm-up", "set": {"schedule": "constant"}}]
    )
    study = run_study(plan, driver)
    output = root / "report"
    output.mkdir()
    (output / "fidelity.json").write_text(
        json.dumps(
            {
                "title": "Fidelity of the predictors",
                "command": "capo bench fidelity",
                "rows": [{"predictor": "deep", "spearman": 0.98765}, {"predictor": "head"}],
                "goals": [
                    {"name": "fidelity", "goal": "≥ 0.95", "value": "0.988", "reached": True}
                ],
            }
        )
    )
    goals = write_report(study, driver.known, output)
    return study, goals, output, driver.known


def test_every_goal_has_its_sentence(made):
    _, goals, output, _ = made
    text = (output / "README.md").read_text()
    statuses = {goal.name: goal.status for goal in goals}
    assert statuses == {
        "any learning rate": "reached",
        "the stable range of plain GRPO": "as measured",
        "against conservative GRPO": "reached",
        "against GRPO with the same batch at its own best": "as measured",
        "against GRPO at its best": "reached",
        "ahead of gradient-norm clip, completions": "reached",
        "ahead of gradient-norm clip, learning rates": "reached",
        "fidelity": "reached",
    }
    for goal in goals:
        assert f"- {goal.sentence}\n" in text
    # 13,824 completions against a median of 1056.
    assert "Against conservative GRPO: goal ≥ 10 ×: reached, 13.1 ×" in text
    assert "Fidelity: goal ≥ 0.95: reached, 0.988." in text


def test_the_tables_say_what_was_run(made):
    _, _, output, known = made
    text = (output / "README.md").read_text()
    assert f"{len(known)} runs," in text
    assert "other seeds for every choice but that of the conservative learning rate" in text
    assert "at commit 0123456789 on a test's CPU (2 cores)" in text
    assert "| CAPO, default | `small-aggressive-capo`  | 1,056 [960, 1,152] | 5 of 5 | 0 |" in text
    assert "CAPO \\| no warm-up" in text
    assert "it is 4e-04" in text
    assert "| 4e-04 | 5 of 5 |" in text
    assert "| deep | 0.9877 |" in text
    assert "| head |  |" in text
    assert "At the edge of what was tried: lr 0.0001, batch 24.\n" in text


def test_the_data_say_the_same(made):
    _, goals, output, known = made
    summary = json.loads((output / "summary.json").read_text())
    assert [goal["status"] for goal in summary["goals"]] == [goal.status for goal in goals]
    races = {race["name"]: race for race in summary["races"]}
    assert races["capo-default"]["completions"]["value"] == {"low": 1056, "high": 1056}
    assert races["capo-default"]["per_seed"] == [960, 1008, 1056, 1104, 1152]
    assert summary["collapse_search"]["lowest"] == 4e-4
    rows = table(output / "runs.csv")
    assert len(rows) == len(known)
    mine = [row for row in rows if row["arm"] == "capo-default"]
    assert [row["completions_to_target"] for row in mine] == ["960", "1008", "1056", "1104", "1152"]


def test_the_figures_are_drawn(made):
    _, _, output, _ = made
    for slug in ("races", "races_rules", "races_variants", "completions", "learning_rates"):
        assert (output / f"{slug}.png").read_bytes().startswith(b"\x89PNG")
        svg = (output / f"{slug}.svg").read_text()
        assert "NaN" not in svg
        assert f"![{slug}" not in svg
    text = (output / "README.md").read_text()
    assert "](learning_rates.png)" in text
    rows = table(output / "races.csv")
    assert {row["series"] for row in rows} >= {"CAPO, default", "conservative GRPO"}
    assert all(float(row["low"]) <= float(row["median"]) <= float(row["high"]) for row in rows)
    assert all(float(row["completions"]) > 0 for row in rows)


def test_the_report_of_the_recorded_runs_is_the_same(made, tmp_path):
    study, _, output, known = made
    (tmp_path / "fidelity.json").write_bytes((output / "fidelity.json").read_bytes())
    write_report(study, list(reversed(known)), tmp_path)
    for name in ("README.md", "summary.json", "runs.csv"):
        assert (tmp_path / name).read_text() == (output / name).read_text()


def test_goals_that_are_not_reached_are_said_as_plainly(tmp_path):
    def slow(job):
        if job.arm.preset == "small-aggressive-capo":
            return racing(job, collapses=job.config().training.learning_rate >= 1e-2)
        return behave(job)

    driver = Driver(Store(tmp_path / "runs"), Fake(slow))
    statuses = {g.name: g.status for g in all_goals(run_study(small_plan(), driver))}
    assert statuses["any learning rate"] == "not reached"
    assert statuses["against GRPO at its best"] == "not reached"
    assert statuses["ahead of gradient-norm clip, completions"] == "not reached"


def test_a_report_on_nothing_is_still_a_report(tmp_path):
    goals = write_report(run_study(small_plan(), Driver(Store(tmp_path), None)), [], tmp_path)
    assert {goal.status for goal in goals} == {"not measured"}
    assert "not measured yet" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_a_broken_table_of_others_is_named(tmp_path):
    (tmp_path / "cost.json").write_text("[]")
    study = run_study(small_plan(), Driver(Store(tmp_path), None))
    with pytest.raises(InputError, match=r"cost\.json: must be an object with rows"):
        write_report(study, [], tmp_path)


def test_runs_of_several_origins_are_told_apart():
    other = {"git_commit": "fedcba", "git_dirty": True}
    runs = [outcome(0.5), outcome(0.5), outcome(0.5, provenance=other)]
    assert [(p["runs"], p["git_commit"]) for p in provenances(runs)] == [
        (2, "0123456789abcdef"),
        (1, "fedcba"),
    ]
