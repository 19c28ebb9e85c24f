"""Run directories with invented numbers: TEST DATA, for the tests of the report only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = ["<pad>", "<eos>", *"0123456789+-=", " ", "\n", "so ", "then ", "carry ", "<script>"]
HOSTILE = "<script>alert('run')</script>"


def config(name: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A resolved configuration; ``changes`` are dotted keys with ``__`` for the dot."""
    resolved: dict[str, Any] = {
        "run": {"seed": seed, "name": name},
        "policy": {"path": "embedded:sums"},
        "task": {"name": "sums", "params": {}},
        "algorithm": {"name": "grpo", "epsilon": 0.2, "beta": 0.0},
        "training": {"learning_rate": 1e-4, "completions_per_step": 96, "num_generations": 8},
        "capo": {"selection": None, "step_model": "adam", "top_k": 50},
        "eval": {"every_completions": 960, "problems": 512},
        "records": {"tokens": True},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        resolved[section][name] = value
    return resolved


def accuracies(shape: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Accuracy curves: ``learns`` rises from 0.45, ``collapses`` falls to 0, ``holds`` stays."""
    x = np.linspace(0, 1, count)
    curve = {
        "learns": 0.45 + 0.45 * (1 - np.exp(-3 * x)),
        "collapses": np.where(x < 0.15, 0.45, 0.0),
        "holds": 0.45 + 0 * x,
    }[shape]
    noise = np.concatenate([[0.0], rng.normal(0, 0.012, count - 1)])
    return np.clip(curve + noise * (curve > 0), 0, 1)


def write_run(
    path: Path,
    configuration: dict[str, Any] | None = None,
    *,
    shape: str = "learns",
    steps: int = 60,
    eval_every: int = 5,
    shifts: bool = True,
    trust: float | None = None,
    tokens: int = 0,
    state: str = "finished",
    vocabulary: list[str] | None = None,
) -> Path:
    """Write a complete run directory of invented numbers.

    ``tokens`` steps get token records; with ``trust`` the steps have a ledger and that budget.
    """
    configuration = configuration or config(path.name)
    path.mkdir(parents=True)
    seed = configuration["run"]["seed"]
    rng = np.random.default_rng([seed, *path.name.encode()])
    per_step = configuration["training"]["completions_per_step"]
    _dump(path / "config.json", configuration)
    _dump(path / "status.json", {"state": state, "step": steps, "steps": steps, "message": ""})
    _dump(
        path / "provenance.json",
        {
            "capo_version": "0.1.0",
            "python": "3.11.9",
            "packages": {"torch": "2.13.0", "trl": "1.16.0"},
            "git_commit": "0123456789abcdef0123456789abcdef01234567",
            "git_dirty": seed % 2 == 1,
            "hardware": {"cpu": "a test's CPU", "cores": 2, "memory_gb": 8, "gpu": None},
            "command": ["capo", "train", "small config.toml"],
            "started": "2026-01-02T03:04:05Z",
        },
    )
    curve = accuracies(shape, steps // eval_every + 1, rng)
    evals = [
        {
            "step": i * eval_every,
            "completions": i * eval_every * per_step,
            "seconds": 2.0 * i * eval_every,
            "accuracy": float(p),
            "problems": 512,
            "stderr": float((p * (1 - p) / 512) ** 0.5),
        }
        for i, p in enumerate(curve)
    ]
    rewards = np.interp(np.arange(1, steps + 1), np.arange(len(curve)) * eval_every, curve)
    metrics = [
        _metrics(step, per_step, float(rewards[step - 1]), shape, shifts, rng)
        for step in range(1, steps + 1)
    ]
    if trust is not None:
        for row in metrics:
            row.update(trust_entries(trust, np.random.default_rng([seed, row["step"]])))
    write_lines(path / "evals.jsonl", evals)
    write_lines(path / "metrics.jsonl", metrics)
    if tokens:
        (path / "tokens").mkdir()
        names = vocabulary or VOCABULARY
        _dump(path / "tokens" / "vocab.json", {str(i): text for i, text in enumerate(names)})
        for step in range(1, tokens + 1):
            write_tokens(path / "tokens" / f"step-{step:06d}.npz", len(names), rng)
    return path


def _metrics(
    step: int, per_step: int, reward: float, shape: str, shifts: bool, rng: np.random.Generator
) -> dict[str, Any]:
    wild = 8.0 if shape == "collapses" else 1.0
    row: dict[str, Any] = {
        "step": step,
        "completions": step * per_step,
        "seconds": 2.0 * step,
        "reward": float(np.clip(reward + rng.normal(0, 0.04), 0, 1)),
        "loss": float(rng.normal(0, 0.01)),
        "entropy": float(0.6 * np.exp(-step / 80) + rng.normal(0, 0.01)),
        "grad_norm": float(rng.lognormal(-1, 0.3) * wild),
        "learning_rate": float(1e-4 * np.cos(step / 60 * np.pi / 2)),
    }
    if not shifts:
        return row
    scale = wild * float(rng.lognormal(-9, 0.3))
    row |= {
        f"capo/policy_shift/{name}": scale * factor
        for name, factor in {"p50": 1e-5, "p90": 0.02, "p99": 1.0, "max": 30.0}.items()
    }
    row |= {
        f"capo/objective_shift/{name}": scale * factor
        for name, factor in {"p01": -3.0, "p50": 1e-3, "p99": 5.0}.items()
    }
    rates = {
        "policy_shift": 0.05 * np.exp(-step / 15),
        "objective_low": 0.01 * np.exp(-step / 30),
        "objective_high": 0.004,
    }
    row |= {f"capo/rejection_rate/{name}": float(rate) for name, rate in rates.items()}
    row |= {
        "capo/rejection_rate": float(sum(rates.values())),
        "capo/batch/policy_shift": scale / 50,
        "capo/batch/objective_shift": scale / 20,
        "capo/tokens": 1000,
    }
    return row


def trust_entries(budget: float, rng: np.random.Generator) -> dict[str, float]:
    """The ledger's entries of one step: predicted within the budget, measured about as predicted."""
    proposed = budget * float(rng.lognormal(2.0, 1.0))
    scale = min(1.0, 0.8 * (budget / proposed) ** 0.5)
    predicted = proposed * scale**2
    measured = predicted * float(rng.lognormal(0.0, 0.3))
    promised = float(rng.normal(0.004, 0.003))
    values = {
        "budget": budget,
        "scale": scale,
        "proposed_policy_shift": proposed,
        "predicted_policy_shift": predicted,
        "measured_policy_shift": measured,
        "predicted_objective_shift": promised,
        "observed_objective_shift": promised * float(rng.lognormal(0.0, 0.2)),
        "trials": 2.0,
        "omega": promised * 20,
        "penalty": 2**0.5 * 2.5 * 20 * 19 * measured**0.5,
        "met": float(measured <= budget),
    }
    return {f"capo/trust/{name}": value for name, value in values.items()}


def alarm(step: int, kind: str = "policy shift", text: str = "7", **changes: Any) -> dict[str, Any]:
    """A row of ``alarms.jsonl``."""
    moved = {
        "token": text,
        "prompt": "12+34?",
        "before": "12+34=4",
        "after": "6<|eos|>",
        "divergence": 3.5,
        "share": 0.41,
        "advantage": -1.0,
        "log_ratio": -4.0,
    }
    row = {"step": step, "completions": 96 * step, "seconds": 1.0, "kind": kind, "began": step}
    return {**row, "sentence": f"step {step} went too far", "moved": [moved], **changes}


def write_tokens(path: Path, vocabulary: int, rng: np.random.Generator) -> None:
    """Token records of one step: 12 completions of uneven length."""
    lengths = rng.integers(8, 60, size=12)
    count = int(lengths.sum())
    shift = rng.lognormal(-14, 2.5, count).astype(np.float32)
    np.savez_compressed(
        path,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=rng.integers(2, vocabulary, count).astype(np.int32),
        log_prob=(-rng.exponential(0.5, count)).astype(np.float16),
        entropy=rng.exponential(0.4, count).astype(np.float16),
        advantage=np.repeat(rng.normal(0, 1, 12), lengths).astype(np.float32),
        objective_shift=(rng.normal(0, 1, count) * shift).astype(np.float32),
        policy_shift=shift,
        weight=(shift < 1e-4).astype(np.float16),
        reason=(shift >= 1e-4).astype(np.int8),
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, as Python writes them (NaN included)."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
