"""The demonstration: four runs, one report, a verdict that follows from the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from capo.lab import demo
from capo.lab.report.reading import read_run
from capo.lab.report.summary import summarise
from capo.lab.run import Interrupted
from capo.lab.rundir import RunDirectory
from run_kit import TINY, SignalAt

# TINY saves every second step, which must not fall between two passes over the same completions.
ONE_PASS = ["algorithm.num_iterations=1"]


def test_the_demonstration_is_the_regimes_and_the_default():
    conservative, aggressive, masks, capo = demo.demo_configs().values()
    assert conservative.training.completions_per_step == 1152
    assert aggressive.training == masks.training
    assert aggressive.training.learning_rate == capo.training.learning_rate
    selections = [c.capo.selection for c in (conservative, aggressive, masks, capo)]
    assert selections == [None, None, "capo", None]
    assert capo.capo.trust_region.policy_shift == "auto"
    assert [c.capo.trust_region for c in (conservative, aggressive, masks)] == [None] * 3
    assert all(c.capo.ledger is not None for c in (conservative, aggressive, masks, capo))


@pytest.fixture
def tiny_demo(monkeypatch):
    runs = tuple((name, preset, [*more, *TINY, *ONE_PASS]) for name, preset, more in demo.RUNS)
    monkeypatch.setattr(demo, "RUNS", runs)


def finished_at(output: Path) -> dict[str, int]:
    return {
        path.parent.parent.name: path.stat().st_mtime_ns
        for path in output.glob("*/final/config.json")
    }


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_the_demonstration_trains_reports_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    report = demo.run_demo(tmp_path)
    printed = capsys.readouterr()
    assert report.read_text().startswith("<!")
    assert list(tmp_path.glob("report_figures/*.png"))
    assert printed.out.splitlines()[-1] == f"report: {report}"
    assert "the paper's token masks in the same regime: accuracy" in printed.out
    trained = finished_at(tmp_path)
    assert len(trained) == 4

    demo.run_demo(tmp_path)
    assert "already trained" in capsys.readouterr().err
    assert finished_at(tmp_path) == trained

    # Another configuration of one run replaces that run alone.
    *others, (name, preset, more) = demo.RUNS
    monkeypatch.setattr(demo, "RUNS", (*others, (name, preset, [*more, "run.seed=1"])))
    demo.run_demo(tmp_path, quiet=True)
    again = finished_at(tmp_path)
    assert [run for run in trained if trained[run] != again[run]] == [name]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_an_interrupted_demonstration_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_progress", lambda *_: SignalAt(2))
    with pytest.raises(Interrupted):
        demo.run_demo(tmp_path)
    first = RunDirectory(tmp_path / "grpo-conservative")
    assert (first.state, first.last_checkpoint()[0]) == ("interrupted", 3)
    assert not (tmp_path / "report.html").exists()
    monkeypatch.undo()
    runs = tuple((name, preset, [*more, *TINY, *ONE_PASS]) for name, preset, more in demo.RUNS)
    monkeypatch.setattr(demo, "RUNS", runs)
    assert demo.run_demo(tmp_path, quiet=True).is_file()
    assert len(first.read("provenance.json")["resumed"]) == 1


def summary_of(directory: Path, accuracies: list[float]):
    run = RunDirectory(directory)
    directory.mkdir()
    run.write("config.json", {})
    for step, accuracy in enumerate(accuracies):
        row = {"step": step, "completions": 96 * step, "accuracy": accuracy, "problems": 100}
        run.append("evals.jsonl", row)
    return summarise(read_run(directory), demo.TARGET)


RISES, HOLDS, FALLS = [0.5, 0.6, 0.8, 0.9], [0.5, 0.5, 0.5, 0.5], [0.5, 0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    ("conservative", "aggressive", "masks", "capo", "says"),
    [
        (RISES, FALLS, FALLS, RISES, ["masks did not keep", "trust region kept", "1.0 × fewer"]),
        (RISES, FALLS, HOLDS, FALLS, ["masks kept", "trust region did not", "did not reach"]),
        (HOLDS, RISES, HOLDS, RISES, ["nothing to rescue", "at least 2 × fewer"]),
    ],
)
def test_the_verdict_follows_from_the_figures(
    tmp_path, conservative, aggressive, masks, capo, says
):
    courses = {"a": conservative, "b": aggressive, "c": masks, "d": capo}
    summaries = [summary_of(tmp_path / name, values) for name, values in courses.items()]
    sentences = demo.verdict(summaries)
    for sentence, course in zip(sentences, courses.values(), strict=False):
        assert ("collapsed at 96 completions" in sentence) == (course == FALLS)
        assert ("0.75 after 192 completions" in sentence) == (course == RISES)
    rest = " ".join(sentences[4:])
    assert all(words in rest for words in says)
