"""How well each predictor foresees the policy shift of real steps.

    capo bench fidelity --output results/trust_region/fidelity.json
    capo bench fidelity --policies sums_gemma2 aiw --output results/policies/fidelity.json

Plain GRPO trains the embedded policy, or those of recipes on their own tasks; nothing is scaled. Before
each step every predictor says what the step will do, on all of the batch's completions; the truth is the
exact KL between the policies before and after, on the same tokens. Reported: the token-level Spearman
correlation (the paper's Table 5), and over the steps of a run the correlation of the logarithms of the
batch means, the median of |log ratio| and the worst under-prediction.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo.lab.options import at_least_one
from capo.lab.provenance import collect_provenance

if TYPE_CHECKING:
    from torch import Tensor

    from capo.core.trust_region import Divergence, Probe
    from capo.integrations._trl_batch import StepBatch
    from capo.integrations._trl_sample import Sample

PRESET = "small-aggressive"
GENERATIONS = 8  # of a prompt, in the preset
SUBSETS = (8, 16, 24)  # completions, drawn as the trust region draws them
EMBEDDED = "sums"  # the recipe of the embedded policy
FEW = 64  # problems of an evaluation, which nothing here is read from
FLOOR = 1e-9
"""Nats a token; a step of less (the first of a warm-up) is no step."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        seed, completions, steps: of the run; completions of a step.
        learning_rate: constant: nothing but the steps' own curvature makes their shifts differ.
        policy: the recipe, whose task it is trained on.
        runs: where the policies of recipes lie.
    """

    seed: int
    completions: int
    learning_rate: float
    steps: int
    policy: str = EMBEDDED
    runs: Path = Path()

    def overrides(self) -> list[str]:
        """Of the preset."""
        return [
            f"run.seed={self.seed}",
            "run.threads=1",
            f"training.learning_rate={self.learning_rate}",
            f"training.completions_per_step={self.completions}",
            f"training.micro_batch={min(self.completions, 96)}",
            'training.schedule="constant"',
            "training.warmup_ratio=0.0",
            f"training.steps={self.steps}",
            f"training.save_every={self.steps}",
            f"eval.every_completions={self.steps * self.completions}",
            "records.tokens=false",
            "capo.watch=true",
            *self._of_recipe(),
        ]

    def _of_recipe(self) -> list[str]:
        from capo.lab.study.jobs import overrides_of
        from capo.lab.sweep.execute import pretrained
        from capo.lab.sweep.grid import Condition
        from capo.policies.recipes import recipe_settings

        settings = Condition(name="recipe", recipe=self.policy).settings()
        if settings:
            settings["policy.path"] = str(pretrained(recipe_settings(self.policy), self.runs))
            settings["eval.problems"] = FEW
        return list(overrides_of(settings))


def measure_run(job: Job) -> list[dict[str, Any]]:
    """Train once and compare the predictors at every step.

    Returns:
        one dict a step: ``truth`` and, by predictor, ``batch`` (nats a token), ``token`` (Spearman) and
        ``seconds``.
    """
    import tempfile

    from capo.lab.run import train
    from capo.lab.sources import load_config

    config = load_config(PRESET, job.overrides())
    with tempfile.TemporaryDirectory() as directory, comparing() as rows:
        train(config, Path(directory) / "run")
    run = {
        "seed": job.seed,
        "completions": job.completions,
        "learning_rate": job.learning_rate,
        "policy": job.policy,
    }
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
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[EMBEDDED],
        metavar="NAME",
        help="recipes, each on its task",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"), help="where policies lie")
    parser.add_argument("--output", type=Path, help="JSON file; measured anew is what is replaced")
    options = parser.parse_args(arguments)
    at_least_one(options, "seeds", "jobs")
    from capo.lab.bench_fidelity_report import in_words, write

    for policy in options.policies:
        tables = measured(policy, options)
        if options.output:
            write(options.output, tables)
        for table in tables:
            print(in_words(table))


def measured(policy: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every batch size and learning rate with this policy."""
    conditions = list(itertools.product(options.completions, options.learning_rates))
    jobs = [
        Job(seed, completions, lr, options.steps, policy, options.runs)
        for completions, lr in conditions
        for seed in range(options.seeds)
    ]
    jobs[0].overrides()  # the policy is made before the processes ask for it
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(jobs))) as pool:
        rows = [row for run in pool.map(measure_run, jobs, chunksize=1) for row in run]
    return [
        {
            **({} if policy == EMBEDDED else {"policy": policy}),
            "completions": completions,
            "learning_rate": lr,
            "seeds": options.seeds,
            "steps": options.steps,
            "provenance": collect_provenance(),
            "predictors": summarise(
                [r for r in rows if (r["completions"], r["learning_rate"]) == (completions, lr)]
            ),
        }
        for completions, lr in conditions
    ]


if __name__ == "__main__":
    main()
