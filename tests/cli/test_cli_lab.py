"""``capo lab``: what it refuses in one sentence, and what it says before it runs anything."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from capo.cli.main import app
from capo.core.errors import InputError
from run_kit import start

GRID = """
preset = "small-aggressive"
seeds = [0]
[set]
"training.steps" = 200
"training.completions_per_step" = 16
"training.save_every" = 1
"eval.problems" = 8
"eval.every_completions" = 3200
"""


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["lab", *arguments])


def grid(tmp_path: Path, text: str = GRID) -> str:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("preset = 3", "preset"),
        ('preset = "small-aggressive"\nseed = [0]', "seed"),
        ('preset = "none"', "config"),
        ("preset", "GRID"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_written(tmp_path, text, field):
    result = invoke("sweep", grid(tmp_path, text), "--runs", str(tmp_path / "runs"))
    assert isinstance(result.exception, InputError)
    assert result.exception.field == field
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("sweep", "missing.toml"), "GRID"),
        (("reproduce", "fig11"), "FIGURE"),
        (("reproduce", "fig1", "--seeds", "0"), "--seeds"),
        (("reproduce", "fig1", "--set", "steps"), "--set"),
        (("reproduce", "fig1", "--set", "training.stepz=3"), "training.stepz"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, field):
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    assert result.exception.field == field


def test_a_dry_run_says_how_long_and_runs_nothing(tmp_path):
    result = invoke("sweep", grid(tmp_path), "--runs", str(tmp_path / "runs"), "--dry-run")
    assert result.exit_code == 0
    assert "1 runs, 0 of them made already; about" in result.output
    assert not (tmp_path / "runs").exists()
    result = invoke("reproduce", "fig3", "--runs", str(tmp_path / "runs"), "--dry-run")
    assert "20 runs, 0 of them made already" in result.output


def test_status_before_anything(tmp_path):
    path = grid(tmp_path)
    assert invoke("status", path, "--runs", str(tmp_path)).output == "1 missing\n"
    rows = json.loads(invoke("status", path, "--runs", str(tmp_path), "--json").output)
    assert [(row["point"], row["state"]) for row in rows] == [("as-is seed 0", "missing")]


def test_a_record_is_not_replaced_by_another(tmp_path):
    """Neither by a trial of a figure, before a run of it is made, nor by one without runs."""
    record = tmp_path / "results/fig3"
    shutil.copytree(Path(__file__).parents[2] / "results/fig3", record)
    before = {path.name: path.read_bytes() for path in record.iterdir()}
    where = ("--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results"))
    for arguments, field in (
        (("fig3", "--set", "training.steps=5"), "--output"),
        (("fig3", "--seeds", "1"), "--output"),
        (("fig3", "--report-only"), "--runs"),
    ):
        result = invoke("reproduce", *arguments, *where)
        assert isinstance(result.exception, InputError)
        assert result.exception.field == field
    result = invoke("reproduce", "all", "--report-only", *where)
    assert result.exit_code == 0
    assert "fig3: no run is there; left as it is" in result.output
    assert {path.name: path.read_bytes() for path in record.iterdir()} == before
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["fig3"]


def test_verdicts_without_results(tmp_path):
    result = invoke("verdicts", "--results", str(tmp_path))
    assert result.output == f"{tmp_path / 'README.md'}\n"
    assert "not measured" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_command_and_its_workers(tmp_path, number):
    process = start("lab", "sweep", grid(tmp_path), "--runs", str(tmp_path / "runs"), "--jobs", "1")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "runs").glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "continue with the same command" in said
    assert "leaked" not in said, "the pool was not closed"
    left = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="],
        capture_output=True,
        text=True,
        check=False,
    )
    assert left.stdout.split() == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['capo', 'lab', '--help']\n"
        "from capo.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'scipy', 'pandas', 'altair'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
