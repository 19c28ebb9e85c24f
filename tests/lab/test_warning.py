"""`capo bench warning`: leads, false alarms, the freezing rule, and the record that the constants follow."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from capo import WarningConstants
from capo.core.early_warning import FROZEN
from capo.lab.warning import command, report
from capo.lab.warning.freeze import SAFETY, candidates, largest_sum, lead
from capo.lab.warning.plan import RunPlan, freezing_runs, judged_runs
from capo.lab.warning.watched import Watched, watch_run

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "results" / "warning"
CONSTANTS = WarningConstants(allowance=2.0, threshold=4.0, most=3.0)


def run(
    excess: list[float | None],
    accuracy: list[float] | None = None,
    group: str = "a group",
    seed: int = 0,
) -> Watched:
    values = accuracy or [0.5] * (len(excess) + 1)
    return Watched(
        group, "small-aggressive", seed, {}, len(excess), excess, list(enumerate(values))
    )


LONG = [None, 20.0, 20.0, 20.0, 20.0, 20.0]
FALLEN = run(LONG, [0.4, 0.5, 0.6, 0.7, 0.5, 0.3, 0.1])
STABLE = run([1.0] * 6)


def test_halved_is_the_first_evaluation_below_half_of_the_peak_so_far() -> None:
    assert (FALLEN.halved, FALLEN.peak) == (5, 0.7)
    assert run([1.0] * 3, [0.4, 0.3, 0.21, 0.2]).halved is None  # half is not below half
    assert run([1.0] * 3, [0.4, 0.1, 0.9, 0.8]).halved == 1  # a later peak excuses nothing


def test_lead_is_from_the_warning_to_the_halving() -> None:
    assert FALLEN.warned(CONSTANTS) == 3
    assert lead(FALLEN, CONSTANTS) == 2
    late = dataclasses.replace(CONSTANTS, threshold=9.0)
    assert FALLEN.warned(late) == 5
    assert lead(FALLEN, late) == 0
    never = dataclasses.replace(CONSTANTS, threshold=90.0)
    assert lead(FALLEN, never) == -math.inf
    assert lead(STABLE, CONSTANTS) == -math.inf
    after = run([1.0] * 5 + [20.0] * 3, [0.5, 0.1, *[0.1] * 7])
    assert after.warned(CONSTANTS) == 7
    assert lead(after, CONSTANTS) == -math.inf  # a warning after the fall is none


def test_the_freezing_rule() -> None:
    noisy = run([3.0] * 4 + [0.1] * 4, group="stable")
    best, *others = candidates([FALLEN, STABLE, noisy])
    assert best.safety >= SAFETY
    worst = max(largest_sum(one, best.constants) for one in (STABLE, noisy))
    assert best.safety == (best.constants.threshold / worst if worst else math.inf)
    for one in others:
        assert one.safety < SAFETY or one.merit <= best.merit
        assert one.constants.threshold > one.constants.most
    unsafe = [one for one in others if one.safety < SAFETY]
    assert unsafe
    assert others[-len(unsafe) :] == unsafe


def test_freezing_and_judging_share_nothing() -> None:
    frozen, judged = freezing_runs(), judged_runs(5)
    assert not {one.seed for one in frozen} & {one.seed for one in judged}
    assert all("task.params.largest" in one.settings for one in frozen)
    assert not any("task.params.largest" in one.settings for one in judged)
    rates = [
        {one.settings.get("training.learning_rate", 1e-3) for one in plans}
        for plans in (frozen, judged)
    ]
    assert not rates[0] & rates[1]
    assert sum(one.group == "CAPO, lr 1e-2" for one in judged) == 5
    assert sum(one.group == "GRPO, lr 1e-4" for one in judged) == 5
    planted = [one for one in judged if one.group == report.PLANTED]
    assert [(one.preset, one.settings) for one in planted] == [("small-aggressive", {})] * 5


def test_goals_are_counted() -> None:
    planted = [dataclasses.replace(FALLEN, group=report.PLANTED, seed=s) for s in range(3)]
    stable = [dataclasses.replace(STABLE, seed=s, group=report.CALM[s % 2]) for s in range(10)]
    wild = run([20.0] * 6, group=report.CALM[0], seed=99)
    edge = run([20.0] * 6, group="edge")
    calm = report.judged([*planted, *stable])
    values = {goal["goal"]: (goal["value"], goal["reached"]) for goal in calm["goals"]}
    assert values["no false alarm over ten stable runs"] == ("0 of 10", True)
    assert [row["halved"] for row in calm["leads"]] == [5, 5, 5]
    alarmed = report.judged([*planted, *stable, wild])
    values = {goal["goal"]: (goal["value"], goal["reached"]) for goal in alarmed["goals"]}
    assert values["no false alarm over ten stable runs"] == ("1 of 11", False)
    beside = {goal["goal"]: goal for goal in report.judged([*stable, edge])["goals"]}
    assert beside["no false alarm over ten stable runs"]["reached"]
    assert beside["nor in the other runs that did not halve, near the edge"]["value"] == "1 of 1"
    few = report.judged([*planted, *stable[:9]])
    assert not {g["goal"]: g for g in few["goals"]}["no false alarm over ten stable runs"][
        "reached"
    ]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "judged.json"
    command.write(path, {"command": "x", "runs": [FALLEN.to_dict(), STABLE.to_dict()]})
    document = command.read(path)
    assert [Watched.from_dict(row) for row in document["runs"]] == [FALLEN, STABLE]
    assert document["command"] == "x"
    command.write(path, {"runs": []})
    assert command.read(path)["runs"] == []


def test_recorded_runs_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = judged_runs(1)
    done = [Watched(p.group, p.preset, p.seed, p.settings, 6, LONG, [(0, 0.5)]) for p in plans]
    path = tmp_path / "judged.json"
    command.write(path, {"runs": [one.to_dict() for one in done]})

    def refuse(*_: object) -> None:
        raise AssertionError("a run was made")

    monkeypatch.setattr(command, "watch_run", refuse)
    assert command.make_runs(plans, path, 2) == done
    assert command.make_runs(judged_runs(2), path, 0) == done  # --report-only


@pytest.mark.slow
def test_a_run_is_watched_until_it_has_fallen() -> None:
    settings = {
        "training.steps": 30,
        "training.completions_per_step": 32,
        "training.micro_batch": 32,
    }
    plan = RunPlan("x", "small-aggressive", 5, {**settings, "training.learning_rate": 4e-3})
    watched = watch_run(plan)
    assert watched.halved is not None
    assert watched.steps < 30
    assert len(watched.excess) == watched.steps
    assert watched.excess[0] is None  # the warm-up begins at 0
    assert [step for step, _ in watched.accuracy] == list(range(watched.steps + 1))
    assert min(one for one in watched.excess if one is not None) > FROZEN.allowance


@pytest.mark.slow
def test_the_report_from_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = command.read(RECORD / command.JUDGED)
    command.write(tmp_path / command.JUDGED, {"runs": document["runs"]})
    command.main(["--report-only", "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no false alarm over ten stable runs" in said
    assert "# Early warning of collapse" in (tmp_path / "README.md").read_text()
    for name in ("warning.svg", "warning.png", "warning.csv"):
        assert (tmp_path / name).stat().st_size > 500
    again = json.loads((tmp_path / command.JUDGED).read_text())
    for key in ("goals", "groups", "leads", "constants"):
        assert again[key] == document[key]


def test_the_constants_are_those_of_the_record() -> None:
    document = command.read(RECORD / command.FREEZING)
    runs = [Watched.from_dict(row) for row in document["runs"]]
    assert len(runs) == len(freezing_runs())
    best, *_ = candidates(runs)
    assert best.constants == FROZEN
    assert document["frozen"] == dataclasses.asdict(FROZEN)
    assert best.safety >= SAFETY
