"""The report's section on the trust region, its alarms, and the numbers behind both."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import HOSTILE, alarm, config, write_lines, write_run
from test_report import page, words

from capo.lab.report import build_report
from capo.lab.report.alarms import read_alarms
from capo.lab.report.ledger import agreement, certified, ledger, points, same_sign
from capo.lab.report.reading import read_run
from capo.lab.report.summary import group_series, summarise
from capo.lab.report.trust import MAX_DRAWN, trust_figures

TARGET, BUDGET = 0.75, 1.5e-3
TRUST = {"capo__trust_region": {"policy_shift": BUDGET, "predictor": "measured"}}
FIGURES = {"agreement", "scale", "objective", "reward", "bound"}


def series_of(*paths: Path) -> list[Any]:
    return group_series([summarise(read_run(path), TARGET) for path in paths])


def rewrite(run: Path, change: Any) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    write_lines(run / "metrics.jsonl", rows)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("two")
    runs = [
        write_run(root / "plain", config("plain"), shape="collapses", shifts=False),
        write_run(root / "kept", config("kept", **TRUST), trust=BUDGET, shifts=False),
        write_run(root / "other", config("other", 1, **TRUST), trust=2 * BUDGET, shifts=False),
    ]
    write_lines(runs[0] / "alarms.jsonl", [alarm(9), alarm(12, kind="reward", began=9)])
    return build_report(runs, root / "report.html"), runs


def test_the_section_has_its_figures_and_their_data(two: tuple[Path, list[Path]]) -> None:
    path, runs = two
    folder = path.parent / "report_figures"
    found = {file.stem.removeprefix("trust-") for file in folder.glob("trust-*.png")}
    # The two runs of one configuration are one series: nothing to overlay.
    assert found == FIGURES | {"shift-1"}
    metrics = read_run(runs[1]).metrics
    drawn = [row for row in rows_of(folder / "trust-agreement.csv") if row["run"] == "kept"]
    assert [float(row["y"]) for row in drawn] == pytest.approx(
        metrics["capo/trust/measured_policy_shift"].tolist()
    )
    assert [float(row["x"]) for row in drawn] == pytest.approx(
        metrics["capo/trust/predicted_policy_shift"].tolist()
    )
    shift = rows_of(folder / "trust-shift-1.csv")
    assert {row["quantity"] for row in shift} == {"proposed", "predicted", "measured", "budget"}


def test_the_captions_say_what_was_measured(two: tuple[Path, list[Path]]) -> None:
    path, runs = two
    text = words(page(path))
    (one,) = [one for one in series_of(*runs) if len(one.runs) == 2]
    found = agreement(points([one], "predicted", "measured"))
    assert found.correlation is not None
    assert found.factor is not None
    assert found.worst is not None
    assert f"log-log correlation {found.correlation:.2f}" in text
    assert f"median |log ratio| {math.log(found.factor):.2f}" in text
    assert f"worst measured {found.worst[0]:.2f} × the prediction, at step {found.worst[1]}" in text
    assert "0 of 120 steps (0%)" in text  # the bound certifies nothing
    assert "Trust region" in text


def test_the_summary_counts_steps_within_the_budget(two: tuple[Path, list[Path]]) -> None:
    path, runs = two
    text = words(page(path))
    shares, met, steps = [], 0, 0
    for run in runs[1:]:
        table = read_run(run).metrics
        within = table["capo/trust/measured_policy_shift"] <= table["capo/trust/budget"]
        shares.append(within.mean())
        met, steps = met + int(within.sum()), steps + len(within)
        summary = summarise(read_run(run), TARGET)
        assert summary.within is not None
        assert (summary.within.met, summary.within.steps) == (within.sum(), len(within))
    assert all(0 < share < 1 for share in shares)
    assert "Steps in budget" in text
    assert f"{met / steps:.1%}" in text
    assert f"{shares[0]:.1%} δ 1.5e-03" in text
    assert "GRPO + trust region" in text


def test_a_report_without_ledger_has_no_such_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    text = words(page(build_report([run], tmp_path / "r.html")))
    for absent in ("Trust region", "Steps in budget", "Alarms"):
        assert absent not in text
    assert trust_figures(series_of(run)) == []
    assert summarise(read_run(run), TARGET).algorithm == "GRPO"


def test_a_ledger_that_scales_nothing(tmp_path: Path) -> None:
    settings = config("a", capo__trust_region={"policy_shift": None})
    run = write_run(tmp_path / "a", settings, trust=BUDGET)

    def unscaled(row: dict[str, Any]) -> None:
        del row["capo/trust/budget"], row["capo/trust/met"]
        row["capo/trust/scale"] = 1.0

    rewrite(run, unscaled)
    slugs = {figure.slug for figure in trust_figures(series_of(run))}
    assert slugs == {f"trust-{name}" for name in (FIGURES - {"scale"}) | {"shift-1"}}
    summary = summarise(read_run(run), TARGET)
    assert (summary.algorithm, summary.within) == ("GRPO", None)
    assert build_report([run], tmp_path / "r.html").exists()


def test_steps_without_a_number_survive(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", **TRUST), trust=BUDGET)

    def holes(row: dict[str, Any]) -> None:
        if row["step"] == 1:  # learning rate 0
            for name in ("proposed", "predicted", "measured"):
                row[f"capo/trust/{name}_policy_shift"] = 0.0
        if row["step"] == 2:  # no finite step
            row["capo/trust/proposed_policy_shift"] = math.inf
        if row["step"] == 3:
            row["capo/trust/measured_policy_shift"] = math.nan
            row["reward"] = None
        if row["step"] == 4:
            for key in [key for key in row if key.startswith("capo/trust/")]:
                del row[key]

    rewrite(run, holes)
    assert build_report([run], tmp_path / "r.html").exists()
    (one,) = series_of(run)
    assert agreement(points([one], "predicted", "measured")).steps == 57
    assert set(points([one], "promised", "change")["step"]) == set(range(1, 60)) - {3, 4}


def test_nothing_but_zeros_survives(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", **TRUST), trust=BUDGET, steps=5, eval_every=5)
    rewrite(run, lambda row: row.update({k: 0.0 for k in row if k.startswith("capo/trust/")}))
    assert "Trust region" in words(page(build_report([run], tmp_path / "r.html")))
    slugs = {path.stem for path in (tmp_path / "r_figures").iterdir()}
    assert "trust-scale" in slugs
    assert not {"trust-agreement", "trust-bound"} & slugs
    other = write_run(
        tmp_path / "b", config("b", training__learning_rate=1.0, **TRUST), trust=2 * BUDGET
    )
    text = words(page(build_report([run, other], tmp_path / "r.html")))
    assert "a: no step moved the policy; b:" in text


def test_many_steps_are_thinned_but_counted(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "a", config("a", **TRUST), trust=BUDGET, steps=2 * MAX_DRAWN + 1, eval_every=500
    )
    (figure,) = [f for f in trust_figures(series_of(run)) if f.slug == "trust-bound"]
    assert MAX_DRAWN / 2 < len(figure.data) <= MAX_DRAWN
    assert f"0 of {2 * MAX_DRAWN + 1} steps" in figure.caption


# The numbers


def table(x: list[float], y: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"x": x, "y": y, "step": range(1, len(x) + 1)})


def test_agreement_of_known_numbers() -> None:
    found = agreement(table([1e-3, 1e-2, 1e-1, 0.0], [2e-3, 2e-2, 5e-2, 1.0]))
    assert (found.steps, found.tried) == (3, 0)
    assert found.factor == pytest.approx(2.0)
    assert found.worst is not None
    assert found.worst[0] == pytest.approx(2.0)
    x, y = np.log10([1e-3, 1e-2, 1e-1]), np.log10([2e-3, 2e-2, 5e-2])
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_a_step_that_was_tried_is_no_prediction() -> None:
    found = agreement(table([1e-3, 1e-2, 1e-1], [1e-3, 1e-2, 3e-1]))
    assert (found.steps, found.tried, found.correlation) == (3, 2, None)
    assert found.worst == (pytest.approx(3.0), 3)
    alike = agreement(table([1e-3, 1e-2], [1e-3, 1e-2]))
    assert (alike.tried, alike.factor, alike.worst) == (2, None, None)
    assert agreement(table([], [])).steps == 0


def test_counts_of_known_numbers() -> None:
    assert same_sign(table([1.0, -1.0, 1.0, 0.0], [2.0, -0.1, -1.0, 5.0])) == pytest.approx(2 / 3)
    assert same_sign(table([0.0], [1.0])) is None
    assert certified(table([1.0, 2.0, 3.0], [1.5, -1.0, 3.0])) == (1, 3)


def test_the_change_of_the_reward_is_to_the_next_batch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", **TRUST), trust=BUDGET, steps=4, eval_every=4)
    rewards = {1: 0.5, 3: 0.75}

    def reuse(row: dict[str, Any]) -> None:
        row.pop("reward")
        if row["step"] in rewards:
            row["reward"] = rewards[row["step"]]

    rewrite(run, reuse)
    change = ledger(read_run(run))["change"].tolist()
    assert change[0] == pytest.approx(0.25)
    assert all(math.isnan(value) for value in change[1:])


def test_what_the_next_pass_measured_is_put_in_its_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", **TRUST), trust=BUDGET, steps=6, eval_every=6)
    before = read_run(run).metrics["capo/trust/measured_policy_shift"].tolist()

    def late(row: dict[str, Any]) -> None:
        if row["step"] in (2, 3):
            del row["capo/trust/measured_policy_shift"]
        if row["step"] in (2, 3, 4):
            row["capo/trust/last_measured_policy_shift"] = 1e-3 * (row["step"] - 1)

    rewrite(run, late)
    after = read_run(run).metrics["capo/trust/measured_policy_shift"].tolist()
    assert after == pytest.approx([before[0], 2e-3, 3e-3, *before[3:]])


# Alarms


def test_alarms_are_told_with_their_tokens(two: tuple[Path, list[Path]]) -> None:
    path, _ = two
    text = words(page(path))
    assert "Alarms" in text
    assert "plain 9 policy shift 9 step 9 went too far 41%" in text
    assert "plain 12 reward 9 step 12 went too far" in text
    assert "12+34? 12+34=4 7 6<|eos|>" in text


def test_blamed_steps_are_marked_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", **TRUST), trust=BUDGET)
    write_lines(run / "alarms.jsonl", [alarm(9), alarm(12, began=9), alarm(30), alarm(99)])
    (figure,) = [f for f in trust_figures(series_of(run)) if f.slug == "trust-shift-1"]
    assert figure.extras["blamed"]["step"].tolist() == [9, 30]


def test_torn_and_hostile_alarms(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    hostile = alarm(3, kind=HOSTILE, text=f"</script>{HOSTILE}<img src=x>", sentence=HOSTILE)
    write_lines(run / "alarms.jsonl", [hostile, {"step": 4}, [1], alarm(5, moved=[])])
    with (run / "alarms.jsonl").open("a") as handle:
        handle.write('{"step": 61, "ki')
    assert [one.step for one in read_alarms(read_run(run))] == [3, 5]
    found = page(build_report([run], tmp_path / "r.html"))
    assert found.tags.count("script") == 4
    assert "img" not in found.tags
    assert "alert('run')" in words(found)
