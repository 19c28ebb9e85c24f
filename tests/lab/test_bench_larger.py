"""`capo bench larger`: one sitting for real, but tiny, and its page."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from lab_runs import invented, metric_rows, results

from capo import InputError
from capo.lab.bench_larger import ARCHIVE, Sitting, checked, main, recipes, smaller, way
from capo.lab.bench_larger_report import verdict, write
from capo.lab.sweep.grid import load_grid, parse_grid
from capo.policies.pretrain_config import PretrainConfig

FOLDER = Path(__file__).parents[2] / "results" / "gpu" / "larger_policy"
WAYS = {"plain", "selection", "region"}
SMALL = """
preset = "small-aggressive"
seeds = [0]
[set]
"policy.path" = "policies:sums"
"run.device" = "cpu"
"training.steps" = 2
"training.completions_per_step" = 8
"training.micro_batch" = 4
"training.save_every" = 2
"eval.problems" = 4
"eval.every_completions" = 8
[[variants]]
name = "grpo"
label = "GRPO"
[[variants]]
name = "masks"
label = "Masks"
set = { "capo.selection" = "capo" }
[policies.sums]
steps = 3
batch_size = 4
warmup_steps = 1
layers = 1
hidden_size = 16
intermediate_size = 16
heads = 2
eval_problems = 4
eval_k = 2
"""


def test_the_committed_grid_has_all_ways_at_the_width_that_it_promises():
    grid = load_grid(FOLDER / "grid.toml")
    assert {way(point) for point in grid.points()} == WAYS
    assert {way(point) for point in checked(grid).points()} == WAYS
    [recipe] = recipes(grid)
    config = PretrainConfig.from_dict(recipe)
    assert config.device == "cuda"
    kv = 2 * config.hidden_size * config.hidden_size // config.heads * (config.kv_heads or 0)
    layer = 2 * config.hidden_size**2 + kv + 3 * config.hidden_size * config.intermediate_size
    embedded = 2 * (config.vocabulary or 0) * config.hidden_size
    assert 50e6 < config.layers * layer + embedded < 150e6
    rates = {cell.variant: cell for cell in grid.cells()}
    aggressive, conservative = (
        next(
            p.resolved.training for p in grid.points() if p.cell is not None and p.cell.variant == v
        )
        for v in ("grpo-aggressive", "grpo-conservative")
    )
    assert len(rates) == 8
    assert conservative.learning_rate == pytest.approx(aggressive.learning_rate / 5)
    assert conservative.completions_per_step == 12 * aggressive.completions_per_step


def test_a_rehearsal_needs_no_gpu_and_leaves_the_ways_as_they_are():
    grid = smaller(load_grid(FOLDER / "grid.toml"), FOLDER / "tiny.toml")
    assert {way(point) for point in grid.points()} == WAYS
    assert {point.resolved.run.device for point in grid.points()} == {"cpu"}
    assert all(not PretrainConfig.from_dict(each).bf16 for each in recipes(grid))
    with pytest.raises(InputError, match="cannot be read"):
        smaller(grid, FOLDER / "none.toml")


@pytest.mark.slow
def test_a_sitting_and_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "grid.toml").write_text(SMALL)
    out, page = tmp_path / "out", tmp_path / "page"
    places = ["--runs", str(tmp_path / "runs"), "--output", str(out)]
    main([str(tmp_path / "grid.toml"), *places, "--jobs", "2", "--seconds", "500"])
    with tarfile.open(out / ARCHIVE) as archive:
        names = archive.getnames()
    assert sum(name.endswith("evals.jsonl") for name in names) == 2
    assert not any("safetensors" in name or "tokenizer" in name for name in names)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checks"] == {"plain": "ok", "selection": "ok"}
    assert summary["failed"] == {}
    assert [row["seeds"] for row in summary["rows"]] == [1, 1]
    assert summary["policy"]["steps"] == 3
    main(["--report", str(out / ARCHIVE), "--output", str(page)])
    assert capsys.readouterr().out.strip().endswith("README.md")
    text = (page / "README.md").read_text()
    assert "No run failed." in text
    assert "- GRPO: " in text
    assert {"accuracy.png", "accuracy.svg", "accuracy.csv", "reward.png"} <= {
        path.name for path in page.iterdir()
    }
    curves = (page / "curves.csv").read_text().splitlines()
    assert curves[0].startswith("variant,seed,step,completions,accuracy")
    assert len(curves) == 1 + 2 * 3


def test_a_page_says_what_went_wrong(tmp_path: Path):
    grid = parse_grid(SMALL)
    curves = {"grpo": [0.4, 0.6, 0.1, 0.05, 0.02], "masks": [0.4, 0.6, 0.7, 0.72, 0.71]}
    rows = metric_rows(8, reward=lambda step: 0.1 * step)
    found = results(grid, lambda cell, _seed: invented_in(cell, curves, rows))
    policy: dict[str, Any] = {
        "config": PretrainConfig(max_seconds=150.0).model_dump(mode="json") | {"vocabulary": 3072},
        "weights": {"parameters": 54_541_312},
        "measured": {"problems": 8, "k": 8, "sampled_accuracy": 0.4, "greedy_accuracy": 0.5}
        | {"pass_at_k": 0.9},
        "steps": 1200,
        "seconds": 160.0,
        "final_loss": 0.3,
    }
    hardware = {"gpu": "H100", "cores": 16, "cpu": "some"}
    versions = {"torch": "2", "transformers": "5", "trl": "1"}
    sitting = Sitting(
        grid,
        seconds={"all": 400.0, "training": 200.0},
        checks={"plain": "ok", "selection": "RuntimeError: no"},
        policy=policy,
        provenance={"hardware": hardware, "packages": versions, "git_commit": None},
    )
    text = write(sitting.as_dict(), found, tmp_path).read_text()
    assert "Failed: selection: RuntimeError: no." in text
    assert "54.5 M parameters" in text
    assert verdict(found) == [
        "GRPO: **collapsed** from 384 completions on, 0.40 → 0.02 in 768 completions, best 0.60.",
        "Masks: held, 0.40 → 0.71 in 768 completions.",
    ]


def invented_in(cell, curves, rows):
    point = next(p for p in parse_grid(SMALL).points() if p.cell.variant == cell.variant)
    return invented(point, curves[cell.variant], rows)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([], "GRID"),
        (["--report", "nowhere.tar.gz"], "--report"),
        (["grid", "--jobs", "0"], "--jobs"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], field: str, tmp_path: Path):
    with pytest.raises(InputError) as error:
        main([*arguments, "--output", str(tmp_path / "out")])
    assert error.value.field == field
