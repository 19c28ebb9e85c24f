"""`capo bench fidelity`: whose policy, on which task, and what is kept of earlier calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capo import InputError
from capo.lab.bench_fidelity import PRESET, Job
from capo.lab.bench_fidelity_report import in_words, write
from capo.lab.sources import load_config
from capo.policies import recipes

SMALLER: dict[str, Any] = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "eval_problems": 4}
SMALLER |= {"eval_k": 2, "layers": 1, "hidden_size": 16, "intermediate_size": 16, "heads": 2}


def test_the_embedded_policy_is_the_presets_own() -> None:
    config = load_config(PRESET, Job(3, 24, 1e-4, 5).overrides())
    assert (config.policy.path, config.task.name) == ("embedded:sums", "sums")
    assert (config.run.seed, config.steps, config.training.schedule) == (3, 5, "constant")


def test_a_recipes_policy_is_made_and_trained_on_its_own_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipes.recipe_settings
    monkeypatch.setattr(recipes, "recipe_settings", lambda name: whole(name) | SMALLER)
    job = Job(0, 24, 1e-4, 5, "spell_backward", tmp_path)
    config = load_config(PRESET, job.overrides())
    assert config.task.params["dataset"] == "spell_backward"
    assert (Path(config.policy.path) / "model.safetensors").is_file()
    with pytest.raises(InputError, match="did you mean 'aiw'"):
        Job(0, 24, 1e-4, 5, "aiww", tmp_path).overrides()


def table(completions: int, correlation: float, **more: Any) -> dict[str, Any]:
    spread = {"median": correlation, "min": correlation, "max": correlation}
    found = {
        "log_correlation": spread,
        "median_abs_log_ratio": 0.1,
        "worst_under_prediction": 1.5,
        "worst_over_prediction": 1.5,
        "token_spearman": spread,
        "cpu_seconds": 0.1,
    }
    predictors = {"deep (all)": found, "measured (8 completions)": found}
    head = {"completions": completions, "learning_rate": 1e-4, "seeds": 2, "steps": 9}
    return head | {"predictors": predictors} | more


def test_what_is_measured_again_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "fidelity.json"
    write(path, [table(24, 0.5), table(8, 0.6)])
    write(path, [table(24, 0.7, policy="aiw")])
    write(path, [table(24, 0.9)])
    document = json.loads(path.read_text())
    found = [
        (each.get("policy"), each["completions"], each["predictors"]["deep (all)"])
        for each in document["conditions"]
    ]
    assert [(*key, value["log_correlation"]["median"]) for *key, value in found] == [
        (None, 8, 0.6),
        ("aiw", 24, 0.7),
        (None, 24, 0.9),
    ]
    names = [goal["name"] for goal in document["goals"]]
    assert "token Spearman of deep, aiw, 24 completions a step, lr 0.0001" in names
    assert "--policies aiw --seeds 2 --steps 9 --completions 24" in document["command"]
    assert in_words(document["conditions"][1]).startswith("aiw, 24 completions a step")
