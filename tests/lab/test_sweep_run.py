"""Sweeps of real runs in real processes: killed, continued, failed, reported."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_kit import GRID, write_grid

from capo.lab.sweep.drive import state_of, sweep
from capo.lab.sweep.execute import Mark
from capo.lab.sweep.grid import load_grid, parse_grid
from capo.lab.sweep.point import Point
from capo.lab.sweep.reading import read_grid
from capo.lab.sweep.watching import Watcher
from run_kit import capo_command, here, start

pytestmark = pytest.mark.slow

SMALL = GRID.replace("[1e-4, 1e-3]", "[1e-3]").replace("seeds = [0, 1]", "seeds = [0]")


def command(grid: Path, runs: Path, *more: str) -> list[str]:
    return ["lab", "sweep", str(grid), "--runs", str(runs), *more]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        capo_command(*arguments), capture_output=True, text=True, check=False, timeout=600
    )


def logs(folder: Path) -> list[list[dict[str, object]]]:
    """Evaluations and metrics without the clock."""
    found = []
    for name in ("evals.jsonl", "metrics.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found.append(
            [{k: v for k, v in row.items() if "time" not in k and k != "seconds"} for row in rows]
        )
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A grid swept undisturbed: its file, its runs, and what was said."""
    folder = tmp_path_factory.mktemp("swept")
    grid = write_grid(folder)
    said = run(*command(grid, folder / "runs", "--jobs", "2"))
    assert said.returncode == 0, said.stderr
    return grid, folder / "runs", said


def test_a_sweep_makes_a_directory_a_point_and_one_table(swept):
    grid, runs, said = swept
    points = load_grid(grid).points()
    assert {path.name for path in runs.iterdir()} == {point.folder() for point in points}
    result = read_grid(load_grid(grid), runs)
    assert result.complete
    for cell in result.cells:
        assert [run.point.seed for run in cell.runs] == [0, 1]
        for one in cell.runs:
            assert [e.completions for e in one.evaluations] == [0, 16, 32, 48, 64]
            assert len(one.metrics) == 4
    assert not list(runs.glob("*/checkpoints")) + list(runs.glob("*/final"))
    assert "8 made, 0 found, 0 failed" in said.stdout
    assert said.stdout.count("CAPO, learning rate") == 2
    assert "[8 of 8]" in said.stderr
    assert "left" in said.stderr  # the time left, on a line of its own in a pipe


