"""Theorem 5.1 on exact ground: ``python -m capo.lab.tabular --output results/theorem_5_1``.

Prints a table and writes ``summary.json``, ``by_step.csv``, ``by_kl.csv`` and the figure. The same
seed gives the same numbers. What they mean: ``docs/theorem.md``.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from capo.core.errors import InputError
from capo.lab.tabular_adversary import Search, worst_ratio
from capo.lab.tabular_bounds import episodic_constants, safe_logit_range
from capo.lab.tabular_study import (
    SETTINGS,
    Setting,
    rows_by_kl,
    rows_by_step,
    summarise,
    sweep,
    vacuous_horizons,
)

DISCOUNTS = (0.3, 0.5, 0.9, 0.99)
HORIZONS = (2, 8, 32)


def run_study(
    mdps: int,
    seed: int,
    search: Search | None = None,
    settings: tuple[Setting, ...] = SETTINGS,
) -> dict[str, Any]:
    """Everything the command writes, as plain data.

    Args:
        mdps: random MDPs per setting.
        seed: of everything; setting i uses ``seed + i``.
        search: effort of the search for the worst case.
        settings: which forms of the theorem.

    Returns:
        ``settings``, ``adversary``, ``vacuous`` (JSON) and ``by_step``, ``by_kl`` (CSV rows).

    Raises:
        InputError: ``mdps`` too small.
    """
    summaries, by_step, by_kl = [], [], []
    for index, setting in enumerate(settings):
        measured = sweep(setting, mdps, seed + index)
        summaries.append(summarise(measured))
        by_step += rows_by_step(measured)
        by_kl += rows_by_kl(measured)
    return {
        "settings": summaries,
        "adversary": _adversary(seed, search or Search()),
        "vacuous": vacuous_horizons(),
        "by_step": by_step,
        "by_kl": by_kl,
    }


def _adversary(seed: int, search: Search) -> list[dict[str, Any]]:
    """Worst case found per setting, beside what is proven."""
    ranges = torch.arange(2.0, 17.0)
    exact = worst_ratio(torch.tensor(DISCOUNTS), seed=seed, search=search)
    quadratic = worst_ratio(
        torch.tensor(DISCOUNTS).repeat_interleave(len(ranges)),
        quadratic=True,
        logit_ranges=ranges.repeat(len(DISCOUNTS)),
        seed=seed,
        search=search,
    ).view(len(DISCOUNTS), -1)
    rows: list[dict[str, Any]] = []
    for gamma, tightness, ratios in zip(DISCOUNTS, exact.tolist(), quadratic, strict=True):
        violating = ranges[ratios > 1]
        rows.append(
            {
                "setting": f"γ={gamma:g}",
                "tightness": tightness,
                "proven_over_paper": min(0.5, 0.5 * math.sqrt((1 - gamma) / gamma)),
                "quadratic_onset_logit_range": float(violating.min()) if len(violating) else None,
                "quadratic_safe_logit_range": safe_logit_range(discount=gamma),
            }
        )
    for horizon in HORIZONS:
        stepwise, trajectory = episodic_constants(horizon)
        found = worst_ratio(horizon=horizon, seed=seed, search=search)
        rows.append(
            {
                "setting": f"T={horizon}",
                "tightness": float(found),
                "proven_over_paper": min(1.0, trajectory / stepwise),
                "quadratic_onset_logit_range": None,  # searched in the discounted form only
                "quadratic_safe_logit_range": safe_logit_range(horizon=horizon),
            }
        )
    return rows


def _penalties() -> list[dict[str, Any]]:
    """Lines of the figure's third panel, ε = 1 and return in [0, 1]."""
    rows = []
    for row in vacuous_horizons():
        root = math.sqrt(row["mean_kl"])
        for exponent in range(2, 25):
            T = round(2 ** (exponent / 2))
            stepwise, trajectory = episodic_constants(T)
            for bound, factor in (
                ("Theorem 5.1", stepwise),
                ("trajectory (3)", trajectory),
                ("damage (8)", math.sqrt(T / 2)),
            ):
                rows.append(
                    {
                        "horizon": T,
                        "mean_kl": row["mean_kl"],
                        "bound": bound,
                        "penalty": factor * root,
                    }
                )
    return rows


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _print(study: dict[str, Any], console: Console) -> None:
    """Four tables: exact, quadratic, adversary, length."""
    exact = Table(title="Exact ω and mean KL (violations expected: 0)")
    for name in ("setting", "instances", "viol. C", "viol. proven C", "viol. damage (8)"):
        exact.add_column(name, justify="right")
    for name in ("min slack/ε", "tightness", "of proven C", "of (8)", "certified C", "max KL (4)"):
        exact.add_column(name, justify="right")
    quadratic = Table(title="Quadratic ω and m_F")
    for name in ("setting", "viol.", "rate", "onset R min", "p01", "p50", "onset δ min"):
        quadratic.add_column(name, justify="right")
    for name in ("proven safe R", "viol. corrected", "order", "error/bound", "max KL/m_F"):
        quadratic.add_column(name, justify="right")
    for row in study["settings"]:
        n = row["instances"]
        exact.add_row(
            row["setting"],
            str(n),
            str(row["violations_exact"]),
            str(row["violations_exact_proven_constant"]),
            str(row["violations_damage"]),
            f"{row['minimal_slack_over_epsilon']:.1e}",
            f"{row['tightness']:.3f}",
            f"{row['tightness_proven_constant']:.3f}",
            f"{row['tightness_damage']:.3f}",
            f"{row['certified_exact'] / n:.2%}",
            f"{row['certified_max_kl'] / n:.1%}",
        )
        onset = row["quadratic_onset_logit_range"] or {}
        quadratic.add_row(
            row["setting"],
            str(row["violations_quadratic"]),
            f"{row['violations_quadratic'] / n:.2%}",
            *(_cell(onset.get(key)) for key in ("min", "p01", "p50")),
            _cell((row["quadratic_onset_kl"] or {}).get("min")),
            f"{row['quadratic_safe_logit_range']:.2f}",
            str(row["violations_corrected"]),
            f"{row['remainder_order']:.2f}",
            f"{row['remainder_over_bound']:.3f}",
            f"{row['mean_kl_over_quadratic']:.3g}",
        )
    adversary = Table(title="Worst case found by gradient ascent")
    for name in ("setting", "tightness", "proven C / C", "onset R found", "proven safe R"):
        adversary.add_column(name, justify="right")
    for row in study["adversary"]:
        adversary.add_row(*(v if isinstance(v, str) else _cell(v) for v in row.values()))
    length = Table(title="γ = 1, ε = 1, reward in [0, 1]: shortest T with a penalty ≥ 1")
    for name in ("δ (nats/token)", "Theorem 5.1", "trajectory (3)", "damage (8)"):
        length.add_column(name, justify="right")
    length.add_column("Thm 5.1 at T=1024", justify="right")
    length.add_column("damage (8) at T=1024", justify="right")
    for row in study["vacuous"]:
        length.add_row(*(f"{value:.6g}" for value in row.values()))
    for table in (exact, quadratic, adversary, length):
        console.print(table)


