"""What `capo train` and `capo lab sweep` show on a real terminal, and what they print in a pipe."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from capo.lab.progress import Progress
from capo.lab.report.alarms import read_alarms
from capo.lab.report.reading import read_run
from capo.lab.run import Interrupted, train
from capo.lab.rundir import RunDirectory
from run_kit import TINY, SignalAt, capo_command, here, tiny, weights
from terminal_kit import Screen, on_terminal

JUDGED = [
    *TINY,
    "algorithm.num_iterations=1",
    "capo.selection=capo",
    "capo.trust_region=auto",
]
GRID = """
preset = "small-aggressive"
seeds = [0, 1]
[set]
"training.steps" = 16
"training.completions_per_step" = 16
"capo.watch" = true
"eval.problems" = 16
"eval.every_completions" = 64
"""


def line_of(text: str, name: str) -> str:
    """The one line of a screen that begins with a name."""
    found = [line for line in text.splitlines() if re.match(rf" *{name}( |$)", line)]
    assert len(found) == 1, text
    return found[0]


def test_the_screen_draws_what_a_terminal_would() -> None:
    screen = Screen(10)
    screen.feed("one\r\ntwo\r\x1b[2K\x1b[1A\x1b[2KONE\r\nTW\x1b[?25l\x1b[1;31mO\x1b[0m")
    assert screen.text == "ONE\nTWO"
    assert not screen.cursor_shown
    screen.feed("\r" + "x" * 12)
    assert screen.text == "ONE\nxxxxxxxxxx\nxx"


@pytest.mark.slow
def test_a_run_on_a_terminal(tmp_path) -> None:
    shown = on_terminal("train", "small-capo", *JUDGED, "-o", "run", cwd=tmp_path)
    assert shown.code == 0
    text = shown.screen.text
    assert "100%" in line_of(text, "grpo")
    assert line_of(text, "grpo").endswith("step 4/4")
    evals = RunDirectory(tmp_path / "run").rows("evals.jsonl")
    row = RunDirectory(tmp_path / "run").rows("metrics.jsonl")[-1]
    assert f"{evals[-1]['accuracy']:.3f} ± {evals[-1]['stderr']:.3f}" in line_of(text, "  accuracy")
    assert f"base {evals[0]['accuracy']:.3f}" in line_of(text, "base")
    shift, budget = row["capo/trust/measured_policy_shift"], row["capo/trust/budget"]
    assert f"{shift:.1e} nats a token of {budget:.1e}" in line_of(text, "policy shift")
    assert f"{row['capo/rejection_rate']:.1%}" in line_of(text, "rejected")
    assert f"{row['capo/trust/scale']:.2f}" in line_of(text, "trust-region scale")
    assert line_of(text, "objective shift")
    assert line_of(text, "warnings").endswith("none")
    assert shown.screen.cursor_shown
    assert "policy: run/final" in text.replace("\n", "")
    # It was alive: earlier frames stood at earlier steps, each view in the place of the last.
    steps = [int(n) for frame in shown.frames for n in re.findall(r"step (\d)/4", frame)]
    assert len(set(steps)) > 2
    assert all(frame.count("step ") <= 1 for frame in shown.frames)


@pytest.mark.slow
def test_a_narrow_terminal_is_not_overrun(tmp_path) -> None:
    shown = on_terminal(
        "train", "small-capo", *JUDGED, "-o", "run", "--monitor", "1", cwd=tmp_path, columns=60
    )
    assert shown.code == 0
    text = shown.screen.text
    assert line_of(text, "warning score")
    assert line_of(text, "warnings")
    assert not set("▁▂▃▄▅▆▇█") & set(text)
    assert all(frame.count("warnings") <= 1 for frame in shown.frames)


@pytest.mark.slow
def test_a_run_in_a_pipe_is_plain(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("train", "small-capo", *JUDGED, "-o", "run", "--overwrite")
    plain = subprocess.run(capo_command(*command), capture_output=True, text=True, check=True)
    assert "\x1b" not in plain.stderr + plain.stdout
    assert re.search(
        r"^step 4/4, \d+ completions, reward .*, shift .*, rejected .*, scale ", plain.stderr, re.M
    )
    assert plain.stdout.startswith("accuracy ")
    quiet = here(*command, "--quiet")
    assert quiet.stderr == ""
    assert quiet.stdout.count("\n") == 1
    as_json = here(*command, "--json")
    assert quiet.returncode == as_json.returncode == 0
    assert as_json.stderr == ""
    assert json.loads(as_json.stdout)["run"] == "run"


@pytest.mark.slow
def test_a_sweep_on_a_terminal(tmp_path, monkeypatch) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    shown = on_terminal("lab", "sweep", "grid.toml", "--jobs", "2", "--runs", "runs", cwd=tmp_path)
    assert shown.code == 0
    live = [frame for frame in shown.frames if "  running" in frame]
    assert live, shown.screen.text
    assert re.search(
        r"^  running +step +accuracy +reward +policy shift +rejected +scale +warnings$",
        live[-1],
        re.M,
    )
    steps = [int(n) for f in live for n in re.findall(r"as-is seed 0 +(\d+)/16", f)]
    assert steps == sorted(steps)
    assert len(set(steps)) > 1
    text = shown.screen.text
    assert "  running" not in text  # nothing is left of it
    assert "2 of 2" in text
    assert "2 made, 0 found, 0 failed" in text
    assert shown.screen.cursor_shown

    monkeypatch.chdir(tmp_path)
    printed = here("lab", "sweep", "grid.toml", "--runs", "runs", "--json")
    assert (printed.returncode, printed.stderr) == (0, "")
    document = json.loads(printed.stdout)
    assert (document["made"], document["found"], document["failed"]) == (0, 2, {})
    assert [row["seeds"] for row in document["table"]] == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(), ("capo.trust_region=auto", "algorithm.num_iterations=2"), ("capo.watch=true",)],
    ids=["plain", "trust region", "watched"],
)
def test_the_monitor_of_a_run_changes_no_weight(tmp_path, overrides) -> None:
    plain = train(tiny(*overrides), tmp_path / "plain")
    watched = train(tiny(*overrides), tmp_path / "watched", monitor=1)
    assert weights(plain) == weights(watched)
    rows = RunDirectory(watched).rows("metrics.jsonl")
    assert all("capo/monitor/measured_policy_shift" in row for row in rows)
    assert not any(
        "capo/monitor" in key for row in RunDirectory(plain).rows("metrics.jsonl") for key in row
    )


@pytest.mark.slow
def test_an_early_warning_is_told_and_kept(tmp_path, capsys) -> None:
    heard: list[str] = []

    class Listener(Progress):
        def warned(self, message: str) -> None:
            heard.append(message)

    config = tiny("training.learning_rate=3e-3", "training.warmup_ratio=0.0", "training.steps=6")
    directory = train(config, tmp_path / "run", monitor=1, progress=Listener())
    told = [alarm for alarm in read_alarms(read_run(directory)) if alarm.kind == "monitor"]
    assert any(alarm.sentence.startswith("early warning at step") for alarm in told)
    assert {alarm.sentence for alarm in told} <= set(heard)
    assert "early warning" not in capsys.readouterr().err  # told once, by the progress


@pytest.mark.slow
def test_a_monitored_run_that_is_resumed_is_monitored_on(tmp_path) -> None:
    steps = ("training.steps=6", "training.save_every=2")
    whole = train(tiny(*steps), tmp_path / "whole", monitor=2)
    with pytest.raises(Interrupted):
        train(tiny(*steps), tmp_path / "run", monitor=2, progress=SignalAt(4))
    run = train(tiny(*steps), tmp_path / "run", resume=True)
    for directory in (whole, run):
        rows = RunDirectory(directory).rows("metrics.jsonl")
        assert [row["step"] for row in rows if "capo/monitor/warning_score" in row] == [1, 3, 5]
    assert weights(whole) == weights(run)
