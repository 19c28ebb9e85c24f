"""The report: what it says, what it survives, and that nothing in it escapes or is loaded."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lab_runs import invented
from sweep_kit import GRID
from synthetic_runs import HOSTILE, VOCABULARY, config, write_lines, write_run

import capo
from capo.lab.report import build_report
from capo.lab.report.reading import read_run, read_runs
from capo.lab.report.series import MAX_POINTS, accuracy_table, signal_table
from capo.lab.report.summary import collapse_of, group_series, headline, summarise
from capo.lab.report.tokens import worst_offenders
from capo.lab.rundir import OUT_OF_TIME
from capo.lab.sweep.grid import parse_grid

TARGET = 0.75


class Page(HTMLParser):
    """Text outside scripts and styles, and every attribute that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "action")
        ]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text.append(data)


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def words(found: Page) -> str:
    return " ".join(" ".join(found.text).split())


def evals(*accuracies: float) -> list[dict[str, float]]:
    return [
        {"step": i, "completions": 96 * i, "seconds": i, "accuracy": p, "problems": 400}
        for i, p in enumerate(accuracies)
    ]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("three")
    fast = {"training__learning_rate": 2.5e-4}
    runs = [
        write_run(root / "slow", config("slow"), shifts=False),
        write_run(root / "fast", config("fast", **fast), shape="collapses", shifts=False),
        write_run(
            root / "kept", config("kept", capo__selection="capo", **fast), shape="holds", tokens=4
        ),
    ]
    return build_report(runs, root / "out" / "report.html", "Three <b>ways</b>"), runs


def test_page_says_what_was_measured(three: tuple[Path, list[Path]]) -> None:
    path, runs = three
    text = words(page(path))
    final = read_run(runs[0]).evals["accuracy"].iloc[-1]
    assert "Of 3 runs, 1 collapsed (fast)" in text
    assert f"highest final accuracy is {final:.3f}" in text
    assert "Three <b>ways</b>" in text  # shown as text, not as markup
    for expected in ("GRPO", "CAPO", "not reached", "training.learning_rate", "2.5e-4", "seed"):
        assert expected in text
    for expected in ("0123456789ab", "capo train 'small config.toml'", "a test's CPU", "trl"):
        assert expected in text
    assert "policy shift too large" in text
    assert "task.name" not in text.split("Only the keys in which the runs differ")[1][:400]


def test_page_loads_nothing(three: tuple[Path, list[Path]]) -> None:
    path, _ = three
    html = path.read_text(encoding="utf-8")
    found = page(path)
    assert path.stat().st_size < 6_000_000
    assert all(load.startswith(("#", "data:")) for load in found.loads)
    assert "https://" not in " ".join(found.text)
    assert "http" not in found.scripts[1]  # the figures' specifications
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>.*?</style>", html, re.S)))
    assert "default-src 'none'" in html


def test_figures_and_data_lie_beside(three: tuple[Path, list[Path]]) -> None:
    path, runs = three
    folder = path.parent / "report_figures"
    slugs = {file.stem for file in folder.iterdir()}
    assert {"accuracy", "reward", "entropy", "grad-norm", "learning-rate"} <= slugs
    assert {"policy-shift", "objective-shift", "batch-policy-shift", "rejection-rate"} <= slugs
    for slug in slugs:
        assert (folder / f"{slug}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert (folder / f"{slug}.svg").read_text(encoding="utf-8").startswith("<svg")
    with (folder / "accuracy.csv").open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["series"] == "slow"]
    written = [json.loads(line) for line in (runs[0] / "evals.jsonl").read_text().splitlines()]
    assert len(rows) == len(written)
    for row, line in zip(rows, written, strict=True):
        assert float(row["completions"]) == line["completions"]
        assert float(row["accuracy"]) == pytest.approx(line["accuracy"], rel=1e-12)
        low = max(0.0, line["accuracy"] - line["stderr"])
        assert float(row["low"]) == pytest.approx(low, rel=1e-12)
    with (folder / "policy-shift.csv").open(encoding="utf-8") as handle:
        shifts = list(csv.DictReader(handle))
    logged = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    assert {row["series"] for row in shifts} == {"kept"}
    assert [float(row["p99"]) for row in shifts] == pytest.approx(
        [line["capo/policy_shift/p99"] for line in logged]
    )


