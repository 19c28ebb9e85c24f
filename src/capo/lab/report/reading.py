"""Run directories in, one `Run` each out; everything a crash can leave behind is survivable."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capo.core.errors import InputError
from capo.lab.divergence import has_diverged
from capo.lab.rundir import RunDirectory

EVAL_COLUMNS = ("step", "completions", "seconds", "accuracy", "problems", "stderr")
POSITION_COLUMNS = ("step", "completions", "seconds")
MEASURED = "capo/trust/measured_policy_shift"
LATE = "capo/trust/last_measured_policy_shift"


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        name: ``run.name`` of the config, or the directory's name.
        config, provenance, status: the JSON files as written (``{}`` where one is missing).
        metrics: one row per optimizer step, sorted by step; floats, NaN where a value is missing
            or not finite. Always has the columns ``step``, ``completions``, ``seconds``.
        evals: one row per evaluation, columns `EVAL_COLUMNS`; accuracy is never NaN.
        notes: sentences about what is missing or odd, for the reader of the report.
        diverged: the run ended because nothing can be sampled from its policy any more.
    """

    path: Path
    name: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    status: dict[str, Any]
    metrics: pd.DataFrame
    evals: pd.DataFrame
    notes: tuple[str, ...]
    diverged: bool = False

    @property
    def state(self) -> str | None:
        """As its status says, or that it diverged; None where it says nothing."""
        return "diverged" if self.diverged else self.status.get("state")

    @property
    def over(self) -> bool:
        """Whether nothing will change its accuracy any more."""
        return self.state in ("diverged", "finished")

    @cached_property
    def curve(self) -> pd.DataFrame:
        """The evaluations, and accuracy 0 where the policy diverged."""
        if not self.diverged:
            return self.evals
        batch = _number(self.setting("training.completions_per_step"))
        fell = {"accuracy": 0.0, "stderr": 0.0}
        # What broke the policy may not be logged: it was the next batch after the last evaluation at least.
        for key, least in (("step", 1.0), ("completions", batch if math.isfinite(batch) else 1.0)):
            fell[key] = max([*self.metrics[key], *(self.evals[key] + least), least])
        row = pd.DataFrame([fell], columns=list(EVAL_COLUMNS), dtype=float)
        return pd.concat([self.evals, row], ignore_index=True) if len(self.evals) else row

    def setting(self, key: str, default: Any = None) -> Any:
        """The config value at a dotted ``key``, or ``default``."""
        return lookup(self.config, key, default)


def lookup(tree: Any, key: str, default: Any = None) -> Any:
    """The value at a dotted ``key`` of nested dicts, or ``default`` where a level is missing."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run directory once, in the order given.

    Raises:
        InputError: no path, or a path that is no run directory.
    """
    if not paths:
        raise InputError("runs", "give at least one run directory.")
    unique: dict[Path, Path] = {}
    for path in map(Path, paths):
        unique.setdefault(path.resolve(), path)
    return [read_run(path) for path in unique.values()]


