"""The plan's check as JSON, CSV and a page."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from capo.lab.provenance import collect_provenance
from capo.planning.architecture import architecture_of
from capo.planning.table import size
from capo.planning.work import Rates

if TYPE_CHECKING:
    from capo.lab.bench_plan import Compared

QUANTITIES = ("judging", "trial", "held", "ratio")
TITLES = {
    "judging": "tokens judged, most bytes",
    "trial": "trust region, most bytes",
    "held": "held",
    "ratio": "CAPO update / plain update",
}


def error(pair: tuple[float, float]) -> float:
    """Predicted / measured − 1."""
    return pair[0] / pair[1] - 1.0


def _pair(name: str, pair: tuple[float, float]) -> str:
    if name == "ratio":
        return f"{pair[0]:.2f} / {pair[1]:.2f} ({error(pair):+.0%})"
    return f"{size(pair[0])} / {size(pair[1])} ({error(pair):+.0%})"


def table(found: list[Compared]) -> str:
    """Predicted / measured (error), a row a size."""
    head = ["size", "parameters", *(TITLES[name] for name in QUANTITIES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in found:
        model = architecture_of(one.case.config)
        cells = [one.case.name, f"{model.parameters / 1e6:.1f} M"]
        cells += [_pair(name, getattr(one, name)) for name in QUANTITIES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worst(found: list[Compared], name: str) -> float:
    """The largest error of a quantity, as a share."""
    return max(abs(error(getattr(one, name))) for one in found)


def write(found: list[Compared], rates: Rates, output: Path) -> None:
    """Write ``plan.json``, ``plan.csv`` and ``README.md`` into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "rates": asdict(rates),
        "cases": [asdict(one) for one in found],
        "worst": {name: worst(found, name) for name in QUANTITIES},
        "provenance": collect_provenance(),
    }
    (output / "plan.json").write_text(json.dumps(record, indent=2) + "\n")
    with (output / "plan.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "quantity", "predicted", "measured", "error"])
        for one in found:
            for name in QUANTITIES:
                pair = getattr(one, name)
                writer.writerow([one.case.name, name, *pair, error(pair)])
    (output / "README.md").write_text(_page(found))


def _page(found: list[Compared]) -> str:
    errors = "; ".join(f"{TITLES[name]} {worst(found, name):.0%}" for name in QUANTITIES)
    return f"""# The plan against the real thing

Predicted by `capo plan`'s cost model / measured (error), from a real `CAPOTrainer` on random policies, one
process, float32, one thread; `capo bench plan --output results/plan` makes this page. Memory is what torch's
profiler sees allocated in the call; the ratio is of CPU time, completions and rewards left out, and the
model is given the machine's rates of matrix products and of memory.

{table(found)}

Largest errors: {errors}.

A policy that knows something shares rows of the head between tokens: fewer are then used than the plan
assumes, and the judgement takes less. No job on several devices was measured in time; what they send is
counted from the code, and by `tests/planning/test_two_devices.py` on two processes.
"""
