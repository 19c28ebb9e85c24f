"""The study's real runs: a few steps of 16 completions."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from study_kit import ORIGIN

from capo.lab.study.execute import execute
from capo.lab.study.jobs import Arm
from capo.lab.study.outcome import Store
from run_kit import capo_command, here

pytestmark = pytest.mark.slow

PLAN = """
preset = "{preset}"
plain = "{preset}"
[measure]
problems = 8
spacing = 16
horizon = 64
seeds = [0, 1]
[range]
learning_rates = [1e-4]
[collapse]
needed = 2
[[rounds]]
seeds = [100]
budget = 32
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset of 16 completions a step."""
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    lines = ["completions_per_step = 16", "micro_batch = 8", "steps = 4"]
    path.write_text('extends = "small-aggressive"\n[training]\n' + "\n".join(lines))
    return str(path)


def arm(preset, *overrides, **changes):
    values = {"target": 0.99, "spacing": 16, "problems": 8, "horizon": 64} | changes
    return Arm("stage", "arm", preset, overrides, **values)


def test_a_run_leaves_what_it_measured(preset):
    job = arm(preset).job(3)
    outcome = execute(job, ORIGIN)
    assert [(e.step, e.completions) for e in outcome.evaluations] == [
        (0, 0),
        (1, 16),
        (2, 32),
        (3, 48),
        (4, 64),
    ]
    assert [row["step"] for row in outcome.metrics] == [1, 2, 3, 4]
    assert all(
        {"reward", "loss", "grad_norm", "completions"} <= row.keys() for row in outcome.metrics
    )
    assert (outcome.completions, outcome.horizon, outcome.ended) == (64, 64, "steps")
    assert outcome.fingerprint == job.fingerprint()
    assert outcome.provenance == ORIGIN
    assert outcome.seconds > 0


def test_a_run_is_the_same_twice(preset):
    first, second = (execute(arm(preset).job(0), ORIGIN) for _ in range(2))
    assert first.evaluations == second.evaluations
    assert first.metrics == second.metrics


def test_a_race_ends_at_its_target(preset):
    outcome = execute(arm(preset, target=0.001, stop_at="target").job(0), ORIGIN)
    assert outcome.ended == "target"
    assert outcome.to_target == outcome.completions == outcome.evaluations[-1].completions == 32


def test_a_run_ends_at_its_collapse(preset):
    broken = arm(preset, "training.learning_rate=0.03", horizon=160, stop_at="target or collapse")
    outcome = execute(broken.job(0), ORIGIN)
    assert outcome.ended == "collapse"
    assert outcome.collapsed
    assert outcome.completions < 160


def test_a_run_ends_at_its_budget_wherever_its_schedule_is(preset):
    outcome = execute(arm(preset, budget=24).job(0), ORIGIN)
    assert (outcome.ended, outcome.completions, outcome.horizon) == ("budget", 32, 64)
    whole = execute(arm(preset).job(0), ORIGIN)
    assert outcome.evaluations == whole.evaluations[:3]


def test_weights_that_are_no_numbers_are_a_collapse(preset):
    outcome = execute(arm(preset, "training.learning_rate=1e30").job(0), ORIGIN)
    assert outcome.ended == "diverged"
    assert outcome.collapsed
    assert outcome.final_accuracy == 0.0


def test_completions_used_twice_are_evaluated_after_the_last_pass(preset):
    twice = arm(preset, "algorithm.num_iterations=2", spacing=32)
    outcome = execute(twice.job(0), ORIGIN)
    assert [(e.step, e.completions) for e in outcome.evaluations] == [(0, 0), (4, 32), (8, 64)]


def command(tmp_path, preset, *arguments):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(preset=preset))
    return [
        *["bench", "trust-region", "--plan", str(plan), "--jobs", "1"],
        *["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "report"), *arguments],
    ]


def run(tmp_path, preset, *arguments):
    return subprocess.run(
        capo_command(*command(tmp_path, preset, *arguments)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_command_makes_runs_and_writes_the_report(tmp_path, preset):
    planned = here(*command(tmp_path, preset, "--dry-run", "--only", "final/*"))
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.splitlines()[-2].split()[:2] == ["all", "2"]
    assert not (tmp_path / "runs").exists()

    made = run(tmp_path, preset, "--only", "final/capo-*")
    assert made.returncode == 0, made.stderr
    assert "final/capo-default/0: accuracy" in made.stderr
    files = sorted((tmp_path / "runs" / "trust_region").rglob("*.json"))
    assert [path.name for path in files] == ["0.json", "1.json"]
    times = [path.stat().st_mtime_ns for path in files]
    assert "Any learning rate: not measured yet." in made.stdout

    again = here(*command(tmp_path, preset, "--only", "final/capo-*"))
    assert "final/capo-default" not in again.stderr
    assert [path.stat().st_mtime_ns for path in files] == times

    text = (tmp_path / "report" / "README.md").read_text()
    looked = here(*command(tmp_path, preset, "--report-only"))
    assert looked.returncode == 0, looked.stderr
    assert (tmp_path / "report" / "README.md").read_text() == text
    rows = (tmp_path / "report" / "runs.csv").read_text().splitlines()
    assert [row["seed"] for row in csv.DictReader(rows)] == ["0", "1"]
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["provenance"][0]["runs"] == 2
    assert (tmp_path / "report" / "races.png").is_file()


def test_an_interrupted_command_keeps_what_is_finished(tmp_path, preset):
    process = subprocess.Popen(
        capo_command(*command(tmp_path, preset, "--only", "final/capo-*")),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "runs" / "trust_region"
    deadline = time.monotonic() + 120
    while not list(folder.rglob("0.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to the workers too
    _, errors = process.communicate(timeout=60)
    finished = {path.name for path in folder.rglob("*.json")}
    if process.returncode == 0:  # the second run was as quick
        assert finished == {"0.json", "1.json"}
        return
    assert process.returncode == 130, errors
    assert "continue with the same command" in errors
    assert "Traceback" not in errors
    assert finished == {"0.json"}
    assert Store(folder).root == folder
    rest = run(tmp_path, preset, "--only", "final/capo-*")
    assert "final/capo-default/1" in rest.stderr
    assert "final/capo-default/0" not in rest.stderr


def test_the_workers_of_a_killed_command_end_with_it(tmp_path, preset):
    process = subprocess.Popen(
        capo_command(*command(tmp_path, preset, "--only", "final/capo-*")),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path / "runs" / "trust_region"
    deadline = time.monotonic() + 120
    while not list(folder.rglob("0.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert children
    while any(_at_work(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _at_work(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_bad_input_is_one_sentence(tmp_path, preset):
    for arguments, message in [
        (["--jobs", "0"], "--jobs: must be at least 1"),
        (["--preset", "no-such"], "config: 'no-such' is neither a file nor a preset"),
    ]:
        answer = run(tmp_path, preset, *arguments)
        assert answer.returncode == 2
        assert message in answer.stderr
        assert len(answer.stderr.splitlines()) == 1