def read_run(path: Path) -> Run:
    """Read one run directory, finished or not.

    Raises:
        InputError: ``path`` has no readable ``config.json``.
    """
    if not path.is_dir():
        raise InputError("runs", f"{path} is not a directory; give a directory made by capo train.")
    if not (path / "config.json").is_file():
        inside = sorted(child.parent.name for child in path.glob("*/config.json"))
        hint = f" It holds runs, though: {', '.join(inside[:5])}." if inside else ""
        raise InputError(
            "runs", f"{path} is no run directory: it must hold the config.json of a run.{hint}"
        )
    config = _read_json(path / "config.json")
    if config is None:
        raise InputError("runs", f"{path}/config.json must be a JSON object.")
    notes: list[str] = []
    metrics = _metrics(path, config, notes)
    evals = _evals(path, config, notes)
    status = _read_json(path / "status.json") or {}
    diverged = has_diverged(RunDirectory(path), status)
    notes[:0] = _state_notes(status, diverged)
    name = lookup(config, "run.name") or path.resolve().name
    provenance = _read_json(path / "provenance.json") or {}
    return Run(path, str(name), config, provenance, status, metrics, evals, tuple(notes), diverged)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; what a killed writer tore is left out and noted."""
    if not path.is_file():
        notes.append(f"There is no {path.name}.")
        return []
    rows, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            torn += 1
    if torn:
        notes.append(f"{path.name}: {torn} unreadable line{'s' * (torn > 1)} left out.")
    if not rows:
        notes.append(f"{path.name} is empty.")
    return rows


def _number(value: Any) -> float:
    """A JSON value as a float; what is no number (or a bool) is NaN. Infinities stay, for now."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _frame(rows: list[dict[str, Any]], config: dict[str, Any], required: Sequence[str]) -> Any:
    """Rows as a float table with the position columns; one row a step, sorted."""
    table = pd.DataFrame([{k: _number(v) for k, v in row.items()} for row in rows], dtype=float)
    for column in required:
        if column not in table:
            table[column] = np.nan
    per_step = _number(lookup(config, "training.completions_per_step"))
    table["completions"] = table["completions"].fillna(table["step"] * per_step)
    table = table[np.isfinite(table["step"]) & np.isfinite(table["completions"])]
    return table.drop_duplicates("step", keep="last").sort_values("step").reset_index(drop=True)


def _metrics(path: Path, config: dict[str, Any], notes: list[str]) -> Any:
    rows = _read_lines(path / "metrics.jsonl", notes)
    table = _frame(rows, config, POSITION_COLUMNS)
    # A written NaN or infinity is news (a missing key is not): remember it before it is dropped.
    seen: dict[str, list[int]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                step = _number(row.get("step"))
                seen.setdefault(key, []).append(int(step) if math.isfinite(step) else -1)
    for key, steps in seen.items():
        more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
        listed = ", ".join(str(step) for step in steps[:5])
        notes.append(f"{key} was not finite at step{'s' * (len(steps) > 1)} {listed}{more}.")
    return _late(table.replace([np.inf, -np.inf], np.nan))


def _late(table: Any) -> Any:
    """Where completions are used again, a step is measured in the next one's pass: put it in place."""
    if LATE not in table:
        return table
    shown = table[LATE].shift(-1).where(table["step"].diff(-1) == -1)
    return table.assign(**{MEASURED: table.get(MEASURED, shown).fillna(shown)})


def _evals(path: Path, config: dict[str, Any], notes: list[str]) -> Any:
    table = _frame(_read_lines(path / "evals.jsonl", notes), config, EVAL_COLUMNS)
    table = table.replace([np.inf, -np.inf], np.nan)
    known = table["accuracy"].notna()
    if not known.all():
        count = int((~known).sum())
        notes.append(f"evals.jsonl: {count} evaluation{'s' * (count > 1)} without an accuracy.")
    table = table[known].reset_index(drop=True)
    accuracy = table["accuracy"].clip(0, 1)
    binomial = (accuracy * (1 - accuracy) / table["problems"]) ** 0.5
    table["stderr"] = table["stderr"].fillna(binomial)
    if len(table) and table["step"].iloc[0] != 0:
        notes.append("The base policy was not evaluated (no step 0 in evals.jsonl).")
    return table[list(EVAL_COLUMNS)]


def _state_notes(status: dict[str, Any], diverged: bool) -> list[str]:
    state = status.get("state", "unknown")
    where = ""
    if status.get("step") is not None:
        where = f" at step {status['step']} of {status.get('steps', '?')}"
    if diverged:
        return [f"The policy diverged{where}: nothing can be sampled from it, which counts as 0."]
    if state == "finished":
        return []
    message = f": {status['message']}" if status.get("message") else ""
    if state == "unknown":
        return ["There is no status.json: whether the run ended is not known."]
    return [f"The run {'failed' if state == 'failed' else f'is {state}'}{where}{message}."]
