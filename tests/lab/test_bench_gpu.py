"""``capo bench gpu``: the dry run that stands for a GPU, its red checks, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capo.lab.gpu import command
from capo.lab.gpu.report import DRY, table, verdicts, write_report
from capo.lab.gpu.step import summary
from capo.lab.gpu.timing import Record, measure

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_dry_runs_from_checks_to_table(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton exists for Linux only")
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    records = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert records.keys() == {"verdict", "checks", "core", "step0"}
    assert all(record["complete"] for record in records.values())
    assert records["verdict"]["checks"] == records["verdict"]["suite"] == "green"
    assert records["core"]["naive"]["tokens"] == 24
    assert "trust region, deep" in records["step0"]["steps"]
    page = (tmp_path / "README.md").read_text()
    assert DRY in page
    assert DRY in done.stdout


def test_a_red_check_takes_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(self: command.Stages, name: str) -> command.Job:
        assert name == "checks", "something was timed"
        return self.start(name, [sys.executable, "-c", "raise SystemExit('out of bounds: sgd')"])

    monkeypatch.setattr(command.Stages, "stage", stage)
    monkeypatch.setattr(command.Stages, "_suite", lambda self: None)
    assert command.run("tiny", tmp_path) == 1
    said = capsys.readouterr().out
    assert "out of bounds: sgd" in said
    assert "no figure was taken" in said
    assert json.loads((tmp_path / "verdict.json").read_text())["checks"] == "red (exit 1)"


def test_a_stage_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.LIMITS, "core", 0.1)
    stages = command.Stages("full", tmp_path)
    job = stages.start("core", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert stages.finish(job) == 124


def test_a_record_is_on_disk_before_its_stage_ends(tmp_path: Path) -> None:
    record = Record(tmp_path / "core.json", stage="core")
    record.add("core", measure(lambda: None, 3))
    record.fail("naive", RuntimeError("out of memory"))
    found = json.loads((tmp_path / "core.json").read_text())
    assert found["core"]["repeats"] == 3
    assert not found["complete"]
    record.finish()
    assert not json.loads((tmp_path / "core.json").read_text())["complete"]
    write_report(tmp_path)
    assert "failed: RuntimeError: out of memory" in table(tmp_path)


def test_an_overhead_is_over_the_turns_around_it() -> None:
    def turn(name: str, ms: float, **parts: list[float]) -> dict[str, Any]:
        return {"name": name, "cycle": 0, "ms": {"step": [ms, ms], **parts}, "peak_mb": 1.0}

    raw = [
        turn("GRPO", 100.0),
        turn("x", 110.0, judge=[5.0]),
        turn("y", 132.0),
        turn("GRPO", 120.0),
        turn("x", 126.0),
        turn("GRPO", 120.0),
    ]
    found = summary(raw)
    assert found["x"]["overheads"] == pytest.approx([0.0, 0.05])
    assert found["x"]["parts_of_a_plain_step"] == {"judge": pytest.approx(5.0 / 120.0)}
    assert found["y"]["overhead"] == pytest.approx(0.2)
    assert found["GRPO"]["overheads"] == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        (0, "small: done\n========= ERROR SUMMARY: 0 errors", "green"),
        (9, "========= ERROR SUMMARY: 3 errors", "red (3 errors, exit 9)"),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors", "red (0 errors, exit 1)"),
        (1, "Device not supported", "not run: compute-sanitizer stopped (exit 1)"),
        (124, "", "not run: not finished in time"),
    ],
)
def test_only_what_the_memory_checker_found_is_red(status: int, log: str, verdict: str) -> None:
    assert command._memory_verdict(status, log) == verdict


def test_verdicts_are_by_what_was_asked() -> None:
    step = {"overhead": 0.02, "overheads": [0.02], "step_ms": 1.0}
    records: dict[str, Any] = {
        "core": {"naive": {"times_slower": 7.0, "times_memory": 40.0, "tokens": 8}},
        "step0": {"policy": {"name": "Q"}, "steps": {"CAPO": step, "GRPO": step}},
    }
    lines = verdicts(records)
    assert "**met** (7.0 ×" in lines[0]
    assert "**not met** (1/40)" in lines[1]
    assert "**not met** (+2.00%)" in lines[2]
    assert "noise" in lines[3]


def test_the_report_is_of_stages_that_ran_apart(tmp_path: Path) -> None:
    def about(device: str, started: str) -> dict[str, Any]:
        return {"device": device, "started": started}

    step = {"overhead": 0.02, "overheads": [0.02], "step_ms": 1.0, "peak_mb": 1.0}
    step["parts_of_a_plain_step"] = {}  # type: ignore[assignment]
    timing = {"median_ms": 2.0, "peak_mb": 8.0}
    Record(
        tmp_path / "core.json",
        stage="core",
        scale="full",
        about=about("H100", "2026-01-01T10:00:00"),
        chunked={
            "tokens": 4,
            "theirs": timing,
            "ours": timing,
            "times_slower": 3.0,
            "times_memory": 0.2,
        },
    ).finish()
    record = Record(
        tmp_path / "step1.json",
        stage="step1",
        scale="full",
        about=about("H200", "2026-01-02T11:00:00"),
    )
    record.add("policy", {"name": "Q", "parameters": 7e9, "tokens": 8})
    record.add("left out for want of time", ["trust region, deep"])
    record.add("steps", {"GRPO": step | {"overheads": [-0.01, 0.01]}, "CAPO": step})
    record.finish()
    (tmp_path / "NOTES.md").write_text("## The run\n\nBy hand.\n")
    write_report(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| core | full | H100 | 2026-01-01T10:00 | whole |" in page
    assert "| step1 | full | H200 | 2026-01-02T11:00 | without trust region, deep |" in page
    assert "| step0 | | | | **not run**" in page
    assert "By hand." in page
    assert "5.0 × the memory" in page
    assert "+2.00% of the step (one turn)" in page
    assert "differs from its turn before by -1.00% to +1.00%" in page


def test_a_stage_ends_itself_in_time_and_keeps_its_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capo.lab.gpu import step as stage
    from capo.lab.gpu.sizes import sizes_of

    class Bench:
        parameters, clock = 1, None

        def __init__(self, shape: Any) -> None: ...

        def trainer(self, **settings: Any) -> None: ...

    class Turn:
        trials = (2,)

        def __init__(self, *_: Any) -> None: ...

        def take(self) -> dict[str, list[float]]:
            kept = json.loads(path.read_text()).get("raw", [])
            if len(kept) == 3:
                now[0] += 1000.0
            return {"step": [1.0]}

    now, path = [0.0], tmp_path / "step0.json"
    monkeypatch.setattr(stage, "Bench", Bench)
    monkeypatch.setattr(stage, "Turn", Turn)
    monkeypatch.setattr(stage.time, "monotonic", lambda: now[0])
    record = Record(path, stage="step0")
    stage.run(sizes_of("full").policies[0], record)
    found = json.loads(path.read_text())
    names = [turn["name"] for turn in found["raw"]]
    assert names[:3] == ["GRPO", *list(stage.VARIANTS)[:2]]
    assert names[-1] == "GRPO"  # an overhead has a turn on either side
    assert "trust region, deep" in found["left out for want of time"]
    assert found["raw"][0]["trials"] == [2]
