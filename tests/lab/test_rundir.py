"""The run directory's bookkeeping, without any training."""

from __future__ import annotations

import subprocess
import sys

import pytest

from capo import InputError
from capo.lab.rundir import COMPLETE_MARK, RunDirectory, write_text


@pytest.fixture
def run(tmp_path):
    """Checkpoints at 2 and 4 (the latter torn), logs up to 5 with a torn line, tokens up to 5."""
    run = RunDirectory(tmp_path / "run")
    for step in (2, 4):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    (run.checkpoints / "checkpoint-2" / COMPLETE_MARK).touch()
    run.tokens.mkdir()
    for step in range(1, 6):
        run.append("metrics.jsonl", {"step": step, "loss": float("nan")})
        (run.tokens / f"step-{step:06d}.npz").touch()
        run.append("ledger.jsonl", {"step": step, "moved": []})
    for step in (0, 2, 4):
        run.append("evals.jsonl", {"step": step})
    for step in (1, 3):
        run.append("alarms.jsonl", {"step": step})
    with (run.path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    run.write("config.json", {})
    return run


def steps(run, name):
    return [row["step"] for row in run.rows(name)]


def test_a_torn_last_line_is_left_out(run):
    assert steps(run, "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_a_checkpoint_counts_when_it_is_whole(run):
    assert run.last_checkpoint() == (2, run.checkpoints / "checkpoint-2")


def test_rewinding_forgets_what_came_after_the_checkpoint(run):
    run.rewind(2)
    assert steps(run, "metrics.jsonl") == [1, 2]
    assert steps(run, "evals.jsonl") == [0, 2]
    assert steps(run, "ledger.jsonl") == [1, 2]
    assert steps(run, "alarms.jsonl") == [1]
    assert sorted(path.name for path in run.tokens.iterdir()) == [
        "step-000001.npz",
        "step-000002.npz",
    ]
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]


def test_rewinding_to_the_start_forgets_everything(run):
    run.rewind(0)
    assert steps(run, "metrics.jsonl") == steps(run, "evals.jsonl") == []
    assert steps(run, "ledger.jsonl") == steps(run, "alarms.jsonl") == []
    assert not list(run.tokens.iterdir())


def test_rewinding_makes_no_log_that_was_not_there(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("metrics.jsonl", {"step": 1})
    run.rewind(0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_checkpoint_replaces_the_older(run):
    run.mark_complete(4)
    assert run.last_checkpoint()[0] == 4
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-4"]


def test_a_run_is_not_overwritten_unasked(run):
    with pytest.raises(InputError, match=r"output: there is a run in .* --overwrite"):
        run.check_free(overwrite=False)
    run.check_free(overwrite=True)


def test_other_peoples_files_are_never_overwritten(run):
    (run.path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"output: .* no run's \('thesis.tex'\)"):
        run.check_free(overwrite=True)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        RunDirectory(tmp_path / "file").check_free(overwrite=True)


def test_clearing_leaves_nothing(run):
    run.clear()
    assert not list(run.path.iterdir())


def test_another_process_is_kept_out(run):
    code = (
        "import sys, pathlib; from capo.lab.rundir import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).locked(): pass"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with run.locked():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is at work" in refused.stderr
    subprocess.run(command, check=True)


def test_a_file_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
