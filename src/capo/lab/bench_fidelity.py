"""How well each predictor foresees the policy shift of real steps.

    capo bench fidelity --output results/trust_region/fidelity.json

Plain GRPO trains the embedded policy, nothing is scaled. Before each step every predictor says what the
step will do, on all of the batch's completions; the truth is the exact KL between the policies before
and after, on the same tokens. Reported: the token-level Spearman correlation (the paper's Table 5), and
over the steps of a run the correlation of the logarithms of the batch means, the median of |log ratio|
and the worst under-prediction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.lab.provenance import collect_provenance

if TYPE_CHECKING:
    from torch import Tensor

    from capo.core.trust_region import Divergence, Probe
    from capo.integrations._trl_batch import StepBatch
    from capo.integrations._trl_sample import Sample

PRESET = "small-aggressive"
GENERATIONS = 8  # of a prompt, in the preset
SUBSETS = (8, 16, 24)  # completions, drawn as the trust region draws them
FLOOR = 1e-9
"""Nats a token; a step of less (the first of a warm-up) is no step."""


def measure_run(arguments: tuple[int, int, float, int]) -> list[dict[str, Any]]:
    """Train once and compare the predictors at every step.

    Args:
        arguments: seed, completions a step, learning rate (constant: nothing but the steps' own
            curvature makes their shifts differ), optimizer steps.

    Returns:
        one dict a step: ``truth`` and, by predictor, ``batch`` (nats a token), ``token`` (Spearman) and
        ``seconds``.
    """
    import tempfile

    from capo.lab.run import train
    from capo.lab.sources import load_config

    seed, completions, lr, steps = arguments
    config = load_config(
        PRESET,
        [
            f"run.seed={seed}",
            "run.threads=1",
            f"training.learning_rate={lr}",
            f"training.completions_per_step={completions}",
            f"training.micro_batch={min(completions, 96)}",
            'training.schedule="constant"',
            "training.warmup_ratio=0.0",
            f"training.steps={steps}",
            f"training.save_every={steps}",
            f"eval.every_completions={steps * completions}",
            "records.tokens=false",
            "capo.watch=true",
        ],
    )
    with tempfile.TemporaryDirectory() as directory, comparing() as rows:
        train(config, Path(directory) / "run")
    run = {"seed": seed, "completions": completions, "learning_rate": lr}
    return [{**run, "step": step, **row} for step, row in enumerate(rows, start=1)]


Compare = Callable[["Probe", "Sample", Any], dict[str, Any]]


@contextmanager
def comparing(how: Compare | None = None) -> Iterator[list[dict[str, Any]]]:
    """While this is open, a trainer's trust region only compares predictors.

    Args:
        how: called with the probe, the sample and a random generator before every step; returns the
            row of that step, with its ``truth``. None: all predictors of this module.
    """
    how = how or _compare
    from dataclasses import replace

    import torch

    from capo.core.trust_region import StepChoice
    from capo.integrations._trl_ledger import Pending
    from capo.integrations._trl_trust import StepControl

    rows: list[dict[str, Any]] = []
    collect, choose = StepControl.collect, StepControl._choose
    generator = torch.Generator().manual_seed(0)

    def everything(self: StepControl, *args: Any, **kwargs: Any) -> None:
        self.region = replace(self.region, sequences=None, policy_shift=None)
        collect(self, *args, **kwargs)

    def compare(self: StepControl, probe: Probe, batch: StepBatch, *_: Any) -> Any:
        rows.append(how(probe, batch.samples[0], generator))
        choice = StepChoice(1.0, rows[-1]["truth"], rows[-1]["truth"], 1, capped=False)
        return Pending(choice, 0.0)

    StepControl.collect, StepControl._choose = everything, compare  # type: ignore[method-assign,assignment]
    try:
        yield rows
    finally:
        StepControl.collect, StepControl._choose = collect, choose  # type: ignore[method-assign]


def _compare(probe: Probe, sample: Sample, generator: Any) -> dict[str, Any]:
    truth, seconds = _timed(lambda: probe.after(1.0))
    exact = probe.mean(truth).policy
    found: dict[str, dict[str, float]] = {"measured (all)": {"batch": exact, "seconds": seconds}}
    subsets = [size for size in SUBSETS if size < sample.mask.size(0)]
    for size in subsets:
        on_part = _on_subset(sample, truth, size, generator)
        found[f"measured ({size} completions)"] = {"batch": on_part}
    layers = len(_layers(probe))
    for depth in (0, 1, 2, "all"):
        name = {0: "head", "all": "deep (all)"}.get(depth, f"deep ({depth} of {layers})")
        divergence, seconds = _timed(lambda d=depth: probe.along(d))
        found[name] = {
            "batch": probe.mean(divergence).policy,
            "token": spearman(divergence.policy_shift, truth.policy_shift),
            "seconds": seconds,
        }
        if depth == "all":
            for size in subsets:
                on_part = _on_subset(sample, divergence, size, generator)
                found[f"deep ({size} completions)"] = {"batch": on_part}
    return {"truth": exact, "predictors": found}


def _layers(probe: Probe) -> Any:
    from torch import nn

    return max((m for m in probe.backbone.children() if isinstance(m, nn.ModuleList)), key=len)


def _timed(call: Any) -> tuple[Divergence, float]:
    start = time.process_time()
    return call(), time.process_time() - start


def _on_subset(sample: Sample, divergence: Divergence, size: int, generator: Any) -> float:
    """The mean that so many completions, drawn as the trust region draws them, would have given."""
    import torch

    from capo.integrations._trl_sample import spread

    rows, weight = spread(sample.prompt_ids, size, generator)
    lengths = sample.mask.sum(-1)
    owner = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    share = torch.zeros(lengths.numel()).index_put((rows,), weight)[owner]
    return float((divergence.policy_shift * share).sum() / share.sum())


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties get their mean rank."""
    import torch

    def ranks(x: Tensor) -> Tensor:
        values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        del values
        ends = counts.cumsum(0).double()
        middle: Tensor = ends - (counts.double() - 1) / 2
        return middle[inverse]

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def log_correlation(predicted: Sequence[float], truth: Sequence[float]) -> float:
    """Pearson correlation of the logarithms."""
    return statistics.correlation([math.log(p) for p in predicted], [math.log(t) for t in truth])