def test_every_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    settings = config(HOSTILE, capo__selection="capo")
    settings["task"]["params"] = {HOSTILE: HOSTILE}
    vocabulary = [f"</script>{HOSTILE}<img src=x onerror=alert(1)>"] * len(VOCABULARY)
    run = write_run(tmp_path / "a", settings, tokens=1, vocabulary=vocabulary, state=HOSTILE)
    other = write_run(tmp_path / "b", config("b"))
    provenance = json.loads((run / "provenance.json").read_text())
    provenance |= {"command": [HOSTILE], "packages": {HOSTILE: HOSTILE}, "git_commit": HOSTILE}
    (run / "provenance.json").write_text(json.dumps(provenance))
    found = page(build_report([run, other], tmp_path / "r.html", HOSTILE))
    assert found.tags.count("script") == 4  # theme, payload, bundle, page: none from the run
    assert "img" not in found.tags
    assert "alert('run')" in words(found)
    assert json.loads(found.scripts[1])["figures"]["accuracy"]["datasets"]["data"]


def test_directory_that_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "all" / "inner")
    for bad in (tmp_path / "missing", tmp_path / "all", run / "config.json"):
        with pytest.raises(capo.InputError, match=re.escape(str(bad))) as caught:
            build_report([run, bad], tmp_path / "r.html")
        assert caught.value.field == "runs"
    with pytest.raises(capo.InputError, match="inner"):
        read_run(tmp_path / "all")
    (run / "config.json").write_text("[1]")
    with pytest.raises(capo.InputError, match="JSON object"):
        read_run(run)
    with pytest.raises(capo.InputError, match="at least one"):
        build_report([], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("target", [0.0, 1.5, math.nan])
def test_bad_target(tmp_path: Path, target: float) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(capo.InputError, match="target_accuracy"):
        build_report([run], tmp_path / "r.html", target_accuracy=target)


def test_nothing_but_a_config(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "config.json").write_text("{}")
    text = words(page(build_report([run], tmp_path / "r.html")))
    assert "1 run, none of them evaluated yet." in text
    for missing in ("no metrics.jsonl", "no evals.jsonl", "no status.json"):
        assert missing in text


def test_torn_and_empty_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn", tokens=3, state="interrupted")
    with (run / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 61, "completi')
    (run / "tokens" / "step-000002.npz").write_bytes(b"PK\x03\x04 cut off")
    empty = write_run(tmp_path / "empty", steps=4, eval_every=1)
    (empty / "metrics.jsonl").write_text("")
    (empty / "provenance.json").unlink()
    text = words(page(build_report([run, empty], tmp_path / "r.html")))
    assert "metrics.jsonl: 1 unreadable line left out." in text
    assert "metrics.jsonl is empty." in text
    assert "The run is interrupted at step 60 of 60." in text
    assert "1 unreadable record left out" in text
    assert len(read_run(run).metrics) == 60


def test_not_finite_values_are_noted_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nan")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[2]["grad_norm"] = math.nan
    rows[3]["grad_norm"] = math.inf
    rows[5]["capo/policy_shift/max"] = math.nan
    rows[6]["reward"] = None
    write_lines(run / "metrics.jsonl", rows)
    found = page(build_report([run], tmp_path / "r.html"))
    assert "grad_norm was not finite at steps 3, 4." in words(found)
    drawn = json.loads(found.scripts[1])["figures"]["grad-norm"]["datasets"]["data"]
    assert [row["step"] for row in drawn] == [1, 2, *range(5, 61)]


def test_evaluations_without_accuracy_or_base(tmp_path: Path) -> None:
    run = write_run(tmp_path / "holes")
    write_lines(run / "evals.jsonl", [{"step": 5, "accuracy": 0.5, "problems": 100}, {"step": 6}])
    found = read_run(run)
    assert found.evals["completions"].tolist() == [5 * 96]
    assert found.evals["stderr"].iloc[0] == pytest.approx(0.05)
    summary = summarise(found, TARGET)
    assert summary.base is None
    assert summary.collapsed is None
    assert summary.final is not None
    text = words(page(build_report([run], tmp_path / "r.html")))
    assert "1 evaluation without an accuracy" in text
    assert "The base policy was not evaluated" in text


@pytest.mark.parametrize(
    ("curve", "collapsed", "at"),
    [
        ((0.4, 0.5, 0.6), False, None),
        ((0.4, 0.1, 0.1, 0.3, 0.1, 0.3), False, None),  # never three in a row
        ((0.4, 0.3, 0.19, 0.1, 0.0, 0.5), True, 2),  # recovered, and yet
        ((0.4, 0.5, 0.5, 0.1), True, 3),  # at the end
        ((0.4, 0.5, 0.1, 0.1), True, 2),
        ((0.4, 0.2, 0.2, 0.2), False, None),  # half is not below half
        ((0.0, 0.0, 0.0, 0.0), False, None),
        ((0.4,), None, None),
    ],
)
def test_collapse(
    tmp_path: Path, curve: tuple[float, ...], collapsed: bool | None, at: int | None
) -> None:
    run = write_run(tmp_path / "a")
    write_lines(run / "evals.jsonl", evals(*curve))
    verdict, where = collapse_of(read_run(run))
    assert verdict is collapsed
    assert (where.completions if where else None) == (None if at is None else 96 * at)


DIED = "RuntimeError: the weights are not finite: they make no probability tensor any more"
ASSERTED = "RuntimeError: CUDA error: device-side assert triggered"


def ended(run: Path, state: str, message: str, accuracies: Sequence[float], logged: int) -> Path:
    """The run with this status, these evaluations and so many steps in its log."""
    status = {"state": state, "step": logged, "steps": 60, "message": message}
    (run / "status.json").write_text(json.dumps(status))
    write_lines(run / "evals.jsonl", evals(*accuracies))
    rows = [{"step": i + 1, "completions": 96 * (i + 1), "seconds": i} for i in range(logged)]
    write_lines(run / "metrics.jsonl", [row | {"grad_norm": math.nan} for row in rows])
    return run


@pytest.mark.parametrize(
    ("state", "message", "diverged"),
    [
        ("finished", "diverged", True),
        ("failed", DIED, True),
        ("failed", ASSERTED, True),
        ("failed", "RuntimeError: out of memory", False),
        ("finished", "", False),
        ("running", "diverged", False),
    ],
)
def test_a_run_that_diverged_ends_at_0_and_has_collapsed(
    tmp_path: Path, state: str, message: str, diverged: bool
) -> None:
    run = ended(write_run(tmp_path / "a"), state, message, (0.4, 0.5, 0.6), logged=4)
    summary = summarise(read_run(run), TARGET)
    assert summary.final is not None
    assert summary.best is not None
    assert summary.best.accuracy == 0.6
    assert summary.collapsed is diverged
    text = words(page(build_report([run], tmp_path / "r.html")))
    if diverged:
        assert (summary.final.accuracy, summary.final.completions) == (0.0, 4 * 96)
        assert summary.collapsed_at == summary.final
        assert "to 0.000 ± 0.000 accuracy after 384 completions, collapsed at 384" in text
        assert "The policy diverged at step 4 of 60" in text
    else:
        assert summary.final.accuracy == 0.6


@pytest.mark.parametrize(
    ("accuracies", "logged", "verdict", "at"),
    [
        ((), 0, True, 96),
        ((), 3, True, 288),
        ((0.0,), 0, True, 96),
        ((0.4,), 1, True, 96),
        ((0.4, 0.1), 1, True, 96),  # was low before it diverged
        ((0.4, 0.4), 1, True, 192),  # what broke it is not logged
    ],
)
def test_where_a_run_diverged(
    tmp_path: Path, accuracies: tuple[float, ...], logged: int, verdict: bool, at: int
) -> None:
    run = ended(write_run(tmp_path / "a"), "finished", "diverged", accuracies, logged)
    collapsed, where = collapse_of(read_run(run))
    assert collapsed is verdict
    assert where is not None
    assert where.completions == at
    build_report([run], tmp_path / "r.html")


def test_a_seed_that_diverged_counts_as_0_beside_the_others(tmp_path: Path) -> None:
    fates = [
        ("finished", "", (0.4, 0.5, 0.6, 0.7, 0.8)),
        ("finished", "diverged", (0.4, 0.6, 0.7)),
        ("finished", OUT_OF_TIME, (0.4, 0.3, 0.3)),
        ("interrupted", "", (0.4, 0.9)),
    ]
    runs = [
        ended(write_run(tmp_path / f"s{i}", config(f"base-s{i}", i)), *fate, logged=len(fate[2]))
        for i, fate in enumerate(fates)
    ]
    series = group_series([summarise(run, TARGET) for run in read_runs(runs)])
    table = accuracy_table(series)
    assert table["completions"].tolist() == [0, 96, 192, 288, 384]
    assert table["runs"].tolist() == [4, 4, 3, 3, 3]
    assert table["low"].tolist() == [0.4, 0.3, 0.3, 0.0, 0.0]
    assert table["accuracy"].tolist() == pytest.approx([0.4, 0.55, 0.6, 0.3, 0.3])
    assert table["high"].tolist() == [0.4, 0.9, 0.7, 0.7, 0.8]
    assert "1 collapsed" in headline(series, TARGET)


def test_reports_and_grids_agree_on_collapses(tmp_path: Path) -> None:
    point = next(iter(parse_grid(GRID).points()))
    curves = [(0.4, 0.2, 0.2, 0.2), (0.0, 0.0), (0.4, 0.1, 0.1, 0.1, 0.5), (0.4, 0.5, 0.1)]
    for index, curve in enumerate(curves):
        run = write_run(tmp_path / str(index))
        write_lines(run / "evals.jsonl", evals(*curve))
        assert collapse_of(read_run(run))[0] is invented(point, curve).collapsed


def test_completions_to_target_and_rejection(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", capo__selection="capo"))
    write_lines(run / "evals.jsonl", evals(0.4, 0.7, 0.76, 0.7, 0.8))
    rates = [
        {"capo/rejection_rate": 0.5, "capo/tokens": 1},
        {"capo/rejection_rate": 0.0, "capo/tokens": 3},
    ]
    write_lines(
        run / "metrics.jsonl", [{"step": i + 1, "seconds": i, **row} for i, row in enumerate(rates)]
    )
    summary = summarise(read_run(run), TARGET)
    assert summary.completions_to_target == 2 * 96
    assert summary.best is not None
    assert summary.best.accuracy == 0.8
    assert summary.rejection_mean == pytest.approx(0.125)  # of tokens, not of steps
    assert summary.rejection_peak == 0.5
    assert summarise(read_run(run), 0.9).completions_to_target is None


def test_watched_run_rejects_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")  # logs rejection rates, selects nothing
    summary = summarise(read_run(run), TARGET)
    assert (summary.algorithm, summary.rejection_mean) == ("GRPO", None)
    path = build_report([run], tmp_path / "r.html")
    slugs = {file.stem for file in (tmp_path / "r_figures").iterdir()}
    assert "policy-shift" in slugs
    assert not any(slug.startswith("rejection") for slug in slugs)
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "selection", "shown"),
    [
        ("grpo", None, "GRPO"),
        ("grpo", "capo", "CAPO"),
        ("dr_grpo", "dr_capo", "Dr.CAPO"),
        ("reinforce", "reincapo", "ReinCAPO"),
        ("reinforce", "capo", "REINFORCE + capo thresholds"),
        ("grpo", {"policy_shift": 1e-3, "objective_shift": [None, None]}, "GRPO + own thresholds"),
        ("grpo", {"policy_shift": None, "objective_shift": [None, None]}, "GRPO"),
    ],
)
def test_algorithm_names(tmp_path: Path, name: str, selection: object, shown: str) -> None:
    settings = config("a", algorithm__name=name, capo__selection=selection)
    run = write_run(tmp_path / "a", settings, steps=10)
    assert summarise(read_run(run), TARGET).algorithm == shown


def test_seeds_are_one_series(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", config(f"base-s{seed}", seed)) for seed in range(3)]
    runs.append(write_run(tmp_path / "other", config("other", training__learning_rate=1.0)))
    found = read_runs([*runs, runs[0]])
    assert [run.path for run in found] == runs  # given twice, read once, in order
    series = group_series([summarise(run, TARGET) for run in found])
    assert [(one.name, len(one.runs)) for one in series] == [("base (3 seeds)", 3), ("other", 1)]
    path = build_report(runs, tmp_path / "r.html")
    with (tmp_path / "r_figures" / "accuracy.csv").open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["series"] == "base (3 seeds)"]
    last = sorted(run.evals["accuracy"].iloc[-1] for run in found[:3])
    assert [float(rows[-1][key]) for key in ("low", "accuracy", "high")] == pytest.approx(last)
    assert rows[-1]["runs"] == "3"
    assert f"{last[1]:.3f} {last[0]:.3f} – {last[2]:.3f}" in words(page(path))


def test_series_of_one_name_stay_apart(tmp_path: Path) -> None:
    rates = (1e-4, 2e-4, 3e-4)
    runs = [
        write_run(tmp_path / f"d{i}", config("same", training__learning_rate=rate), steps=10)
        for i, rate in enumerate(rates)
    ]
    series = group_series([summarise(run, TARGET) for run in read_runs(runs)])
    assert [one.name for one in series] == ["same (d0)", "same (d1)", "same (d2)"]


def test_long_runs_are_thinned_with_their_extremes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", steps=2000, eval_every=100)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1234]["grad_norm"] = 1e6
    write_lines(run / "metrics.jsonl", rows)
    table = signal_table(group_series([summarise(read_run(run), TARGET)]), "grad_norm")
    assert len(table) <= MAX_POINTS
    assert table["high"].max() == 1e6
    assert table["values"].sum() == 2000
    assert table["completions"].iloc[-1] == 2000 * 96


def test_worst_offenders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", config("a", capo__selection="capo"), tokens=1)
    arrays = {
        "offsets": np.array([0, 3, 3, 6]),
        "token_ids": np.array([2, 3, 4, 5, 6, 7], np.int32),
        "log_prob": np.log(np.array([0.5, 0.25, 0.5, 0.5, 0.125, 0.5], np.float32)),
        "advantage": np.array([1, 1, 1, -1, -1, -1], np.float32),
        "objective_shift": np.array([0, 0.5, 0, 0, 0.25, 0], np.float32),
        "policy_shift": np.array([0, 2, np.nan, 0, 3, 1], np.float32),
        "reason": np.array([0, 1, 0, 0, 3, 0], np.int8),
        "prompt_offsets": np.array([0, 1, 1, 3]),
        "prompt_ids": np.array([12, 8, 12], np.int32),
    }
    np.savez_compressed(run / "tokens" / "step-000007.npz", **arrays)
    (run / "tokens" / "step-000001.npz").unlink()
    found = worst_offenders(read_run(run), count=2)
    assert (found.tokens, found.steps, found.unreadable) == (6, 1, 0)
    first, second = found.offenders
    assert (first.prompt, first.before, first.text, first.after) == ("6+", "3", "4", "5")
    assert (second.prompt, second.before, second.text, second.after) == ("+", "0", "1", "2")
    assert first.step == 7
    assert first.probability == pytest.approx(0.125)
    assert (first.advantage, first.objective_shift, first.policy_shift) == (-1, 0.25, 3)
    assert [one.verdict for one in found.offenders] == [
        "objective shift too high",
        "policy shift too large",
    ]


def test_headline_of_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", shape="collapses")
    series = group_series([summarise(read_run(run), TARGET)])
    sentence = headline(series, TARGET)
    assert sentence.startswith("a (GRPO) went from 0.450 to 0.000")
    assert "collapsed at" in sentence
    assert sentence.endswith("0.75 accuracy was not reached.")
