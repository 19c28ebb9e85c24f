"""What CAPO adds to an update step: TRL's own trainer and ours in turn on the same batch, in one process.

The update step is forward, loss, backward and optimizer; completions are given, so that generation is in
no figure. Trainers share one model and one optimizer and take turns; a ratio is of a turn to the turns of
plain GRPO before and after it, and of two turns of plain GRPO that follow each other for the noise.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch

from capo.lab.gpu.policy import Bench, Turn
from capo.lab.gpu.report import PLAIN
from capo.lab.gpu.sizes import Policy
from capo.lab.gpu.timing import MEGABYTE, Record, release

VARIANTS: dict[str, dict[str, Any]] = {
    "CAPO, simulated moments": {"selection": "capo", "trust_region": None},
    "CAPO, the optimizer's moments": {
        "selection": "capo",
        "trust_region": None,
        "moments": "optimizer",
    },
    "CAPO, the optimizer's moments, step logged": {
        "selection": "capo",
        "trust_region": None,
        "moments": "optimizer",
        "logging_strategy": "steps",
        "logging_steps": 1,
    },
    "trust region, default (measured)": {"trust_region": "auto"},
    "trust region, head": {"trust_region": {"predictor": "head"}},
    "trust region, deep": {"trust_region": {"predictor": "deep"}},
}
AFTER = 2  # variants between two turns of plain GRPO


def run(shape: Policy, record: Record) -> None:
    """Cycle after cycle, as time allows; what is known is written after each turn."""
    started = time.monotonic()
    late = started + shape.seconds
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    bench = Bench(shape)
    record.add("policy", {"parameters": bench.parameters, **vars(shape), "tokens": shape.tokens})
    record.add("gradient checkpointing", True)
    turns: dict[str, Turn] = {PLAIN: Turn(bench.trainer(), bench.clock)}
    turns[PLAIN].take()  # the optimizer's state comes into being
    record.add("seconds until the first turn", time.monotonic() - started)
    raw: list[dict[str, Any]] = []
    dead: set[str] = set()

    def keep(name: str, cycle: int) -> None:
        raw.append(_take(name, turns[name], cycle))
        record.add("raw", raw, quiet=True)
        record.add("steps", steps := summary(raw), quiet=True)
        said = f"{steps[name]['step_ms']:.1f} ms, {100 * steps[name]['overhead']:+.2f} %"
        print(f"  [{time.monotonic() - started:5.1f} s] {cycle}: {name}: {said}", flush=True)

    for cycle in range(shape.cycles):
        for index, (name, settings) in enumerate(VARIANTS.items()):
            if time.monotonic() > late:
                break
            if index % AFTER == 0:
                keep(PLAIN, cycle)
            if name in dead:
                continue
            try:
                if name not in turns:
                    turns[name] = Turn(bench.trainer(**settings), bench.clock)
                    turns[name].take()  # compiles
                keep(name, cycle)
            except Exception as error:
                dead.add(name)
                turns.pop(name, None)
                record.fail(name, error)
                bench.optimizer.zero_grad(set_to_none=True)
                release()
        if raw and raw[-1]["name"] != PLAIN:
            keep(PLAIN, cycle)
        if time.monotonic() > late:
            break
    record.add(
        "left out for want of time", [n for n in VARIANTS if n not in turns and n not in dead]
    )


def _take(name: str, turn: Turn, cycle: int) -> dict[str, Any]:
    release()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"name": name, "cycle": cycle, "ms": turn.take()}
    if turn.trials:
        found["trials"] = turn.trials
    found["peak_mb"] = torch.cuda.max_memory_allocated() / MEGABYTE if cuda else None
    return found


def summary(raw: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians, and each variant's overhead over the turns of plain GRPO around it.

    Plain GRPO's own is what its turns differ by from the one before: the noise.

    Args:
        raw: turns in their order: ``name``, ``ms`` of the steps and of their parts, ``peak_mb``.
    """
    plain = [i for i, turn in enumerate(raw) if turn["name"] == PLAIN]
    level = {i: statistics.median(raw[i]["ms"]["step"]) for i in plain}
    base = statistics.median(ms for i in plain for ms in raw[i]["ms"]["step"])
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(turn["name"] for turn in raw):
        at = [i for i, turn in enumerate(raw) if turn["name"] == name]
        ratios = []
        for i in at:
            sides = [[j for j in plain if j < i][-1:], [j for j in plain if j > i][:1]]
            around = [level[j] for side in sides[: 1 if name == PLAIN else 2] for j in side]
            if around:
                ratios.append(statistics.median(raw[i]["ms"]["step"]) / statistics.fmean(around))
        parts = {
            part: statistics.median(ms for i in at for ms in raw[i]["ms"].get(part, [])) / base
            for part in dict.fromkeys(key for i in at for key in raw[i]["ms"])
            if part != "step"
        }
        steps = [ms for i in at for ms in raw[i]["ms"]["step"]]
        out[name] = {
            "step_ms": statistics.median(steps),
            "overhead": statistics.median(ratios) - 1.0 if ratios else 0.0,
            "overheads": [ratio - 1.0 for ratio in ratios],
            "steps": len(steps),
            "peak_mb": raw[at[-1]]["peak_mb"],
            "parts_of_a_plain_step": parts,
        }
    return out
