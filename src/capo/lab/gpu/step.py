"""What CAPO adds to an update step: TRL's own trainer and ours in turn on the same batch, in one process.

The update step is forward, loss, backward and optimizer; completions are given, so that generation is in
no figure. Trainers share one model and one optimizer and take turns; a ratio is of a turn to the turns of
plain GRPO before and after it.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch

from capo.lab.gpu.policy import Bench, Turn
from capo.lab.gpu.sizes import Policy
from capo.lab.gpu.timing import MEGABYTE, Record, release

PLAIN = "GRPO"
VARIANTS: dict[str, dict[str, Any]] = {
    "CAPO, simulated moments": {"selection": "capo", "trust_region": None},
    "CAPO, the optimizer's moments": {
        "selection": "capo",
        "trust_region": None,
        "moments": "optimizer",
    },
    "trust region, default (measured)": {"trust_region": "auto"},
    "trust region, head": {"trust_region": {"predictor": "head"}},
    "trust region, deep": {"trust_region": {"predictor": "deep"}},
    "GRPO again": {},
}


def run(shape: Policy, record: Record) -> None:
    """Cycle after cycle; what is known is written after each."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    bench = Bench(shape)
    record.add("policy", {"parameters": bench.parameters, **vars(shape), "tokens": shape.tokens})
    record.add("gradient checkpointing", True)
    turns: dict[str, Turn] = {PLAIN: Turn(bench.trainer(), bench.clock)}
    turns[PLAIN].take()  # the optimizer's state comes into being
    raw: list[dict[str, Any]] = []
    dead: set[str] = set()
    for cycle in range(shape.cycles):
        before = _take(turns[PLAIN])
        for name, settings in VARIANTS.items():
            if name in dead:
                continue
            try:
                if name not in turns:
                    turns[name] = Turn(bench.trainer(**settings), bench.clock)
                    turns[name].take()  # compiles
                now = _take(turns[name])
            except Exception as error:
                dead.add(name)
                turns.pop(name, None)
                record.fail(name, error)
                bench.optimizer.zero_grad(set_to_none=True)
                release()
                continue
            after = _take(turns[PLAIN])
            raw.append({"name": name, "cycle": cycle, "before": before, "now": now, "after": after})
            before = after
            record.add("raw", raw, quiet=True)
            record.add("steps", steps := summary(raw), quiet=True)
            print(f"  cycle {cycle}: {name}: {100 * steps[name]['overhead']:+.1f} %", flush=True)


def _take(turn: Turn) -> dict[str, Any]:
    release()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = dict(turn.take())
    found["peak_mb"] = torch.cuda.max_memory_allocated() / MEGABYTE if cuda else None
    return found


def summary(raw: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians, and the overhead over the turns of plain GRPO around each."""
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(turn["name"] for turn in raw):
        mine = [turn for turn in raw if turn["name"] == name]
        ratios = [
            statistics.median(t["now"]["step"])
            / statistics.fmean(statistics.median(t[side]["step"]) for side in ("before", "after"))
            for t in mine
        ]
        steps = [ms for t in mine for ms in t["now"]["step"]]
        plain = [ms for t in mine for side in ("before", "after") for ms in t[side]["step"]]
        base = statistics.median(plain)
        parts = {
            part: statistics.median(ms for t in mine for ms in t["now"].get(part, [])) / base
            for part in dict.fromkeys(key for t in mine for key in t["now"])
            if part not in ("step", "peak_mb")
        }
        out[name] = {
            "plain_ms": base,
            "step_ms": statistics.median(steps),
            "overhead": statistics.median(ratios) - 1.0,
            "overheads": [ratio - 1.0 for ratio in ratios],
            "steps": len(steps),
            "peak_mb": mine[-1]["now"]["peak_mb"],
            "plain_peak_mb": mine[-1]["after"]["peak_mb"],
            "parts_of_a_plain_step": parts,
        }
    return out
