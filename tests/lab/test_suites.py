"""Suites: estimators against brute force, files that say what is missing, a real process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from capo import InputError
from capo.lab.suite_run import Figure, majority, pass_at_k
from capo.lab.suites import load_suite, suite_names
from run_kit import here

SUITE = """
[defaults]
problems = 12
k = 3

[[tasks]]
name = "sums"
task = "sums"

[[tasks]]
name = "greedy"
task = "sums"
temperature = 0.0
k = 1

[[tasks]]
name = "file"
dataset = "problems.jsonl"
problems = 2
max_completion_tokens = 4
params = { template = "{problem}" }
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    rows = [{"problem": f"1{i}+20+30?", "answer": str(60 + i)} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "problems.jsonl").write_text(text)
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "suite.toml"


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n, right in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if right > n:
                continue
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answers", "index"),
    [
        (["1", "2", "2"], 1),
        (["1", "2"], 0),
        ([None, None, "3"], 2),
        ([None, None], None),
        (["2", "1", "1", "2"], 0),
    ],
)
def test_majority(answers: list[str | None], index: int | None) -> None:
    assert majority(answers) == index


def test_an_interval_is_honest_at_the_ends() -> None:
    figure = Figure.over([1.0] * 20)
    assert (figure.mean, figure.stderr) == (1.0, 0.0)
    assert figure.interval[0] == pytest.approx(0.839, abs=1e-3)  # Wilson, 20 of 20


def test_a_suite_file_is_loaded_whole(suite: Path) -> None:
    entries = load_suite(str(suite))
    assert [(e.settings.name, len(e.problems), e.settings.k) for e in entries] == [
        ("sums", 12, 3),
        ("greedy", 12, 1),
        ("file", 2, 3),
    ]
    suite.write_text(SUITE.replace("problems = 2\n", "problems = 3\n"))
    assert len(load_suite(str(suite))[2].problems) == 3  # none is lost to a train split


def test_a_file_of_problems_is_a_suite(suite: Path) -> None:
    [entry] = load_suite(str(suite.parent / "problems.jsonl"))
    assert entry.settings.name == "problems"
    assert len(entry.problems) == 3


def test_shipped_suites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"embedded", "math", "paper", "reasoning-gym"} <= set(suite_names())
    assert len(load_suite("reasoning-gym")) == 8
    row = json.dumps({"problem": "1+1?", "answer": 2})
    names = ("aime24", "amc23", "math500", "minerva_math", "olympiadbench", "gsm8k_test")
    for name in (*names, "gaokao2023en", "college_math"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    monkeypatch.setenv("CAPO_DATA_DIR", str(tmp_path))
    assert len(load_suite("paper")) == 8
    monkeypatch.delenv("CAPO_DATA_DIR")
    with pytest.raises(InputError, match=r"tasks\.aime24\.dataset: needs .* CAPO_DATA_DIR"):
        load_suite("paper")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("problems.jsonl", "nowhere.jsonl", r"tasks\.file\.dataset: there is no file 'nowhere"),
        ("k = 3", "k = 0", r"tasks\.0\.k: must be"),
        ("k = 3", "kk = 3", r"tasks\.0\.kk: unknown key"),
        ('task = "sums"', 'task = "chess"', r"tasks\.sums\.task: must be one of"),
        ("problems = 12", "problems = 1000000", r"tasks\.sums\.problems: must be in"),
        ('name = "greedy"', 'name = "sums"', r"two of them are named 'sums'"),
        ("[defaults]", "[default", "is not valid TOML"),
        ("[defaults]", "[defaultss]", "defaultss: unknown key"),
    ],
)
def test_bad_suites(suite: Path, old: str, new: str, says: str) -> None:
    suite.write_text(SUITE.replace(old, new, 1))
    with pytest.raises(InputError, match=says):
        load_suite(str(suite))


def test_an_unknown_suite_has_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean 'paper'"):
        load_suite("papers")


@pytest.mark.slow
def test_the_command_writes_a_report(suite: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    command = ("eval", "embedded:sums", "--suite", str(suite), "-o", str(output))
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert "pass@1" in done.stdout
    document = json.loads((output / "evaluation.json").read_text())
    sums, greedy, file = document["tasks"]
    assert greedy["pass_at"]["1"]["mean"] == 1.0  # the embedded policy can
    assert 0 < sums["pass_at"]["1"]["mean"] < sums["pass_at"]["3"]["mean"] <= 1
    assert sums["pass_at"]["2"]["mean"] > sums["pass_at"]["1"]["mean"]
    assert sums["majority"]["interval"][0] < sums["majority"]["mean"]
    assert file["problems"] == 2
    assert "| sums | 12 | 3 |" in (output / "report.md").read_text()

    suite.write_text(SUITE.replace("problems.jsonl", "nowhere.jsonl"))
    done = here(*command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("capo: tasks.file.dataset: there is no file")
