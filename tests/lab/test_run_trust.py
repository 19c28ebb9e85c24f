"""Runs with a ledger: what they write, and that to look changes nothing and to resume changes nothing."""

from __future__ import annotations

import signal

import pytest

from capo.lab.progress import Progress
from capo.lab.run import Interrupted, train
from capo.lab.rundir import RunDirectory
from run_kit import SignalAt, tiny, weights

pytestmark = pytest.mark.slow

LOGS = ("metrics.jsonl", "evals.jsonl", "ledger.jsonl", "alarms.jsonl")


def logs(path):
    """The logs without what the clock says, and without the note of a first step after a resume."""
    rows = {name: RunDirectory(path).rows(name) for name in LOGS}
    clock = ("seconds", "step_time")
    return {
        name: [{key: row[key] for key in row if key not in clock} for row in found]
        for name, found in rows.items()
    }


@pytest.mark.parametrize("value", ["auto", "1e-4"])
def test_a_trust_region_scales_steps_and_keeps_a_ledger(tmp_path, value):
    config = tiny(f"capo.trust_region={value}", "training.learning_rate=1e-2")
    run = RunDirectory(train(config, tmp_path / "run"))
    rows = run.rows("metrics.jsonl")
    assert all(0 <= row["capo/trust/scale"] <= 1 for row in rows)
    assert any(row["capo/trust/scale"] < 1 for row in rows)
    if value != "auto":
        assert all(row["capo/trust/budget"] == pytest.approx(1e-4) for row in rows)
    moved = run.rows("ledger.jsonl")
    measured = [row for row in rows if "capo/trust/measured_policy_shift" in row]
    assert [row["step"] for row in moved] == [row["step"] for row in measured]
    first, *rest = moved
    assert first["moved"] == []  # the warm-up begins with a step of length 0
    for row in rest:
        shares = [one["share"] for one in row["moved"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
        assert all(one["prompt"].endswith("?") for one in row["moved"] if one["prompt"])


def test_a_run_that_is_broken_says_so_while_it_breaks(tmp_path):
    class Listener(Progress):
        said_at = None
        step = 0

        def stepped(self, row):
            self.step = row["step"]

        def said(self, message):
            assert message.startswith("alarm: ")
            self.said_at = self.said_at or self.step

    progress = Listener()
    config = tiny(
        "capo.trust_region={policy_shift='none'}",
        "training.steps=24",
        "training.learning_rate=3e-2",
        "training.schedule=constant_with_warmup",
        "training.completions_per_step=48",
        "training.micro_batch=48",
        "eval.every_completions=480",
    )
    run = RunDirectory(train(config, tmp_path / "run", progress=progress))
    alarms = run.rows("alarms.jsonl")
    assert alarms
    assert progress.said_at == alarms[0]["step"] < 24
    assert all(1 <= row["began"] <= row["step"] for row in alarms)
    assert alarms[0]["moved"]
    assert run.rows("metrics.jsonl")[-1]["reward"] < 0.1


@pytest.mark.parametrize("passes", [1, 2])
def test_a_continued_run_has_the_same_ledger(tmp_path, passes):
    config = tiny(
        "capo.trust_region=auto",
        "training.steps=8",
        "training.learning_rate=3e-3",
        f"algorithm.num_iterations={passes}",
    )
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", progress=SignalAt(3, signal.SIGTERM))
    train(config, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole)
    assert logs(tmp_path / "run") == logs(whole)


def test_to_measure_is_not_to_change(tmp_path):
    plain = train(tiny(), tmp_path / "plain")
    ledger = train(tiny("capo.trust_region={policy_shift='none'}"), tmp_path / "ledger")
    assert weights(ledger) == weights(plain)
    assert not (plain / "ledger.jsonl").exists()
    rows = RunDirectory(ledger).rows("metrics.jsonl")
    assert all(row["capo/trust/scale"] == 1 for row in rows)
    assert all("capo/trust/budget" not in row for row in rows)
    assert len(RunDirectory(ledger).rows("ledger.jsonl")) == 4
