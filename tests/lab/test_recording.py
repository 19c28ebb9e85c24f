"""Which tokens a run records, and that recording disturbs nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from capo import InputError
from capo.lab.recording import make_recording
from capo.lab.records import read_step, read_vocabulary, recorded_steps
from capo.lab.run import Interrupted, train
from capo.lab.rundir import RunDirectory
from run_kit import SignalAt, tiny, weights


def test_the_first_the_last_and_every_so_many() -> None:
    config = tiny("training.steps=10")
    recording = make_recording(config, 4)
    assert [step for step in range(1, 11) if recording.wants(step)] == [1, 4, 8, 10]
    assert [taken for taken in range(10) if recording.watch(taken)] == [0, 3, 7, 9]


@pytest.mark.parametrize(
    ("overrides", "every", "expected"),
    [
        ([], None, (0, True)),
        ([], 3, (3, True)),
        (["capo.watch=true"], None, (1, False)),
        (["capo.selection=capo"], 2, (2, False)),
        (["capo.selection=capo", "records.tokens=false"], None, (0, False)),
    ],
)
def test_who_records_what(
    overrides: list[str], every: int | None, expected: tuple[int, bool]
) -> None:
    recording = make_recording(tiny(*overrides), every)
    assert (recording.every, recording.watches) == expected


def test_a_run_that_says_nothing_is_judged_by_its_own_optimizer() -> None:
    adam, sgd = make_recording(tiny(), 1), make_recording(tiny("training.optimizer=sgd"), 1)
    assert (adam.step_model, adam.moments, sgd.step_model) == ("adam", "optimizer", "sgd")
    judged = make_recording(tiny("capo.selection=capo"), 1)
    assert (judged.step_model, judged.moments) == ("adam", "simulated")


def test_bad_wishes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--tokens: must be a number of steps of at least 1"):
        train(tiny(), tmp_path / "run", tokens=0)
    with pytest.raises(InputError, match=r"--tokens: .* records\.tokens = false"):
        train(tiny("records.tokens=false"), tmp_path / "run", tokens=1)
    assert not (tmp_path / "run").exists()


def metrics(run: Path) -> list[dict[str, object]]:
    rows = RunDirectory(run).rows("metrics.jsonl")
    timing = ("seconds", "time", "step_time", "per_second")
    return [{k: v for k, v in row.items() if not any(t in k for t in timing)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("small-aggressive", "training.optimizer=adamw"),
        ("small-aggressive", "training.optimizer=sgd"),
        ("small-capo", "training.save_every=4"),
    ],
)
def test_recording_changes_no_bit(tmp_path: Path, preset: str, override: str) -> None:
    config = tiny(override, preset=preset)
    plain = train(config, tmp_path / "plain")
    recorded = train(config, tmp_path / "recorded", tokens=3)
    assert weights(recorded) == weights(plain)
    assert repr(metrics(recorded)) == repr(metrics(plain))
    assert (recorded / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    assert list(recorded_steps(recorded / "tokens")) == [1, 3, 4]
    assert not (plain / "tokens").exists()
    about = json.loads((recorded / "tokens" / "about.json").read_text())
    assert (about["every"], about["watches"]) == (3, True)
    assert about["step_model"] == ("sgd" if "sgd" in override else "adam")
    for step, path in recorded_steps(recorded / "tokens").items():
        arrays = read_step(path)
        assert arrays is not None
        assert (arrays["weight"] == 1).all()
        assert len(arrays["reward"]) == len(arrays["offsets"]) - 1 == 16
        if config.algorithm.num_iterations == 1:
            assert metrics(recorded)[step - 1]["reward"] == pytest.approx(arrays["reward"].mean())
        moved = (
            step > 1 or config.training.warmup_ratio == 0
        )  # at a learning rate of 0 nothing does
        assert bool((arrays["policy_shift"] > 0).any()) == moved
    assert read_vocabulary(recorded / "tokens")[int(arrays["token_ids"][0])] != ""


@pytest.mark.slow
def test_a_run_that_is_continued_records_on(tmp_path: Path) -> None:
    config = tiny("training.save_every=4", "training.steps=6")
    whole = train(config, tmp_path / "whole", tokens=2)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", tokens=2, progress=SignalAt(2, signal.SIGTERM))
    run = train(config, tmp_path / "run", resume=True)
    assert weights(run) == weights(whole)
    ours, theirs = (recorded_steps(path / "tokens") for path in (run, whole))
    assert list(ours) == list(theirs) == [1, 2, 4, 6]
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        first, second = read_step(one), read_step(other)
        assert first is not None
        assert second is not None
        for name, values in first.items():
            np.testing.assert_array_equal(values, second[name], err_msg=name)
