"""`capo bench policies`: made once, measured, recorded, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capo import InputError
from capo.lab import bench_policies
from capo.lab.bench_policies import FIDELITY, RECORD, main
from capo.lab.sweep.point import policy_folder
from capo.policies import recipes

SMALLER: dict[str, Any] = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "eval_problems": 4}
SMALLER |= {"eval_k": 2, "layers": 1, "hidden_size": 16, "intermediate_size": 16, "heads": 2}


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes that ship, cut short."""
    whole = recipes.recipe_settings
    monkeypatch.setattr(recipes, "recipe_settings", lambda name: whole(name) | SMALLER)


@pytest.mark.usefixtures("smaller")
def test_made_measured_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, output = tmp_path / "runs", tmp_path / "out"
    options = ["--problems", "6", "--k", "8", "--runs", str(runs), "--output", str(output)]
    main(["spell_backward", *options])
    main(["sums_gemma2", *options])
    rows = json.loads((output / RECORD).read_text())["policies"]
    assert [row["name"] for row in rows] == ["spell_backward", "sums_gemma2"]
    for row in rows:
        directory = runs / row["policy"]
        assert row["policy"] == policy_folder(row["recipe"])
        recipe = json.loads((directory / "recipe.json").read_text())
        assert row["sha256"] == recipe["weights"]["sha256"]
        assert row["problems"] == 6
        low, high = row["pass_at_1_interval"]
        assert 0 <= low <= row["pass_at_1"] <= high <= 1
        assert row["pass_at_1"] <= row["pass_at_8"]
    page = (output / "README.md").read_text()
    assert "| `spell_backward` | qwen2 |" in page
    assert "| `sums_gemma2` | gemma2 |" in page
    assert "spell_backward: pass@1" in capsys.readouterr().out

    weights = runs / rows[0]["policy"] / "model.safetensors"
    made = weights.stat().st_mtime_ns
    main(["spell_backward", *options])  # measured again, not made again
    assert weights.stat().st_mtime_ns == made
    assert json.loads((output / RECORD).read_text())["policies"] == rows


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["--k", "4"], "--k"), (["--problems", "0"], "--problems"), (["spell"], "recipe")],
)
def test_bad_options(tmp_path: Path, arguments: list[str], field: str) -> None:
    with pytest.raises(InputError) as error:
        main([*arguments, "--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")])
    assert error.value.field == field
    assert not (tmp_path / "out").exists()


def test_a_rerun_replaces_its_row_only(tmp_path: Path) -> None:
    row = {"name": "b", "title": "B.", "architecture": "x", "parameters": 1, "vocabulary": 64}
    row |= {"completion_tokens": 3, "completion_tokens_90": [1, 5], "greedy": 1.0}
    row |= {"pass_at_1": 0.5, "pass_at_1_interval": [0.4, 0.6], "pretraining_seconds": 60}
    row |= {"pass_at_8": 0.9, "pass_at_8_interval": [0.8, 0.95]}
    for each in (row, row | {"name": "a"}, row | {"pass_at_1": 0.25}):
        bench_policies.write(tmp_path, each)
    rows = json.loads((tmp_path / RECORD).read_text())["policies"]
    assert [(each["name"], each["pass_at_1"]) for each in rows] == [("a", 0.5), ("b", 0.25)]
    page = (tmp_path / "README.md").read_text()
    assert "0.250 [0.400, 0.600]" in page
    assert "Steps foreseen" not in page
    goal = {"name": "token Spearman of deep, b", "goal": "≥ 0.95", "value": "0.987"}
    found = {"command": "capo bench fidelity --policies b", "goals": [goal]}
    (tmp_path / FIDELITY).write_text(json.dumps(found))
    bench_policies.write(tmp_path, row)
    page = (tmp_path / "README.md").read_text()
    assert "| token Spearman of deep, b | ≥ 0.95 | 0.987 |" in page
    assert "capo bench fidelity --policies b --output results/policies/fidelity.json" in page


def test_the_default_is_the_one_that_ships(tmp_path: Path) -> None:
    row = bench_policies.measured("sums", tmp_path, 8, 8, 0)
    assert row["policy"] == "embedded:sums"
    assert row["parameters"] == 871_040
    assert 0.2 < row["pass_at_1"] < 0.8
    assert not any(tmp_path.iterdir())