def calibrated(raw: Sequence[float], truth: Sequence[float]) -> list[float]:
    """The head's predictions times the ratio learned from the steps before, as in training.

    The first step is measured in training, since nothing is learned yet.
    """
    from capo.core.trust_region import Calibration

    calibration, out = Calibration(), []
    for prediction, real in zip(raw, truth, strict=True):
        factor = calibration.factor
        out.append(real if factor is None else factor * prediction)
        calibration.observe(prediction, real)
    return out


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By predictor: medians over runs with the smallest and the largest, and the worst step of all."""
    runs: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["truth"] > FLOOR:
            runs.setdefault((row["seed"], row["learning_rate"]), []).append(row)
    names = list(rows[0]["predictors"])
    table: dict[str, dict[str, Any]] = {}
    for name in [*names, "head (calibrated)"]:
        source = "head" if name == "head (calibrated)" else name
        correlations, ratios, tokens, seconds = [], [], [], []
        for run in runs.values():
            truth = [row["truth"] for row in run]
            said = [max(row["predictors"][source]["batch"], 1e-30) for row in run]
            if name == "head (calibrated)":
                said = calibrated(said, truth)
            correlations.append(log_correlation(said, truth))
            ratios += [math.log(p / t) for p, t in zip(said, truth, strict=True)]
            tokens += [r["predictors"][source].get("token", math.nan) for r in run]
            seconds += [r["predictors"][source].get("seconds", math.nan) for r in run]
        tokens = [t for t in tokens if math.isfinite(t)]
        seconds = [t for t in seconds if math.isfinite(t)]
        table[name] = {
            "log_correlation": _spread(correlations),
            "median_abs_log_ratio": statistics.median(map(abs, ratios)),
            "worst_under_prediction": math.exp(-min(ratios)),
            "worst_over_prediction": math.exp(max(ratios)),
            "token_spearman": _spread(tokens) if tokens else None,
            "cpu_seconds": statistics.median(seconds) if seconds else None,
        }
    return table


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``capo bench trust-region`` shows: title, rows, goals and notes.

    Args:
        conditions: dicts of completions, learning_rate and predictors (see `summarise`).
    """
    from capo.core.trust_region import auto_sequences

    rows, goals = [], []
    for each in conditions:
        where = f"{each['completions']} completions a step, lr {each['learning_rate']:g}"
        for name, found in each["predictors"].items():
            rows.append(_row(each, name, found))
        deep = each["predictors"]["deep (all)"]["token_spearman"]["median"]
        goals.append(_goal(f"token Spearman of deep, {where}", deep))
        size = auto_sequences(each["completions"] // GENERATIONS)
        default = each["predictors"][f"measured ({size} completions)"]["log_correlation"]["median"]
        goals.append(_goal(f"log-log correlation of the default predictor, {where}", default))
    notes = [
        "Over the natural steps of plain GRPO at a constant learning rate, nothing scaled: the truth is "
        "the exact mean KL over all completion tokens of the step's batch. Medians over runs "
        "[smallest, largest]; |log ratio|: median over all steps; worst: over all steps. The default "
        "predictor is `measured` on two completions of every prompt (24 of 96), on 8 at least (of 24); "
        "`measured (all)` is the truth itself.",
        "The paper's Table 5 gives 0.622 (token level) and 0.459 (batch level) for the last layer.",
    ]
    return {"title": "Fidelity of the predictors", "rows": rows, "goals": goals, "notes": notes}


def _row(condition: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    def span(key: str) -> str:
        values = found[key]
        if values is None:
            return ""
        return f"{values['median']:.3f} [{values['min']:.3f}, {values['max']:.3f}]"

    seconds = found["cpu_seconds"]
    return {
        "completions a step": condition["completions"],
        "learning rate": f"{condition['learning_rate']:g}",
        "predictor": name,
        "token Spearman": span("token_spearman"),
        "batch log-log": span("log_correlation"),
        "median |log ratio|": f"{found['median_abs_log_ratio']:.2f}",
        "worst under": f"{found['worst_under_prediction']:,.1f} ×",
        "worst over": f"{found['worst_over_prediction']:,.1f} ×",
        "CPU ms": "" if seconds is None else f"{1000 * seconds:.0f}",
    }


def _goal(name: str, value: float, goal: float = 0.95) -> dict[str, Any]:
    return {"name": name, "goal": f"≥ {goal}", "value": f"{value:.3f}", "reached": value >= goal}


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(
        prog="capo bench fidelity", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs at each learning rate")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--completions", type=int, nargs="+", default=[96, 24], help="of a step")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 4e-4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    conditions = list(itertools.product(options.completions, options.learning_rates))
    jobs = [(seed, *each, options.steps) for each in conditions for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(jobs))) as pool:
        rows = [row for run in pool.map(measure_run, jobs, chunksize=1) for row in run]
    tables = [
        {
            "completions": completions,
            "learning_rate": lr,
            "predictors": summarise(
                [r for r in rows if (r["completions"], r["learning_rate"]) == (completions, lr)]
            ),
        }
        for completions, lr in conditions
    ]
    document = {
        "command": f"capo bench fidelity --seeds {options.seeds} --steps {options.steps} "
        f"--completions {' '.join(map(str, options.completions))} "
        f"--learning-rates {' '.join(f'{lr:g}' for lr in options.learning_rates)}",
        "provenance": collect_provenance(),
        **report(tables),
        "conditions": tables,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for table in tables:
        print(
            f"{table['completions']} completions a step, learning rate {table['learning_rate']:g}"
        )
        for name, entry in table["predictors"].items():
            token = entry["token_spearman"]
            print(
                f"  {name:<26} log-log {entry['log_correlation']['median']:6.3f}"
                f"  |log ratio| {entry['median_abs_log_ratio']:5.2f}"
                f"  under {entry['worst_under_prediction']:9.2f}x"
                f"  Spearman {token['median'] if token else math.nan:6.3f}"
            )


if __name__ == "__main__":
    main()
