"""Runs on a device, and within a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from sweep_kit import GRID

from capo import InputError
from capo.lab.config import Config
from capo.lab.devices import Place, check_device, find_place, precision
from capo.lab.divergence import DIVERGED, is_divergence
from capo.lab.recorder import _check_finite
from capo.lab.run import check_resumable, train
from capo.lab.rundir import OUT_OF_TIME, RunDirectory
from capo.lab.sources import load_config
from capo.lab.sweep import drive, execute
from capo.lab.sweep.execute import (
    MARK,
    Ended,
    Mark,
    end_point,
    make_point,
    mark_of,
)
from capo.lab.sweep.grid import parse_grid
from capo.lab.sweep.reading import read_run
from capo.lab.sweep.watching import Watcher
from run_kit import tiny


def config(*overrides: str) -> Config:
    return load_config("small-aggressive", list(overrides))


def test_defaults_of_the_new_keys_leave_recorded_runs_what_they_are():
    identity = config().identity()
    assert not {"device", "max_seconds"} & set(identity["run"])
    assert "tf32" not in identity["training"]
    limited = config("run.max_seconds=5.0", "run.device=cpu").identity()
    assert limited["run"]["max_seconds"] == 5.0
    assert limited["run"]["device"] == "cpu"


def test_a_device_that_is_not_there_or_not_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_device(config())
    with pytest.raises(InputError, match=r"run\.device: 'cuda' needs a GPU"):
        check_device(config("run.device=cuda"))
    with pytest.raises(InputError, match=r"training\.tf32: needs a GPU"):
        check_device(config("training.tf32=true"))
    with pytest.raises(InputError, match=r"training\.tf32: must be false"):
        config("training.tf32=true", "run.device=cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device(config("run.device=cpu"))
    with pytest.raises(InputError, match="must be one GPU, and torch finds 2"):
        check_device(config())


@pytest.fixture
def accelerators(monkeypatch):
    """Tells torch of so many GPUs."""

    def tell(number):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))

    return tell


def test_an_evaluation_is_where_there_is_an_accelerator(accelerators):
    accelerators(0)
    assert find_place("auto", "auto") == Place(torch.device("cpu"), torch.float32)
    accelerators(2)
    assert find_place("auto", "auto") == Place(torch.device("cuda"), None)  # None: as saved
    assert find_place("auto", "float16") == Place(torch.device("cuda"), torch.float16)
    assert find_place("cuda:1", "auto") == Place(torch.device("cuda:1"), None)
    assert find_place("cpu", "auto") == Place(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("number", "device", "dtype", "says"),
    [
        (0, "cuda", "auto", "--device: 'cuda' is not there: torch finds the CPU only"),
        (2, "cuda:2", "auto", "--device: 'cuda:2' is not there: torch finds 2 of 'cuda'"),
        (2, "xpu", "auto", "--device: 'xpu' is not there"),
        (2, "gpu", "auto", "--device: must be auto, cpu, cuda or cuda:1, got 'gpu'"),
        (2, "cuda:x", "auto", "--device: must be auto"),
        (2, "", "auto", "--device: must be auto"),
        (0, "auto", "int8", "--dtype: must be auto, float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_a_place_that_is_not_there_is_refused(accelerators, number, device, dtype, says):
    accelerators(number)
    with pytest.raises(InputError, match=says):
        find_place(device, dtype)


def test_tf32_holds_for_the_run_and_is_undone():
    before = torch.get_float32_matmul_precision()
    with precision(config("training.tf32=true")):
        assert torch.get_float32_matmul_precision() == "high"
    with precision(config()):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_end_a_run_as_a_divergence(value, tmp_path):
    model = torch.nn.Linear(3, 2)
    _check_finite(model)
    with torch.no_grad():
        model.weight[1, 2] = value
    with pytest.raises(RuntimeError) as error:
        _check_finite(model)
    assert is_divergence(str(error.value), RunDirectory(tmp_path))


def test_an_assertion_on_a_gpu_is_a_divergence_only_where_the_last_step_says_so(tmp_path):
    directory = RunDirectory(tmp_path)
    error = "RuntimeError: CUDA error: device-side assert triggered"
    assert not is_divergence(error, directory)
    directory.append("metrics.jsonl", {"step": 1, "loss": 0.1, "grad_norm": 2.0})
    assert not is_divergence(error, directory)
    directory.append("metrics.jsonl", {"step": 2, "loss": 0.1, "grad_norm": math.nan})
    assert is_divergence(error, directory)
    assert not is_divergence("out of memory", directory)


@pytest.fixture
def slow_clock(monkeypatch):
    """The recorder's clock: ten seconds pass whenever it is looked at."""
    ticks = itertools.count(step=10.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr("capo.lab.recorder.time", clock)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_clock")
def test_a_run_ends_with_its_time_evaluated_and_is_not_resumed(tmp_path: Path):
    limited = tiny("run.max_seconds=60.0", "training.steps=400", "eval.every_completions=1000000")
    directory = RunDirectory(train(limited, tmp_path / "run"))
    status = directory.read("status.json")
    assert status["state"] == "finished"
    assert status["message"] == OUT_OF_TIME
    assert 0 < status["step"] < 400
    assert directory.out_of_time
    assert [row["step"] for row in directory.rows("evals.jsonl")] == [0, status["step"]]
    assert (directory.final / "model.safetensors").is_file()
    train(limited, directory.path, resume=True)
    assert directory.read("status.json") == status
    with pytest.raises(InputError, match=r"run\.max_seconds"):
        check_resumable(directory, tiny("training.steps=400", "eval.every_completions=1000000"))


@pytest.mark.slow
@pytest.mark.usefixtures("slow_clock")
def test_a_point_ends_with_its_time(tmp_path: Path):
    text = GRID.replace('"training.steps" = 4', '"training.steps" = 400\n"run.max_seconds" = 90.0')
    point = parse_grid(text).points()[0]
    mark = make_point(point, tmp_path, {})
    assert mark.ended == "time"
    run = read_run(point, tmp_path)
    assert run is not None
    assert run.ended == "time"
    assert not (tmp_path / point.folder() / "checkpoints").exists()


@pytest.mark.slow
def test_a_sweep_ends_with_its_time_and_what_is_half_finished_can_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = GRID.replace('"training.steps" = 4', '"training.steps" = 2000').replace(
        "seeds = [0, 1]", "seeds = [0]"
    )
    points = parse_grid(text).points()[:2]
    first, second = (RunDirectory(tmp_path / point.folder()) for point in points)

    def clock() -> float:  # stands still until the first point has been evaluated in training
        return 100.0 if len(first.rows("evals.jsonl")) > 1 else 0.0

    monkeypatch.setattr(drive, "time", SimpleNamespace(monotonic=clock))
    swept = drive.sweep(points, tmp_path, 1, Watcher(), max_seconds=50.0)
    assert swept.made == 0
    assert not swept.failed
    assert mark_of(first, points[0]) is None
    closed = end_point(points[0], tmp_path, {})
    assert closed is not None
    assert closed.ended == "time"
    assert end_point(points[0], tmp_path, {"another": 1}) == closed  # what is over stays as it is
    assert not first.exists or not first.checkpoints.exists()
    assert end_point(points[1], tmp_path, {}) is None
    assert not second.exists


@pytest.mark.parametrize(
    ("ended", "state"),
    [
        ("steps", ("finished", "")),
        ("time", ("finished", "out of time")),
        ("diverged", ("diverged", "")),
    ],
)
def test_a_point_that_ran_out_of_time_is_finished(tmp_path: Path, ended: Ended, state: object):
    point = parse_grid(GRID).points()[0]
    directory = RunDirectory(tmp_path / point.folder())
    directory.path.mkdir()
    directory.write(MARK, asdict(Mark(point.fingerprint(), ended, 1.0, {})))
    assert drive.state_of(point, tmp_path) == state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("finished", DIVERGED),
        ("failed", "RuntimeError: the weights are not finite: they make no probability tensor"),
    ],
)
def test_a_point_that_diverged_and_was_killed_before_its_mark_has_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Literal["finished", "failed"], message
):
    first, second = parse_grid(GRID).points()[:2]
    for point in (first, second):
        directory = RunDirectory(tmp_path / point.folder())
        directory.path.mkdir()
        directory.write("config.json", point.config(tmp_path).model_dump(mode="json"))
        directory.set_status(state, 2, 4, message)
        for step, accuracy in enumerate((0.45, 0.6)):
            row = {"step": step, "completions": 16 * step, "seconds": 1.0}
            directory.append("evals.jsonl", row | {"accuracy": accuracy, "stderr": 0.1})
    monkeypatch.setattr("capo.lab.run.train", lambda *_, **__: pytest.fail("it is over"))
    assert make_point(first, tmp_path, {}).ended == "diverged"
    closed = end_point(second, tmp_path, {})
    assert closed is not None
    assert closed.ended == "diverged"
    for point in (first, second):
        run = read_run(point, tmp_path)
        assert run is not None
        assert (run.final_accuracy, run.collapsed) == (0.0, True)


def test_a_points_time_is_its_own_without_its_policys_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]

    def passes(seconds: float, result: object = None) -> Callable[..., object]:
        def work(*_: object) -> object:
            now[0] += seconds
            return result

        return work

    monkeypatch.setattr(execute, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(execute, "make_policy", passes(3600.0))
    monkeypatch.setattr(execute, "_make", passes(60.0, "steps"))
    point = parse_grid(GRID).points()[0]
    (tmp_path / point.folder()).mkdir()
    assert make_point(point, tmp_path, {}).seconds == 60.0