def test_what_is_finished_is_found_and_not_rerun(swept):
    grid, runs, _ = swept
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/*")}
    said = here(*command(grid, runs))
    assert "0 made, 8 found, 0 failed" in said.stdout
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/*")} == before


def test_status_and_report(swept, tmp_path):
    grid, runs, _ = swept
    said = here("lab", "status", str(grid), "--runs", str(runs))
    assert (said.returncode, said.stdout.strip()) == (0, "8 finished")
    said = here("lab", "report", str(grid), "--runs", str(runs), "-o", str(tmp_path / "report"))
    assert said.returncode == 0, said.stderr
    rows = list(csv.DictReader((tmp_path / "report" / "table.csv").read_text().splitlines()))
    assert len(rows) == 4
    document = json.loads((tmp_path / "report" / "table.json").read_text())
    result = read_grid(load_grid(grid), runs)
    for row, cell in zip(document, result.cells, strict=True):
        finals = [one.evaluations[-1].accuracy for one in cell.runs]
        assert row["final_accuracy"]["value"] == pytest.approx(sum(finals) / 2)
        assert row["final_accuracy"]["low"] == pytest.approx(min(finals))
        assert row["final_accuracy"]["high"] == pytest.approx(max(finals))
    assert (tmp_path / "report" / "curves.svg").read_text().startswith("<svg")
    assert "curves.svg" in (tmp_path / "report" / "README.md").read_text()


def test_a_killed_sweep_continues_where_it_was(tmp_path):
    """SIGKILL to the parent; its workers end with it; the finished point is found, the other continues."""
    text = SMALL.replace('"training.steps" = 4', '"training.steps" = 16')
    grid, runs = write_grid(tmp_path, text), tmp_path / "runs"
    first, second = load_grid(grid).points()
    process = start(*command(grid, runs, "--jobs", "1"))
    deadline = time.monotonic() + 300
    status = runs / second.folder() / "status.json"
    while not status.is_file() or json.loads(status.read_text())["step"] < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for pid in map(int, workers):
        while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert state_of(first, runs) == ("finished", "")
    state, word = state_of(second, runs)
    assert state == "half-finished"
    assert word.endswith("of 16")
    finished = {p: p.stat().st_mtime_ns for p in (runs / first.folder()).iterdir()}

    said = run(*command(grid, runs, "--jobs", "1"))
    assert said.returncode == 0, said.stderr
    assert "1 made, 1 found, 0 failed" in said.stdout
    assert {p: p.stat().st_mtime_ns for p in (runs / first.folder()).iterdir()} == finished
    provenance = json.loads((runs / second.folder() / "provenance.json").read_text())
    assert len(provenance["resumed"]) == 1  # continued, not begun anew

    undisturbed = tmp_path / "undisturbed"
    sweep([second], undisturbed, 1, Watcher())
    assert logs(runs / second.folder()) == logs(undisturbed / second.folder())


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_a_failure_is_listed_stops_no_other_and_is_tried_again(tmp_path):
    """A policy that is no directory for one variant: the config is fine, the run is not."""
    text = SMALL.replace(
        'set = { "capo.selection" = "capo" }', f'set = {{ "policy.path" = "{tmp_path}/gone" }}'
    )
    grid, runs = write_grid(tmp_path, text), tmp_path / "runs"
    said = run(*command(grid, runs))
    assert said.returncode == 1
    assert "1 made, 0 found, 1 failed" in said.stdout
    assert "failed: capo/lr1e-03 seed 0: InputError: policy.path" in said.stdout
    assert "FAILED" in said.stderr
    assert "0/1" in said.stdout  # the table says that a seed is missing
    stands = here("lab", "status", str(grid), "--runs", str(runs))
    assert stands.returncode == 1
    assert stands.stdout.startswith("1 finished, 1 failed\ncapo/lr1e-03 seed 0: failed, InputError")
    again = run(*command(grid, runs))
    assert again.returncode == 1
    assert "0 made, 1 found, 1 failed" in again.stdout


def test_a_worker_that_dies_is_replaced_and_its_point_made(tmp_path):
    """As from the kernel, for memory: the pool is lost, the sweep is not."""
    text = SMALL.replace('"training.steps" = 4', '"training.steps" = 12')
    grid, runs = write_grid(tmp_path, text), tmp_path / "runs"
    first, second = load_grid(grid).points()
    process = start(*command(grid, runs, "--jobs", "1"))
    log = runs / first.folder() / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not log.is_file() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid=,args=", "ww"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    worker = next(int(line.split()[0]) for line in children if "spawn_main" in line)
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "2 made, 0 found, 0 failed" in out
    for point in (first, second):
        assert state_of(point, runs) == ("finished", "")


def _die_at_rate(point: Point, runs: Path, provenance: dict[str, Any]) -> Mark:
    """A point that takes no time, or at one learning rate ends its process."""
    if point.resolved.training.learning_rate == 1e-4:
        os._exit(1)
    return Mark(point.fingerprint(), "steps", 0.0, provenance)


def test_a_point_that_always_dies_takes_no_other_with_it(tmp_path):
    seeds = ", ".join(map(str, range(7)))
    text = GRID.replace("seeds = [0, 1]", f"seeds = [{seeds}]").replace("1e-4, 1e-3", "1e-3")
    points = parse_grid(text).points()
    deadly = parse_grid(SMALL.replace("1e-3", "1e-4")).points()[0]
    swept = sweep([deadly, *points], tmp_path, 2, Watcher(), make=_die_at_rate)
    assert swept.made == len(points) == 14
    assert list(swept.failed) == [deadly.name]
    assert swept.failed[deadly.name].startswith("BrokenProcessPool: ")
    assert state_of(deadly, tmp_path)[0] == "failed"


def test_a_policy_that_diverges_is_a_result(tmp_path):
    grid = parse_grid(SMALL).with_settings(["training.learning_rate=1e30"])
    point = grid.points()[0]
    swept = sweep([point], tmp_path, 1, Watcher())
    assert (swept.made, swept.failed) == (1, {})
    assert state_of(point, tmp_path) == ("diverged", "")
    (run_,) = read_grid(grid, tmp_path).cells[0].runs
    assert run_.collapsed
    assert run_.final_accuracy == 0.0


def test_a_base_policy_is_pretrained_once(tmp_path):
    recipe = "steps = 3\nbatch_size = 4\neval_problems = 4\neval_k = 2\nwarmup_steps = 1\n"
    text = SMALL.replace("[set]", '[set]\n"policy.path" = "policies:small"')
    grid = parse_grid(f"{text}\n[policies.small]\n{recipe}")
    points = grid.points()
    swept = sweep(points, tmp_path, 2, Watcher())
    assert (swept.made, swept.failed) == (2, {})
    policies = [path for path in (tmp_path / "policies").iterdir() if "." not in path.name]
    assert [path.name for path in policies] == [Path(points[0].cell.policy_folder or "").name]
    assert {(run.base_accuracy) for run in read_grid(grid, tmp_path).runs} == {0.0}


@pytest.mark.parametrize("measure", ["fidelity", "cost"])
def test_measurements_beside_a_run(tmp_path, measure):
    text = SMALL.replace('"training.steps" = 4', '"training.steps" = 4\n"capo.watch" = true')
    grid = parse_grid(f'measure = "{measure}"\n{text}')
    grid = grid.with_settings(
        ["training.learning_rate=1e-5"]
    )  # steps so short that 2nd order is all
    swept = sweep(grid.points()[1:], tmp_path, 1, Watcher())
    assert swept.failed == {}
    (run_,) = read_grid(grid, tmp_path).cells[1].runs
    assert [row["step"] for row in run_.measured] == [1, 2, 3, 4]
    for row in run_.measured[1:]:
        if measure == "cost":
            parts = {key: value for key, value in row.items() if key != "step"}
            assert all(value >= 0 for value in parts.values())
            assert parts["generation and rewards"] > parts["moments"] > 0
        else:
            assert row["truth"] > 0
            assert row["token"]["deep"] > 0.8
            assert -1 <= row["token"]["m_F, own step"] <= 1
            assert row["batch"]["deep"] == pytest.approx(row["truth"], rel=0.5)


def test_a_figure_is_reproduced_from_nothing_and_judged(tmp_path):
    small = ["steps=4", "completions_per_step=16", "micro_batch=16", "save_every=4"]
    more = [word for each in small for word in ("--set", f"training.{each}")]
    options = ["--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "results"), "--seeds", "1"]
    options += [*more, "--set", "eval.problems=8", "--set", "eval.every_completions=16"]
    said = run("lab", "reproduce", "fig3", "--jobs", "2", *options)
    assert said.returncode == 0, said.stderr
    assert "4 runs, 0 of them made already; about" in said.stderr  # beforehand
    folder = tmp_path / "results" / "fig3"
    record = json.loads((folder / "record.json").read_text())
    assert (record["runs"], record["wanted"], record["failed"]) == (4, 4, {})
    assert record["seeds"] == [0]
    assert record["wall_seconds"] > 0
    assert record["hardware"]["cores"] >= 1
    assert record["command"].startswith("capo lab reproduce fig3 --seeds 1 --set training.steps=4")
    finals = [row["final_accuracy"]["value"] for row in record["numbers"]["cells"]]
    assert len(finals) == 4
    assert (folder / "batch-policy-shift.svg").is_file()
    again = here("lab", "reproduce", "fig3", "--report-only", *options)
    assert again.returncode == 0, again.stderr
    unchanged = json.loads((folder / "record.json").read_text())
    assert unchanged["wall_seconds"] == record["wall_seconds"]
    assert unchanged["numbers"] == record["numbers"]
    assert here("lab", "verdicts", "--results", str(tmp_path / "results")).returncode == 0
    assert "| m_F and m_H warn of a collapse" in (tmp_path / "results" / "README.md").read_text()


SEARCH = """
preset = "small-aggressive"
seeds = [0]
target = "halfway"
[set]
"training.steps" = 3
"training.completions_per_step" = 16
"training.save_every" = 1
"eval.problems" = 8
"eval.every_completions" = 16
[[variants]]
name = "grpo"
[[variants]]
name = "best"
[variants.search]
seeds = [100]
[[variants.search.among]]
axes = { "training.learning_rate" = [1e-5, 1e-4] }
[[conditions]]
name = "one"
[[conditions]]
name = "other"
set = { "task.params" = { reward_noise = 0.2 } }
"""


def test_a_search_decides_what_is_run_after_it(tmp_path):
    grid, runs = write_grid(tmp_path, SEARCH), tmp_path / "runs"
    said = run(*command(grid, runs, "--only", "one/*", "--jobs", "2"))
    assert said.returncode == 0, said.stderr
    assert "4 runs, 0 of them made already" in said.stderr
    assert "4 made, 0 found, 0 failed" in said.stdout
    result = read_grid(load_grid(grid), runs)
    first, second = result.searches["one/best"]
    best = max((first, second), key=lambda each: each.runs[0].mean_accuracy)
    (found,) = (each for each in result.cells if each.cell.name == "one/best")
    assert found.cell.chosen == best.cell.at
    assert [each.point.seed for each in found.runs] == [0]
    assert result.target("one") == pytest.approx((1 + found.runs[0].base_accuracy) / 2)
    assert result.target("other") is None
    assert not result.complete
    waiting = here("lab", "status", str(grid), "--runs", str(runs))
    assert waiting.stdout.strip() == "4 finished, 3 missing, 1 waiting for a search"
    nothing = here(*command(grid, runs, "--only", "two/*"))
    assert nothing.returncode == 2
    assert "--only: 'two/*' matches none" in nothing.stderr