def write_study(study: dict[str, Any], output: Path, command: dict[str, Any]) -> None:
    """Write the JSON, the CSVs and the figure into ``output``, which exists."""
    from capo.lab.tabular_figure import save_figure

    summary = {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        **{key: study[key] for key in ("settings", "adversary", "vacuous")},
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    for name in ("by_step", "by_kl"):
        frame = pd.DataFrame(study[name])
        frame.to_csv(output / f"{name}.csv", index=False, float_format="%.6g")
    save_figure(study["by_step"], study["vacuous"], _penalties(), output)


def main(
    output: Annotated[Path, typer.Option(help="Directory for the results.")],
    mdps: Annotated[int, typer.Option(help="Random MDPs per setting.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    search_iterations: Annotated[
        int, typer.Option(min=1, help="Ascent steps of the search for the worst case.")
    ] = 500,
    overwrite: Annotated[bool, typer.Option(help="Replace results that are there.")] = False,
) -> None:
    """Check Theorem 5.1 on random tabular MDPs where both of its sides are exact."""
    torch.set_num_threads(1)  # the tensors are small, and one thread gives the same sums everywhere
    started = time.perf_counter()
    try:
        if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not overwrite)):
            raise InputError("output", f"{output} is not an empty directory; pass --overwrite.")
        study = run_study(mdps, seed, Search(iterations=search_iterations))
        output.mkdir(parents=True, exist_ok=True)
        options = {"mdps": mdps, "seed": seed, "search_iterations": search_iterations}
        write_study(study, output, options)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    _print(study, Console(width=None if sys.stdout.isatty() else 150))
    typer.echo(f"{output}: written in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
